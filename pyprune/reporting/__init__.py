"""What a run leaves to be read: the report as data, and its texts and pages.

``record``            the report of a run as plain data, ``pruning.json``, ``run.yaml``, the settings that name a run
``words``             figures and rows of reports in words; labels and cells of every table
``console``           standard output: tables, JSON, perplexities
``summary``           the table after a run
``plan_table``        the plan before it
``verdict``           what a run's figures come to, in plain words
``card``              README.md of a pruned checkpoint
``page``              parts of a self-contained HTML page: figures, tables, charts
``quantiles``         how errors spread over tokens and sequences, as bands and as a picture
``plotting``          matplotlib, for the pictures that are files
``run_page``          ``report.html``
``comparison``        ``pyprune.compare``: reports side by side
``comparison_page``   the same as a page
``inspection``        ``pyprune.inspect``: zeros, N:M violations and coverage of any checkpoint
``inspection_table``  the same on a terminal

From outside: all of them, by module.
May import: ``execution`` and everything below it.
"""
