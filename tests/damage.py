"""Files as nobody should have written them: cut, flipped, of other types, with code in them."""

from __future__ import annotations

import builtins
import json
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, 10**400, -(10**400)]),
    st.floats(),
    st.sampled_from([1e308, -1e308, 5e-324]),
)
LEAVES = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.sampled_from(["", "entropy", "2", "../../x", "\x00", "\ud800"]), st.text(max_size=4)
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6
)
DEEP = 20_000  # brackets: more than any reader's stack


def only_value_errors(load: Callable[[], Any]) -> Any:
    """What ``load`` gives; None where it raises a ValueError that says something. Anything else is the test's failure."""
    try:
        return load()
    except ValueError as error:
        if len(str(error)) > 10:
            return None
        raise AssertionError(f"{error!r} is no sentence") from error


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """These bytes cut off somewhere, with some of them changed, or with others in between."""
    data = bytearray(whole)
    kind = draw(st.sampled_from(["cut", "flip", "insert", "both"]))
    if kind in ("flip", "both"):
        for at in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=4)):
            data[at] ^= draw(st.integers(1, 255))
    if kind == "insert":
        at = draw(st.integers(0, len(data)))
        data[at:at] = draw(st.binary(min_size=1, max_size=9))
    return bytes(data[: draw(st.integers(0, len(data) - 1))] if kind in ("cut", "both") else data)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with another one somewhere inside: in the place of anything, or a field more, or one less."""
    value = json.loads(json.dumps(value))
    place, key = None, None
    inner = value
    while isinstance(inner, (dict, list)) and inner and (place is None or draw(st.booleans()) or draw(st.booleans())):
        place, key = inner, draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        inner = inner[key]
    assert place is not None
    kind = draw(st.sampled_from(["other", "other", "other", "less", "more"]))
    if kind == "less":
        del place[key]
    elif kind == "more" and isinstance(place, dict):
        place[draw(st.text(max_size=3))] = draw(VALUES)
    else:
        place[key] = draw(VALUES)
    return value


@contextmanager
def workplace(*copied: Path) -> Iterator[Path]:
    """A folder for one example, with these files in it; nothing else is in the folder above."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "place"
        folder.mkdir()
        for path in copied:
            shutil.copy(path, folder / path.name)
        yield folder


class Bomb:
    """What, unpickled, makes a file: so a test sees whether it was."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (builtins.open, (str(self.marker), "w"))


def bombs(marker: Path, place: Path) -> list[bytes]:
    """The bomb as a bare pickle, as torch keeps it, and as torch kept it before zip files."""
    files = []
    for new in (True, False):
        torch.save({"done": Bomb(marker)}, place, _use_new_zipfile_serialization=new)
        files.append(place.read_bytes())
    place.unlink()
    return [pickle.dumps(Bomb(marker)), *files]


def nested(opening: str = "[", closing: str = "]") -> str:
    return opening * DEEP + closing * DEEP


def endless(path: Path) -> None:
    """A name for what can be read for ever."""
    path.symlink_to("/dev/zero")
