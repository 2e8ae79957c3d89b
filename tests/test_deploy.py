"""A policy outside training: acting in raw units, its latency, and as an exported graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dppo_fast import load_policy
from dppo_fast.build import build_trainer, parse
from dppo_fast.build import load_policy as load_checkpoint
from dppo_fast.checkpoint import Checkpoint, find
from dppo_fast.deploy import Units, WholeChain
from dppo_fast.envs.normalize import BoundedMinMax, Identity, MinMax, Normalization, Running
from dppo_fast.export import main as export
from dppo_fast.latency import main as latency
from dppo_fast.policies.diffusion import DiffusionPolicy
from dppo_fast.trainer import Trainer
from dppo_fast.types import NoiseStream, UserError
from tests.runs import BC, DPPO, PPO, demonstrations, train
from tests.small import perturb
from tests.tolerances import Tolerance

UNET = ["piece/policy@policy=diffusion_unet", "policy.network.dim=8", "policy.network.dim_mults=[1,2]"]
CLOSE = Tolerance(relative=1e-5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A fine-tuned and a pre-trained diffusion policy, one with a U-Net, one that decides by its probability flow, and
    a Gaussian with running normalisation.
    """
    folder = tmp_path_factory.mktemp("runs")
    data = demonstrations(folder / "data.npz")
    short = ["train.n_train_itr=1", "train.val_freq=0"]
    commands = {
        "fine-tuned": DPPO,
        "pre-trained": [*BC, f"data.path={data}"],
        "unet": [*DPPO, *UNET],
        "flow": [
            "cfg=gym/finetune/hopper-v2/ft_ppo_exact_diffusion_mlp",
            *DPPO[1:],
            "policy.options.sde_step_size=0.5",
        ],
        "gaussian": PPO,
    }
    for name, arguments in commands.items():
        arguments = [x for x in arguments if name != "unet" or "mlp_dims=[16" not in x]
        assert train(*arguments, *short, f"logdir={folder / name}") == 0
    return {name: folder / name for name in commands}


NORMALIZATIONS: list[Callable[[], Normalization | None]] = [
    lambda: None,
    lambda: Identity([-2.0, 0.0], [1.0, 3.0]),
    lambda: MinMax([-1.0, 0, 5], [1.0, 100, 5], [-2.0, 0.0], [1.0, 3.0]),
    lambda: BoundedMinMax([-1.0, 0, 5], [1.0, 100, 6], [-2.0, 0.0], [1.0, 3.0]),
    lambda: running([-2.0, 0.0], [1.0, 3.0]),
]


def running(low: list[float], high: list[float]) -> Running:
    made = Running(low, high, 3)
    made.update(np.random.default_rng(1).normal(50, [0.1, 1, 10], (100, 3)))
    return made


@pytest.mark.parametrize("make", NORMALIZATIONS)
def test_units_are_those_of_the_normalization(make: Callable[[], Normalization | None]) -> None:
    normalization, rng = make(), np.random.default_rng(0)
    units, raw, action = Units(normalization), rng.normal(50, 60, (20, 3)), rng.uniform(-1.5, 1.5, (20, 2))
    expected = (raw, action)
    if normalization is not None:
        expected = normalization.normalize_obs(raw), normalization.unnormalize_action(action)
    state, raw_action = units.normalize(torch.tensor(raw)), units.unnormalize(torch.tensor(action))
    np.testing.assert_allclose(state, expected[0], rtol=2e-7, atol=1e-6)
    np.testing.assert_allclose(raw_action, expected[1], rtol=2e-7, atol=1e-6)


@pytest.mark.parametrize("name", ["fine-tuned", "pre-trained", "unet", "flow", "gaussian"])
def test_acts_as_in_its_environment(runs: dict[str, Path], name: str) -> None:
    """Raw actions for raw observations are what the environment executes for the policy's own."""
    loaded = load_checkpoint(runs[name], torch.device("cpu"))
    loaded.policy.noise = NoiseStream(3)
    policy = load_policy(runs[name], "cpu", seed=3)
    env = loaded.make_env(2, torch.device("cpu"), seed=0)
    obs = env.reset(0)
    for _ in range(2):
        raw = env.raw_obs
        chosen = loaded.policy.act(obs, deterministic=True).action[:, : env.act_steps]
        action = policy.act({key: value.astype(np.float64) for key, value in raw.items()})
        np.testing.assert_allclose(action, env.normalization.unnormalize_action(chosen.numpy()), rtol=1e-5, atol=1e-5)
        obs = env.step(chosen).obs
    env.close()


