"""What the mains share: Hydra behind ``cfg=<name>``, and one line with exit code 2 for a user's mistake."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher, get_close_matches
from fnmatch import fnmatchcase
from functools import cache, wraps
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from dppo_fast.types import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

T = TypeVar("T")

HELP = {"--help", "-h"}
INTERRUPTED = 130
"""The exit code after Ctrl-C."""

HYDRA_DEFAULTS = (
    "hydra.run.dir=.",
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
    return sorted(name.as_posix() for name in files if name.parts[0] != "piece")


SHOWN = ("env.id", "algorithm.name", "policy.network.name")
"""Keys of a configuration that `outline` tells."""


def outline(name: str) -> tuple[str, str, str]:
    """Task, algorithm and network of a configuration, read off its defaults: for a list Hydra would take too long."""
    said = _said(f"/{name}", "")
    task, algorithm, network = (said.get(key) for key in SHOWN)
    return str(task), str(algorithm or "evaluation"), str(network)


@cache
def _said(name: str, package: str) -> dict[str, str]:
    """What the file ``name``, put under the key ``package``, and its defaults say of `SHOWN`; the last word holds."""
    import yaml

    text = (config_folder() / f"{name[1:]}.yaml").read_text()
    node = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    said: dict[str, str] = {}
    for entry in node.get("defaults", []):
        if entry != "_self_":
            where, choice = next(iter(entry.items())) if isinstance(entry, dict) else (entry, "")
            path, _, inside = where.partition("@")
            path = path if path[0] == "/" else f"{name.rpartition('/')[0]}/{path}"
            inside = package if inside in ("", "_here_") else f"{package}.{inside}".lstrip(".")
            said |= _said(f"{path}/{choice}".rstrip("/"), inside)
    for key in SHOWN:
        if key.startswith(package):
            value: Any = node
            for part in key.removeprefix(package).strip(".").split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value is not None:
                said[key] = value
    return said


def print_list(patterns: Sequence[str]) -> None:
    """The configurations whose names contain one of ``patterns``, or match it where it has a star; all without one."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    matching = [pattern if "*" in pattern else f"*{pattern}*" for pattern in patterns or "*"]
    rows = [
        (name, *outline(name)) for name in config_names() if any(fnmatchcase(name, pattern) for pattern in matching)
    ]
    if not rows:
        raise UserError(f"no configuration matches {' '.join(patterns)}; --list alone shows all")
    if not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table("configuration", "task", "algorithm", "network", box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def config_source(arguments: Sequence[str]) -> list[str]:
    """Hydra's arguments for what ``cfg=<name or file>``, or else ``resume=<run>``, names.

    Raises UserError for an unknown or missing name, and for a file that is no YAML.
    """
    settings = dict(argument.split("=", 1) for argument in arguments if "=" in argument and argument[0] != "-")
    name, run = settings.get("cfg"), settings.get("resume")
    if run is not None and not Path(run, "config.yaml").is_file():
        raise UserError(f"resume={run}: not a run directory, it holds no config.yaml")
    if name is None and run is None:
        raise UserError("cfg=<name> is missing, for example cfg=quickstart; --list shows all")
    if name is None or name.endswith(".yaml"):
        file = Path(name or f"{run}/config.yaml")
        if not file.is_file():
            raise UserError(f"cfg={name}: no such file; give one, or a name that --list shows")
        _check_grammar(file)
        return ["--config-dir", str(file.parent.resolve()), "--config-name", file.stem]
    if name not in (names := config_names()):
        near = get_close_matches(name, names, n=3, cutoff=0.3)
        raise UserError(f"cfg={name} is unknown; nearest: {', '.join(near) or 'none'}; --list shows all")
    return ["--config-name", name]


def _check_grammar(file: Path) -> None:
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        content = OmegaConf.load(file)
        defaults = content.get("defaults", []) if isinstance(content, DictConfig) else []
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file}: not a readable configuration: {' '.join(str(error).split())}") from error
    if not (isinstance(defaults, list | ListConfig) and all(isinstance(entry, str | DictConfig) for entry in defaults)):
        raise UserError(f"{file}: defaults={defaults} must be a list of configurations, as in [quickstart, _self_]")


def hydra_arguments(arguments: Sequence[str]) -> list[str]:
    """What of our command line is left for Hydra: flags, which it wants first, and overrides."""
    rest = [argument for argument in arguments if not argument.startswith("cfg=")]
    # a run's path may hold characters that are not in Hydra's grammar
    rest = [re.sub(r"^resume=([^']+)$", r"resume='\1'", argument) for argument in rest]
    return sorted(rest, key=lambda argument: argument[:1] != "-" and ("=" in argument or argument[:1] == "~"))


