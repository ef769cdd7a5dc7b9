"""A datastore's order is kept in the cache folder, and gives what sorting gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adi.drafters import datastore
from adi.drafters.datastore import Datastore


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADI_CACHE", str(tmp_path))
    return tmp_path / "orders"


def some(count: int = datastore.KEPT_FROM, seed: int = 0) -> Datastore:
    dice = np.random.default_rng(seed)
    lengths = dice.integers(1, 60, count // 20)
    return Datastore(dice.integers(0, 50, lengths.sum(), dtype=np.int32), lengths.astype(np.int32))


def found_in(store: Datastore) -> list[object]:
    dice = np.random.default_rng(1)
    return [store.find(dice.integers(0, 50, 10).tolist(), 4) for _ in range(200)]


def test_a_kept_order_finds_what_sorting_finds(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = found_in(some())
    (note,) = cache.glob("*.npy")
    monkeypatch.setattr("adi.drafters.ngram._order", lambda _: pytest.fail("sorted again"))
    assert found_in(some()) == wanted
    assert any(wanted)
    assert len(np.load(note)) < len(some().ids_N)


@pytest.mark.parametrize("damage", [b"", b"no array", None])
def test_a_damaged_order_is_made_anew(cache: Path, damage: bytes | None) -> None:
    wanted = found_in(some())
    (note,) = cache.glob("*.npy")
    whole = note.read_bytes()
    if damage is None:
        np.save(note, np.load(note) + np.int32(len(some().ids_N)))
    else:
        note.write_bytes(damage)
    assert found_in(some()) == wanted
    assert note.read_bytes() == whole


def test_another_datastore_has_another_order(cache: Path) -> None:
    found_in(some())
    found_in(some(seed=2))
    assert len(list(cache.iterdir())) == 2


def test_small_ones_and_a_cache_that_cannot_be_written_are_sorted(cache: Path) -> None:
    found_in(some(2000))
    assert not cache.exists()
    cache.write_text("in the way")
    assert any(found_in(some()))