def small_run(algorithm: str, policy: dict[str, Any], folder: Path) -> Trainer:
    """An untrained one, with a checkpoint."""
    folder.mkdir()
    config = {
        "logdir": str(folder),
        "device": "cpu",
        "env": {"id": "Hopper-v4", "num_envs": 2, "num_threads": 1},
        "policy": policy,
        "critic": {"mlp_dims": [8]},
        "algorithm": {"name": algorithm},
        "data": {"path": str(demonstrations(folder / "data.npz"))},
        "train": {"n_steps": 2, "val_freq": 0},
    }
    trainer = build_trainer(parse(OmegaConf.create(config)), folder, config)
    assert trainer.collector is not None
    trainer.collector.reset()
    trainer.save()
    return trainer


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trainer]:
    """Runs in which critics choose among the policy's proposals."""
    diffusion = {"name": "diffusion", "network": {"name": "diffusion_mlp"}, "options": {"denoising_steps": 4}}
    gaussian = {"name": "gaussian", "network": {"name": "gaussian_mlp", "mlp_dims": [8], "fixed_std": 0.3}}
    folder = tmp_path_factory.mktemp("judged")
    small_run("rwr", gaussian, folder / "imitated")
    imitating = {**gaussian, "checkpoint": str(folder / "imitated")}
    made = {
        "idql": small_run("idql", diffusion, folder / "idql"),
        "ibrl": small_run("ibrl", imitating, folder / "ibrl"),
    }
    for trainer in made.values():
        perturb(trainer.algorithm.modules()["policy"].trained(), 0.3)
        perturb(trainer.algorithm.modules()["target_critic"], 0.3)
        trainer.save()
    return made


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", ["idql", "ibrl"])
def test_acts_as_in_evaluation(judged: dict[str, Trainer], name: str, published: bool, tmp_path: Path) -> None:
    """By the critics' choice, which is another than the policy's own, from the published file, too."""
    trainer, path = judged[name], judged[name].run
    if published:
        path = tmp_path / "policy.safetensors"
        Checkpoint.load(find(judged[name].run)).policy_only().save(path)
    actor, state = trainer.algorithm.actor, torch.randn(64, 1, 11)
    decisions = []
    for act in (actor.act, trainer.algorithm.modules()["policy"].act):
        actor.noise = NoiseStream(3)
        decisions.append(act({"state": state}, deterministic=True).action)
    deployed = load_policy(path, "cpu", seed=3)
    torch.testing.assert_close(deployed.act(state), deployed.raw(decisions[0]))
    assert not torch.equal(*decisions)
    loaded = load_checkpoint(path, torch.device("cpu"))
    loaded.actor.noise = NoiseStream(3)
    torch.testing.assert_close(loaded.actor.act({"state": state}, True).action, decisions[0])


