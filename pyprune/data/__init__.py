"""Text and token ids: from wherever they come to the sequences that a run calibrates on.

``given``            text and token ids given in memory, in the forms that people have them in
``texts``            where text and token ids come from: files, data sets, lists, tensors
``builtin``          texts that come with pyprune: for calibration without a source, and to measure on
``calibration``      the sequences to calibrate on and those held out: ``load``, ``CalibrationData``
``self_generated``   ``pyprune.generate``: sequences sampled from the dense model
``thin``             warnings about repeated, constant or padded calibration data

From outside: ``builtin``, ``calibration``, ``texts`` and ``self_generated``.
May import: ``model``, ``ops`` and the modules without a package.
"""
