"""Unstructured and N:M masks of one block's weights, and the layer-wise step that follows the choice.

``statistics``   Gram matrices and moments of the inputs of a block's layers; layers that read the same share one
``solvers``      mask and weights of one matrix: magnitude, Wanda, SparseGPT's sweep
``refit``        least-squares weights of one matrix on a fixed mask
``block``        both for all selected weights of a block, dealt out to the processes
``group_order``  in which order the groups of a block's layers are reached, recorded in one pass
``sequential``   one pass over a block in which each group is pruned when all tokens have arrived at it

From outside: ``block.gather`` and ``block.prune_block``, ``sequential.SequentialPass``, ``statistics.observe`` and
``statistics.Inputs``.
May import: ``evaluation`` and everything below it; today it needs ``execution``, ``model``, ``ops`` and the modules
without a package.
"""
