"""Whole runs: open the model, measure it, work on its blocks one by one, measure it again, report and write.

``prune``               ``pyprune.prune``, from what callers give to a configuration
``phases``              the phases of one run, from the configuration to the result
``several``             masks of several sparsities: one run each, on what is prepared once
``session``             what a run holds while it lasts, and what its journal keeps beside the blocks
``checks``              what is refused, or warned of, before a run begins its work
``sequences``           what a run reads: calibration sequences and evaluation windows
``refine``              ``pyprune.refine``: trains a live pruned model towards its dense one
``refine_request``      what a refinement is asked to do, and the ``refine.yaml`` that repeats it
``refine_checkpoint``   ``pyprune refine``: the same from one folder to another
``block_loop``          the one loop over blocks, and the protocol ``BlockWork`` of what a kind of run does in it
``mask_work``           ``BlockWork`` of unstructured and N:M masks
``structured_work``     ``BlockWork`` of removed heads and neurons
``refine_work``         ``BlockWork`` of training a model that is pruned already
``opening``             which runs can read their weights block by block
``passes``              how often a kind of run passes its calibration data through a block, and what it keeps of them
``sparsities``          sparsities by name, as a run of masks applies them
``shared``              what several runs on one model have in common, worked out by the first
``tracking``            scalars of each block for TensorBoard or any other tracker
``result``              ``PruneResult``: the pruned model, its report, and how both are written

From outside: ``prune.prune``, ``refine.refine``, ``refine_checkpoint.refine_checkpoint``, ``result.PruneResult``, and
``opening`` for the plan.
May import: ``reconstruction``, ``structured``, ``masks`` and everything below them.
"""
