"""Ctrl-C may come between any two lines: the model it came to goes on, and is left as it was found."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

pytest.importorskip("openvino")

import adi
from adi.model.openvino import export_and_open
from adi.model.openvino import kv_pool as pool
from families import tiny

PROMPT, TOKENS = (5, 17, 9, 5, 17), 5
INTERRUPTIONS = 40
GIVING_BACK = ("close",)  # interrupted there, blocks of a text that has ended may stay in use
NAMES = ("full", "verified at exits", "sampled")


@pytest.fixture(scope="module", params=["hf", "openvino"])
def model(request: pytest.FixtureRequest) -> Iterator[adi.Model]:
    if request.param == "hf":
        yield adi.load(tiny("llama"))
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "FIRST_BLOCKS", 1)  # so that memory grows soon
        yield adi.Model(export_and_open(tiny("llama"), name="llama", precision="int8"), None, frozenset())


def text(model: adi.Model, name: str, prompt: tuple[int, ...] = PROMPT) -> tuple[int, ...]:
    policy = (
        adi.Verified(adi.bare_exits(model, (2, 4)), adi.Always((2,)), 3) if name == "verified at exits" else adi.FullDepth()
    )
    options: dict[str, Any] = {"temperature": 0.8, "seed": 11} if name == "sampled" else {}
    return adi.generate(model, prompt, policy, max_new_tokens=TOKENS, **options).token_ids


def pages(model: adi.Model) -> int:
    """Blocks of KV memory in use, where the engine counts them."""
    memory = getattr(model.backbone, "pool", None)
    return 0 if memory is None else memory.used


def leaves_a_with(frame: Any) -> bool:
    """On the way out of a ``with`` its line is met again, before ``__exit__``: an error there would keep a lock for good. No
    signal is handled at that place (CPython looks for them after calls and at jumps back), so none is raised there."""
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")


@contextmanager
def interrupted_at_line(number: int, inside: Callable[[Any], bool]) -> Iterator[list[int]]:
    """KeyboardInterrupt before so many lines of this code have run."""
    seen = [0]

    def trace(frame: Any, event: str, _: Any) -> Any:
        if not inside(frame.f_code):
            return None
        if event == "line" and not leaves_a_with(frame):
            seen[0] += 1
            if seen[0] == number:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(before)


def ours(code: Any) -> bool:
    return any(part in code.co_filename for part in ("/adi/decoding/", "/adi/model/")) and code.co_name not in GIVING_BACK


def growing(code: Any) -> bool:
    return code.co_filename.endswith("openvino/kv_pool.py") and code.co_name in ("reserve", "_grow", "begin", "_take", "_block")


@pytest.mark.parametrize("name", NAMES)
def test_an_interruption_at_any_line(model: adi.Model, name: str) -> None:
    """Not at every one, but at so many of them, spread over all."""
    wanted = text(model, name)
    with interrupted_at_line(-1, ours) as seen:
        text(model, name)
    lines = seen[0]
    assert lines > 500
    stopped = 0
    for number in range(3, lines, lines // INTERRUPTIONS):
        with suppress(KeyboardInterrupt), interrupted_at_line(number, ours) as seen:
            text(model, name)
        stopped += seen[0] == number
        assert pages(model) == 0, number
        assert text(model, name) == wanted, number
    assert stopped > INTERRUPTIONS // 2  # a later text may need fewer lines, since more has been compiled


def test_a_pass_that_is_interrupted_at_any_line_leaves_nothing_behind(model: adi.Model) -> None:
    """Afterwards adi says what it said, and the user's own model was never touched."""
    if model.backbone.spec.backend != "hf":
        pytest.skip("the compiled engine has no blocks to steer")
    hf: Any = model.backbone.model  # type: ignore[attr-defined]
    wanted = text(model, "full")

    def steering(code: Any) -> bool:
        return code.co_filename.endswith("hf/passes.py") and code.co_name in ("running", "step")

    with interrupted_at_line(-1, steering) as seen:
        text(model, "full")
    for number in range(1, min(seen[0], 120) + 1):
        with pytest.raises(KeyboardInterrupt), interrupted_at_line(number, steering):
            text(model, "full")
        assert text(model, "full") == wanted, number
        assert not [block for block in hf.model.layers if "forward" in block.__dict__], number


def test_memory_that_grows_may_be_interrupted_at_every_line(model: adi.Model) -> None:
    """Every block is somebody's or free, exactly once, and all keys and values are where they were."""
    if model.backbone.spec.backend == "hf":
        pytest.skip("transformers' caches grow by themselves")
    backbone: Any = model.backbone
    long = tuple(range(3, 120))
    wanted, short = text(model, "full", long), text(model, "full")

    def grown(number: int) -> int:
        """The pool made anew and grown while another sequence is under way; how many lines of it ran."""
        backbone.pool.__init__(backbone.pool.budget_bytes)
        for segment in backbone._segments._segments.values():
            segment.add_to(backbone.pool)
        other = adi.stream(model, PROMPT, adi.FullDepth(), max_new_tokens=TOKENS)
        begun = [next(other).token, next(other).token]
        with suppress(KeyboardInterrupt), interrupted_at_line(number, growing) as seen:
            text(model, "full", long)
        assert (*begun, *(step.token for step in other)) == short, number
        assert text(model, "full", long) == wanted, number
        backbone.pool._recount()
        assert backbone.pool.free == backbone.pool.capacity, number
        assert sorted(place.number for place in backbone.pool._free) == list(range(1, backbone.pool.blocks + 1)), number
        return seen[0]

    lines = grown(-1)
    assert lines > 30
    for number in range(1, lines + 1):
        grown(number)
