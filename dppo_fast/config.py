"""From a composed configuration to typed objects; every mistake is a UserError that names the key."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dppo_fast.types import UserError

T = TypeVar("T")


def typed(schema: type[T], node: Any, key: str) -> T:
    """``node`` as the dataclass ``schema``: unknown keys, missing values and wrong types are refused."""
    try:
        merged = OmegaConf.merge(_writable(OmegaConf.structured(schema)), node)
        if missing := OmegaConf.missing_keys(merged):
            raise UserError(f"{key}.{min(missing)} is missing")
        result: T = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, key, list(schema.__dataclass_fields__))) from error  # type: ignore[attr-defined]
    return result


def construct(cls: type[T], arguments: Mapping[str, Any], key: str, **derived: Any) -> T:
    """``cls(**derived, **arguments)``, refusing arguments that it does not take."""
    accepted = [name for name in inspect.signature(cls).parameters if name not in derived]
    for name in arguments:
        if name in derived:
            raise UserError(f"{key}.{name} follows from the environment or the data; remove it")
        if name not in accepted:
            raise UserError(f"{key}.{name} is unknown{did_you_mean(name, accepted)}; {key} takes {', '.join(accepted)}")
    try:
        return cls(**derived, **arguments)
    except TypeError as error:
        raise UserError(f"{key}: {error}") from error


def choose(table: Mapping[str, T], name: Any, key: str) -> T:
    """``table[name]``; an unknown name lists the known ones."""
    if name not in table:
        raise UserError(
            f"{key}={name} is unknown{did_you_mean(str(name), list(table))}; choose one of {', '.join(table)}"
        )
    return table[name]


def did_you_mean(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def plain(node: DictConfig) -> dict[str, Any]:
    """The configuration as dicts, lists and scalars, interpolations resolved."""
    try:
        container = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, "", [])) from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def resolve_path(path: str) -> str:
    """``asset:<name>`` is a file that the package ships; anything else is taken as it is."""
    if not path.startswith("asset:"):
        return path
    name = path.removeprefix("asset:")
    file = Path(str(resources.files("dppo_fast"))) / "assets" / name
    if not file.exists():
        raise UserError(f"{path}: the package ships no such file; there are {', '.join(sorted(_assets())) or 'none'}")
    return str(file)


def _writable(node: DictConfig) -> DictConfig:
    """Frozen dataclasses make read-only nodes, which would refuse the merge."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        if not OmegaConf.is_missing(node, key) and isinstance(child := node[key], DictConfig):
            _writable(child)
    return node


def _assets() -> list[str]:
    folder = Path(str(resources.files("dppo_fast"))) / "assets"
    return [f"asset:{file.relative_to(folder)}" for file in folder.rglob("*") if file.is_file()]


def _explain(error: OmegaConfBaseException, key: str, known: list[str]) -> str:
    full = ".".join(part for part in (key, str(error.full_key or "")) if part)
    reason = str(error).splitlines()[0]
    return f"{full}: {reason}{did_you_mean(str(error.key), known)}" if known else f"{full}: {reason}"
