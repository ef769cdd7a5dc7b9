"""JSON files with a schema: types that refuse what they do not know, and errors that name file, field and value.

A file's content is declared as a ``Record`` (a ``msgspec.Struct``) or a dataclass, and converted in strict mode: no text is
taken for a number, no bool for an int. Only a ``Record`` refuses fields that it does not know.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Self, TypeVar, overload

import msgspec
from msgspec import Meta, Struct

from adi.errors import FileError, UsageError
from adi.files import read_json, write_json

T = TypeVar("T")

Int = Annotated[int, Meta(ge=-(1 << 62), le=1 << 62)]  # of any sign; beyond it arithmetic would fail far from here
Natural = Annotated[int, Meta(ge=0, le=1 << 62)]
Positive = Annotated[int, Meta(ge=1, lt=1 << 31)]
Share = Annotated[float, Meta(ge=0, le=1)]
NonNegative = Annotated[float, Meta(ge=0, le=1.7976931348623157e308)]  # finite, so not NaN either
PATH = re.compile(r"\.(\w+)|\[(\d+)\]")


class Record(Struct, frozen=True, forbid_unknown_fields=True):
    """An immutable value that goes to JSON and back. ``msgspec.structs.replace`` makes a changed copy."""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; keys of mappings become texts."""
        value: dict[str, Any] = to_json(self)
        return value

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """The record that ``to_json`` wrote; FileError names the field that is missing, unknown or of another type."""
        return from_json(value, cls, f"the {cls.__name__.lower()}")


def to_json(value: Any) -> Any:
    """Records and dataclasses, also inside of containers, as JSON values."""
    return msgspec.to_builtins(value, str_keys=True)


@overload
def from_json(value: Any, kind: type[T], what: str) -> T: ...
@overload
def from_json(value: Any, kind: UnionType, what: str) -> Any: ...
def from_json(value: Any, kind: Any, what: str) -> Any:
    """A JSON value as an instance of ``kind``; FileError names ``what``, the field, what it must be and what it is."""
    try:
        return msgspec.convert(value, kind, strict=True, str_keys=True)
    except msgspec.ValidationError as error:
        raise FileError(f"{what}: {_explained(str(error), value)}.") from None
    except RecursionError:
        raise FileError(f"{what}: nested too deeply.") from None


def read_json_as(path: Path, kind: type[T], what: str) -> T:
    """The JSON file as an instance of ``kind``; FileError says that this ``what`` is missing, too large or damaged, and how."""
    return from_json(read_json(path, what), kind, f"the {what} {path} is damaged")


def claim(path: Path, settings: Record) -> None:
    """Note in a file what its folder is made with; UsageError where it was begun with other settings."""
    if path.exists():
        before = read_json_as(path, type(settings), "file of settings")
        for name in settings.__struct_fields__:
            if (was := getattr(before, name)) != (now := getattr(settings, name)):
                raise UsageError(
                    f"{path.parent} was begun with {name} = {was!r}, not {now!r}; choose another folder, or delete it."
                )
    write_json(path, settings.to_json())


def _explained(message: str, value: Any) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.steps[0].token`" as "steps[0].token: expected int, got str '7'"."""
    reason, _, place = message.partition(" - at ")
    reason = reason.replace("`", "").rstrip(".")
    if not place:
        return reason[:1].lower() + reason[1:]
    place = place.replace("`", "")
    path = place.rpartition("$")[2]
    if "..." not in path and not place.startswith("key"):
        for name, index in PATH.findall(path):
            value = value[name] if name else value[int(index)]
        if not isinstance(value, (dict, list)):
            reason = f"{reason} ({value!r:.60})"
    return f"{path.removeprefix('.') or 'a key'}: {reason[:1].lower()}{reason[1:]}"
