"""The pages in `docs/` name what exists, and the example that they give works."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dppo_fast.algorithms import ALGORITHMS
from dppo_fast.cli import config_folder, config_names
from dppo_fast.log import read_metrics
from dppo_fast.policies.base import Policy
from dppo_fast.train import main as train
from tests.algorithms.learning_tasks import Learner, diffusion, gaussian
from tests.algorithms.off_policy import check_capturable, parts
from tests.algorithms.test_learning import FAST, MARGIN
from tests.runs import COMMON, SMALL_DIFFUSION, SMALL_ENV
from tests.small import diffusion_policy

ROOT = Path(__file__).parent.parent
ALGORITHMS_PAGE, EXTENDING_PAGE = ((ROOT / "docs" / name).read_text() for name in ("algorithms.md", "extending.md"))


def sections() -> dict[str, str]:
    """What is said of each algorithm."""
    _, *parts = re.split(r"^### `(\w+)`$", ALGORITHMS_PAGE.partition("\n## Where ours differ")[0], flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def block(language: str) -> str:
    """The only block in this language on the page about extending."""
    (code,) = re.findall(rf"```{language}\n(.*?)```", EXTENDING_PAGE, re.DOTALL)
    return code


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's algorithm as a module."""
    file = tmp_path / "filtered_bc.py"
    file.write_text(block("python"))
    spec = importlib.util.spec_from_file_location("filtered_bc", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "filtered_bc", module)
    spec.loader.exec_module(module)
    return module


def test_every_algorithm_has_a_section() -> None:
    assert set(sections()) == set(ALGORITHMS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_section_has_a_formula_a_paper_and_a_configuration_that_runs_it(name: str) -> None:
    section = sections()[name]
    assert section.count("```math\n") == 1
    assert re.search(r"\]\(https://(arxiv\.org/abs/\d{4}\.\d{5}|doi\.org/\S+)\)", section)
    assert re.search(r"^- Configurations?: `", section, re.MULTILINE)


def test_configurations_exist() -> None:
    named = re.findall(r"`((?:gym/|quickstart)[\w/-]*)`|cfg=([\w/-]+)", ALGORITHMS_PAGE + EXTENDING_PAGE)
    assert len(named) > len(ALGORITHMS)
    assert {name or argument for name, argument in named} <= set(config_names())


def test_the_tests_in_the_table_of_differences_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(?:\w+::)?(\w+)`", ALGORITHMS_PAGE)
    assert len(named) == ALGORITHMS_PAGE.count("`tests/")
    for file, test in named:
        functions = (
            node for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)
        )
        assert test in {function.name for function in functions}, f"{file}::{test}"


@pytest.mark.parametrize("page", ["algorithms.md", "extending.md", "kernels.md", "migrating.md", "profiling.md"])
def test_links_and_files_exist(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
        assert (ROOT / "docs" / target).exists(), f"{page}: {target}"


def test_the_example_is_short() -> None:
    assert len(block("python").splitlines()) < 60


@pytest.mark.parametrize("policy", [diffusion, gaussian])
def test_the_example_learns_to_choose_the_best_mode(policy: Callable[[], Policy], example: ModuleType) -> None:
    options = {"batch_size": 64, "buffer_size": 256, "replay_ratio": 8, **FAST}
    before, after = Learner(policy, options).learn(example.FilteredBC, example.FilteredBCConfig)
    assert after > before + MARGIN, (before, after)


def test_the_example_can_be_captured(example: ModuleType) -> None:
    config = example.FilteredBCConfig(batch_size=8, replay_ratio=2)
    check_capturable(example.FilteredBC(config, parts(diffusion_policy(ft_denoising_steps=0))))


def test_the_example_runs_with_its_configuration(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = OmegaConf.create(block("yaml"))
    monkeypatch.setitem(ALGORITHMS, node.name, (example.FilteredBC, example.FilteredBCConfig))
    with initialize_config_dir(str(config_folder()), version_base=None):
        config = compose("gym/finetune/hopper-v2/ft_dql_diffusion_mlp", [f"logdir={tmp_path}/run"])
    config.algorithm = node
    OmegaConf.save(config, tmp_path / "filtered_bc.yaml")
    small = [*COMMON, *SMALL_ENV, *SMALL_DIFFUSION, "policy.checkpoint=null", "critic.mlp_dims=[8,8,8]"]
    short = ["algorithm.batch_size=4", "algorithm.n_critic_warmup_itr=1", "train.n_train_itr=2", "train.n_steps=4"]
    assert train([f"cfg={tmp_path}/filtered_bc.yaml", *small, *short]) == 0
    first, last = read_metrics(tmp_path / "run" / "metrics.jsonl")[1:]
    assert "loss/critic" in first
    assert "loss/actor" not in first
    assert "loss/actor" in last
