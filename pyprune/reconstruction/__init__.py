"""Training of pruned blocks against dense ones, masks fixed (Shin et al., arXiv 2406.15524).

``windows``          which windows of blocks are trained, on what and towards what (BR, GP, CR): ``WindowTrainer``
``training``         the training of one window: batches, learning rate, held-out error, ``train``
``trained_window``   a window under training: copies that compute, float32 weights, masks, optimiser

From outside: ``windows.WindowTrainer`` for masks; for ``pyprune refine`` ``training.train`` and
``trained_window.TrainedWindow``.
May import: ``masks`` and everything below it; never ``structured``, which stands beside it.
"""
