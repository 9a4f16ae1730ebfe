"""What a run would take, before it is run: ``pyprune.plan`` and ``pyprune prune --plan``.

``plan``        every weight and whether it is pruned, memory, disk, seconds, and whether weights are streamed
``costs``       FLOPs, passes and bytes, counted from shapes alone
``rehearsal``   seconds, scaled from a real run over two blocks of the same architecture

From outside: ``plan.plan`` (it is ``pyprune.plan``).
May import: ``pipeline`` and everything below it, never ``cli``.
"""