@pytest.mark.parametrize("trained", [{"graphs": "on"}, {"precision": "tf32"}])
def test_critics_choose_on_another_device_than_they_were_trained_on(
    judged: dict[str, Trainer], trained: dict[str, str], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.load(find(judged["idql"].run))
    replace(checkpoint, config={**checkpoint.config, **trained}).save(tmp_path / "on_a_gpu.safetensors")
    state = torch.randn(4, 1, 11)
    torch.testing.assert_close(
        load_policy(tmp_path / "on_a_gpu.safetensors", "cpu").act(state),
        load_policy(judged["idql"].run, "cpu").act(state),
    )


def test_an_annealed_std_is_the_checkpoints(tmp_path: Path) -> None:
    diffusion = {"name": "diffusion", "network": {"name": "diffusion_mlp"}}
    options = {"denoising_steps": 4, "min_sampling_denoising_std": 0.4}
    trainer = small_run("rwr", {**diffusion, "options": options}, tmp_path / "annealed")
    policy = trainer.algorithm.modules()["policy"]
    assert isinstance(policy, DiffusionPolicy)
    policy.set_min_sampling_std(0.05)
    trainer.save()
    loaded = load_checkpoint(trainer.run, torch.device("cpu")).policy
    assert isinstance(loaded, DiffusionPolicy)
    assert loaded.min_sampling_std == 0.05


def test_a_checkpoint_needs_no_file_of_its_normalisation(
    judged: dict[str, Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would otherwise be looked for, and downloaded where it is one of the published ones."""
    checkpoint = Checkpoint.load(find(judged["idql"].run))
    named = {**checkpoint.config["env"], "normalization": "data/gym/hopper-medium-v2/normalization.npz"}
    replace(checkpoint, config={**checkpoint.config, "env": named}).save(tmp_path / "policy.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dppo_fast.config.fetch", None)
    loaded = load_checkpoint(tmp_path / "policy.safetensors", torch.device("cpu"))
    loaded.make_env(1, torch.device("cpu"), seed=0).close()


def test_what_critics_choose_is_no_graph(judged: dict[str, Trainer], capsys: pytest.CaptureFixture[str]) -> None:
    assert export([f"checkpoint={judged['idql'].run}", "out=policy.pt2"]) == 2
    assert re.match("error: checkpoint: critics choose among several of its chains", capsys.readouterr().err)


def test_lists_give_numpy(runs: dict[str, Path]) -> None:
    policy = load_policy(runs["fine-tuned"], "cpu")
    action = policy.act([[0.0] * 11])  # type: ignore[call-overload]
    policy.policy.noise = NoiseStream(0)
    np.testing.assert_array_equal(action, policy.act(np.zeros((1, 11))))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_robot_moves_by_nan(runs: dict[str, Path], value: float) -> None:
    state = np.zeros((1, 11))
    state[0, 3] = value
    with pytest.raises(UserError, match="the observation's 'state' holds NaN or Inf"):
        load_policy(runs["fine-tuned"]).act(state)


def test_numpy_gives_numpy_and_torch_torch(runs: dict[str, Path]) -> None:
    states = np.random.default_rng(0).normal(size=(3, 1, 11)).astype(np.float32)
    actions = [load_policy(runs["fine-tuned"]).act(x) for x in (states, torch.tensor(states), {"state": states})]
    assert [type(action) for action in actions] == [np.ndarray, torch.Tensor, np.ndarray]
    for action in actions:
        np.testing.assert_array_equal(action, actions[0])
    assert actions[0].dtype == np.float32
    assert actions[0].shape == (3, 4, 3)
    single = load_policy(runs["fine-tuned"]).act(states[0])
    np.testing.assert_allclose(single, actions[0][0], rtol=1e-5, atol=1e-5)


def test_the_seed_decides(runs: dict[str, Path]) -> None:
    state = np.zeros((1, 11))
    one, same, other = (load_policy(runs["fine-tuned"], seed=seed) for seed in (1, 1, 2))
    first = one.act(state)
    np.testing.assert_array_equal(same.act(state), first)
    assert not np.array_equal(other.act(state), first)
    assert not np.array_equal(one.act(state), first), "every decision has its own noise"


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        (np.zeros((1, 12)), r"'state' has shape \[1, 12\], expected \[1, 11\]"),
        (np.zeros((2, 2, 11)), r"'state' has shape \[2, 2, 11\], expected \[1, 11\]"),
        (np.zeros(11), r"'state' has shape \[11\], expected \[1, 11\]"),
        ({"position": np.zeros((1, 11))}, r"holds \['position'\], the policy takes \['state'\]"),
    ],
)
def test_another_observation_is_refused(runs: dict[str, Path], obs: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_policy(runs["fine-tuned"]).act(obs)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        load_policy(tmp_path / "none")
    (tmp_path / "file.safetensors").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"file\.safetensors: truncated or not a safetensors file"):
        load_policy(tmp_path / "file.safetensors")


def test_latency(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert latency([f"checkpoint={runs['fine-tuned']}", "calls=20", "warm_up=2"]) == 0
    found = re.match(
        r"p50 ([\d.]+) ms  p99 ([\d.]+) ms  \(20 decisions, B = 1, CPU, 1 threads\)", capsys.readouterr().out
    )
    assert found
    assert 0 < float(found[1]) <= float(found[2])


@pytest.mark.parametrize("name", ["fine-tuned", "unet"])
def test_what_is_exported_decides_as_the_policy(
    runs: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployed = load_policy(runs[name], "cpu")
    chain = WholeChain(deployed)
    noise, state = chain.example(1)
    monkeypatch.setattr(deployed.policy, "draw_noise", lambda batch, draws: noise[:draws])
    CLOSE.check(chain(noise, state), deployed.act(state))


def inputs(chain: WholeChain, batch: int) -> tuple[torch.Tensor, ...]:
    """Others than those that the export itself compares."""
    return tuple(value.flip(-1) for value in chain.example(batch))


@pytest.mark.parametrize("name", ["fine-tuned", "unet"])
def test_exported_programs(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    assert export([f"checkpoint={runs[name]}", f"out={tmp_path}/new/policy.pt2"]) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["policy.pt2"]
    program = torch.export.load(tmp_path / "new" / "policy.pt2").module()
    chain = WholeChain(load_policy(runs[name], "cpu"))
    for batch in (1, 4):
        arguments = inputs(chain, batch)
        CLOSE.check(program(*arguments), chain(*arguments))


@pytest.mark.parametrize("name", ["fine-tuned", "unet"])
def test_onnx(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="ONNX is not installed: pip install 'dppo-fast[export]'")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX is not installed: pip install 'dppo-fast[export]'")
    assert export([f"checkpoint={runs[name]}", f"out={tmp_path}/policy.onnx"]) == 0
    session = runtime.InferenceSession(tmp_path / "policy.onnx")
    assert [node.name for node in session.get_inputs()] == ["noise", "state"]
    chain = WholeChain(load_policy(runs[name], "cpu"))
    for batch in (1, 4):
        arguments = inputs(chain, batch)
        feeds = dict(zip(chain.names, (value.numpy() for value in arguments), strict=True))
        (action,) = session.run(["action"], feeds)
        CLOSE.check(action, chain(*arguments))


@pytest.mark.skipif(which("g++") is None, reason="AOTInductor needs g++")
def test_compiled_program(runs: dict[str, Path], tmp_path: Path) -> None:
    assert export([f"checkpoint={runs['fine-tuned']}", f"out={tmp_path}/policy.pt2", "aot=true"]) == 0
    program = torch._inductor.aoti_load_package(str(tmp_path / "policy.pt2"))
    chain = WholeChain(load_policy(runs["fine-tuned"], "cpu"))
    arguments = inputs(chain, 2)
    CLOSE.check(program(*arguments), chain(*arguments))


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        ("fine-tuned", ["out=policy.trt"], "out=policy.trt: the name must end with .onnx or .pt2"),
        ("fine-tuned", ["out=policy.onnx", "aot=true"], "aot=true compiles a .pt2 program, out=policy.onnx is none"),
        ("gaussian", ["out=policy.pt2"], "checkpoint: GaussianPolicy has no denoising chain"),
        ("flow", ["out=policy.pt2"], "checkpoint: FlowPolicy decides by its probability flow"),
        ("nothing", ["out=policy.pt2"], "checkpoint: .*no such checkpoint"),
    ],
)
def test_export_names_mistakes(
    runs: dict[str, Path],
    run: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export([f"checkpoint={runs.get(run, run)}", *arguments]) == 2
    assert re.match(f"error: {message}", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(find_spec("onnxscript") is not None, reason="ONNX is installed")
def test_without_onnx_what_to_install_is_named(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert export([f"checkpoint={runs['fine-tuned']}", "out=policy.onnx"]) == 2
    assert "pip install 'dppo-fast[export]'" in capsys.readouterr().err


def test_published_policies_act(runs: dict[str, Path], tmp_path: Path) -> None:
    """Nothing but the file is needed."""
    saved = Checkpoint.load(next((runs["fine-tuned"] / "checkpoint").iterdir()))
    saved.policy_only().save(tmp_path / "policy.safetensors")
    assert load_policy(tmp_path / "policy.safetensors").act(np.zeros((1, 11))).shape == (4, 3)
