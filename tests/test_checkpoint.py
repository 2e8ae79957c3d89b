"""Checkpoint files: what is saved comes back, and nothing else is ever loaded."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from dppo_fast.checkpoint import (
    Checkpoint,
    CheckpointError,
    ReferenceCheckpoint,
    checkpoint_path,
    checkpoints,
    find,
    load_policy_weights,
    load_weights,
    prune,
)

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    tensor = (100 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    if draw(st.booleans()) and tensor.is_floating_point() and tensor.numel():
        tensor.flatten()[0] = draw(st.sampled_from([torch.nan, torch.inf, -0.0]))
    return tensor.mT if tensor.dim() > 1 and draw(st.booleans()) else tensor


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | tensors()
STATES = st.dictionaries(
    st.text(),
    st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)),
    max_size=4,
)


def same(a: Any, b: Any) -> bool:
    """Equality that looks into tensors and takes NaN for equal to itself."""
    if isinstance(a, Tensor):
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        bits = (tensor.contiguous().view(integers) for tensor in (a, b))
        return bool(a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits))
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a != b)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def example(**state: Any) -> Checkpoint:
    weights = {"policy": {"actor.weight": torch.arange(6.0).view(2, 3)}, "critic": {"bias": torch.ones(2)}}
    return Checkpoint(weights, {"interface": {}, **state}, {"seed": 1}, 7)


@settings(max_examples=100)
@given(state=STATES)
def test_any_state_comes_back(folder: Path, state: dict[str, Any]) -> None:
    path = folder / "state.safetensors"
    saved = example(**state)
    saved.save(path)
    loaded = Checkpoint.load(path)
    assert same(dict(saved.state), loaded.state)
    assert same(dict(saved.weights), loaded.weights)
    assert (loaded.config, loaded.iteration, loaded.deployed) == (saved.config, 7, "policy")


def test_lists_arrays_and_shared_tensors_come_back_as_plain_ones(tmp_path: Path) -> None:
    shared = torch.ones(3)
    example(a=(1, 2), b=np.arange(3.0), c=shared, d=shared, e=shared.expand(2, 3)).save(tmp_path / "file")
    state = Checkpoint.load(tmp_path / "file").state
    expected = {"a": [1, 2], "b": torch.arange(3, dtype=torch.float64), "c": shared, "d": shared, "e": torch.ones(2, 3)}
    assert same({key: state[key] for key in expected}, expected)


@pytest.fixture(scope="module")
def file(folder: Path) -> bytes:
    path = folder / "file.safetensors"
    example(generator=torch.Generator().get_state()[:64], numbers=[1.5, {"x": 2}]).save(path)
    return path.read_bytes()


def load_bytes(content: bytes | bytearray, folder: Path) -> Checkpoint:
    path = folder / "file.safetensors"
    path.write_bytes(content)
    return Checkpoint.load(path)


@settings(max_examples=1000)
@given(data=st.data())
def test_flipped_bits_never_load_as_something_else(file: bytes, folder: Path, data: st.DataObject) -> None:
    damaged = bytearray(file)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(file) - 1))] ^= data.draw(st.integers(1, 255))
    original = load_bytes(file, folder)
    with suppress(CheckpointError):
        assert same(vars(original), vars(load_bytes(damaged, folder))), "only white space may differ"


@given(data=st.data())
def test_a_truncated_file_is_refused(file: bytes, folder: Path, data: st.DataObject) -> None:
    end = data.draw(st.integers(0, len(file) - 1))
    with pytest.raises(CheckpointError, match=r"file\.safetensors: truncated or not a safetensors file"):
        load_bytes(file[:end], folder)


@pytest.mark.parametrize("content", [b"", b"\0" * 1000, b"PK\x03\x04", struct.pack("<Q", 2) + b"{}", os.urandom(500)])
def test_a_foreign_file_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"file\.safetensors: "):
        load_bytes(content, tmp_path)


def test_another_program_s_tensors_are_refused(tmp_path: Path) -> None:
    save_file({"weights/policy/actor.weight": torch.ones(2)}, tmp_path / "other.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"other\.safetensors: .* not a checkpoint"):
        Checkpoint.load(tmp_path / "other.safetensors")


def test_another_version_s_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("dppo_fast.checkpoint.FORMAT", "dppo_fast/0")
        example().save(tmp_path / "file")
    with pytest.raises(CheckpointError, match="format 'dppo_fast/0', this version reads 'dppo_fast/1'"):
        Checkpoint.load(tmp_path / "file")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.safetensors"
    example().save(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        example(more=1).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_runs_know_their_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    for iteration in (0, 2, 10, 1_000_000):
        example().save(checkpoint_path(tmp_path, iteration))
    (tmp_path / "checkpoint" / ".iteration_000011.safetensors.abcd.tmp").touch()
    (tmp_path / "checkpoint" / "notes.txt").touch()
    assert [file.stem for file in checkpoints(tmp_path)] == [
        "iteration_000000", "iteration_000002", "iteration_000010", "iteration_1000000"
    ]  # fmt: skip
    assert find(tmp_path) == checkpoint_path(tmp_path, 1_000_000)
    assert find(tmp_path, "previous") == checkpoint_path(tmp_path, 10)
    prune(tmp_path, 1_000_000, keep=1, keep_every=10)
    assert checkpoints(tmp_path) == [checkpoint_path(tmp_path, i) for i in (0, 10, 1_000_000)]
    prune(tmp_path, 1_000_000, keep=1, keep_every=0)
    assert checkpoints(tmp_path) == [checkpoint_path(tmp_path, 1_000_000)]
    with pytest.raises(CheckpointError, match="the previous one is not there"):
        find(tmp_path, "previous")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        Checkpoint.load(find(tmp_path / "nothing"))


def linear(value: float) -> dict[str, Tensor]:
    return {"weight": torch.full((2, 3), value), "bias": torch.full((2,), value)}


def below(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in weights.items()}


def test_the_reference_s_pretraining_gives_the_averaged_weights(tmp_path: Path) -> None:
    content = {"epoch": 3, "model": below("network", linear(1.0)), "ema": below("network", linear(2.0))}
    torch.save(content, tmp_path / "state_3.pt")
    weights = load_policy_weights(tmp_path / "state_3.pt")
    assert same(weights.actor, linear(2.0))
    assert (weights.actor_ft, weights.critic, weights.config) == (None, None, None)


def test_the_reference_s_fine_tuning_gives_both_networks(tmp_path: Path) -> None:
    model = {
        **below("network", linear(1.0)),
        **below("actor", linear(1.0)),
        **below("actor_ft", linear(2.0)),
        **below("critic", linear(3.0)),
    }
    torch.save({"itr": 9, "model": model}, tmp_path / "state_9.pt")
    weights = load_policy_weights(tmp_path / "state_9.pt")
    assert same(weights.actor, linear(1.0))
    assert same(weights.actor_ft, linear(2.0))
    assert same(weights.critic, linear(3.0))


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_a_pickle_is_refused_and_does_not_run(write: Any, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "state.pt"
    write({"itr": 0, "model": below("network", linear(1.0)), "extra": Malicious(trace)}, path)
    with pytest.raises(CheckpointError, match=r"state\.pt: not readable as tensors alone"):
        load_policy_weights(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if write is torch.save else pickle.loads(path.read_bytes())
    assert trace.exists(), "it would have run"


@pytest.mark.parametrize("average", [None, {"network.weight": torch.ones(2, 3)}])
def test_the_reference_s_file_comes_back(average: dict[str, Tensor] | None, tmp_path: Path) -> None:
    saved = ReferenceCheckpoint(5, {"network.weight": torch.rand(2, 3).mT}, average)
    saved.save(tmp_path / "state_5.pt")
    assert same(vars(ReferenceCheckpoint.load(tmp_path / "state_5.pt")), vars(saved))
    assert [file.name for file in tmp_path.iterdir()] == ["state_5.pt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no itr and no model, unlike"),
        ({}, "holds no itr and no model, unlike"),
        ({"model": {"network.weight": torch.ones(1)}}, "holds no itr, unlike"),
        ({"epoch": 1, "ema": {"network.weight": torch.ones(1)}}, "holds no model, unlike"),
        ({"itr": 1.5, "model": {"network.weight": torch.ones(1)}}, "holds no number in itr or no weights in model"),
        ({"itr": 1, "model": 3}, "holds no number in itr or no weights in model"),
        ({"itr": 1, "model": {"network.weight": 1.0}}, "holds no number in itr or no weights in model"),
        ({"epoch": 1, "model": {}, "ema": None}, "holds no number in epoch or no weights in model or ema"),
        ({"itr": 1, "model": {}}, r"holds neither 'network\.\*' nor 'actor\.\*' weights"),
        ({"itr": 1, "model": {"q.x": torch.ones(1)}}, r"holds neither 'network\.\*' nor 'actor\.\*' weights"),
    ],
)
def test_a_pt_file_of_something_else_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=rf"state\.pt: {message}"):
        load_policy_weights(tmp_path / "state.pt")


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04" + b"\0" * 50])
def test_a_damaged_pt_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.pt: not readable"):
        load_policy_weights(tmp_path / "state.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(2, 4)}, r"weight has shape \[2, 4\], this configuration needs \[2, 3\]"),
        ({"bias": None}, "it lacks bias"),
        ({"extra": torch.ones(1)}, "it has an unexpected extra"),
        ({"bias": torch.tensor([1.0, torch.nan])}, "bias holds NaN or Inf"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: dict[str, Tensor | None], message: str) -> None:
    weights = {name: value for name, value in (linear(1.0) | change).items() if value is not None}
    module = nn.Linear(3, 2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"policy\.pt: .*{message}"):
        load_weights(module, weights, "policy.pt")
    assert same(before, dict(module.state_dict()))


def test_what_is_made_infinite_may_be() -> None:
    """Such as an attention mask; but no NaN."""
    module = nn.Linear(3, 2)
    module.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    load_weights(module, {**linear(1.0), "mask": torch.tensor([1.0, -torch.inf])}, "policy.pt")
    assert module.mask.tolist() == [1.0, -torch.inf]
    with pytest.raises(CheckpointError, match="mask holds NaN or Inf"):
        load_weights(module, {**linear(1.0), "mask": torch.tensor([torch.inf, -torch.inf])}, "policy.pt")


INTERFACE = {
    "obs_shapes": {"state": [1, 11], "rgb": [1, 3, 96, 96]},
    "action_dim": 3,
    "ft_steps": 10,
    "normalization": {"obs_min": torch.zeros(11), "action_min": torch.zeros(3)},
}


def interfaced(path: Path, **changes: Any) -> Path:
    """A file that tells its interface."""
    weights = {"policy": below("actor", linear(1.0)) | below("actor_ft", linear(2.0)), "critic": linear(3.0)}
    Checkpoint(weights, {"interface": INTERFACE | changes}, {}, 7).save(path)
    return path


def test_a_checkpoint_describes_itself(tmp_path: Path) -> None:
    file = interfaced(tmp_path / "policy.safetensors")
    assert load_policy_weights(file).describe() == (
        f"{file} (policy after iteration 7): actor 8, actor_ft 8, critic 8 weights; F 10; observations "
        "rgb [1, 3, 96, 96], state [1, 11] and 3 action dims; normalised by action_min, obs_min"
    )
    file = interfaced(tmp_path / "raw.safetensors", normalization=None)
    assert load_policy_weights(file).describe().endswith("3 action dims; no normalisation")


def test_a_file_of_the_reference_describes_itself(tmp_path: Path) -> None:
    weights = below("network", linear(1.0))
    torch.save({"epoch": 3, "model": weights, "ema": weights}, tmp_path / "pre.pt")
    torch.save({"itr": 9, "model": weights | {"eta.eta_logit": torch.ones(1)}}, tmp_path / "ft.pt")
    pre, ft = (load_policy_weights(tmp_path / name).describe() for name in ("pre.pt", "ft.pt"))
    assert pre == f"{tmp_path}/pre.pt (reference pre-training, epoch 3, averaged weights): actor 8 weights"
    assert ft == f"{tmp_path}/ft.pt (reference fine-tuning, iteration 9): actor 8, eta 1 weights"


@pytest.mark.parametrize(
    ("obs_shapes", "action_dim"),
    [
        ({"state": (1, 17), "rgb": (1, 3, 96, 96)}, 3),
        ({"state": (1, 11), "rgb": (1, 3, 96, 96)}, 6),
        ({"state": (1, 11)}, 3),
    ],
)
def test_another_task_s_checkpoint_is_named(
    obs_shapes: dict[str, tuple[int, ...]], action_dim: int, tmp_path: Path
) -> None:
    weights = load_policy_weights(interfaced(tmp_path / "policy.safetensors"))
    weights.require_dims({"rgb": (1, 3, 96, 96), "state": (1, 11)}, 3)
    own = r"observations rgb \[1, 3, 96, 96\], state \[1, 11\] and 3 action dims"
    with pytest.raises(CheckpointError, match=rf"is of another task: it has {own}, this one observations .*state"):
        weights.require_dims(obs_shapes, action_dim)


def test_a_file_of_the_reference_tells_no_dims(tmp_path: Path) -> None:
    torch.save({"itr": 9, "model": below("network", linear(1.0))}, tmp_path / "state.pt")
    load_policy_weights(tmp_path / "state.pt").require_dims({"state": (1, 1)}, 1)


def test_checkpoints_after_the_newest_are_those_of_a_run_that_was_given_up(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    for iteration in (8, 10, 11, 12, 20):
        checkpoint_path(tmp_path, iteration).touch()
    assert prune(tmp_path, 11, keep=2, keep_every=20) == [10, 11]  # resumed from 10, and 11 is the first it wrote
    assert checkpoints(tmp_path) == [checkpoint_path(tmp_path, i) for i in (10, 11)]
