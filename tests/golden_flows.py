"""Policies and probes of the golden file of exact likelihoods."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dppo_fast.policies.probability_flow import FlowPolicy, FlowPolicyConfig
from tests.golden_files import Case, golden_cases
from tests.golden_models import base_weights, below, denoising_network, options, shapes_of, weights_of


def flow_cases(array: str) -> list[Any]:
    """The cases that have ``array``."""
    return golden_cases("08_exact_likelihood", lambda case: array in case)


def flow_policy(case: Case, reference: bool = True) -> FlowPolicy:
    """The case's policy, with the reference's likelihood unless told otherwise."""
    weights, shape = weights_of(case), case["in/samples"].shape[1:]
    base = base_weights(weights)
    config = options(FlowPolicyConfig, case.cfg)
    policy = FlowPolicy(denoising_network(shapes_of(base), *shape), config, *shape, reference=reference)
    policy.actor.load_state_dict(base)
    policy.actor_ft.load_state_dict(below(weights, "actor_ft."))
    return policy


def probes(case: Case, prefix: str) -> Tensor:
    """Those [B, P, Th, Da] that the reference drew."""
    draws = f"{prefix}/noise"
    noise = case.tensor(draws)[0] if draws in case else 2 * case.tensor(f"{draws}/000_randint").float() - 1
    samples = case["in/samples"]
    return noise.view(len(samples), -1, *samples.shape[1:])
