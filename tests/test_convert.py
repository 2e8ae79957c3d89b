"""Conversion to and from the reference's files: every number survives, and what does not fit is named."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from dppo_fast.build import build_trainer, load_policy, parse
from dppo_fast.checkpoint import Checkpoint, ReferenceCheckpoint, load_policy_weights
from dppo_fast.cli import config_folder, config_names
from dppo_fast.config import plain
from dppo_fast.convert import from_reference, main, to_reference
from dppo_fast.envs.normalize import MinMax
from dppo_fast.publish import main as publish
from tests.configs.stated import StatedEnv
from tests.golden_files import Case, golden_cases
from tests.golden_models import below, roots
from tests.runs import SMALL_DIFFUSION, SMALL_ENV, demonstrations
from tests.test_checkpoint import same

REFERENCE = os.environ.get("DPPO_REFERENCE")
PRE = ["cfg=gym/pretrain/hopper-medium-v2/pre_diffusion_mlp", *SMALL_DIFFUSION]
FT = [
    "cfg=gym/finetune/hopper-v2/ft_ppo_diffusion_mlp",
    *SMALL_DIFFUSION,
    "policy.options.ft_denoising_steps=2",
    "critic.mlp_dims=[8,8,8]",
]
RUNS = {
    "pre": PRE,
    "gaussian_pre": ["cfg=gym/pretrain/hopper-medium-v2/pre_gaussian_mlp", "policy.network.mlp_dims=[8,8]"],
    "ft": FT,
    "eta": [
        *FT,
        "policy.options.ft_denoising_steps=4",
        "policy.options.ddim_steps=4",
        "policy.eta={name: fixed, base_eta: 1, max_eta: 1}",
    ],
    "gaussian": ["cfg=gym/scratch/hopper-v2/ppo_gaussian_mlp", "policy.network.mlp_dims=[8,8]"],
}
"""Configurations by pre-training and fine-tuning of both kinds of policy; the logit of ``eta`` is infinite."""


def configured(arguments: list[str], **changes: Any) -> dict[str, Any]:
    """The configuration that the arguments describe."""
    name, *overrides = arguments
    with initialize_config_dir(str(config_folder()), version_base=None):
        return plain(compose(name.removeprefix("cfg="), [*overrides, "logdir=unused", "device=cpu"])) | changes


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every configuration, after 7 iterations, with weights that all differ."""
    folder = tmp_path_factory.mktemp("ours")
    data = demonstrations(folder / "data.npz", lengths=(200,))
    files = {}
    for name, arguments in RUNS.items():
        more = [*SMALL_ENV, f"data.path={data}", "policy.checkpoint=null", "algorithm.batch_size=100"]
        content = configured([*arguments, *more])
        trainer = build_trainer(parse(content), folder / name, content)
        trainer.iteration = 7
        if trainer.collector is not None:
            trainer.collector.reset()
        generator = torch.Generator().manual_seed(0)
        for module in trainer.algorithm.modules().values():
            for parameter in module.parameters():
                parameter.data += torch.rand(parameter.shape, generator=generator)
        files[name] = trainer.save()
    return files


@pytest.fixture(scope="module")
def theirs(ours: dict[str, Path]) -> dict[str, Path]:
    """The same in the reference's format."""
    files = {}
    for name, file in ours.items():
        files[name] = file.with_name(f"{name}.pt")
        assert main([f"source={file}", f"out={files[name]}"]) == 0
    return files


def contents(file: Path) -> dict[str, Any]:
    content = torch.load(file, weights_only=True)
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize("name", RUNS)
def test_a_round_trip_from_the_reference_loses_nothing(name: str, theirs: dict[str, Path], tmp_path: Path) -> None:
    assert main([f"source={theirs[name]}", f"out={tmp_path}/a.safetensors", *RUNS[name]]) == 0
    assert main([f"source={tmp_path}/a.safetensors", f"out={tmp_path}/b.pt"]) == 0
    assert same(contents(theirs[name]), contents(tmp_path / "b.pt"))


