"""Random sequences of what users do to a model, played on three copies of it side by side.

- **compiled**: prepared (or adopted) and compiled by the backend;
- **eager**: prepared and run as it is;
- **plain**: the effective weights of the eager copy in a model that knows nothing of this package.

Each action (`actions`) does the same to the first two and says what it may change; after each, what
must always hold (`invariants`) is checked. Both copies are stepped with the gradients of the eager
one, once those of the compiled one have been found equal within rounding: so nothing drifts apart,
and what the copies have become is compared bit for bit.

A sequence prints as calls that can be played again (`python -m tests.play --replay "…"`); one that
fails is shrunk by leaving actions out. `python -m tests.play --seeds 0-99` plays the sequences
of these seeds. Those that failed once are in `tests/test_play.py` as they were found.
"""
