"""How a run is carried out: activations through blocks, weights in and out, several processes, safe progress.

``run``                what a run is (``Run``) and what it finds (``Findings``)
``executor``           activations through one block at a time: ``Executor``, ``Activations``
``activation_store``   where activations live: host memory or files, and their way to a GPU and back
``unopened``           a checkpoint before it is opened, and whether its weights are streamed: ``Unopened``
``weight_streaming``   blocks read from their files when it is their turn: ``Streamed``, ``open_checkpoint``
``residency``          weights on a GPU for a whole run, or there in time for their block: ``resident``, ``Arrivals``
``journal``            finished blocks on disk, from which ``--resume`` goes on; ``Interrupted``
``distributed``        several processes under ``torchrun``: shares, sums, broadcasts: ``World``
``replays``            what a GPU is given again and again, recorded and launched as a whole: ``Replays``
``relay``              forward passes that take turns and can stand still in the middle of a block: ``Pass``
``spilling``           memory that a pass which stands still does not need: ``Alive``, ``Spilled``
``lanes``              the passes of all batches through one block, in step: ``Lanes``
``progress``           what is done now and how long it takes, on a terminal and in a log: ``Progress``, ``Doing``
``error_probes``       sequences carried through dense and pruned blocks to measure the error between them
``heap``               memory that passes free stays for the next batch: ``kept_warm``
``cpu_forward``        products and attention of blocks on a CPU
``between``            norms, rotary embeddings and gated layers of blocks through ``ops``, recognised by what they do
``trust``              what is done where a guard finds an op's result wrong
``device``             names of devices and types turned into devices and types

From outside: all of them, by module.
May import: ``data``, ``model``, ``ops`` and the modules without a package.
"""
