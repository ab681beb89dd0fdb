"""Read a configuration from YAML and ``key=value`` edits; say in one sentence what is wrong with it."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError

from training.config import Config

PRESETS = Path(__file__).parent / "configs"
VARIANTS = Path(__file__).parent / "variants.yaml"  # changes of a preset, by name
_WORDS = {"integer": "int", "number": "float", "boolean": "true or false", "string": "text", "array": "a list of names"}


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read the YAML file at `path`, or the preset of that name; then named variants, each after a comma, then edits.

    Raises:
        ValueError: an unknown key (with the nearest known one), a value of another type or out of bounds.
    """
    first, *rest = str(path).split(",")
    variants = _variants()
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
        values = _yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    except UnicodeDecodeError as error:
        raise ValueError(f"config: {path} must be UTF-8: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config: {path} must hold a mapping of keys, got {_shown(values)}")
    for name in rest:
        _merge(values, variants[name])
    edits = [_edit(values, override) for override in overrides]
    try:
        return config_from_dict(values)
    except ValueError as error:
        key = re.search(r"`([\w.]+)`", str(error))
        if key is None or any(f"{key[1]}.".startswith(f"{edit}.") for edit in edits):
            raise
        raise ValueError(f"{error} (in {path})") from error


def config_from_dict(values: dict[str, Any]) -> Config:
    """The checked configuration of nested `values`, texts or numbers; keys that are missing keep their default.

    Raises:
        ValueError: as of `load_config`.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"config: {_sentence(error, values)}") from error


def edited(config: Config, overrides: Iterable[str], allowed: Iterable[str]) -> Config:
    """`config` with ``section.key=value`` edits of the keys that are `allowed`.

    Raises:
        ValueError: as of `load_config`, or another key.
    """
    values = config.model_dump()
    for override in overrides:
        key = _edit(values, override)
        if key in known_keys() and key not in allowed:
            raise ValueError(f"config: the checkpoint settles `{key}`; what may be edited is {', '.join(allowed)}")
    return config_from_dict(values)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping of dotted keys."""
    keys: dict[str, Any] = {}
    for key, value in values.items():
        keys |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return keys


def key_table() -> str:
    """Every key with its default, what it must be, and what it means, as ``--keys`` prints it."""
    rows = [("key", "default", "must be", "")]
    rows += [
        (key, _shown(schema["default"]), _expected(schema), f"  # {schema['description']}")
        for key, schema in _keys().items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}{row[3]}" for row in rows)


def settings_of(config: Config) -> list[Setting]:
    """Every key of a configuration with its value and default, as YAML would have them, and its meaning."""
    values = flat(config.model_dump(mode="json"))
    defaults = flat(Config(steps=1).model_dump(mode="json")) | {"steps": None}  # quirks: as their preset
    return [
        Setting(key, _shown(values[key]), _shown(defaults[key]), schema["description"])
        for key, schema in _keys().items()
    ]


def known_keys() -> list[str]:
    """Every key, with its section in front."""
    return list(_keys())


def overview() -> str:
    """The presets and the sections of keys, for ``--help``."""
    lines = [f"presets (in {PRESETS}):"]
    for file in sorted(PRESETS.glob("*.yaml")):
        lines.append(f"  {file.stem:20}{file.read_text(encoding='utf-8').partition(chr(10))[0].lstrip('# ')}")
    lines.append("\nvariants, joined to a preset by commas (--config camvid,row_b):")
    lines.append(textwrap.fill(", ".join(_variants()), 76, initial_indent="  ", subsequent_indent="  "))
    lines.append("\nsections of keys, which --keys lists with their meaning:")
    for name, section in _sections().items():
        lines.append(f"  {name:20}{(section.__doc__ or '').partition(chr(10))[0]}")
    return "\n".join(lines)


class Setting(NamedTuple):
    """A key of a configuration; values as text."""

    key: str
    value: str
    default: str
    meaning: str


