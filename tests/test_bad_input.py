"""A user's mistake ends a command with exit code 2 and one line naming it, before any work and any run directory."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from dppo_fast.checkpoint import checkpoints
from dppo_fast.cli import config_folder, guarded
from dppo_fast.collect import main as collect
from dppo_fast.publish import main as publish
from dppo_fast.train import train as run_config
from tests.runs import BC, PPO, demonstrations, train

ROOT = Path(__file__).parent.parent
FINETUNE, PRETRAIN = "quickstart", "gym/pretrain/hopper-medium-v2/pre_diffusion_mlp"
SCRATCH = "gym/scratch/hopper-v2/ppo_gaussian_mlp"

FailsWith = Callable[[Callable[[], int], str], None]


@pytest.fixture
def fails_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> FailsWith:
    """Run a main that must fail with this message and leave nothing in ``tmp_path``."""

    def check(run: Callable[[], int], message: str) -> None:
        assert run() == 2
        error = capsys.readouterr().err
        assert re.fullmatch(rf"error: .*{message}.*\n", error), error
        assert not list(tmp_path.iterdir())

    return check


@pytest.fixture(scope="module")
def composed() -> Callable[[str], DictConfig]:
    """The configuration ``cfg=<name>``; composed once, open for any key."""
    nodes: dict[str, DictConfig] = {}

    def get(name: str) -> DictConfig:
        if name not in nodes:
            with initialize_config_dir(str(config_folder()), version_base=None):
                nodes[name] = compose(name, ["logdir=unset"])
            OmegaConf.set_struct(nodes[name], False)
        return nodes[name]

    return get


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the cases below name in braces."""
    folder = tmp_path_factory.mktemp("files")
    made = {"data": demonstrations(folder / "data.npz"), "file": folder / "file", "run": folder / "run"}
    made["file"].write_text("not a folder")
    good = dict(np.load(made["data"]))
    rows = len(good["states"])
    variants = {
        "nan": {"states": np.where(np.arange(rows)[:, None] == 5, np.nan, good["states"])},
        "inf": {"actions": np.where(np.arange(rows)[:, None] == 5, np.inf, good["actions"])},
        "empty": {"traj_lengths": np.array([rows, 0])},
        "lengths": {"traj_lengths": np.array([rows + 1])},
        "nothing": {"states": good["states"][:0], "actions": good["actions"][:0]},
        "pickled": {"states": np.array([{"x": 1}], dtype=object)},
        "flat": {"states": good["states"].ravel()},
    }
    for name, change in variants.items():
        made[name] = folder / f"{name}.npz"
        np.savez(made[name], **(good | change))
    made["truncated"] = folder / "truncated.npz"
    made["truncated"].write_bytes(made["data"].read_bytes()[:-500])
    made["walker_data"] = demonstrations(folder / "walker.npz", 17, 6)

    assert train(*BC, f"data.path={made['data']}", "train.n_train_itr=1", f"logdir={made['run']}") == 0
    checkpoint = checkpoints(made["run"])[-1]
    made["checkpoint"] = checkpoint
    cut = checkpoint.read_bytes()[:-1]
    for name, content in {"short": cut, "corrupt": cut + b"?"}.items():
        made[name] = folder / f"{name}.safetensors"
        made[name].write_bytes(content)
    made["not_a_run"] = folder / "not_a_run"
    made["not_a_run"].mkdir()
    made["reference"] = folder / "state.pt"
    torch.save({"itr": 0, "model": {"actor.weight": torch.ones(1)}}, made["reference"])
    made["gaussian"] = folder / "gaussian"
    assert train(*PPO, "train.n_train_itr=1", "algorithm.reward_scale_running=false", f"logdir={made['gaussian']}") == 0
    return made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "cfg=<name> is missing"),
        ("cfg=quickstrat", "cfg=quickstrat is unknown; nearest: quickstart"),
        ("cfg=gym/finetune/hoper-v2/ft_ppo_diffusion_mlp", "nearest: gym/finetune/hopper-v2/ft_ppo_diffusion_mlp"),
        ("cfg=piece/run", "cfg=piece/run is unknown"),
        ("cfg=/nope/mine.yaml", "cfg=/nope/mine.yaml: no such file"),
        ("cfg=quickstart algorithm.gama=0.9", "algorithm.gama is unknown; nearest: algorithm.gamma,"),
        ("cfg=quickstart gamma=0.9", "gamma is unknown; nearest: algorithm.gamma,"),
        ("cfg=quickstart env.nun_envs=3", "env.nun_envs is unknown; nearest: env.num_envs,"),
        ("cfg=quickstart +algorithm.gama=0.9", r"algorithm.gama is unknown \(did you mean gamma"),
        ("cfg=quickstart +foo=1", "foo is unknown"),
        ("cfg=quickstart ~algorithm", "algorithm is missing"),
        ("cfg=quickstart ~algorthm", "algorthm.* does not exist"),
        ("cfg=quickstart algorithm.gamma=[1", r"algorithm.gamma=\[1"),
        ("cfg=quickstart gamma", "gamma"),
        ("cfg=quickstart piece/policy@policy=foo", "Could not find 'piece/policy/foo'"),
        ("resume=/nope", "resume=/nope: not a run directory, it holds no config.yaml"),
        ("resume={not_a_run}", "not a run directory, it holds no config.yaml"),
        ("cfg=quickstart resume={not_a_run}", "not a run directory"),
        ("resume={run} train.n_stps=1", "train.n_stps is unknown; nearest: train.n_steps,"),
        ("resume={gaussian} env.num_envs=2", "env.num_envs=2: the run has 3, with which alone it can go on"),
        ("resume={gaussian} seed=7", "seed=7: the run has seed 42, with which alone it can go on"),
        ("cfg=quickstart logdir=runs/x --multirun seed=0,1", "logdir=runs/x: every job of a --multirun needs its own"),
        ("resume={gaussian} policy.network.mlp_dims=[9]", r"has shape \[8\], this configuration needs \[9\]"),
        ("resume={gaussian} algorithm.reward_scale_running=true", "holds no state of 'reward_scaler'"),
        ("resume={gaussian} resume_from=first", "resume_from=first is unknown"),
        ("cfg=quickstart seed=-1,-2 --multirun device=cpu", "seed=-1 must lie in"),
    ],
)
def test_arguments(
    arguments: str,
    message: str,
    files: dict[str, Path],
    fails_with: FailsWith,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    fails_with(lambda: train(*(argument.format(**files) for argument in arguments.split())), message)


@pytest.mark.parametrize(
    "content", [b"seed: [1\nx: }", b"seed: \xff", b"seed: \0", b"env:\n &id: a", b"seed: ${x", b"3"]
)
def test_a_file_that_is_no_configuration(
    content: bytes, fails_with: FailsWith, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("config") / "mine.yaml"
    file.write_bytes(content)
    fails_with(lambda: train(f"cfg={file}"), r"mine\.yaml: not a readable configuration: ")


@pytest.mark.parametrize("defaults", ["3", "quickstart", "[quickstart, 3]", "{quickstart: 3}", "null"])
def test_defaults_that_are_no_list(
    defaults: str, fails_with: FailsWith, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("config") / "mine.yaml"
    file.write_text(f"defaults: {defaults}\n")
    fails_with(lambda: train(f"cfg={file}"), r"mine\.yaml: defaults=.* must be a list of configurations")


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        # kinds of value
        (FINETUNE, "algorithm.gamma=abc", "algorithm.gamma: Value 'abc' .* Float"),
        (FINETUNE, "algorithm.gamma=${{eval:1/2}}", "algorithm.gamma: Unsupported interpolation type eval"),
        (FINETUNE, "data=null", "data must be a group of keys: env.normalization follows from data.folder"),
        (FINETUNE, "seed=abc", "seed: Value 'abc' .* Integer"),
        (FINETUNE, "env.num_envs=abc", "env.num_envs: Value 'abc' .* Integer"),
        (FINETUNE, "policy.options.predict_epsilon=maybe", "policy.options.predict_epsilon: Value 'maybe' .* bool"),
        (FINETUNE, "policy.network.use_layernorm=maybe", "policy.network.use_layernorm: Value 'maybe' .* bool"),
        (FINETUNE, "policy.network.mlp_dims=[a,2,2]", r"policy.network.mlp_dims\[0\]: Value 'a' .* Integer"),
        (FINETUNE, "policy.network.mlp_dims=512", "policy.network.mlp_dims: "),
        (FINETUNE, "policy=gaussian_mlp", "policy=gaussian_mlp: policy is a group of keys"),
        (FINETUNE, "train=null", "train=None: train is a group of keys"),
        (FINETUNE, "algorithm=dppo", "algorithm: Cannot assign str to Dict"),
        (FINETUNE, "logdir=null", "logdir: Incompatible value 'None'"),
        (FINETUNE, "env=null", "env is missing"),
        # names
        (FINETUNE, "algorithm.name=dpo", r"algorithm.name=dpo is unknown \(did you mean dppo"),
        (FINETUNE, "policy.name=difusion", r"policy.name=difusion is unknown \(did you mean diffusion"),
        (FINETUNE, "policy.network.name=mlp", "policy.network.name=mlp is unknown"),
        (
            FINETUNE,
            "policy.name=gaussian",
            "network.name=diffusion_mlp does not fit policy.name=gaussian; choose one of ga",
        ),
        (
            FINETUNE,
            "policy.network.name=gmm_mlp",
            "network.name=gmm_mlp does not fit policy.name=diffusion; choose one",
        ),
        (SCRATCH, "policy.name=gmm", "network.name=gaussian_mlp does not fit policy.name=gmm; choose one of gmm_mlp"),
        (FINETUNE, "policy.network.time_dims=3", r"policy.network.time_dims is unknown \(did you mean time_dim"),
        (FINETUNE, "policy.network.cond_dim=3", "policy.network.cond_dim follows from the environment"),
        (FINETUNE, "policy.network.activation_type=Relu", "activation='Relu' is unknown"),
        (FINETUNE, "critic.name=cnn", "critic.name=cnn is unknown"),
        (FINETUNE, "policy.eta.name=fixd", r"policy.eta.name=fixd is unknown \(did you mean fixed"),
        (FINETUNE, "algorithm.name=ppo", "algorithm.[a-z_]* is unknown"),
        (FINETUNE, "algorithm.name=bc", "algorithm.[a-z_]* is unknown"),
        (FINETUNE, "compat=v1", "compat=v1 is unknown"),
        (FINETUNE, "resume_from=first", "resume_from=first is unknown"),
        (FINETUNE, "profile=perf", "profile=perf"),
        (FINETUNE, "graphs=maybe", "graphs=maybe is unknown; choose auto, on, off"),
        (FINETUNE, "graphs=on device=cpu", "graphs=on: CUDA graphs need a CUDA device"),
        (FINETUNE, "precision=fp8", "precision=fp8 is unknown"),
        (FINETUNE, "precision=tf32 device=cpu", "precision=tf32 needs a CUDA device"),
        # ranges
        (FINETUNE, "algorithm.gamma=0", r"algorithm.gamma=0.0 must lie in \(0, 1\]"),
        (FINETUNE, "algorithm.gamma=1.01", "algorithm.gamma=1.01 must lie in"),
        (FINETUNE, "algorithm.gamma=.nan", "algorithm.gamma=nan must lie in"),
        (FINETUNE, "algorithm.gamma_denoising=-1", "algorithm.gamma_denoising=-1.0 must lie in"),
        (FINETUNE, "algorithm.gae_lambda=2", "algorithm.gae_lambda=2.0 must lie in"),
        (FINETUNE, "algorithm.actor_lr=0", "algorithm.actor_lr=0.0 must lie in"),
        (FINETUNE, "algorithm.critic_lr=-1e-3", "algorithm.critic_lr=-0.001 must lie in"),
        (FINETUNE, "algorithm.batch_size=0", "algorithm.batch_size=0 must lie in"),
        (FINETUNE, "algorithm.batch_size=1", r"algorithm.batch_size=1 must lie in \[2, inf\)"),
        (FINETUNE, "algorithm.batch_size=601 train.n_steps=3", "algorithm.batch_size=601 is larger than the 600 pairs"),
        (FINETUNE, "algorithm.microbatch_size=0", "algorithm.microbatch_size=0 must lie in"),
        (FINETUNE, "algorithm.update_epochs=0", "algorithm.update_epochs=0 must lie in"),
        (FINETUNE, "algorithm.clip_ploss_coef_rate=0", "algorithm.clip_ploss_coef_rate=0.0 must lie in"),
        (FINETUNE, "algorithm.clip_advantage_upper_quantile=1.1", r"upper_quantile=1.1 must lie in \[0, 1\]"),
        (
            FINETUNE,
            "algorithm.clip_advantage_lower_quantile=0.9 algorithm.clip_advantage_upper_quantile=0.1",
            r"lower_quantile=0.9 must lie in \[0, 0.1\]",
        ),
        (
            FINETUNE,
            "algorithm.actor_lr_scheduler.warmup_steps=1000",
            r"actor_lr_scheduler.warmup_steps=1000 must lie in",
        ),
        (
            FINETUNE,
            "algorithm.eta_lr_scheduler.first_cycle_steps=0",
            "eta_lr_scheduler.first_cycle_steps=0 must lie in",
        ),
        (FINETUNE, "train.n_train_itr=0", "train.n_train_itr=0 must lie in"),
        (FINETUNE, "train.n_steps=-3", "train.n_steps=-3 must lie in"),
        (FINETUNE, "train.eval_episodes=0", "train.eval_episodes=0 must lie in"),
        (FINETUNE, "env.num_envs=0", "env.num_envs=0: must be at least 1"),
        (FINETUNE, "env.max_episode_steps=0", "env.max_episode_steps=0: must be at least 1"),
        (FINETUNE, "task.cond_steps=0", "task.cond_steps=0 must lie in"),
        (FINETUNE, "task.act_steps=5", "task.act_steps=5 is longer than task.horizon_steps=4"),
        (FINETUNE, "seed=-1", "seed=-1 must lie in"),
        (FINETUNE, "policy.network.mlp_dims=[0,0,0]", r"policy.network.mlp_dims=\[0, 0, 0\]: every width"),
        (FINETUNE, "policy.network.mlp_dims=[8,8]", "policy.network: .* odd number of entries"),
        (FINETUNE, "policy.network.time_dim=0", "policy.network: time_dim=0 must be"),
        (FINETUNE, "policy.options.denoising_steps=0", "policy.options.denoising_steps=0 must lie in"),
        (FINETUNE, "policy.options.ft_denoising_steps=99", "policy.options: ft_denoising_steps=99 must lie between"),
        (SCRATCH, "algorithm.name=dppo", "algorithm.name=dppo does not fit policy.name=gaussian: it trains a"),
        (FINETUNE, "policy.options.ft_denoising_steps=0", "policy.options.ft_denoising_steps=0: fine-tuning needs"),
        (FINETUNE, "policy.options.ddim_steps=21", "policy.options: ddim_steps=21 must lie between"),
        (FINETUNE, "policy.options.randn_clip_value=-1", "policy.options.randn_clip_value=-1.0 must lie in"),
        (FINETUNE, "policy.options.learn_eta=true", "policy.options: learn_eta=true needs DDIM"),
        (PRETRAIN, "algorithm.learning_rate=0", "algorithm.learning_rate=0.0 must lie in"),
        (PRETRAIN, "algorithm.ema_decay=1.5", "algorithm.ema_decay=1.5 must lie in"),
        (PRETRAIN, "algorithm.lr_scheduler.warmup_steps=200", "algorithm.lr_scheduler.warmup_steps=200 must lie in"),
        (PRETRAIN, "policy.options.ft_denoising_steps=2", "ft_denoising_steps=2 is for fine-tuning"),
        # this machine
        (FINETUNE, "device=foo", "device=foo is unknown; choose auto, cpu, cuda"),
        (FINETUNE, "device=meta", "device=meta is not supported"),
        (FINETUNE, "device=cuda:99", "device=cuda:99: this machine has . CUDA devices"),
        pytest.param(
            FINETUNE,
            "device=cuda",
            "device=cuda: this machine has 0 CUDA devices",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one"),
        ),
        (FINETUNE, "logdir={file}/run", "logdir=.*/file/run: cannot write there"),
        (FINETUNE, "logdir={run}", "logdir=.*/run holds a run already; choose another, or continue it with resume="),
        # environments
        (FINETUNE, "env.id=Hoper-v4", "env.id=Hoper-v4.* nearest names: Hopper-v4"),
        (FINETUNE, "env.id=hopper-medum-v2", "nearest names: hopper-medium-v2"),
        (FINETUNE, "env.backend=mujoco", "env.backend=mujoco: unknown; choose from auto, .*envpool, gymnasium"),
        (FINETUNE, "env.normalization=/nope.npz", "env.normalization=/nope.npz: no such file"),
        (FINETUNE, "env.normalization={file}", "env.normalization=.*: not a readable npz file"),
        (FINETUNE, "env.normalization=asset:nope", "env.normalization: asset:nope: the package ships no such file"),
        (FINETUNE, "env.id=Walker2d-v4", r"env.normalization=.*: obs_min has shape \(11,\), expected \(17,\)"),
        # checkpoints
        (FINETUNE, "policy.checkpoint=/nope", "policy.checkpoint: /nope: no such checkpoint"),
        (FINETUNE, "policy.checkpoint={not_a_run}", "policy.checkpoint: .*/not_a_run: holds 0 checkpoints"),
        (FINETUNE, "policy.checkpoint={file}", "policy.checkpoint: .*/file: truncated or not a safetensors file"),
        (FINETUNE, "policy.checkpoint={short}", "policy.checkpoint: .*/short.safetensors: truncated"),
        (FINETUNE, "policy.checkpoint={corrupt}", "policy.checkpoint: .*/corrupt.safetensors: .* corrupt"),
        (FINETUNE, "policy.checkpoint={reference}", "policy.checkpoint: .*/state.pt .* belongs to another network"),
        (FINETUNE, "policy.checkpoint={gaussian}", "policy.checkpoint: .* is fine-tuned already"),
        (FINETUNE, "policy.checkpoint={checkpoint}", r"has shape \[16\], this configuration needs \[512\]"),
        (
            FINETUNE,
            "env.id=Walker2d-v4 env.normalization=none",
            r"policy.checkpoint: .* is of another task: it has .*\[1, 11\] and 3 .*\[1, 17\] and 6 action dims",
        ),
        (
            PRETRAIN,
            "policy.checkpoint=/nope data.path={data} algorithm.batch_size=8",
            "policy.checkpoint: /nope: no such",
        ),
        # data
        (PRETRAIN, "data.path=null", "data.path is missing"),
        (PRETRAIN, "data.path=/nope.npz", "data.path: /nope.npz: no such file"),
        (PRETRAIN, "data.path={file}", "data.path: .*/file: not an npz file"),
        (PRETRAIN, "data.path={truncated}", "data.path: .*/truncated.npz: "),
        (PRETRAIN, "data.path={pickled}", "data.path: .*/pickled.npz: states is pickled"),
        (PRETRAIN, "data.path={nan}", "data.path: .*/nan.npz: states has NaN or Inf in 1 of 89 rows, first in row 5"),
        (PRETRAIN, "data.path={inf}", "data.path: .*/inf.npz: actions has NaN or Inf"),
        (PRETRAIN, "data.path={empty}", r"data.path: .*/empty.npz: traj_lengths\[1\]=0"),
        (PRETRAIN, "data.path={lengths}", "data.path: .*/lengths.npz: traj_lengths adds up to 90"),
        (PRETRAIN, "data.path={nothing}", "data.path: .*/nothing.npz: no data"),
        (PRETRAIN, "data.path={flat}", "data.path: .*/flat.npz: states has shape"),
        (PRETRAIN, "data.path={walker_data} algorithm.batch_size=8", "has observations .*17.* and 6 action dims"),
        (PRETRAIN, "data.path={data} task.horizon_steps=41", "horizon_steps=41 is longer than every trajectory"),
        (PRETRAIN, "data.path={data}", "algorithm.batch_size=128 is larger than the 80 windows"),
        (PRETRAIN, "data.path={data} data.max_n_episodes=0", "data.max_n_episodes=0 must lie in"),
    ],
)
def test_configurations(
    name: str,
    overrides: str,
    message: str,
    composed: Callable[[str], DictConfig],
    files: dict[str, Path],
    fails_with: FailsWith,
    tmp_path: Path,
) -> None:
    given = OmegaConf.from_dotlist(overrides.format(**files).split())
    node = OmegaConf.merge(composed(name), {"logdir": f"{tmp_path}/run"}, given)
    assert isinstance(node, DictConfig)
    fails_with(lambda: guarded(lambda: run_config(node)), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("checkpoint={run}", "out is missing"),
        ("out={out}", "give one of checkpoint=<file or run> and scripted=<name>"),
        ("out={out} scripted=lift checkpoint={gaussian}", "give one of checkpoint=<file or run> and scripted=<name>"),
        ("out={out} scripted=lfit", r"scripted=lfit is unknown \(did you mean lift"),
        ("out={out} scripted=lift options.nois=0", r"options.nois is unknown \(did you mean noise"),
        ("out={out} scripted=lift env.num_env=3", r"env.num_env is unknown \(did you mean num_envs"),
        ("checkpoint={gaussian} out={out} options.noise=0", "options go with scripted=<name>"),
        ("checkpoint={gaussian} out={out} stps=3", r"stps is unknown \(did you mean steps"),
        ("checkpoint={gaussian} out={out} steps", "steps: not of the form key=value"),
        ("checkpoint={gaussian} out={out} steps=0", "steps=0 must lie in"),
        ("checkpoint={gaussian} out={out} steps=many", "steps: Value 'many' .* Integer"),
        ("checkpoint={gaussian} out={out} min_return=5 max_return=4", r"max_return=4.0 must lie in \[5.0, inf\]"),
        ("checkpoint={gaussian} out={out} device=foo", "device=foo is unknown"),
        ("checkpoint=/nope out={out}", "checkpoint: /nope: no such checkpoint"),
        ("checkpoint={corrupt} out={out}", "checkpoint: .*/corrupt.safetensors: .* corrupt"),
        ("checkpoint={reference} out={out}", "a checkpoint of the reference holds no configuration"),
        ("checkpoint={gaussian} out={file}/data", "out=.*/file/data is not writable"),
    ],
)
def test_collect(arguments: str, message: str, files: dict[str, Path], fails_with: FailsWith, tmp_path: Path) -> None:
    fails_with(lambda: collect(arguments.format(out=tmp_path / "out", **files).split()), message)


