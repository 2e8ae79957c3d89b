"""How much memory a run will need, told before it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def activation_bytes(function: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of ``function()``, its ``parameters`` left out."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(remember, lambda tensor: tensor):
        result = function()
    del result  # which kept the storages, and so their addresses, apart
    return sum(kept.values())


def describe_memory(sizes: Mapping[str, int]) -> str:
    """One line of what takes how many bytes."""
    return "memory: " + ", ".join(f"{name} {readable(size)}" for name, size in sizes.items())


def readable(size: float) -> str:
    """A number of bytes to three digits."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
