"""CUDA graphs: a function's kernels recorded once, then launched together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor

from dppo_fast.types import UserError

GraphMode: TypeAlias = Literal["auto", "on", "off"]

WARM_UPS = 3
"""Calls before a capture: libraries choose their algorithms and allocate their workspaces in them."""

log = logging.getLogger(__name__)
Key = TypeVar("Key", bound=Hashable)
Out = TypeVar("Out")


def use_graphs(mode: str, device: torch.device) -> bool:
    """Whether ``graphs=<mode>`` means CUDA graphs on ``device``: ``auto`` does where there is CUDA.

    Raises UserError for another mode, and for ``on`` without CUDA.
    """
    mode = {"True": "on", "False": "off"}.get(mode, mode)  # as which YAML reads on and off
    if mode not in get_args(GraphMode):
        raise UserError(f"graphs={mode} is unknown; choose {', '.join(get_args(GraphMode))}")
    if mode == "on" and device.type != "cuda":
        raise UserError(f"graphs=on: CUDA graphs need a CUDA device, and this run is on {device}; choose auto or off")
    return mode != "off" and device.type == "cuda"


@dataclass
class _Captured(Generic[Out]):
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    output: Out


class GraphedFunction(Generic[Key, Out]):
    """A function of named tensors that is captured in a CUDA graph, one for each key and set of shapes, and replayed.

    ``function(inputs, key)`` must run without the host looking at any tensor. Everything else that it reads or writes
    (parameters, optimizer state, buffers) is taken at the address it has when it is captured and has to stay there;
    whatever it takes from the host is frozen, and belongs in the key. ``idle`` names inputs to be filled with a value
    in warm-up calls, such as a flag that keeps them from changing any state.

    With ``enabled=False`` a call is a call of the function.
    """

    def __init__(
        self,
        function: Callable[[Mapping[str, Tensor], Key], Out],
        enabled: bool = False,
        idle: Mapping[str, float] | None = None,
    ) -> None:
        self.function = function
        self.enabled = enabled
        self.idle = idle or {}
        self.captured: dict[Hashable, _Captured[Out]] = {}

    def __call__(self, inputs: Mapping[str, Tensor], key: Key) -> Out:
        """The function's result; with graphs its tensors are overwritten by the next call with this key."""
        if not self.enabled:
            return self.function(inputs, key)
        signature = (key, *((name, value.shape, value.dtype) for name, value in sorted(inputs.items())))
        captured = self.captured.get(signature)
        if captured is None:
            captured = self.captured[signature] = self._capture(inputs, key)
            log.info("captured a CUDA graph of %s for %s", getattr(self.function, "__qualname__", "a function"), key)
        for name, value in inputs.items():
            captured.inputs[name].copy_(value)
        captured.graph.replay()
        return captured.output

    def forget(self) -> None:
        """Drop all graphs, because something they read has moved."""
        self.captured.clear()

    def _capture(self, inputs: Mapping[str, Tensor], key: Key) -> _Captured[Out]:
        static = {name: value.detach().clone() for name, value in inputs.items()}
        for name, value in self.idle.items():
            static[name].fill_(value)
        device = next(iter(static.values())).device
        with torch.cuda.device(device):
            random = torch.cuda.get_rng_state(device)  # of dropout
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self.function(static, key)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.set_rng_state(random, device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self.function(static, key)
        return _Captured(graph, static, output)