def test_a_recording_that_finds_too_little_says_so(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect([f"checkpoint={files['gaussian']}", f"out={tmp_path}", "num_envs=2", "max_steps=50"]) == 2
    assert re.fullmatch(r"error: max_steps=50: only [0-9]+ steps .*\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_recording_is_not_written_over(
    files: dict[str, Path], fails_with: FailsWith, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "train.npz").write_bytes(b"hours of work")
    message = r"out=.* holds train\.npz already; choose another directory, or remove it"
    fails_with(lambda: collect([f"checkpoint={files['gaussian']}", f"out={folder}"]), message)
    assert (folder / "train.npz").read_bytes() == b"hours of work"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("checkpoint=/nope out=policy", "/nope: no such checkpoint"),
        ("checkpoint={run} out={file}/policy", "out=.*/file/policy is not writable"),
    ],
)
def test_publish(arguments: str, message: str, files: dict[str, Path], fails_with: FailsWith) -> None:
    fails_with(lambda: publish(arguments.format(**files).split()), message)


def test_a_diverging_run_names_the_last_good_checkpoint(files: dict[str, Path], tmp_path: Path) -> None:
    arguments = [f"data.path={files['data']}", f"logdir={tmp_path}", "env=null", "algorithm.learning_rate=1e30"]
    with pytest.raises(
        SystemExit, match=r"error: iteration [12]: loss/bc.* is not finite; .*/iteration_00000[01]"
    ) as exit:
        train(*BC, *arguments)
    assert isinstance(exit.value.code, str), "the interpreter prints it and exits with 1"


def test_the_commands_themselves() -> None:
    """One line on stderr, nothing on stdout; and without simulators or plots, so at once."""
    program = """
import sys
from dppo_fast.train import main
code = main(sys.argv[1:])
slow = {"envpool", "gymnasium", "mujoco", "matplotlib", "tensorboard"} & sys.modules.keys()
assert not slow, slow
sys.exit(code)
"""
    for command in (["-c", program, "cfg=quickstrat"], ["-m", "dppo_fast.train", "cfg=quickstart", "device=foo"]):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r"error: .*(cfg=quickstrat|device=foo) is unknown.*\n", done.stderr)
