"""Benchmarks, run by hand from the root of the repository; every row names its hardware.

==============================  ====================================================================
``python -m benchmarks.layers``   one layer, forward + backward, against a trained `nn.Linear`
``python -m benchmarks.merged``   the same in the merged form, with its share of the step
``python -m benchmarks.pieces``   the kernels of the merged form, one op each
``python -m benchmarks.cayley``   packed skew parameters → rotations, and the gradient
``python -m benchmarks.permute``  a permutation of the columns of an activation
``python -m benchmarks.merge``    merge-then-reinitialise of one layer
``python -m benchmarks.step``     a training step of a whole model against dense AdamW
``python -m benchmarks.estimate`` `poetx_compile.estimate` against the memory a GPU measures
``python -m benchmarks.plot``     figures of the results of `layers`
``python -m benchmarks.memory``   large models on a capped GPU beside their rivals
``python -m benchmarks.quality``  losses of whole runs beside tuned rivals: plans, a queue, tables
==============================  ====================================================================

``torchrun --nproc-per-node 2 -m benchmarks.distributed`` compares DDP and FSDP2 with one process
and prints a table; `memory` and `quality` have commands of their own. Each of the others prints a
table and writes ``benchmarks/results/<name>-<gpu>.json``, a list of rows, after every row. No time
is taken of anything that has not passed its correctness gate in the same process.
"""
