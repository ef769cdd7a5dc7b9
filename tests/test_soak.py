"""The soak of ``tools/soak.py`` in small: a tiny model holds nothing after hundreds of generations, and a leak is seen."""

from __future__ import annotations

import gc
import importlib.util
import mmap
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openvino")
pytest.importorskip("scipy")

import adi
from conftest import exits_with_drafter

pytestmark = pytest.mark.slow  # hundreds of generations
MOST_GROWTH_MIB = 24.0
GENERATIONS, WARM_UP, EVERY = 140, 60, 5
LEAK = 1 << 20  # bytes in each generation


@pytest.fixture(scope="module")
def soak() -> Any:
    place = Path(__file__).parent.parent / "tools" / "soak.py"
    spec = importlib.util.spec_from_file_location("soak", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # where its dataclasses look their own names up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["hf", "openvino"])
def work(request: pytest.FixtureRequest, soak: Any, tiny_folder: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADI_HUGE_PAGES", "0")  # filled on request and given back 64 MiB at a time, they would hide a leak
        model = adi.load(str(tiny_folder), backend=request.param)
        exits = replace(exits_with_drafter(model), trigger=adi.Threshold("entropy", 3.0))
        found = soak.Work(model, exits, 3.0, ["the quick brown fox", "a dog sleeps"], most_new_tokens=4)
        for number, kind in enumerate(soak.KINDS):  # what opens in the background does so before anything is counted
            found.do(kind, number)
            model.backbone.prepare((), drafts=True, wait=True)
        gc.collect()  # what tests before this one left
        yield found


def test_nothing_is_held(soak: Any, work: Any) -> None:
    samples, kinds = soak.soak(work, GENERATIONS, EVERY)
    found = soak.judged(samples, WARM_UP, MOST_GROWTH_MIB)
    assert not found["wrong"], found
    assert set(kinds) == set(soak.KINDS)
    assert samples[-1].generations == sum(kinds.values()) >= GENERATIONS
    assert found["slope_mib_per_1000"]["low"] <= found["slope_mib_per_1000"]["slope"]


def test_a_leak_of_memory_is_caught(soak: Any, work: Any) -> None:
    hoard: list[mmap.mmap] = []

    def keep() -> None:
        hoard.append(mmap.mmap(-1, LEAK, mmap.MAP_PRIVATE))  # of the system: malloc would first fill what other tests gave back
        hoard[-1].write(b"x" * LEAK)

    samples, _ = soak.soak(work, GENERATIONS, EVERY, after_each=keep)
    for piece in hoard:
        piece.close()
    found = soak.judged(samples, WARM_UP, MOST_GROWTH_MIB)
    assert any("private memory grew" in sentence for sentence in found["wrong"])
    assert found["slope_mib_per_1000"]["low"] > 200


def test_a_sequence_that_is_never_closed_is_caught(soak: Any, work: Any) -> None:
    left: list[Any] = []

    def leave() -> None:
        if not left:
            left.append(adi.stream(work.model, [5, 6], adi.FullDepth(), max_new_tokens=4))
            next(left[0])

    samples, _ = soak.soak(work, 20, 10, after_each=leave)
    wrong = soak.judged(samples, 0, 1e9)["wrong"]
    left[0].close()
    assert any("sequences are still alive" in sentence for sentence in wrong)
    assert work.model.backbone.spec.backend == "hf" or any("blocks of KV memory" in sentence for sentence in wrong)


def test_files_left_open_are_caught(soak: Any, work: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    files: list[Any] = []
    samples, _ = soak.soak(work, 30, 5, after_each=lambda: files.append((tmp_path / "file").open()))
    wrong = soak.judged(samples, 5, 1e9)["wrong"]
    for file in files:
        file.close()
    assert any("open files rose" in sentence for sentence in wrong)


def test_steady_noise_is_no_growth_and_the_slope_is_that_of_a_line(soak: Any) -> None:
    def sample(generations: int, mib: float) -> Any:
        return soak.Sample(generations, 0.0, 0, int(mib * soak.MIB), 0, 0, 5, 5)

    noisy = [sample(100 * i, 500 + 3 * (-1) ** i) for i in range(50)]
    assert not soak.judged(noisy, 1000, 8.0)["wrong"]
    rising = [sample(100 * i, 500 + 0.5 * i) for i in range(50)]
    found = soak.judged(rising, 1000, 8.0)
    assert found["slope_mib_per_1000"]["slope"] == pytest.approx(5.0, abs=0.01)
    assert found["growth_mib"] == pytest.approx(18.5, abs=1.0)
    assert found["wrong"]


def test_nothing_waits_for_the_garbage_collector(soak: Any, work: Any) -> None:
    """Logits in a cycle would: the collector counts objects, and knows nothing of their bytes."""
    for kind in dict.fromkeys(soak.KINDS):
        work.do(kind, 1)  # whatever is made once
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for number in range(3):
                work.do(kind, 10 + number)
            gc.collect()
            left = [type(thing).__name__ for thing in gc.garbage if type(thing).__module__.startswith(("adi.", "torch"))]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert not left, kind
