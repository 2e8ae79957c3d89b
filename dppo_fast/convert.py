"""python -m dppo_fast.convert source=<file or run> out=<file> [cfg=<name> key=value ...]: to and from the reference.

A .pt file of the reference becomes a .safetensors file, which also says what the policy is: cfg=<name> and its
overrides, as train takes them, describe the run that the weights are of (env.normalization=<npz> is what normalised its
observations). One of our files, which knows, or a run's latest becomes a .pt file.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from dppo_fast.cli import described_main
from dppo_fast.publish import writing
from dppo_fast.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dppo_fast.checkpoint import Checkpoint, ReferenceCheckpoint


@dataclass
class ConvertConfig:
    source: str = MISSING
    out: str = MISSING


DIFFUSION = {"network": "actor", "actor": "actor", "actor_ft": "actor_ft", "eta": "eta"}
LAYOUTS = {
    "diffusion": DIFFUSION,
    "flow": DIFFUSION,
    "gaussian": {"network": "actor_ft", "actor": "actor", "actor_ft": "actor_ft"},
    "gmm": {"network": "actor_ft", "actor_ft": "actor_ft"},
}
"""``policy.name`` -> the modules of the reference's policy, some of which are one module, by their names in ours.

Pre-trained it has ``network`` alone.
"""

POLICY = {module for layout in LAYOUTS.values() for module in layout}
"""What belongs to the policy in a file of the reference; the rest, such as ``critic``, are modules of their own."""


def convert(config: ConvertConfig, run: Mapping[str, Any] | None = None) -> None:
    """Convert one file; ``run`` is the configuration of the run that a file of the reference is of."""
    from dppo_fast.checkpoint import Checkpoint, find, load
    from dppo_fast.config import naming

    with naming("source"):
        source = find(config.source)
        found = load(source)
        print(found.policy_weights(source).describe())
    made: Checkpoint | ReferenceCheckpoint
    if isinstance(found, Checkpoint):
        if run is not None:
            raise UserError(f"cfg is for files of the reference; {source} holds its own: remove all but source and out")
        made, suffix = to_reference(found), ".pt"
    else:
        if run is None:
            raise UserError(
                "cfg=<name> is missing: the weights alone tell neither task nor activation nor denoising steps; "
                "python -m dppo_fast.train --list shows all names"
            )
        made, suffix = from_reference(found, {**run, "logdir": str(Path(config.out).parent)}), ".safetensors"
    if not config.out.endswith(suffix):
        raise UserError(f"out={config.out} must end in {suffix}, which is what becomes of {source.name}")
    with writing(config.out) as out:
        made.save(out)


def from_reference(reference: ReferenceCheckpoint, run: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint of the run that ``run`` configures with these weights, which `to_reference` gives back.

    Raises CheckpointError where they do not fit or some would be lost, UserError for a mistake in ``run``.
    """
    import torch

    from dppo_fast.algorithms import ALGORITHMS
    from dppo_fast.algorithms.bc import BehaviourCloning
    from dppo_fast.build import build_policy, env_config, interface_of, parse
    from dppo_fast.checkpoint import Checkpoint, CheckpointError, describe_dims, load_weights
    from dppo_fast.config import naming
    from dppo_fast.envs import make_env, normalization_of

    config = parse(run)
    pretrained, algorithm = reference.ema is not None, config.algorithm.get("name")
    if algorithm is not None and pretrained != (algorithm == "bc"):
        raise UserError(f"cfg has algorithm.name={algorithm}, but source is of {reference.kind}")
    settings = env_config(config, num_envs=1)
    env = make_env(settings, "cpu", config.seed)
    env.close()
    policy = build_policy(config, env.obs_shapes, env.action_dim, config.seed)
    deployed = BehaviourCloning.deployed if pretrained else "policy"
    weights = {"policy": _ours(reference.model, policy.state_dict())}
    if reference.ema is not None:
        weights[deployed] = _ours(reference.ema, policy.state_dict())
    for stage in weights.values():
        with naming(f"source does not fit {settings.id} ({describe_dims(env.obs_shapes, env.action_dim)})"):
            load_weights(policy, stage, reference.kind)
    for name, value in reference.model.items():
        module, _, rest = name.partition(".")
        if module not in POLICY:
            weights.setdefault(module, {})[rest] = value
    judges = [name for name in ALGORITHMS[algorithm][0].judges if name in weights] if algorithm else []
    state = {"interface": interface_of(policy, env.obs_shapes, normalization_of(env), judges)()}
    iteration = reference.number if pretrained else reference.number + 1
    checkpoint = Checkpoint(weights, state, run, iteration, deployed)
    back = to_reference(checkpoint)
    for own, kept in ((reference.model, back.model), (reference.ema or {}, back.ema or {})):
        if lost := [name for name, value in own.items() if name not in kept or not torch.equal(value, kept[name])]:
            raise CheckpointError(f"source holds {min(lost)}, which has no place in policy.name={config.policy.name}")
    return checkpoint


def to_reference(checkpoint: Checkpoint) -> ReferenceCheckpoint:
    """The same weights under the reference's names, without what only we keep.

    A published policy has no critic, and of pre-training nothing but the averaged weights, which stand for both.
    """
    from dppo_fast.algorithms.bc import BehaviourCloning
    from dppo_fast.checkpoint import ReferenceCheckpoint
    from dppo_fast.config import choose

    layout = choose(LAYOUTS, checkpoint.config["policy"]["name"], "policy.name")
    deployed = checkpoint.weights[checkpoint.deployed]
    if checkpoint.deployed == BehaviourCloning.deployed:
        network = {"network": layout["network"]}
        model = _theirs(checkpoint.weights.get("policy", deployed), network)
        return ReferenceCheckpoint(checkpoint.iteration, model, _theirs(deployed, network))
    model = _theirs(deployed, layout)
    for module, weights in checkpoint.weights.items():
        if module != checkpoint.deployed:
            model |= {f"{module}.{name}": value for name, value in weights.items()}
    return ReferenceCheckpoint(checkpoint.iteration - 1, model)


def _ours(model: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the policy that has parameters of these names; a module that the file lacks is its network."""
    modules = {name.partition(".")[0] for name in model}
    weights = {}
    for name in names:
        module, _, rest = name.partition(".")
        if (source := name if module in modules else f"network.{rest}") in model:
            weights[name] = model[source]
    return weights


def _theirs(policy: Mapping[str, Tensor], layout: Mapping[str, str]) -> dict[str, Tensor]:
    from dppo_fast.checkpoint import below

    return {f"{name}.{rest}": value for name, own in layout.items() for rest, value in below(policy, f"{own}.").items()}


def main(arguments: Sequence[str] | None = None) -> int:
    return described_main(ConvertConfig, convert, sys.argv[1:] if arguments is None else arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
