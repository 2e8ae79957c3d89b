"""PPO with the exact likelihood of a diffusion policy, that of its probability flow (Song et al. 2021, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass

from dppo_fast.algorithms.ppo import PPO, PPOConfig
from dppo_fast.policies.probability_flow import FlowPolicy
from dppo_fast.types import require_ranges


@dataclass(frozen=True)
class ExactPPOConfig(PPOConfig):
    """As PPO's, but for ``ent_coef``: the entropy of a flow has no closed form."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges(self, "algorithm", {"ent_coef": "[0, 0]"})


class ExactPPO(PPO):
    """PPO whose decisions are whole chunks that a flow made; the gradient passes through the ODE that scores them."""

    trains = FlowPolicy
    policy: FlowPolicy
    config: ExactPPOConfig
