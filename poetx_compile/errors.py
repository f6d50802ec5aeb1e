"""Errors of the package: one class a cause, each message says what to do.

Errors about the user's input derive from `ValueError`, errors about the state of a run from
`RuntimeError`, so that ``except ValueError`` and ``except RuntimeError`` keep their usual meaning.
"""

from __future__ import annotations


class POETXError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(POETXError, ValueError):
    """A field or an option has a value outside its range, or an unknown name."""


class NothingToTrainError(POETXError, ValueError):
    """No `nn.Linear` of the model is eligible, a `target_modules` pattern matched nothing, or a
    prepared weight is all zeros."""


class IncompatibleStateError(POETXError, ValueError, RuntimeError):
    """A state does not fit the prepared model (block size, groups), or only a part of it does.

    torch raises a `RuntimeError` where a module's state does not fit, a `ValueError` where an
    optimiser's does not: this is both.
    """


class CheckpointError(POETXError, RuntimeError):
    """A file is broken, or no checkpoint of `save_checkpoint`."""


class InterruptedMergeError(POETXError, RuntimeError):
    """A merge or a load was cut off by an exception: some layers have it behind them, some not."""


class DivergedError(POETXError, ArithmeticError):
    """Rotations are NaN or infinite: there is nothing to merge."""


class EffectiveWeightError(POETXError, RuntimeError):
    """An effective weight was written too late, is an argument of compiled code, or cannot go."""


class StaleOptimizerError(POETXError, RuntimeError):
    """The optimiser is a copy, or was built for other rotations than the model has now."""


class UnownedRotationsError(POETXError, RuntimeError):
    """Rotations train through no optimiser: none holds them, or none updates them."""


class AdoptionError(POETXError, RuntimeError):
    """A model that nobody prepared cannot be served as it is, or an optimiser cannot train it."""


class RewriteError(POETXError, RuntimeError):
    """Compiling a graph would change, or has changed, what receives a gradient."""


class EstimateError(POETXError, RuntimeError):
    """The memory of a model cannot be estimated: it cannot be traced without its tensors."""


class ParallelismError(POETXError, RuntimeError):
    """DDP, FSDP or tensor parallelism does not fit rotations, or came in the wrong order."""
