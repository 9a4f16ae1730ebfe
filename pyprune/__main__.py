"""``python -m pyprune``: the command line, also under ``torchrun -m pyprune``."""

from pyprune.cli import main

if __name__ == "__main__":
    main()
