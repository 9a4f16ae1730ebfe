"""What a run leaves to be read: the report as data, and its texts. Labels and cells of tables are here.

``record``       the report of a run as plain data, ``pruning.json``, ``run.yaml``, the settings that name a run
``rendering``    the report as people read it: summary, plan, tables, model card
``comparison``   ``pyprune.compare``: reports side by side
``inspection``   ``pyprune.inspect``: zeros, N:M violations and coverage of any checkpoint

From outside: all of them, by module.
May import: ``execution`` and everything below it.
"""
