"""How much memory training takes, without the memory: what `poetx_compile.estimate` is made of.

==============  ================================================================================
`source`        a module, a Hugging Face configuration or a path → a model on the meta device
`meta`          copies on the meta device, prepared ones too, and copies with fewer layers
`inputs`        example inputs, and the loss
`trace`         the forward and backward graphs that `torch.compile` would compile on a GPU
`attention`     attention as CUDA computes it
`liveness`      the bytes alive while such a graph runs
`step`          the memory of a step, with more layers than were traced
`fit`           how a peak grows with the batch, and what a GPU has room for
`rows`          the result, and how it is printed
`parts`         weights, the state of the optimiser, what its step needs
==============  ================================================================================

Nothing here allocates a tensor of the model's size or needs a GPU.
"""
