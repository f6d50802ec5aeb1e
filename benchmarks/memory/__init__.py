"""Peak memory and tokens/s of large models on one capped GPU, beside what people would use instead.

=====================================  =============================================================
``python -m benchmarks.memory plan``     the cases of plans, and which have a row
``python -m benchmarks.memory run``      do them, each in a process of its own; what is done is
                                         skipped, and running out of memory is a row
``python -m benchmarks.memory table``    rows as a Markdown table, the parts of the peak included
``python -m benchmarks.memory plot``     tokens/s against the peak
``python -m benchmarks.memory goals``    what was asked of 8B and 13B, beside the rows
``python -m benchmarks.memory curve``    the loss of a run of examples/pretrain.py
``python -m benchmarks.memory page``     the tables and figures of docs/memory.md, written anew
``python -m benchmarks.memory estimate`` `poetx_compile.estimate` beside the measured peaks
=====================================  =============================================================

A plan (`plans.PLANS`) is a list of cases, what matters most first. The model is that of
`examples/llama.py`, with random values and one random batch: memory and time do not depend on them.
"""