class _Loader(yaml.BaseLoader):
    """YAML in which all that is written is text: the type of its key decides what it means, so that ``output: 2024`` or
    a class called ``on`` need no quotes. A key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of `node`, whose keys must differ."""
        seen = []
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} stands twice", key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # makes texts, lists and mappings only
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        line = f"line {at.line + 1} of " if at is not None and "\n" in text else ""
        raise ValueError(f"config: {line}{where} is not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config: {where} is not YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"config: {where} is nested too deeply") from error


def _edit(values: dict[str, Any], override: str) -> str:
    """Put the value of an edit into `values`; returns its key. A value is text as it stands, or a list in YAML."""
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not key:
        raise ValueError(f"config: an override must read key=value, without spaces around the =, got {override!r}")
    *sections, name = key.split(".")
    for section in sections:
        if not values.get(section):  # an empty section of a file
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ValueError(f"config: `{key}` goes into `{section}`, which is not a section")
    values[name] = _yaml(text, f"the value of `{key}`") if text[:1] in ("[", "{", '"', "'") else text
    return key


def _variants() -> dict[str, dict[str, Any]]:
    """Changes of a preset, by name."""
    variants: dict[str, dict[str, Any]] = _yaml(VARIANTS.read_text(encoding="utf-8"), str(VARIANTS))
    return variants


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put nested `changes` into `values`, section by section."""
    for key, change in changes.items():
        if isinstance(change, dict):
            values[key] = dict(values.get(key) or {})
            _merge(values[key], change)
        else:
            values[key] = change


def _sentence(error: ValidationError, values: dict[str, Any]) -> str:
    """The first mistake: which key, what it must be, what came."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    where = ".".join(path)
    if first["type"] in ("extra_forbidden", "invalid_key"):
        if isinstance(first["input"], dict) and first["input"]:  # what is meant shows in its first key
            where += f".{next(iter(first['input']))}"
        return f"unknown key `{where}`; {_suggestion(where)}"
    if first["type"] == "value_error":  # of a validator of ours, which says the rest
        return f"{f'`{where}` ' if where else ''}{first['ctx']['error']}"
    key = where if where in _keys() else ".".join(path[: 1 + (path[0] in _sections())])
    for part in key.split("."):
        values = values[part]
    expected = _expected(_keys()[key]) if key in _keys() else "a section of keys"
    return f"`{key}` must be {expected}, got {_shown(values)}"


def _suggestion(key: str) -> str:
    """The nearest known key; without one, what there is."""
    section, _, name = key.rpartition(".")

    def nearness(known: str) -> float:  # the name counts more than the section
        known_section, _, known_name = known.rpartition(".")
        pairs = ((section, known_section), (name, known_name), (name, known_name))
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    nearest = max(_keys(), key=nearness)
    if nearness(nearest) > 1.55:
        return f"did you mean `{nearest}`?"
    if section in _sections():
        return f"the keys of `{section}` are {', '.join(known for known in _keys() if known.startswith(f'{section}.'))}"
    top = [known for known in _keys() if "." not in known]
    return f"known are {', '.join(top)} and the sections {', '.join(_sections())}; --keys lists all"


def _sections() -> dict[str, type[BaseModel]]:
    kinds = {name: field.annotation for name, field in Config.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def _keys() -> dict[str, dict[str, Any]]:
    """The JSON schema of every key: type, default, bounds, choices and meaning."""
    keys = {name: own for name, own in Config.model_json_schema()["properties"].items() if name not in _sections()}
    for section, kind in _sections().items():
        keys |= {f"{section}.{name}": own for name, own in kind.model_json_schema()["properties"].items()}
    return keys


def _expected(schema: dict[str, Any]) -> str:
    """What a value must be, in words."""
    if "anyOf" in schema:
        return " or ".join(map(_expected, schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(schema["enum"])
    if "prefixItems" in schema:
        if schema["maxItems"] != 2:
            return f"a list of {schema['maxItems']} numbers"
        side = _expected(schema["prefixItems"][0]).removeprefix("int, ")
        return f"[height, width] or one number for a square, {side}"
    kind = _WORDS.get(schema["type"], schema["type"])
    low, high, above, below = (
        schema.get(name) for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    )
    if high is not None or below is not None:
        first = f"[{low}" if above is None else f"({above:g}"
        return f"{kind}, in {first}, {f'{below})' if high is None else f'{high}]'}"
    return kind if low is None else f"{kind}, at least {low:g}"


def _shown(value: Any) -> str:
    """A value as YAML would have it."""
    if value is None or value == "":
        return "null"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