@pytest.mark.parametrize("name", RUNS)
def test_a_round_trip_from_ours_loses_nothing_of_the_policy(
    name: str, ours: dict[str, Path], theirs: dict[str, Path], tmp_path: Path
) -> None:
    assert main([f"source={theirs[name]}", f"out={tmp_path}/a.safetensors", *RUNS[name]]) == 0
    before, after = Checkpoint.load(ours[name]), Checkpoint.load(tmp_path / "a.safetensors")
    assert (after.iteration, after.deployed) == (7, before.deployed)
    assert same(after.state, {"interface": before.state["interface"]})
    assert after.weights.keys() == before.weights.keys()
    for module, weights in before.weights.items():
        if name == "gaussian_pre":  # whose frozen network, a copy of the initial one, takes no part
            weights = {key: value for key, value in weights.items() if not key.startswith("actor.")}
        assert same(weights, {key: after.weights[module][key] for key in weights})
    policies = [load_policy(file, torch.device("cpu")).policy for file in (ours[name], tmp_path / "a.safetensors")]
    obs = {"state": torch.rand(5, 1, 11)}
    first, second = (policy.act(obs).action for policy in policies)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", RUNS)
def test_what_the_reference_gets(name: str, ours: dict[str, Path], theirs: dict[str, Path]) -> None:
    content, checkpoint = contents(theirs[name]), Checkpoint.load(ours[name])
    own = checkpoint.weights["policy"]
    if name in ("pre", "gaussian_pre"):
        assert content.keys() == {"epoch", "model", "ema"}
        assert content["epoch"] == 7
        network = "actor." if name == "pre" else "actor_ft."
        for key, module in (("model", "policy"), ("ema", "ema")):
            assert roots(content[key]) == {"network"}
            assert same(below(content[key], "network."), below(checkpoint.weights[module], network))
        assert not same(content["model"], content["ema"])
        return
    assert content.keys() == {"itr", "model"}
    assert content["itr"] == 6, "the last that was done"
    network = "actor_ft." if name == "gaussian" else "actor."
    expected = {f"network.{key}": value for key, value in below(own, network).items()}
    expected |= {f"critic.{key}": value for key, value in checkpoint.weights["critic"].items()}
    assert same(content["model"], {**expected, **own})


def policy_name(case: str) -> str:
    return next((name for name in ("gmm", "diffusion") if name in case), "gaussian")


def is_known(case: Case) -> bool:
    """Whether the model is a pre-trained policy, or one that PPO fine-tunes."""
    return ("/pre_" in case.name or "/ft_ppo" in case.name) and "ibrl" not in case.name


LAYOUTS = golden_cases("13_state_dict_names", is_known, array="names")


def reference_model(case: Case) -> dict[str, Tensor]:
    """Random weights with the case's names and shapes; ``network`` is the same as another network, where there is one,
    the trained one of a Gaussian or mixture.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = zip(case["names"], case["shapes"], strict=True)
    model = {str(name): torch.randn(json.loads(str(shape)), generator=generator) for name, shape in shapes}
    twin = "actor" if policy_name(case.name) == "diffusion" else "actor_ft"
    twins = {name: name.replace("network", twin, 1) if name.startswith("network.") else name for name in model}
    return {name: model[twin if twin in model else name] for name, twin in twins.items()}


@pytest.mark.parametrize("case", LAYOUTS)
def test_names_of_the_reference_s_configurations(case: Case) -> None:
    """Whatever network: only the names of modules count."""
    model, kind = reference_model(case), policy_name(case.name)
    base = below(model, "actor.") or below(model, "network.")
    policy = {f"actor.{name}": value for name, value in base.items()}
    policy |= {name: value for name, value in model.items() if roots([name]) <= {"actor", "actor_ft", "eta"}}
    if kind != "diffusion":
        policy = {f"actor_ft.{name}": value for name, value in base.items()} | policy
    pretrained = roots(model) == {"network"}
    weights = {"policy": policy, "ema" if pretrained else "critic": policy if pretrained else below(model, "critic.")}
    config = {"policy": {"name": kind}, "algorithm": {"name": "bc" if pretrained else "ppo"}}
    converted = to_reference(Checkpoint(weights, {}, config, 7, "ema" if pretrained else "policy"))
    assert same(dict(converted.model), model)
    assert same(converted.ema, model if pretrained else None)


@pytest.mark.parametrize("case", [param for param in LAYOUTS if param.values[0].name in config_names()])
def test_the_reference_s_configurations_that_are_ours(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulators need not be there, of which only the dims count."""
    monkeypatch.setattr("dppo_fast.envs.make_env", lambda settings, *_: StatedEnv(case.name, settings))
    model = reference_model(case)
    average = {name: value + 1 for name, value in model.items()}
    reference = ReferenceCheckpoint(3, model, average if "/pre_" in case.name else None)
    checkpoint = from_reference(reference, configured([case.name, "env.normalization=none"]))
    assert same(vars(to_reference(checkpoint)), vars(reference))


