"""Read a configuration from YAML and ``key=value`` and check it: unknown keys, types, bounds, choices."""

from __future__ import annotations

import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from training.config import Config

GREATEST = 2**31 - 1  # integer without another bound
PRESETS = Path(__file__).parent / "configs"
VARIANTS = Path(__file__).parent / "variants.yaml"  # changes of a preset, by name


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read the YAML file at `path`, or the preset of that name; then named variants, each after a comma, then edits.

    The values of edits are YAML as well.

    Raises:
        ValueError, TypeError: an unknown key (with the nearest known one), a value of another type or out of bounds.
    """
    first, *rest = str(path).split(",")
    variants = {} if not rest else _yaml(VARIANTS.read_text(encoding="utf-8"), str(VARIANTS))
    for name in rest:
        if name not in variants:
            raise ValueError(f"config: no variant {name!r}; there are {', '.join(variants)}")
    path = Path(first)
    preset = PRESETS / f"{path.name}.yaml"
    if path.name == str(path) and not path.exists() and preset.is_file():
        path = preset
    if path.is_dir():
        raise ValueError(f"config: {path} must be a YAML file, got a folder")
    if not path.exists():
        beside = sorted(file.name for file in path.parent.glob("*.yaml"))
        there = f"beside it there are {', '.join(beside)}" if beside else f"presets are in {PRESETS}"
        raise ValueError(f"config: no file {path}; {there}")
    try:
        values = _yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"config: {path} must be UTF-8: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise TypeError(f"config: {path} must hold a mapping, got {type(values).__name__}")
    for name in rest:
        _merge(values, variants[name])
    texts = {}
    for override in overrides:
        key, text = _apply(values, override)
        texts[key] = text
    try:
        return config_from_dict(values, texts)
    except (ValueError, TypeError) as error:
        key = re.search(r"`([\w.]+)`", str(error))
        if key is None or any(f"{key[1]}.".startswith(f"{edited}.") for edited in texts):
            raise
        raise type(error)(f"{error} (in {path})") from error


def config_from_dict(values: dict[str, Any], texts: Mapping[str, str] | None = None) -> Config:
    """The checked configuration of nested `values`; keys that are missing keep their default.

    Args:
        values: by section and key.
        texts: what the user wrote for a value of one key, as errors show it.
    """
    return _build(Config, values, "", texts or {})


def edited(config: Config, overrides: Iterable[str], allowed: Iterable[str]) -> Config:
    """`config` with ``section.key=value`` edits of the keys that are `allowed`.

    Raises:
        ValueError, TypeError: as of `load_config`, or another key.
    """
    values, texts = asdict(config), {}
    for override in overrides:
        key, text = _apply(values, override)
        if key in known_keys() and key not in allowed:
            raise ValueError(f"config: the checkpoint settles `{key}`; what may be edited is {', '.join(allowed)}")
        texts[key] = text
    return config_from_dict(values, texts)


def key_table() -> str:
    """Every key with its default, what it may be, and what it is, as ``--keys`` prints it."""
    rows = [("key", "default", "must be", "")]
    for kind, prefix, item, hint in _entries(Config, ""):
        rows.append(
            (
                prefix + item.name,
                _shown(_default(item)),
                _allowed(item, hint),
                _comments(kind)[item.name].replace("None", "null"),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [
        f"{key:{widths[0]}}  {default:{widths[1]}}  {allowed}{'  # ' + comment if comment else ''}"
        for key, default, allowed, comment in rows
    ]
    return "\n".join(lines)


def known_keys() -> list[str]:
    """Every key, with its section in front."""
    return [prefix + item.name for _, prefix, item, _ in _entries(Config, "")]


class _Loader(yaml.SafeLoader):
    """YAML without the readings that surprise: 010 and 12:30 are no numbers, 2024-01-01 is no date, and a key that
    stands twice is an error."""

    yaml_implicit_resolvers = {
        first: [
            (tag, pattern) for tag, pattern in entries if tag.rpartition(":")[2] not in ("int", "float", "timestamp")
        ]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of `node`, whose keys must differ."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"([-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        line = f"line {at.line + 1} of " if at is not None and "\n" in text else ""
        raise ValueError(f"config: {line}{where} is not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config: {where} is not YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"config: {where} is nested too deeply") from error


def _apply(values: dict[str, Any], override: str) -> tuple[str, str]:
    """Put the value of an override into `values`; returns its key and what the user wrote."""
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not key:
        raise ValueError(f"config: an override must read key=value, without spaces around the =, got {override!r}")
    *sections, name = key.split(".")
    for section in sections:
        if values.get(section) is None:  # an empty section of a file is None
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ValueError(f"config: `{key}` goes into `{section}`, which is not a section")
    try:
        value = _yaml(text, f"the value of `{key}`")
    except ValueError as error:
        raise ValueError(f"{error}{_quote(key, text)}") from error
    if isinstance(value, str) and value != text and text[0] not in "'\"|>!":
        raise ValueError(f"config: YAML reads {text!r} as {value!r} for `{key}`{_quote(key, text)}")
    if value is None and text.lower() not in ("", "~", "null"):
        raise ValueError(f"config: YAML reads {text!r} as nothing for `{key}`{_quote(key, text)}")
    values[name] = value
    return key, text


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put nested `changes` into `values`, section by section."""
    for key, change in changes.items():
        if isinstance(change, dict):
            values[key] = dict(values.get(key) or {})
            _merge(values[key], change)
        else:
            values[key] = change


def _quote(key: str, text: str) -> str:
    return f"; if it is text, put it in quotes twice, for the shell and for YAML: {key}='\"{text}\"'"


