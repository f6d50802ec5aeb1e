"""A snapshot of tensors: whether they are still the same, in the same memory, and unwritten."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from poetx_compile._torch import is_functorch_wrapped_tensor


class Snapshot:
    """Tensors as they are now. It refers to them: no other tensor can get their addresses."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = tuple(tensors)
        self._states = [_state(t) for t in tensors]

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether `tensors` are those of the snapshot, and none has been written since.

        Writes through ``tensor.data`` count no version and go unseen.
        """
        return len(tensors) == len(self.tensors) and all(
            before is tensor and state == _state(tensor)
            for before, state, tensor in zip(self.tensors, self._states, tensors, strict=True)
        )


def _state(tensor: Tensor) -> tuple[int | None, int | None]:
    """What changes when a tensor is written, or given other memory: its version and its address.

    Inference tensors have no version; those of fake modes, of other subclasses and of `torch.func`
    have no address.
    """
    version = None if tensor.is_inference() else tensor._version
    plain = type(tensor) in (Tensor, nn.Parameter)
    if not plain or is_functorch_wrapped_tensor(tensor):
        return version, None
    return version, tensor.data_ptr()
