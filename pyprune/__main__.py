"""``python -m pyprune``: the command line, also under ``torchrun -m pyprune``."""

from pyprune.cli.commands import main

if __name__ == "__main__":
    main()
