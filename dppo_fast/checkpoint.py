"""Checkpoints: one safetensors file with weights, state and configuration, written atomically and read without
unpickling.

Tensors stand under ``weights/<module>/<parameter>`` and ``state/<path>``; the file's metadata holds the rest of the
state, the configuration and a digest of everything. The reference's ``.pt`` files are read too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dppo_fast.runtime.files import atomic_write
from dppo_fast.types import ObsShapes, UserError

FORMAT = "dppo_fast/1"
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes -> the dtype as which NumPy, which lacks some of PyTorch's, can see a tensor."""
NAME = re.compile(r"iteration_(\d+)\.safetensors")


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another kind; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """``weights``: module name -> state dict; ``deployed`` names the module to act with. ``state`` nests dicts and
    lists of tensors, numbers and strings; its ``interface`` is what acting takes: observation shapes, action dim, F,
    the normalisation, and which modules choose among the policy's proposals. ``iteration`` is the next one to run.
    """

    weights: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    config: Mapping[str, Any]
    iteration: int
    deployed: str = "policy"

    def save(self, path: Path) -> None:
        """Write the file; an interrupted write leaves the old one."""
        tensors: dict[str, Tensor] = {}
        for module, parameters in self.weights.items():
            for name, value in parameters.items():
                tensors[f"weights/{module}/{name}"] = value.detach().cpu().contiguous()
        outline = {
            "format": FORMAT,
            "iteration": self.iteration,
            "deployed": self.deployed,
            "config": self.config,
            "state": _pack(self.state, "state", tensors),
        }
        header = json.dumps(outline)
        # a tensor may appear twice (a base network shared by two modules); safetensors wants separate storage
        data = save({k: v.clone() for k, v in tensors.items()}, {"outline": header, "digest": _digest(header, tensors)})
        with atomic_write(path) as file:
            file.write(data)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a file that `save` wrote. Raises CheckpointError where it is missing, truncated, altered or foreign."""
        if not path.is_file():
            raise CheckpointError(f"{path}: no such checkpoint")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error
        header = metadata.get("outline", "")
        if metadata.get("digest") != _digest(header, tensors):
            raise CheckpointError(
                f"{path}: its contents do not match its digest; the file is corrupt or not a checkpoint"
            )
        outline = json.loads(header)
        if outline.get("format") != FORMAT:
            raise CheckpointError(f"{path}: format {outline.get('format')!r}, this version reads {FORMAT!r}")
        weights: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "weights":
                module, _, name = rest.partition("/")
                weights.setdefault(module, {})[name] = value
        state = _unpack(outline["state"], tensors)
        return cls(weights, state, outline["config"], outline["iteration"], outline["deployed"])

    def policy_only(self) -> Checkpoint:
        """The same policy without what only training needs."""
        interface = self.state["interface"]
        acting = (self.deployed, *interface.get("judges", ()))
        weights = {name: self.weights[name] for name in acting}
        return replace(self, weights=weights, state={"interface": interface})

    def policy_weights(self, path: Path) -> PolicyWeights:
        """What the file ``path``, which this is, says of the policy to act with."""
        policy, interface = self.weights[self.deployed], self.state.get("interface")
        judges = interface.get("judges", ()) if interface else ()
        return PolicyWeights(
            f"{path} ({self.deployed} after iteration {self.iteration})",
            below(policy, "actor."),
            below(policy, "actor_ft.") or None,
            self.weights.get("critic"),
            below(policy, "eta.") or None,
            self.config,
            interface,
            {name: self.weights[name] for name in judges},
        )


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """The reference's file: ``{itr, model}`` of fine-tuning, or ``{epoch, model, ema}`` of pre-training, where ``ema``
    are the averaged weights. ``number`` is the last iteration done, counted from 0, or the epochs done.
    """

    number: int
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None = None

    @property
    def kind(self) -> str:
        return f"fine-tuning, iteration {self.number}" if self.ema is None else f"pre-training, epoch {self.number}"

    def save(self, path: Path) -> None:
        """Write the file; an interrupted write leaves the old one."""
        content: dict[str, Any] = {"model": dict(self.model)}
        content |= {"itr": self.number} if self.ema is None else {"epoch": self.number, "ema": dict(self.ema)}
        with atomic_write(path) as file:
            torch.save(content, file)

    @classmethod
    def load(cls, path: Path) -> ReferenceCheckpoint:
        """Read tensors and numbers. Raises CheckpointError where the file is missing, damaged, would need unpickling,
        or holds something else.
        """
        if not path.is_file():
            raise CheckpointError(f"{path}: no such checkpoint")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen unrelated types for damaged or pickled files
            raise CheckpointError(
                f"{path}: not readable as tensors alone ({(str(error) or repr(error)).splitlines()[0]}); it is "
                "damaged, or holds objects, which are never unpickled"
            ) from error
        found = content if isinstance(content, dict) else {}
        keys = ("epoch", "model", "ema") if "ema" in found else ("itr", "model")
        if lacking := [key for key in keys if key not in found]:
            raise CheckpointError(
                f"{path}: holds no {' and no '.join(lacking)}, unlike the reference's {{epoch, model, ema}} and "
                "{itr, model}"
            )
        number, *weights = (found[key] for key in keys)
        if type(number) is not int or not all(map(_is_state_dict, weights)):
            raise CheckpointError(f"{path}: holds no number in {keys[0]} or no weights in {' or '.join(keys[1:])}")
        return cls(number, *weights)

    def policy_weights(self, path: Path) -> PolicyWeights:
        """What the file ``path``, which this is, says of the policy: of pre-training, the averaged one."""
        weights = self.model if self.ema is None else self.ema
        actor = below(weights, "actor.") or below(weights, "network.")
        if not actor:
            raise CheckpointError(f"{path}: holds neither 'network.*' nor 'actor.*' weights")
        return PolicyWeights(
            f"{path} (reference {self.kind}{'' if self.ema is None else ', averaged weights'})",
            actor,
            below(weights, "actor_ft.") or None,
            below(weights, "critic.") or None,
            below(weights, "eta.") or None,
        )


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint files of a run directory, oldest first."""
    return list(_numbered(run).values())


