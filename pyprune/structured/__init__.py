"""Removal of whole heads and FFN neurons: find the groups, score them, choose, repair what is left, slice.

``units``          which units a run chooses from, at which sparsity; refuses what cannot be done
``preparation``    what is decided before the first pass: gradients, sizes, edits of the configuration
``block``          the work on one block: observe, score, choose, repair, slice
``groups``         which rows and columns of a block belong to one head or neuron, found by derivatives
``block_probe``    the derivatives that ``groups`` reads
``taps``           inputs of the consumers and sums their outputs land in, read from a running block
``moments``        second moments of these inputs, with tokens weighted and some held out
``criteria``       scores of groups, one function per criterion
``allocation``     how many groups each block keeps, and which
``liar``           what makes up for the removed groups: LIAR, bias compensation, mask tuning
``slicing``        physically smaller parameters and the attributes that go with them
``config_edits``   the sizes as edits of a Hugging Face configuration, or as a layout that only pyprune reads
``observation``    moments of the consumers' inputs, gathered over one pass through a block
``consumers``      consumers' products taken out of a pass, and put back when they are known
``stop_order``     where the passes stand still for which group, found by a pass of one sequence
``sequential``     one pass over a block in which units go when all tokens have arrived at their consumers

From outside: ``units``, ``preparation``, ``block.dense_block`` and ``block.propagated_block``, ``sequential``,
``stop_order``, ``slicing``, ``config_edits``.
May import: ``masks`` and everything below it; never ``reconstruction``, which stands beside it.
"""
