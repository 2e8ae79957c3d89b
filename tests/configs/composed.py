"""Configurations as Hydra composes them, each once."""

from __future__ import annotations

from functools import cache

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dppo_fast.cli import config_folder


@cache
def composed(name: str) -> DictConfig:
    """``cfg=<name>`` with a run directory; not to be changed."""
    with initialize_config_dir(str(config_folder()), version_base=None):
        return compose(name, ["logdir=unset"])


def overridden(*arguments: str) -> DictConfig:
    """What ``python -m dppo_fast.train`` composes of ``arguments``, the first of which starts with ``cfg=``."""
    cfg, *overrides = sorted(arguments, key=lambda argument: not argument.startswith("cfg="))
    with initialize_config_dir(str(config_folder()), version_base=None):
        return compose(cfg.removeprefix("cfg="), overrides)
