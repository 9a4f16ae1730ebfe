"""Studies: one model pruned in many ways, the table and the trade-off curve, and how far is safe.

``grid``         the cells of a study: which runs its choices make, and which combinations are none
``claims``       who works on which cell, told by files in a folder that several workers share
``study``        ``pyprune.study``: works on the cells that are free, then writes what all of them found
``tables``       rows with mean and spread over seeds, as data, Markdown and CSV; the picture
``safety``       how far is safe: the limit, the knee, a recommended setting
``study_page``   the same as a page

From outside: ``study.study`` and ``study.print_study``.
May import: ``pipeline`` and everything below it.
"""
