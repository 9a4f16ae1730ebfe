"""What a run leaves to be read: the report as data, and its texts and pages. Labels and cells of tables are here.

``record``           the report of a run as plain data, ``pruning.json``, ``run.yaml``, the settings that name a run
``rendering``        the report as people read it: summary, plan, tables
``verdict``          what a run's figures come to, in plain words
``card``             README.md of a pruned checkpoint
``page``             parts of a self-contained HTML page: figures, tables, charts
``quantiles``        how errors spread over tokens and sequences, as bands and as a picture
``plotting``         matplotlib, for the pictures that are files
``run_page``         ``report.html``
``comparison``       ``pyprune.compare``: reports side by side
``comparison_page``  the same as a page
``inspection``       ``pyprune.inspect``: zeros, N:M violations and coverage of any checkpoint

From outside: all of them, by module.
May import: ``execution`` and everything below it.
"""
