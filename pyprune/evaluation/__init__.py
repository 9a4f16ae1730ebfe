"""How good and how fast a model is; the same code measures dense and pruned models.

``single``           ``pyprune.evaluate``: perplexity of one model by itself
``windows``          the windows of text that perplexity is measured on
``perplexity``       losses of windows, and perplexity
``domains``          which texts a run measures, and the gap between the calibration's kind of text and others
``block_by_block``   models whose weights are streamed: ``Blockwise``; perplexity during a run: ``Meter``
``choices``          multiple-choice items from files, scored as lm-eval scores them
``last_word``        last words of passages, as LAMBADA asks for them
``task_runs``        ``pyprune eval --tasks``: files and lm-eval's tasks, two models side by side
``lm_eval_model``    a streamed model as lm-eval sees one
``tasks``            sentence vectors, STS-B, and linear heads for encoders
``glue``             GLUE's classification tasks by their own metrics
``squad``            exact match and F1 of answers found in a text
``latency``          ``pyprune.latency``: size, prefill and decoding speed of one model
``gain``             size, memory and speed of two checkpoints side by side: ``pyprune eval --latency``

From outside: all of them, by module.
May import: ``reporting`` and everything below it.
"""
