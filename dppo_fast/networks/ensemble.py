"""Ensembles of equal networks, evaluated as one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state


class Ensemble(nn.Module):
    """M networks of one architecture, evaluated together: each one's ``member(*inputs)`` [...] -> [M, ...].

    The members keep the weights they come with, which therefore should differ. ``members`` has one's parameters, each
    stacked [M, ...]; these are what is trained and saved.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        stacked, buffers = stack_module_state(list(members))
        assert not buffers, "members with buffers"
        self.members = copy.deepcopy(members[0])
        for name, parameter in self.members.named_parameters():
            parameter.data = stacked[name].detach()

    def forward(self, *inputs: Any, members: Tensor | None = None) -> Tensor:
        """Of ``members`` [m], or of all: [m, ...]. Inputs, tensors or dicts of them, are the same for every member."""
        stacked: dict[str, Tensor] = dict(self.members.named_parameters())
        if members is not None:
            stacked = {name: value[members] for name, value in stacked.items()}
        outputs: Tensor = torch.vmap(lambda own: functional_call(self.members, own, inputs))(stacked)
        return outputs
