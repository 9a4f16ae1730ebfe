"""The command line ``pyprune``: it reads options, calls the library, and prints.

``commands``      the commands, and ``main``, which turns a ConfigError into one sentence and exit code 2
``studies``       ``pyprune study``
``watching``      ``pyprune history``, ``pyprune check``
``options``       options made from the configuration's fields, so that the two cannot drift apart
``help``          ``--help`` in sections, as plain text; an interrupted command ends in one sentence
``packing``       ``pyprune pack`` and ``pyprune unpack``
``environment``   ``pyprune env``: versions, devices, and the back-end that each op takes

Nothing imports from here but ``pyprune.__main__`` and the installed script ``pyprune``.
May import: every other package.
"""