def _build(kind: type, values: Any, prefix: str, texts: Mapping[str, str]) -> Any:
    if values is None and prefix:  # a section whose keys are all commented out
        values = {}
    if not isinstance(values, dict):
        raise TypeError(f"config: `{prefix[:-1]}` must be a section of keys, got {values!r}")
    known = {item.name: item for item in fields(kind)}
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        if name not in known:
            # In an unknown section, what is meant shows in the first of its keys.
            key = f"{prefix}{name}.{next(iter(value))}" if isinstance(value, dict) and value else f"{prefix}{name}"
            raise ValueError(f"config: unknown key `{key}`; {_suggestion(key)}")
        if is_dataclass(hints[name]):
            arguments[name] = _build(hints[name], value, f"{prefix}{name}.", texts)
        else:
            arguments[name] = _checked(f"{prefix}{name}", value, hints[name], known[name], texts)
    return kind(**arguments)


def _suggestion(key: str) -> str:
    """The nearest known key: in the section that `key` names, else in all of them."""
    section, _, name = key.rpartition(".")
    keys = known_keys()
    sections = sorted({known.partition(".")[0] for known in keys if "." in known})
    named = section if section in sections else "".join(difflib.get_close_matches(section, sections, n=1))
    last = {known: known.rpartition(".")[2] for known in keys}
    inside = {last[known]: known for known in keys if named and known.startswith(f"{named}.")}

    near = [inside[own] for own in difflib.get_close_matches(name, inside, n=1)]
    near += [known for known in keys if last[known] == name]
    near += [known for own, known in inside.items() if len(name) > 2 and name in own]
    near += difflib.get_close_matches(key, keys, n=1)
    near += [known for known in keys if last[known] in difflib.get_close_matches(name, last.values(), n=1)]
    if near:
        return f"did you mean `{near[0]}`?"
    if inside:
        return f"the keys of `{named}` are {', '.join(inside.values())}"
    top = [known for known in keys if "." not in known]
    return f"known are {', '.join(top)} and the sections {', '.join(sections)}; --keys lists all"


def _entries(kind: type, prefix: str) -> Iterable[tuple[type, str, Field, Any]]:
    """Class, prefix, field and type of every key."""
    hints = typing.get_type_hints(kind)
    for item in fields(kind):
        if is_dataclass(hints[item.name]):
            yield from _entries(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield kind, prefix, item, hints[item.name]


def _comments(kind: type) -> dict[str, str]:
    """The comment of each field in the source of a class."""
    found = re.findall(r"^    (\w+): [^#\n]*(?:# (.*))?$", inspect.getsource(kind), re.MULTILINE)
    return dict(found)


def _default(item: Field) -> Any:
    return item.default if item.default is not MISSING else item.default_factory()


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value)


def _checked(key: str, value: Any, hint: Any, item: Field, texts: Mapping[str, str]) -> Any:
    value = _converted(key, value, hint, texts)
    if value is not None and "bounds" in item.metadata:
        low, high, open_end = item.metadata["bounds"]
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and high == math.inf and number > GREATEST:
                raise ValueError(f"config: `{key}` must be at most {GREATEST}, got {_plain(value)}")
            inside = low <= number <= high and abs(number) != math.inf
            if not inside or (open_end and number == high):
                raise ValueError(f"config: `{key}` must be {_span(item)}, got {_plain(value)}")
    if "choices" in item.metadata and value not in item.metadata["choices"]:
        raise ValueError(f"config: `{key}` must be one of {', '.join(item.metadata['choices'])}, got {value!r}")
    return value


def _span(item: Field) -> str:
    low, high, open_end = item.metadata["bounds"]
    low, high = (number if isinstance(number, int) else f"{number:g}" for number in (low, high))
    return f"at least {low}" if high == "inf" else f"in [{low}, {high}{')' if open_end else ']'}"


def _plain(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else repr(value)


def _allowed(item: Field, hint: Any) -> str:
    if "choices" in item.metadata:
        return " or ".join(item.metadata["choices"])
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    words = " or ".join("null" if kind is type(None) else _word(kind) for kind in kinds)
    return f"{words}, {_span(item)}" if "bounds" in item.metadata else words


def _word(kind: Any) -> str:
    if kind == tuple[int, int]:
        return "[height, width] or one number for a square"
    if kind == tuple[str, ...]:
        return "a list of names"
    return kind.__name__


def _converted(key: str, value: Any, hint: Any, texts: Mapping[str, str]) -> Any:
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
                return _float(value)
        elif option == tuple[int, int] and type(value) is int:
            return (value, value)
        elif typing.get_origin(option) is tuple:
            kinds = typing.get_args(option)
            count_fits = isinstance(value, (list, tuple)) and (kinds[-1] is Ellipsis or len(value) == len(kinds))
            if count_fits and all(type(entry) is kinds[0] for entry in value):
                return tuple(value)
        elif type(value) is option:
            return value
    expected = " or ".join("null" if option is type(None) else _word(option) for option in options)
    raise TypeError(f"config: `{key}` must be {expected}, got {_plain(value)}{_hint(key, value, options, texts)}")


def _hint(key: str, value: Any, options: tuple[Any, ...], texts: Mapping[str, str]) -> str:
    """What to do about text that YAML takes for something else."""
    if tuple[str, ...] in options and isinstance(value, (list, tuple)):
        return "; names such as on, off, yes, no, null and 3 need quotes, or YAML takes them for something else"
    if str not in options or value is None:
        return ""
    if key in texts:
        return _quote(key, texts[key])
    return "; if it is text, put it in quotes, or YAML takes it for something else"


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
