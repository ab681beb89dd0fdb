"""Read a configuration from YAML and ``key=value`` and check it: unknown keys, types, bounds, choices."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from training.config import Config


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read the YAML file at `path` and apply ``section.key=value`` edits, whose values are YAML too.

    Raises:
        ValueError, TypeError: an unknown key (with the nearest known one), a value of another type or out of bounds.
    """
    path = Path(path)
    if not path.is_file():
        presets = ", ".join(sorted(file.name for file in path.parent.glob("*.yaml"))) or "no YAML files"
        raise ValueError(f"config: no file {path}; beside it there are {presets}")
    try:
        values = _yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    except UnicodeDecodeError as error:
        raise ValueError(f"config: {path} must be UTF-8: {error}") from error
    if not isinstance(values, dict):
        raise TypeError(f"config: {path} must hold a mapping, got {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return config_from_dict(values)


def config_from_dict(values: dict[str, Any]) -> Config:
    """The checked configuration of nested `values`; keys that are missing keep their default."""
    return _build(Config, values, "")


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"config: {where} is not YAML: {error}") from error


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"config: an override must read key=value, got {override!r}")
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"config: `{key}` goes into `{section}`, which is not a section")
    values[name] = _yaml(text, f"the value of `{key}`")


def _build(kind: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise TypeError(f"config: `{prefix[:-1]}` must be a section of keys, got {values!r}")
    known = {item.name: item for item in fields(kind)}
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"config: unknown key `{prefix}{name}`{_suggestion(prefix, str(name))}")
        if is_dataclass(hints[name]):
            arguments[name] = _build(hints[name], value, f"{prefix}{name}.")
        else:
            arguments[name] = _checked(f"{prefix}{name}", value, hints[name], known[name])
    return kind(**arguments)


def _suggestion(prefix: str, name: str) -> str:
    """The nearest known key: of the same section if there is one, else of any."""
    keys = list(_all_keys(Config, ""))
    last = {key: key.rpartition(".")[2] for key in keys}
    by_nearness = difflib.get_close_matches(prefix + name, keys, n=1, cutoff=0.6)
    by_nearness += [key for key in keys if last[key] in difflib.get_close_matches(name, last.values(), n=1)]
    return f"; did you mean `{by_nearness[0]}`?" if by_nearness else f"; known are {', '.join(keys)}"


def _all_keys(kind: type, prefix: str) -> Iterable[str]:
    hints = typing.get_type_hints(kind)
    for item in fields(kind):
        if is_dataclass(hints[item.name]):
            yield from _all_keys(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


def _checked(key: str, value: Any, hint: Any, item: Field) -> Any:
    value = _converted(key, value, hint)
    if value is not None and "bounds" in item.metadata:
        low, high = item.metadata["bounds"]
        if not (low <= value <= high and math.isfinite(value)):
            span = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
            raise ValueError(f"config: `{key}` must be {span}, got {value!r}")
    if "choices" in item.metadata and value not in item.metadata["choices"]:
        raise ValueError(f"config: `{key}` must be one of {', '.join(item.metadata['choices'])}, got {value!r}")
    return value


def _converted(key: str, value: Any, hint: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option is type(None):
            if value is None:
                return None
        elif option is float:
            # YAML reads 5e-4 (no dot) as a string.
            if isinstance(value, str) and _is_number(value):
                value = float(value)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return float(value)
        elif typing.get_origin(option) is tuple:
            kinds = typing.get_args(option)
            count_fits = isinstance(value, (list, tuple)) and (kinds[-1] is Ellipsis or len(value) == len(kinds))
            if count_fits and all(type(entry) is kinds[0] for entry in value):
                return tuple(value)
        elif type(value) is option:
            return value
    expected = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    raise TypeError(f"config: `{key}` must be {expected}, got {value!r}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