def _numbered(run: Path) -> dict[int, Path]:
    """Iteration -> checkpoint, oldest first."""
    found = [(int(match[1]), file) for file in (run / "checkpoint").glob("*") if (match := NAME.fullmatch(file.name))]
    return dict(sorted(found))


def checkpoint_path(run: Path, iteration: int) -> Path:
    """Where a run keeps the checkpoint from which ``iteration`` starts."""
    return run / "checkpoint" / f"iteration_{iteration:06d}.safetensors"


def find(path: str | Path, which: str = "latest") -> Path:
    """A checkpoint file, given itself or its run directory; ``which`` is latest or previous."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = checkpoints(path)
    back = 1 if which == "latest" else 2
    if len(found) < back:
        raise CheckpointError(f"{path}: holds {len(found)} checkpoints, the {which} one is not there")
    return found[-back]


def prune(run: Path, iteration: int, keep: int, keep_every: int) -> list[int]:
    """Delete all but the newest ``keep`` checkpoints and those of every ``keep_every``-th iteration (0: none); returns
    the iterations of those that stay. ``iteration`` is the newest: any after it are of a run that was not gone on with.
    """
    found = _numbered(run)
    own = [i for i in found if i <= iteration]
    stay = [i for i in own if i in own[-keep:] or (keep_every and i % keep_every == 0)]
    for i in found.keys() - stay:
        found[i].unlink()
    return stay


@dataclass(frozen=True)
class PolicyWeights:
    """What a checkpoint says of a policy: the base network ``actor``, the fine-tuned ``actor_ft`` or None,
    ``critic``, ``eta``.

    ``config`` is the run's and ``interface`` what surrounds the policy (see `Checkpoint`); the reference's files have
    neither, nor ``judges``, the modules that choose among the policy's proposals.
    """

    source: str
    actor: Mapping[str, Tensor]
    actor_ft: Mapping[str, Tensor] | None = None
    critic: Mapping[str, Tensor] | None = None
    eta: Mapping[str, Tensor] | None = None
    config: Mapping[str, Any] | None = None
    interface: Mapping[str, Any] | None = None
    judges: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def describe(self) -> str:
        """One line: where the weights are from, how many there are, and what the policy takes and gives."""
        own = {"actor": self.actor, "actor_ft": self.actor_ft, "critic": self.critic, "eta": self.eta}
        modules = {**own, **self.judges}
        sizes = [f"{name} {sum(map(Tensor.numel, module.values())):,}" for name, module in modules.items() if module]
        parts = [f"{self.source}: {', '.join(sizes)} weights"]
        if self.interface:
            kept = self.interface["normalization"]
            parts.append(f"F {self.interface['ft_steps']}")
            parts.append(describe_dims(self.interface["obs_shapes"], self.interface["action_dim"]))
            parts.append("no normalisation" if kept is None else f"normalised by {', '.join(sorted(kept))}")
        return "; ".join(parts)

    def require_dims(self, obs_shapes: ObsShapes, action_dim: int) -> None:
        """Raises CheckpointError where the policy is known to be of a task with other dims; observations that it does
        not look at may differ.
        """
        if self.interface is None:
            return
        seen = self.interface["obs_shapes"]
        own = describe_dims(seen, self.interface["action_dim"])
        wanted = describe_dims({name: shape for name, shape in obs_shapes.items() if name in seen}, action_dim)
        if own != wanted:
            raise CheckpointError(f"{self.source} is of another task: it has {own}, this one {wanted}")


def load_policy_weights(path: str | Path) -> PolicyWeights:
    """Read a run directory, one of our files, or the reference's ``.pt``; pre-trained ones give the averaged weights.

    Raises CheckpointError where the file is missing, damaged, would need unpickling, or holds no policy.
    """
    file = find(path)
    return load(file).policy_weights(file)


def load(file: Path) -> Checkpoint | ReferenceCheckpoint:
    """Read a file of ours, or of the reference's where it ends in .pt or .pth."""
    return ReferenceCheckpoint.load(file) if file.suffix in (".pt", ".pth") else Checkpoint.load(file)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """``load_state_dict`` with strict names and shapes; a mismatch is a CheckpointError that names file and
    parameter, as is a value that is not finite, unless it is of something made infinite: a mask, an eta at its bound.
    """
    own = module.state_dict()
    lacking, unexpected = own.keys() - weights.keys(), weights.keys() - own.keys()
    for names, what in ((lacking, "it lacks"), (unexpected, "it has an unexpected")):
        if names:
            raise CheckpointError(f"{source}: belongs to another network: {what} {min(names)}")
    for name, value in weights.items():
        if value.shape != own[name].shape:
            raise CheckpointError(
                f"{source}: {name} has shape {list(value.shape)}, this configuration needs {list(own[name].shape)}"
            )
        if not (value.isfinite() | own[name].isinf().to(value.device)).all():
            raise CheckpointError(f"{source}: {name} holds NaN or Inf")
    module.load_state_dict(weights)


def below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names start with ``prefix``, without it."""
    return {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def describe_dims(obs_shapes: Mapping[str, Sequence[int]], action_dim: int) -> str:
    """What tells tasks apart, in words."""
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(obs_shapes.items()))
    return f"observations {shapes} and {action_dim} action dims"


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON, its tensors moved to ``tensors`` under their path."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        while path in tensors:  # {"a/b": x} and {"a": {"b": y}} have the same path
            path += "'"
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _pack(item, f"{path}/{key}", tensors) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return {"list": [_pack(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    assert value is None or isinstance(value, (bool, int, float, str)), f"{path}: {type(value)}"
    return {"value": value}


def _unpack(node: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, value),) = node.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in value.items()}
    if kind == "list":
        return [_unpack(item, tensors) for item in value]
    return value


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for part in _bytes(tensors):
        digest.update(part)
    return digest.hexdigest()


def _bytes(tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    for key in sorted(tensors):
        tensor = tensors[key]
        yield f"{key}{tensor.dtype}{list(tensor.shape)}".encode()
        yield tensor.view(INTEGERS[tensor.element_size()]).numpy().tobytes()
