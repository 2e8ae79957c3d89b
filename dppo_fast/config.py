"""From a composed configuration to typed objects; every mistake is a UserError that names the key."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field, is_dataclass, make_dataclass
from difflib import get_close_matches
from functools import reduce
from importlib import resources
from operator import or_
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from dppo_fast.downloads import fetch
from dppo_fast.types import UserError

T = TypeVar("T")


def typed(schema: type[T], node: Any, key: str) -> T:
    """``node`` as the dataclass ``schema``: unknown keys, missing values and wrong types are refused."""
    try:
        empty = _writable(OmegaConf.structured(schema))
        for name, value in node.items():
            if is_dataclass(OmegaConf.get_type(empty, name)) and not isinstance(value, Mapping):
                full = _join(key, name)
                raise UserError(f"{full}={value}: {full} is a group of keys, set {full}.<key>=<value>")
        merged = OmegaConf.merge(empty, node)
        if missing := OmegaConf.missing_keys(merged):
            raise UserError(f"{_join(key, min(missing))} is missing")
        result: T = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, key, list(schema.__dataclass_fields__))) from error  # type: ignore[attr-defined]
    return result


def construct(cls: type[T], arguments: Mapping[str, Any], key: str, **derived: Any) -> T:
    """``cls(**derived, **arguments)``, refusing arguments that it does not take, by name, type or value."""
    types = _parameters(cls)
    accepted = [name for name in types if name not in derived]
    for name in arguments:
        if name in derived:
            raise UserError(f"{key}.{name} follows from the environment or the data; remove it")
        if name not in accepted:
            raise UserError(f"{key}.{name} is unknown{did_you_mean(name, accepted)}; {key} takes {', '.join(accepted)}")
    fields = [(name, _omegaconf_type(types[name]), _field(types[name])) for name in arguments]
    schema = make_dataclass("Arguments", fields, kw_only=True)
    values = vars(typed(schema, arguments, key))
    for name, value in values.items():
        if isinstance(value, list) and min(value, default=1) < 1:
            raise UserError(f"{key}.{name}={value}: every width must be at least 1")
    with naming(key):
        return cls(**derived, **values)


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


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Put ``key`` before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{key}: {error}") from error


def plain(node: DictConfig) -> dict[str, Any]:
    """The configuration as dicts, lists and scalars, interpolations resolved."""
    try:
        container = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, "", [])) from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def resolve_path(path: str) -> str:
    """``asset:<name>`` is a file that the package ships; of others, published ones are downloaded when missing."""
    if not path.startswith("asset:"):
        return fetch(path)
    name = path.removeprefix("asset:")
    file = Path(str(resources.files("dppo_fast"))) / "assets" / name
    if not file.exists():
        shipped = ", ".join(sorted(_assets())) or "none"
        raise UserError(f"{path}: the package ships no such file; there are {shipped}")
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
    return [f"asset:{file.relative_to(folder)}" for file in folder.glob("*/*") if file.is_file()]


def _parameters(cls: type) -> dict[str, Any]:
    """Name -> type of what the constructor takes; by ``**options`` it takes what the next class in line takes.

    Keyword-only parameters are for subclasses, not for users.
    """
    types: dict[str, Any] = {}
    for base in cls.__mro__:
        if initializer := vars(base).get("__init__"):
            _, *parameters = inspect.signature(initializer).parameters.values()
            hints = get_type_hints(initializer)
            types = {p.name: hints[p.name] for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD} | types
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return types


def _field(hint: Any) -> Any:
    """Groups of keys start from their defaults."""
    return field(default_factory=hint) if isinstance(hint, type) and is_dataclass(hint) else field()


def _omegaconf_type(hint: Any) -> Any:
    """A parameter's type in the words of OmegaConf, which knows lists but no other sequences."""
    if get_origin(hint) is Sequence:
        return list[get_args(hint)]  # type: ignore[misc]
    if get_origin(hint) is UnionType:
        return reduce(or_, map(_omegaconf_type, get_args(hint)))
    return hint


def _join(*keys: object) -> str:
    return ".".join(str(key) for key in keys if key)


def _explain(error: OmegaConfBaseException, key: str, known: list[str]) -> str:
    full, reason = _join(key, error.full_key), str(error).splitlines()[0]
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        return f"{full} is unknown{did_you_mean(str(error.key), known) or '; choose one of ' + ', '.join(known)}"
    if access := re.search(r"trying to access (.+): node `(.+)` is not a container", reason):
        return f"{access[2]} must be a group of keys: {full} follows from {access[1]}"
    return f"{full}: {reason}"
