"""How an object was built, as plain data: what a checkpoint stores and what rebuilds the object.

A record is `{"class_path": ..., "init_args": {...}}`, the form that YAML configs use, so that a
checkpoint of a module built in plain Python reads like one built by the command line and loads
with `weights_only=True`.
"""

import dataclasses
import enum
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ssd.errors import UserError

PLAIN = (bool, int, float, str, type(None))


class Recorded:
    """Remembers the arguments it was built with; `describe` turns them into a record."""

    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any):
        self = super().__new__(cls)
        object.__setattr__(self, "_arguments", (args, kwargs))
        return self

    def record(self) -> dict[str, Any]:
        args, kwargs = self._arguments
        bound = inspect.signature(type(self)).bind(*args, **kwargs)
        given: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                given.update(value)
            else:
                given[name] = value
        return {
            "class_path": class_path(type(self)),
            "init_args": {name: describe(value, name) for name, value in given.items()},
        }


def class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def describe(value: Any, name: str = "value") -> Any:
    """Plain data (numbers, strings, lists, dicts) from which `build` makes an equal object."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, np.generic):
        return describe(value.item(), name)
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): describe(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Recorded):
        return value.record()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return {
            "class_path": class_path(type(value)),
            "init_args": {key: describe(item, f"{name}.{key}") for key, item in fields.items()},
        }
    raise UserError(
        f"argument '{name}' is a {type(value).__name__}, which a checkpoint cannot describe. "
        "Pass numbers, strings, lists, dataclasses or objects derived from ssd.record.Recorded."
    )


def build(record: Any) -> Any:
    """The object that `describe` described. Raises UserError for a class that cannot be imported."""
    if isinstance(record, list):
        return [build(item) for item in record]
    if not isinstance(record, Mapping):
        return record
    arguments = {key: build(item) for key, item in record.get("init_args", record).items() if key != "class_path"}
    if "class_path" not in record:
        return arguments
    return import_class(record["class_path"])(**arguments)


def differences(before: Any, now: Any) -> list[str]:
    """Dotted names of the settings in which two records differ, without `init_args`."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return [] if before == now else [""]
    names = [
        ".".join(part for part in (key, below) if part and part != "init_args")
        for key in dict.fromkeys([*before, *now])
        for below in differences(before.get(key), now.get(key))
    ]
    return list(dict.fromkeys(names))


def import_class(path: str) -> type:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"class '{path}' cannot be imported ({error}). Is the package that defines it installed?"
        ) from None
