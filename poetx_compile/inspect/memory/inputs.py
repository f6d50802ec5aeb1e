"""Example inputs on the meta device, and the loss: one step of training as a module."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poetx_compile._torch import pytree
from poetx_compile.errors import ConfigError, EstimateError

Loss = Callable[[Any], Tensor]

_TARGETS = ("labels", "targets")
"""Arguments of a forward that make it return its loss."""


class TrainingStep(nn.Module):
    """The loss of `model`, under autocast where a dtype for it is given."""

    def __init__(self, model: nn.Module, loss: Loss | None, autocast: torch.dtype | None):
        super().__init__()
        self.model, self.loss, self.autocast = model, loss, autocast

    def forward(self, *inputs: Any, **kwargs: Any) -> Tensor:
        region = (
            contextlib.nullcontext()
            if self.autocast is None
            else torch.autocast("cpu", self.autocast)
        )
        with region:
            output = self.model(*inputs, **kwargs)
            if self.loss is not None:
                return self.loss(output)
        return _loss_of(output, inputs, kwargs)


def _loss_of(output: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The loss an output holds; for logits of token ids their cross-entropy in fp32."""
    loss = getattr(output, "loss", None)
    if loss is None and isinstance(output, dict):
        loss = output.get("loss")
    if loss is not None:
        return loss
    if isinstance(output, tuple | list):
        output = output[0]
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"no loss and no tensor in an output of type {type(output).__name__}: give loss=..., a "
            "function of it"
        )
    if logits.dim() == 0:
        return logits
    tokens = next((x for x in (*inputs, *kwargs.values()) if _is_tokens(x, logits)), None)
    if tokens is not None:
        return F.cross_entropy(logits.flatten(0, -2).float(), tokens.flatten())
    return logits.float().square().mean()


def _is_tokens(value: Any, logits: Tensor) -> bool:
    integers = isinstance(value, Tensor) and value.dtype == torch.int64
    return integers and value.shape == logits.shape[:-1]


def make_inputs(
    model: nn.Module, batch_size: int, sequence_length: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for the forward of a model that reads token ids, or one of the Hugging Face kind.

    Token ids [batch_size, sequence_length], and the same for ``labels`` or ``targets`` where the
    forward takes them; images where a Hugging Face model says that they are its input.
    """
    names = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    targets = next((name for name in _TARGETS if name in names), None)
    kwargs: dict[str, Any] = {"use_cache": False} if "use_cache" in names else {}
    if main in ("input_ids", None):
        if targets is not None:
            kwargs[targets] = _ids(batch_size, sequence_length)
        return (_ids(batch_size, sequence_length),), kwargs
    if main == "pixel_values" and hasattr(config, "image_size"):
        sides = config.image_size
        height, width = (sides, sides) if isinstance(sides, int) else sides
        dtype = next(model.parameters()).dtype
        images = torch.empty(
            batch_size, config.num_channels, height, width, dtype=dtype, device="meta"
        )
        if targets is not None:
            kwargs[targets] = _ids(batch_size)
        return (images,), kwargs
    raise EstimateError(
        f"the input of {type(model).__name__} is {main!r}, whose shape is not known here: give "
        "example inputs, estimate(model, *inputs, **kwargs); tensors on the meta device will do"
    )


def _ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device="meta")


def on_meta(value: Any) -> Any:
    """Example inputs with their tensors on the meta device."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().to("meta"), value)


def tensors(*values: Any) -> list[Tensor]:
    """The tensors in arguments of a forward."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def check_sizes(batch_size: int | None, sequence_length: int | None, given: bool) -> None:
    """Raise `ConfigError` where sizes are out of range, or beside inputs that have sizes."""
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if value is None:
            continue
        if given:
            raise ConfigError(
                f"{name} = {value!r} beside example inputs: leave it out, they have sizes"
            )
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} = {value!r} is not allowed: use an int ≥ 1")
