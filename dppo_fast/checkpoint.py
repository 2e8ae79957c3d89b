"""Checkpoints: one safetensors file with weights, state and configuration, written atomically and read without
unpickling.

Tensors stand under ``weights/<module>/<parameter>`` and ``state/<path>``; the file's metadata holds the rest of the
state, the configuration and a digest of everything. The reference's ``.pt`` files are read too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dppo_fast.runtime.files import atomic_write
from dppo_fast.types import UserError

FORMAT = "dppo_fast/1"
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes -> the dtype as which NumPy, which lacks some of PyTorch's, can see a tensor."""
NAME = re.compile(r"iteration_(\d+)\.safetensors")


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another kind; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """``weights``: module name -> state dict; ``deployed`` names the module to act with. ``state`` nests dicts and
    lists of tensors, numbers and strings; its ``interface`` is what acting takes: observation shapes, action dim,
    F and the normalisation. ``iteration`` is the next one to run.
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
        return replace(
            self, weights={self.deployed: self.weights[self.deployed]}, state={"interface": self.state["interface"]}
        )


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint files of a run directory, oldest first."""
    folder = run / "checkpoint"
    found = [(int(match[1]), file) for file in folder.glob("*") if (match := NAME.fullmatch(file.name))]
    return [file for _, file in sorted(found)]


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


def prune(run: Path, keep: int, keep_every: int) -> None:
    """Delete all but the newest ``keep`` checkpoints and those of every ``keep_every``-th iteration (0: none)."""
    for file in checkpoints(run)[:-keep]:
        match = NAME.fullmatch(file.name)
        if match and not (keep_every and int(match[1]) % keep_every == 0):
            file.unlink()


@dataclass(frozen=True)
class PolicyWeights:
    """What a checkpoint says of a policy: the base network ``actor``, the fine-tuned ``actor_ft`` or None,
    ``critic``, ``eta``.

    ``config`` is the run's and ``interface`` what surrounds the policy (see `Checkpoint`); the reference's files have
    neither.
    """

    source: str
    actor: Mapping[str, Tensor]
    actor_ft: Mapping[str, Tensor] | None = None
    critic: Mapping[str, Tensor] | None = None
    eta: Mapping[str, Tensor] | None = None
    config: Mapping[str, Any] | None = None
    interface: Mapping[str, Any] | None = None


def load_policy_weights(path: str | Path) -> PolicyWeights:
    """Read a run directory, one of our files, or the reference's ``.pt``; pre-trained ones give the averaged weights.

    Raises CheckpointError where the file is missing, damaged, would need unpickling, or holds no policy.
    """
    file = find(path)
    if file.suffix in (".pt", ".pth"):
        return _load_reference(file)
    checkpoint = Checkpoint.load(file)
    policy = checkpoint.weights[checkpoint.deployed]
    actor_ft = _below(policy, "actor_ft.")
    return PolicyWeights(
        str(file),
        _below(policy, "actor."),
        actor_ft or None,
        checkpoint.weights.get("critic"),
        _below(policy, "eta.") or None,
        checkpoint.config,
        checkpoint.state.get("interface"),
    )


def _load_reference(path: Path) -> PolicyWeights:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen unrelated types for damaged or pickled files
        raise CheckpointError(
            f"{path}: not readable as tensors alone ({(str(error) or repr(error)).splitlines()[0]}); it is damaged, or "
            "holds objects, which are never unpickled"
        ) from error
    weights = content.get("ema", content.get("model")) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise CheckpointError(f"{path}: holds no weights like the reference's {{epoch, model, ema}} or {{itr, model}}")
    if "ema" in content:
        kind = f"reference pre-training, epoch {content.get('epoch')}, averaged weights"
    else:
        kind = f"reference fine-tuning, iteration {content.get('itr')}"
    actor = _below(weights, "actor.") or _below(weights, "network.")
    if not actor:
        raise CheckpointError(f"{path}: holds neither 'network.*' nor 'actor.*' weights")
    return PolicyWeights(
        f"{path} ({kind})",
        actor,
        _below(weights, "actor_ft.") or None,
        _below(weights, "critic.") or None,
        _below(weights, "eta.") or None,
    )


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """``load_state_dict`` with strict names and shapes; a mismatch is a CheckpointError that names file and
    parameter.
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
        if not value.isfinite().all():
            raise CheckpointError(f"{source}: {name} holds NaN or Inf")
    module.load_state_dict(weights)


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}


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
