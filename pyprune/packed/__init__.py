"""Checkpoints and models without their zeros: a bitmask and the other values, lossless, smaller and faster to decode.

``files``        ``pyprune.pack`` and ``pyprune.unpack``: a checkpoint folder packed, and back to the same bytes
``card``         the section of a model card that says how a packed checkpoint is loaded
``modules``      ``SparseLinear``: the linear layer that multiplies with a packed weight
``conversion``   ``pyprune.sparse`` and ``pyprune.dense``: a live model to packed layers and back
``loading``      ``pyprune.load``: any checkpoint as a live model, a packed one with packed layers

The layout is in ``ops.packed``, packed files are read by ``model.packed_shards``; docs/formats.md describes both.

From outside: all of them, by module.
May import: ``model`` and everything below it.
"""