def test_a_published_policy_is_its_averaged_weights(ours: dict[str, Path], theirs: dict[str, Path]) -> None:
    average = Checkpoint.load(ours["pre"]).policy_only()
    expected = contents(theirs["pre"])["ema"]
    converted = to_reference(average)
    assert same(dict(converted.model), expected)
    assert same(converted.ema, expected)


def test_a_run_s_latest_checkpoint(ours: dict[str, Path], theirs: dict[str, Path], tmp_path: Path) -> None:
    assert main([f"source={ours['ft'].parent.parent}", f"out={tmp_path}/state.pt"]) == 0
    assert same(contents(tmp_path / "state.pt"), contents(theirs["ft"]))


def test_acting_needs_nothing_but_the_file(
    theirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, file = np.random.default_rng(0), tmp_path / "normalization.npz"
    made = MinMax.from_data(rng.normal(size=(20, 11)), rng.normal(size=(20, 3)))
    made.save(file)
    override = f"env.normalization={file}"
    assert main([f"source={theirs['eta']}", f"out={tmp_path}/policy.safetensors", *RUNS["eta"], override]) == 0
    assert publish([f"checkpoint={tmp_path}/policy.safetensors", f"out={tmp_path}/small.safetensors"]) == 0
    file.unlink()
    monkeypatch.chdir(tmp_path)
    for name in ("policy", "small"):
        loaded = load_policy(f"{name}.safetensors", torch.device("cpu"))
        assert loaded.normalization is not None
        assert same(loaded.normalization.state_dict(), made.state_dict())
        assert (loaded.policy.schedule.steps, loaded.policy.ft_steps) == (4, 4)
        env = loaded.make_env(2, torch.device("cpu"), seed=0)
        action = loaded.policy.act(env.reset()).action
        np.testing.assert_array_equal(env.raw_obs["state"].shape, (2, 1, 11))
        env.step(action)
        env.close()


def test_the_reports(theirs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.safetensors"
    assert main([f"source={theirs['ft']}", f"out={out}", *FT]) == 0
    assert main([f"source={out}", f"out={tmp_path}/a.pt"]) == 0
    sizes = {
        name: sum(value.numel() for key, value in contents(theirs["ft"])["model"].items() if key.startswith(f"{name}."))
        for name in ("actor", "actor_ft", "critic")
    }
    weights = ", ".join(f"{name} {size:,}" for name, size in sizes.items()) + " weights"
    assert capsys.readouterr().out.splitlines() == [
        f"{theirs['ft']} (reference fine-tuning, iteration 6): {weights}",
        f"{out}: 0.0 MB",
        f"{out} (policy after iteration 7): {weights}; F 2; observations state [1, 11] and 3 action dims; "
        "normalised by action_max, action_min, obs_max, obs_min",
        f"{tmp_path}/a.pt: 0.0 MB",
    ]


@pytest.fixture(scope="module")
def damaged(theirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files that cannot be converted."""
    folder = tmp_path_factory.mktemp("damaged")
    ft, pre = contents(theirs["ft"]), contents(theirs["pre"])
    model = ft["model"]
    changes: dict[str, Mapping[str, Any]] = {
        "no_actor_ft": {"model": {key: value for key, value in model.items() if "actor_ft.mlp" not in key}},
        "annealed": {"model": model | {key: value + 1 for key, value in model.items() if key.startswith("network.")}},
        "extra": {"model": model | {"actor.extra": torch.ones(1)}},
        "nan": {"model": {key: value * torch.nan for key, value in model.items()}},
        "text": {"itr": "6"},
        "scalars": {"model": {"actor.weight": 1.0}},
    }
    files = {name: folder / f"{name}.pt" for name in [*changes, "no_itr", "no_epoch", "list", "object", "noise"]}
    for name, change in changes.items():
        torch.save(ft | change, files[name])
    torch.save({"model": model}, files["no_itr"])
    torch.save({"ema": pre["ema"]}, files["no_epoch"])
    torch.save([1, 2], files["list"])
    torch.save(ft | {"config": Path("x")}, files["object"])
    files["noise"].write_bytes(b"noise")
    return files


WALKER = ["cfg=gym/finetune/walker2d-v2/ft_ppo_diffusion_mlp", *FT[1:], "env.normalization=none"]
RENAMED = r"reference's \{epoch, model, ema\} and \{itr, model\}"


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("ft", [], "cfg=<name> is missing: the weights alone tell neither"),
        ("ft", ["cfg=gym/finetune/hoper"], "cfg=gym/finetune/hoper is unknown; nearest: gym/finetune/hopper-v2/"),
        ("ft", [*FT, "policy.netwrk=3"], "policy.netwrk is unknown"),
        ("ft", PRE, "cfg has algorithm.name=bc, but source is of fine-tuning, iteration 6"),
        ("pre", FT, "cfg has algorithm.name=dppo, but source is of pre-training, epoch 7"),
        ("ft", WALKER, r"source does not fit walker2d-medium-v2 \(observations state \[1, 17\] and 6 action dims\): "
            r"fine-tuning, iteration 6: .* has shape \[\d+.*\], this configuration needs \[\d+"),
        ("ft", FT[:1], r"this configuration needs \[512"),
        ("ft", RUNS["eta"], "source does not fit .*it lacks eta.eta_logit"),
        ("eta", FT, "source holds eta.eta_logit, which has no place in policy.name=diffusion"),
        ("ft", RUNS["gaussian"], "source does not fit hopper-medium-v2 .*belongs to another network: it lacks actor"),
        ("no_actor_ft", FT, "does not fit .* it lacks actor_ft.mlp_mean"),
        ("annealed", FT, "source holds network.* which has no place"),
        ("extra", FT, "source holds actor.extra, which has no place"),
        ("nan", FT, "holds NaN or Inf"),
        ("text", FT, "source: .*/text.pt: holds no number in itr or no weights in model"),
        ("scalars", FT, "source: .*/scalars.pt: holds no number in itr or no weights in model"),
        ("no_itr", FT, f"source: .*/no_itr.pt: holds no itr, unlike the {RENAMED}"),
        ("no_epoch", PRE, f"source: .*/no_epoch.pt: holds no epoch and no model, unlike the {RENAMED}"),
        ("list", FT, "source: .*/list.pt: holds no itr and no model"),
        ("object", FT, "source: .*/object.pt: not readable as tensors alone .* never unpickled"),
        ("noise", FT, "source: .*/noise.pt: not readable as tensors alone"),
    ],
)  # fmt: skip
def test_files_of_the_reference_that_do_not_convert(
    source: str,
    arguments: list[str],
    message: str,
    theirs: dict[str, Path],
    damaged: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = {**theirs, **damaged}[source]
    assert main([f"source={file}", f"out={tmp_path}/out.safetensors", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*({message}).*\n", error), error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "out is missing|source is missing"),
        ("source={ours} out=a.pt surce=3", r"surce is unknown \(did you mean source"),
        ("source=/nope.pt out=a.safetensors", "source: /nope.pt: no such checkpoint"),
        ("source=/nope out=a.pt", "source: /nope: no such checkpoint"),
        ("source={ours} out=a.safetensors", "out=a.safetensors must end in .pt"),
        ("source={theirs} out=a.pt {cfg}", "out=a.pt must end in .safetensors"),
        ("source={ours} out=a.pt {cfg}", "cfg is for files of the reference; .*: remove all but source and out"),
        ("source={ours} out=nowhere/a.pt", "out=nowhere/a.pt is not writable"),
        ("out=a.safetensors {cfg}", "source is missing"),
    ],
)
def test_arguments(
    arguments: str,
    message: str,
    ours: dict[str, Path],
    theirs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = arguments.format(ours=ours["ft"], theirs=theirs["ft"], cfg=" ".join(FT)).split()
    assert main(given) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*({message}).*\n", error), error
    assert not list(tmp_path.iterdir())


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("python -m dppo_fast.convert")
    assert "source: ???" in text


def test_step_annealing_shows_in_the_description(ours: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.load(ours["ft"])
    interface = {**checkpoint.state["interface"], "ft_steps": 1}
    replace(checkpoint, state={"interface": interface}).save(tmp_path / "annealed.safetensors")
    assert "; F 1;" in load_policy_weights(tmp_path / "annealed.safetensors").describe()
    assert load_policy(tmp_path / "annealed.safetensors", torch.device("cpu")).policy.ft_steps == 1


@pytest.mark.skipif(REFERENCE is None, reason="DPPO_REFERENCE names no checkout of irom-princeton/dppo")
def test_the_reference_loads_what_we_write(
    ours: dict[str, Path], theirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own classes take the files with strict names, and act as we do."""
    monkeypatch.setattr(sys, "path", [str(REFERENCE), *sys.path])
    get = {
        name: getattr(import_module(f"model.{module}"), name)
        for name, module in {
            "DiffusionModel": "diffusion.diffusion",
            "DiffusionEval": "diffusion.diffusion_eval",
            "PPODiffusion": "diffusion.diffusion_ppo",
            "DiffusionMLP": "diffusion.mlp_diffusion",
            "EtaFixed": "diffusion.eta",
            "GaussianModel": "common.gaussian",
            "Gaussian_MLP": "common.mlp_gaussian",
            "CriticObs": "common.critic",
            "PPO_Gaussian": "rl.gaussian_ppo",
        }.items()
    }
    dims = {"horizon_steps": 4, "action_dim": 3}
    style = {"mlp_dims": [16, 16, 16], "activation_type": "ReLU", "residual_style": True}

    def network() -> Any:
        return get["DiffusionMLP"](cond_dim=11, time_dim=16, **style, **dims)

    def critic(width: int) -> Any:
        return get["CriticObs"](cond_dim=11, mlp_dims=[width] * 3, activation_type="Mish", residual_style=True)

    def gaussian(**options: Any) -> Any:
        return get["Gaussian_MLP"](action_dim=3, horizon_steps=1, cond_dim=11, mlp_dims=[8, 8], **options)

    common = {"obs_dim": 11, "denoising_steps": 4, "device": "cpu", **dims}
    ppo = {"gamma_denoising": 0.99, "clip_ploss_coef": 0.01, **common}
    gaussian_common = {"horizon_steps": 1, "device": "cpu"}
    eta = {"use_ddim": True, "ddim_steps": 4, "eta": get["EtaFixed"](base_eta=1, max_eta=1)}
    models = {
        "pre": get["DiffusionModel"](network(), **common),
        "gaussian_pre": get["GaussianModel"](gaussian(activation_type="Mish", fixed_std=0.1), **gaussian_common),
        "ft": get["PPODiffusion"](actor=network(), critic=critic(8), ft_denoising_steps=2, **ppo),
        "eta": get["PPODiffusion"](actor=network(), critic=critic(8), ft_denoising_steps=4, **eta, **ppo),
        "gaussian": get["PPO_Gaussian"](
            actor=gaussian(activation_type="ReLU"), critic=critic(256), clip_ploss_coef=0.1, **gaussian_common
        ),
    }
    for name, model in models.items():
        content = contents(theirs[name])
        model.load_state_dict(content["model"])
        if "ema" in content:
            model.load_state_dict(content["ema"])

    obs = {"state": torch.rand(5, 1, 11)}
    for name in ("gaussian_pre", "gaussian"):
        mean = models[name].network(obs)[0].view(5, 1, 3)
        action = load_policy(ours[name], torch.device("cpu")).policy.act(obs, deterministic=True).action
        torch.testing.assert_close(action, mean)
    chain = torch.randn(5, 5, 4, 3)
    draws = iter(chain)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: next(draws))
    monkeypatch.setattr(torch, "randn_like", lambda *_, **__: next(draws))
    evaluated = get["DiffusionEval"](
        theirs["ft"], ft_denoising_steps=2, network=network(), randn_clip_value=3, **common
    )
    expected = evaluated(obs, deterministic=True).trajectories
    monkeypatch.undo()
    policy: Any = load_policy(ours["ft"], torch.device("cpu")).policy
    torch.testing.assert_close(policy.sample(obs, chain, deterministic=True).action, expected)
