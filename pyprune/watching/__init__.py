"""Runs over time: what became of a model from one to the next, and whether a new one may replace an old one.

``history``        ``pyprune.history``: the runs below a folder in the order of their making; the picture
``history_page``   the same as a page
``check``          ``pyprune.check``: a pruned model against limits, for a model's continuous integration

From outside: ``history.history``, ``history.print_history``, ``history.picture``, ``history_page.history_page``,
``check.check`` and ``check.print_check``.
May import: ``pipeline`` and everything below it.
"""
