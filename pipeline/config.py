"""Typed settings: YAML plus ``--set a.b=c``; an unknown key is an error that names the nearest known one."""

import re
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import InputError, nearest, one_line


class Settings(BaseModel):
    """Base of every settings class: frozen, no unknown keys, defaults checked."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def parse(cls, values: dict[str, Any], where: str) -> Self:
        """Validate ``values``; ``where`` (file, option) is named in the InputError of the first fault."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InputError(_first_fault(cls, values, error, where)) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as written to ``config.json`` and to bundle manifests."""
        return self.model_dump(mode="json")


def _first_fault(cls: type[BaseModel], values: Any, error: ValidationError, where: str) -> str:
    fault = error.errors()[0]
    path = _real_path(fault["loc"], values, named_last=fault["type"] in ("extra_forbidden", "missing"))
    dotted = ".".join(path)
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        # A validator parsed a branch by itself: its message names the keys.
        return f"{where}: {cause}"
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key '{dotted}'.{nearest(path[-1], _keys_at(cls, path[:-1]))}"
    if fault["type"] == "missing":
        return f"{where}: '{dotted}' is required; add it there or with --set {dotted}=..."
    message = fault["msg"].removeprefix("Value error, ")
    return f"{where}: '{dotted}' = {fault.get('input')!r}: {message}" if path else f"{where}: {message}"


def _real_path(loc: tuple[Any, ...], values: Any, *, named_last: bool) -> list[str]:
    """The keys of ``loc`` that a person wrote: pydantic adds the names of the types that a union tried."""
    path: list[str] = []
    for position, part in enumerate(loc):
        is_last = named_last and position == len(loc) - 1
        exists = (isinstance(values, dict) and part in values) or (
            isinstance(values, (list, tuple)) and isinstance(part, int) and part < len(values)
        )
        if exists:
            values = values[part]
        if exists or is_last:
            path.append(str(part))
    return path


def _keys_at(cls: type[BaseModel], path: list[str]) -> list[str]:
    """Field names of the settings classes that may sit at ``path`` below ``cls``."""
    classes: list[type[BaseModel]] = [cls]
    for part in path:
        fields = [settings.model_fields[part] for settings in classes if part in settings.model_fields]
        # A part that is no field is a position in a list or a key of a dictionary of settings.
        classes = [inner for field in fields for inner in _settings_in(field.annotation)] if fields else classes
    return [name for settings in classes for name in settings.model_fields]


def _settings_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [settings for inner in get_args(annotation) for settings in _settings_in(inner)]


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's scalars: YAML 1.1 reads 3e-3 as a string, ``no`` as false, 1:30 as 90, 2020-01-01 as a date."""


_Yaml.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"(~|null|Null|NULL|)", [*"~nN", ""]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))", "-+."),
    ("merge", r"<<", "<"),
):
    _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^{_pattern}$"), list(_first))
# YAML 1.1's constructor reads 010 as octal 8; YAML 1.2 means ten.
_Yaml.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value)))


def parse_sets(pairs: list[str]) -> dict[str, Any]:
    """``["a.b=1", "c=[x, y]"]`` -> ``{"a": {"b": 1}, "c": ["x", "y"]}``; values are read as YAML."""
    tree: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set wants key=value, found '{pair}'; write for example --set optim.lr=0.001")
        try:
            value = yaml.load(text, _Yaml) if text else ""
        except yaml.YAMLError:
            value = text
        node = tree
        *parents, last = (part.strip() for part in key.split("."))
        if not all([*parents, last]):
            raise InputError(f"--set {pair}: '{key}' has an empty part; write for example optim.lr=0.001")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(f"--set {pair}: '{parent}' was already set to a plain value")
        node[last] = value
    return tree


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the leaves of ``over`` laid on top; dictionaries are merged, all else is replaced.

    A dictionary whose ``name`` (of a model, a loss) changes is replaced as a whole: the settings of the old
    one mean nothing to the new one.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _renamed(old, value):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _renamed(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return "name" in old and "name" in new and old["name"] != new["name"]


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """Parse a YAML mapping; ``where`` is named in the InputError when it is none."""
    try:
        value = yaml.load(text, _Yaml)
    except yaml.YAMLError as error:
        line = one_line(error)
        raise InputError(f"{where}: not valid YAML: {line}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: wanted a mapping of settings, found {type(value).__name__}")
    return value


def load(path: str, sets: list[str]) -> dict[str, Any]:
    """The mapping in a local YAML file with ``--set`` pairs laid on top."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"config file '{path}' not found; examples are in jobs/configs/")
    return merge(read_yaml(file.read_text(encoding="utf-8"), path), parse_sets(sets))


def first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """The first place where two trees of plain values differ: ``optim.lr was 0.1, now 0.2``; None if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            inner = first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
            if inner is not None:
                return inner
        return None
    if old == new:
        return None
    return f"{path or 'value'} was {_short(old)}, now {_short(new)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
