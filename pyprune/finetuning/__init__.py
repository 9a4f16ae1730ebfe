"""Fine-tuning of pruned models that keeps their zeros.

``masks``      ``pyprune.keep_sparse``: an optimizer's steps leave the zeros of a model's weights as they are
``adapters``   ``pyprune.merge_lora``: adapters of peft go into the weights without filling their zeros

From outside: both, by module.
May import: ``model`` and the modules without a package; ``peft`` comes with the extra ``finetune``.
"""
