"""The benchmark suite: ``python -m benchmarks`` in a clone of the repository, with nothing else.

``rows`` is the one format of results, ``timing`` takes samples, ``ceilings`` measures what the machine can do at most;
``ops_group``, ``jobs`` and ``scaling`` hold what is measured, ``compare`` and ``tables`` what is made of results. The
studies beside them (``main_job``, ``reconstruction``, ``liar``, ``rates``, …) run for hours, most of them on data of
their own.
"""
