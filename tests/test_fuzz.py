"""Damaged and hostile files: every loader gives what is there or its documented error, and runs nothing.

``DPPO_FAST_FUZZ=100000 python -m pytest tests/test_fuzz.py`` tries that many inputs, all loaders together.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dppo_fast.build import parse
from dppo_fast.checkpoint import Checkpoint, CheckpointError, ReferenceCheckpoint, load_policy_weights
from dppo_fast.cli import config_source
from dppo_fast.data.convert.hdf5 import opened, rows
from dppo_fast.data.trajectories import Trajectories
from dppo_fast.envs.normalize import MinMax
from dppo_fast.log import read_metrics
from dppo_fast.types import UserError
from tests.runs import demonstrations

INPUTS = int(os.environ.get("DPPO_FAST_FUZZ", "1600"))


def policy_file(folder: Path) -> Path:
    weights = {"policy": {"actor.weight": torch.arange(6.0)}, "critic": {"bias": torch.ones(2)}}
    interface = {"obs_shapes": {"state": [1, 3]}, "action_dim": 2, "ft_steps": 1, "normalization": None}
    path = folder / "own.safetensors"
    Checkpoint(weights, {"interface": interface, "numbers": [1, 2.5]}, {"seed": 1}, 3).save(path)
    return path


def reference_file(folder: Path) -> Path:
    ReferenceCheckpoint(3, {"network.weight": torch.ones(3)}, {"network.weight": torch.ones(3)}).save(folder / "own.pt")
    return folder / "own.pt"


def normalization_file(folder: Path) -> Path:
    MinMax(-np.ones(3), np.ones(3), -np.ones(2), np.ones(2)).save(folder / "normalization.npz")
    return folder / "normalization.npz"


def demonstrations_file(folder: Path) -> Path:
    return demonstrations(folder / "data.npz", 2, 1, (3, 2))


def hdf5_file(folder: Path) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "data.hdf5", "w") as file:
        file["observations"] = np.arange(12.0).reshape(4, 3)
    return folder / "data.hdf5"


def metrics_file(folder: Path) -> Path:
    (folder / "metrics.jsonl").write_text('{"iteration": 0, "loss": 1.5}\n{"iteration": 1, "loss": null}\n')
    return folder / "metrics.jsonl"


def config_file(folder: Path) -> Path:
    config = {
        "seed": 1,
        "logdir": "x",
        "algorithm": {"name": "dppo"},
        "policy": {"name": "diffusion", "network": {"name": "unet1d"}},
        "env": {"id": "a"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def load_hdf5(path: Path) -> None:
    with opened(path) as file:
        rows(file, "observations", dims=2)


def load_config(path: Path) -> None:
    """As `dppo_fast.cli` does; what Hydra would do between is left out."""
    config_source([f"cfg={path}"])
    node = OmegaConf.load(path)
    parse(node if OmegaConf.is_dict(node) else {})


LOADERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object], type[UserError]]] = {
    "checkpoint": (policy_file, load_policy_weights, CheckpointError),
    "reference": (reference_file, load_policy_weights, CheckpointError),
    "normalization": (normalization_file, lambda path: MinMax.load(path, 3, 2), UserError),
    "demonstrations": (demonstrations_file, Trajectories.load, UserError),
    "hdf5": (hdf5_file, load_hdf5, UserError),
    "metrics": (metrics_file, read_metrics, UserError),
    "config": (config_file, load_config, UserError),
}


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes flipped, set to limits, cut off, removed, doubled or moved, one to four times."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        if not data:
            break
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 17))
        match rng.integers(6):
            case 0:
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                data[at : at + length] = bytes([int(rng.choice([0, 0x7F, 0x80, 0xFF]))]) * length
            case 2:
                del data[at:]
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length]
            case 5:
                data[at : at + length] = rng.bytes(length)
    return bytes(data)


@pytest.mark.parametrize("name", LOADERS)
def test_damaged_bytes(name: str, tmp_path: Path) -> None:
    make, load, error = LOADERS[name]
    path = make(tmp_path)
    load(path)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for number in range(math.ceil(INPUTS / len(LOADERS))):
        damaged = mutated(content, rng)
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load(path)
        except error:
            refused += 1
        except BaseException as other:
            raise AssertionError(f"input {number}, {damaged!r}: {other!r}") from other
    assert refused


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def hostile(path: Path, trap: Touch) -> None:
    """Write the file that its ending promises, with ``trap`` wherever a loader could unpickle it."""
    if path.suffix == ".npz":
        array = np.array([trap], object)
        keys = ("states", "actions", "traj_lengths", "obs_min", "obs_max", "action_min", "action_max")
        np.savez(path, **dict.fromkeys(keys, array))
    elif path.suffix == ".pt":
        torch.save({"itr": 1, "model": {"network.weight": trap}}, path)
    elif path.suffix == ".yaml":
        path.write_text(f"seed: !!python/object/apply:os.system ['touch {trap.path}']\nalgorithm: {{name: dppo}}\n")
    else:
        path.write_bytes(pickle.dumps(trap) + b"\n")  # a last line without its end would not count


@pytest.mark.parametrize("name", LOADERS)
def test_nothing_in_a_file_is_run(name: str, tmp_path: Path) -> None:
    make, load, error = LOADERS[name]
    path, trap = make(tmp_path), Touch(tmp_path / "executed")
    hostile(path, trap)
    with pytest.raises(error):
        load(path)
    assert not trap.path.exists()


def test_the_trap_works(tmp_path: Path) -> None:
    hostile(tmp_path / "plain.pkl", Touch(tmp_path / "executed"))
    pickle.loads((tmp_path / "plain.pkl").read_bytes())
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_under_another_name_is_refused(legacy: bool, tmp_path: Path) -> None:
    trap, buffer = Touch(tmp_path / "executed"), io.BytesIO()
    torch.save(trap, buffer, _use_new_zipfile_serialization=not legacy)
    for name, (_, load, error) in LOADERS.items():
        path = tmp_path / ("own.pt" if name == "reference" else f"{name}.npz")
        if name in ("reference", "checkpoint", "normalization", "demonstrations"):
            path.write_bytes(buffer.getvalue())
            with pytest.raises(error):
                load(path)
    assert not trap.path.exists()


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.sampled_from(["seed", "algorithm", "name", "train", "n_steps", "env", "task", "policy", "network", "log"])
NODES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(), inner, max_size=4)
)


@settings(max_examples=max(40, INPUTS // 50))
@given(node=st.dictionaries(KEYS | st.text(), NODES, max_size=5))
def test_any_configuration(node: dict[str, Any]) -> None:
    with suppress(UserError):
        parse({"logdir": "x", "algorithm": {"name": "dppo"}} | node)
