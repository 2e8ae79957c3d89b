"""What the mains share: Hydra behind ``cfg=<name>``, and one line with exit code 2 for a user's mistake."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import wraps
from importlib import resources
from pathlib import Path

from dppo_fast.types import UserError

HYDRA_DEFAULTS = (
    "hydra.run.dir=.",
    "hydra.sweep.dir=.",
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)
"""The run directory is ours (``logdir``), not Hydra's."""


def config_folder() -> Path:
    return Path(str(resources.files("dppo_fast"))) / "cfg"


def config_names() -> list[str]:
    """Every ``cfg=`` name: the configs that are whole runs, not the pieces that they are composed of."""
    folder = config_folder()
    files = [file.relative_to(folder).with_suffix("") for file in folder.rglob("*.yaml")]
    return sorted(name.as_posix() for name in files if name.parts[0] not in ("piece",))


def hydra_arguments(arguments: Sequence[str]) -> list[str]:
    """Our command line as Hydra's: ``cfg=<name>`` picks the config, ``resume=<run>`` the run's own.

    Raises UserError for an unknown or missing name.
    """
    settings = dict(argument.split("=", 1) for argument in arguments if "=" in argument and argument[0] != "-")
    rest = [argument for argument in arguments if not argument.startswith("cfg=")]
    name, run = settings.get("cfg"), settings.get("resume")
    if run is not None and name is None:
        if not (Path(run) / "config.yaml").is_file():
            raise UserError(f"resume={run}: not a run directory, it holds no config.yaml")
        # Hydra's grammar does not know every character that a path may hold
        quoted = [f"resume='{run}'" if argument.startswith("resume=") else argument for argument in rest]
        return ["--config-dir", str(Path(run).resolve()), "--config-name", "config", *quoted, *HYDRA_DEFAULTS]
    if name is None:
        if any(argument in ("--help", "-h", "--hydra-help") for argument in arguments):
            name = "quickstart"
        else:
            raise UserError(f"cfg=<name> is missing; for example {', '.join(config_names()[:4])}")
    names = config_names()
    if name not in names:
        near = get_close_matches(name, names, n=3, cutoff=0.3)
        raise UserError(f"cfg={name} is unknown; nearest: {', '.join(near) or ', '.join(names)}")
    return ["--config-name", name, *rest, *HYDRA_DEFAULTS]


def guarded(run: Callable[[], None]) -> int:
    """Run a main: 0, or 2 after one line on a user's mistake. Anything else keeps its traceback."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (HydraException, OmegaConfBaseException) as error:
        lines = dict.fromkeys(str(part).strip().splitlines()[0] for part in (error, error.__cause__) if part)
        print(f"error: {'; '.join(lines)}", file=sys.stderr)
        return 2
    return 0


def hydra_main(task: Callable[..., None], arguments: Sequence[str]) -> int:
    """Compose the configuration that ``arguments`` describe and hand it to ``task``."""
    import hydra

    mistakes: list[UserError] = []

    @wraps(task)
    def job(node: object) -> None:
        try:
            task(node)
        except UserError as error:  # Hydra would print a line of its own about it
            mistakes.append(error)

    def run() -> None:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing
        sys.argv = [sys.argv[0], *hydra_arguments(arguments)]
        hydra.main(version_base=None, config_path=str(config_folder()), config_name=None)(job)()
        if mistakes:
            raise mistakes[0]

    return guarded(run)