def guarded(run: Callable[[], object]) -> int:
    """Run a main: 0, or 2 after one line on a user's mistake, or 130 after one on Ctrl-C, which may say how to go on;
    128 + its number after another signal.

    Anything else keeps its traceback.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (HydraException, OmegaConfBaseException) as error:
        parts = (getattr(error, "override", None), error, error.__cause__)
        texts = (str(part).strip() for part in parts if part)
        lines = dict.fromkeys(text.splitlines()[0] for text in texts if text)
        print(f"error: {'; '.join(lines)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print("; ".join(["interrupted", *map(str, interruption.args)]), file=sys.stderr)
        return getattr(interruption, "code", INTERRUPTED)
    return 0


def command_main(schema: type[T], command: Callable[[T], object], arguments: Sequence[str], usage: str) -> int:
    """Run ``command`` with ``key=value`` arguments, which the dataclass ``schema`` describes; --help explains both."""

    def run() -> None:
        from omegaconf import OmegaConf

        from dppo_fast.config import typed

        if HELP.intersection(arguments):
            print(usage)
            print(OmegaConf.to_yaml(OmegaConf.structured(schema)), end="")
            return
        if wrong := [argument for argument in arguments if "=" not in argument]:
            raise UserError(f"{wrong[0]}: not of the form key=value")
        command(typed(schema, OmegaConf.from_dotlist(list(arguments)), ""))

    return guarded(run)


def described_main(schema: type[T], command: Callable[..., object], arguments: Sequence[str], usage: str) -> int:
    """As `command_main`; where ``cfg=`` and its overrides describe a run, that is the command's second argument."""
    if not any(argument.startswith("cfg=") for argument in arguments):
        return command_main(schema, command, arguments, usage)
    keys = tuple(f"{name}=" for name in schema.__dataclass_fields__)  # type: ignore[attr-defined]
    own = [argument for argument in arguments if argument.startswith(keys)]

    def described(node: DictConfig) -> None:
        from omegaconf import OmegaConf

        from dppo_fast.config import plain, typed

        command(typed(schema, OmegaConf.from_dotlist(own), ""), plain(node))

    return hydra_main(described, [argument for argument in arguments if argument not in own], usage)


def hydra_main(task: Callable[[DictConfig], object], arguments: Sequence[str], usage: str) -> int:
    """Compose the configuration that ``arguments`` describe and hand it to ``task``."""

    def run() -> None:
        if HELP.intersection(arguments) and not any(argument.startswith("cfg=") for argument in arguments):
            print(usage)
            return
        if "--list" in arguments:
            print_list([argument for argument in arguments if argument != "--list"])
            return
        source = config_source(arguments)
        if {"--multirun", "-m"}.intersection(arguments):
            _require_own_folders(arguments)
        with TemporaryDirectory() as scratch:  # Hydra describes a --multirun there
            defaults = [*HYDRA_DEFAULTS, f"hydra.sweep.dir={scratch}"]
            try:
                _compose(task, [*source, *hydra_arguments(arguments), *defaults])
            except Exception as error:
                if unknown := re.match(r"Could not override '(.+?)'", str(error)):
                    keys: list[str] = []
                    _compose(lambda node: keys.extend(_keys(node)), [*source, *defaults])
                    near = _nearest_keys(unknown[1], keys)
                    raise UserError(f"{unknown[1]} is unknown; nearest: {', '.join(near)}") from error
                raise

    return guarded(run)


def _require_own_folders(arguments: Sequence[str]) -> None:
    """Of the jobs of a --multirun, before the first one starts."""
    for folder in (argument.removeprefix("logdir=") for argument in arguments if argument.startswith("logdir=")):
        if not any(mark in folder for mark in ("${", ",")):
            example = f"logdir='{folder}/${{seed}}'"
            raise UserError(
                f"logdir={folder}: every job of a --multirun needs its own, as {example} gives; or leave it out"
            )


def _compose(task: Callable[[DictConfig], object], arguments: Sequence[str]) -> None:
    import hydra

    mistakes: list[UserError] = []

    @wraps(task)
    def job(node: DictConfig) -> None:
        try:
            task(node)
        except UserError as error:  # Hydra would print a line of its own about it
            mistakes.append(error)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing
    own, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        hydra.main(version_base=None, config_path=str(config_folder()), config_name=None)(job)()
    finally:
        sys.argv = own
    if mistakes:
        raise mistakes[0]


def _keys(node: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """All keys of a configuration, dotted."""
    from omegaconf import OmegaConf

    for key in node:
        yield f"{prefix}{key}"
        if not OmegaConf.is_interpolation(node, key) and isinstance(node[key], Mapping):
            yield from _keys(node[key], f"{prefix}{key}.")


def _nearest_keys(wrong: str, keys: Sequence[str]) -> list[str]:
    """The three keys that look most like ``wrong`` as a whole or in their last part."""

    def likeness(key: str) -> float:
        pairs = ((wrong, key), (wrong.rpartition(".")[2], key.rpartition(".")[2]))
        return max(SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return sorted(keys, key=likeness, reverse=True)[:3]
