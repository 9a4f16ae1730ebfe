"""What pyprune knows of Hugging Face models and their files: blocks, prunable weights, checkpoints.

``blocks``            the model as embeddings, blocks and prunable weights: ``ModelView``, ``WeightRef``
``recording``         what a model's own forward pass does with its blocks, learnt by running it
``arguments``         what blocks are given beside hidden states, and what of it belongs to the sequences
``routing``           how experts are stored and which layers route tokens to them
``expert_products``   which expert a product belongs to, and its tokens
``positions``         how many positions a model has
``names``             patterns that name weights (``targets``, ``ignore``)
``kinds``             which weights of a block are its attention and which its feed-forward part
``sparsities``        which of several sparsities by name counts for each weight
``sizes``             modules whose sizes their configuration cannot say
``checkpoint``        checkpoints found, loaded and written whole or not at all
``gguf_cache``        GGUF files, whose dequantised weights are kept for the next opening
``assembly``          the finished checkpoint, made of the blocks that a run has written
``shards``            safetensors files, read in pieces and written crash-safely
``packed_shards``     packed checkpoints, read as if they were dense
``skeleton``          a model from its configuration, without memory
``origin``            what a checkpoint holds beside the model, carried along unchanged
``architecture``      which class of transformers a checkpoint is a model of
``attributes``        what configurations, tokenizers and models call things: the one place for those names
``watching``          what the weights of a running block are multiplied with, fused experts included

From outside: all of them, by module.
May import: ``ops`` and the modules without a package; today it needs ``config``, ``ops.packed`` and the cache folder of
``ops``.
"""
