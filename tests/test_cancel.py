"""Given up or interrupted at any step, a model goes on as if nothing had been: the same text, and nothing kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import pytest

pytest.importorskip("openvino")

import adi
from adi.decoding.frontier import Frontier
from adi.decoding.session import Session
from adi.drafters.history import History
from adi.model.openvino import export_and_open
from conftest import exits_with_drafter, random_exits
from families import tiny

PROMPTS = ((5, 17, 9, 5, 17), (7,), (3, 40, 41, 42, 3, 40))
TOKENS = 5
Calls = dict[str, Callable[[adi.Model], Any]]


@pytest.fixture(scope="module", params=["hf", "openvino"])
def model(request: pytest.FixtureRequest) -> adi.Model:
    if request.param == "hf":
        return adi.load(tiny("llama"))
    return adi.Model(export_and_open(tiny("llama"), name="llama", precision="int8"), None, frozenset())


_POLICIES: WeakKeyDictionary[Any, dict[str, tuple[Any, dict[str, Any]]]] = WeakKeyDictionary()


def policies(model: adi.Model) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Every way of decoding, with its options; made once for a model."""
    if model.backbone not in _POLICIES:
        _POLICIES[model.backbone] = fresh_policies(model)
    return _POLICIES[model.backbone]


def fresh_policies(model: adi.Model) -> dict[str, tuple[Any, dict[str, Any]]]:
    bare = adi.bare_exits(model, (2, 4))
    exits = exits_with_drafter(model) if model.backbone.spec.backend == "hf" else bare
    seed = {"temperature": 0.8, "seed": 11}
    return {
        "full": (adi.FullDepth(), {}),
        "verified": (adi.Verified() if exits is bare else adi.Verified(exits), {}),
        "verified at exits": (adi.Verified(bare, adi.Always((2,)), 3), {}),
        "lookup": (adi.Lookup(), {}),
        "reflex": (adi.Reflex(bare, trigger=adi.Threshold("top_probability", 0.02)), {}),
        "sampled": (adi.Verified(), seed),
        "sampled at exits": (adi.Verified(bare, adi.Always((4,)), 3), seed),
        "reflex sampled": (adi.Reflex(bare, trigger=adi.Threshold("top_probability", 0.02)), seed),
    }


NAMES = ("full", "verified", "verified at exits", "lookup", "reflex", "sampled", "sampled at exits", "reflex sampled")


def text(model: adi.Model, name: str, prompt: tuple[int, ...] = PROMPTS[0]) -> tuple[int, ...]:
    policy, options = policies(model)[name]
    return adi.generate(model, prompt, policy, max_new_tokens=TOKENS, **options).token_ids


@contextmanager
def interrupted(backbone: Any, call: int, methods: tuple[str, ...] = ("forward", "greedy", "logits")) -> Iterator[list[int]]:
    """KeyboardInterrupt where the ``call``-th call of the network begins or, of every other one, has ended."""
    count = itertools.count(1)
    fired: list[int] = []

    def failing(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            now = next(count)
            if now == call and call % 2:
                fired.append(now)
                raise KeyboardInterrupt
            value = method(*args, **options)
            if now == call:
                fired.append(now)
                raise KeyboardInterrupt
            return value

        return run

    for name in methods:
        setattr(backbone, name, failing(getattr(backbone, name)))
    try:
        yield fired
    finally:
        for name in methods:
            delattr(backbone, name)


_ALIVE: WeakSet[Frontier] = WeakSet()


@pytest.fixture(autouse=True)
def _count_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sequence made from here on is known as long as it lives; nobody collects garbage."""
    _ALIVE.clear()
    begin = Frontier.__init__

    def counted(self: Frontier, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        _ALIVE.add(self)

    monkeypatch.setattr(Frontier, "__init__", counted)


def pages(model: adi.Model) -> int:
    """Blocks of KV memory in use, where the engine counts them."""
    pool = getattr(model.backbone, "pool", None)
    return 0 if pool is None else pool.used


def nothing_held(model: adi.Model) -> bool:
    return pages(model) == 0 and not _ALIVE


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_closed_after_any_number_of_tokens(model: adi.Model, name: str) -> None:
    policy, options = policies(model)[name]
    wanted = text(model, name)
    for tokens in range(TOKENS + 1):
        steps = adi.stream(model, PROMPTS[0], policy, max_new_tokens=TOKENS, **options)
        assert tuple(step.token for step in itertools.islice(steps, tokens)) == wanted[:tokens]
        steps.close()  # type: ignore[attr-defined]
        del steps
        assert nothing_held(model), tokens
        assert text(model, name) == wanted
    assert text(model, name, PROMPTS[2]) == text(model, name, PROMPTS[2])


@pytest.mark.parametrize("name", NAMES)
def test_an_interruption_inside_the_network_at_any_call(model: adi.Model, name: str) -> None:
    wanted = {prompt: text(model, name, prompt) for prompt in PROMPTS}
    for call in itertools.count(1):
        with interrupted(model.backbone, call) as fired, suppress(KeyboardInterrupt):
            text(model, name)
        if not fired:
            break
        assert nothing_held(model), call
        assert text(model, name) == wanted[PROMPTS[0]], call
    assert {prompt: text(model, name, prompt) for prompt in PROMPTS} == wanted
    assert call > 2 * TOKENS // 3


def test_a_session_given_up_between_any_two_events(model: adi.Model) -> None:
    """Drafts stand in the cache that nobody has verified yet; they go with it."""
    wanted = text(model, "verified at exits")
    policy, _ = policies(model)["verified at exits"]
    events = len(list(Session(model, PROMPTS[0], policy, max_new_tokens=TOKENS)))
    assert events > TOKENS
    for count in range(events + 1):
        session = Session(model, PROMPTS[0], policy, max_new_tokens=TOKENS)
        stream = iter(session)
        list(itertools.islice(stream, count))
        stream.close()  # type: ignore[attr-defined]
        del session, stream
        assert nothing_held(model)
        assert text(model, "verified at exits") == wanted


def test_a_session_that_never_began_holds_nothing(model: adi.Model) -> None:
    steps = adi.stream(model, PROMPTS[0], adi.FullDepth(), max_new_tokens=TOKENS)
    assert pages(model) == 0
    del steps
    assert nothing_held(model)


@pytest.mark.parametrize("name", ["full", "verified", "verified at exits", "reflex", "sampled"])
def test_a_batch_interrupted_at_any_call(model: adi.Model, name: str) -> None:
    policy, options = policies(model)[name]

    def together() -> list[tuple[int, ...]]:
        found = adi.generate_batch(model, PROMPTS, policy, max_new_tokens=3, most=2, **options)
        return [generation.token_ids for generation in found]

    wanted, alone = together(), text(model, name)
    for call in itertools.count(1):
        with interrupted(model.backbone, call) as fired, suppress(KeyboardInterrupt):
            together()
        if not fired:
            break
        assert nothing_held(model), call
        assert together() == wanted, call
    assert text(model, name) == alone


def test_an_error_that_is_kept_keeps_no_memory(model: adi.Model) -> None:
    """As an interactive session keeps the last one, with its whole traceback."""
    kept = []
    with interrupted(model.backbone, 5):
        try:
            text(model, "verified at exits")
        except KeyboardInterrupt as error:
            kept.append(error)
    assert kept
    assert pages(model) == 0


def test_an_unfinished_text_is_not_learned(model: adi.Model, tmp_path: Path) -> None:
    habits = History.open(tmp_path / "habits", fingerprint="x", vocabulary=model.backbone.spec.vocabulary)
    policy = adi.Verified(history=habits)
    with interrupted(model.backbone, 6) as fired, suppress(KeyboardInterrupt):
        adi.generate(model, PROMPTS[0], policy, max_new_tokens=TOKENS)
    assert fired
    assert habits.info().sequences == 0
    adi.generate(model, PROMPTS[0], policy, max_new_tokens=TOKENS)
    assert habits.info().sequences == 1


def test_a_leak_is_seen(model: adi.Model) -> None:
    """Or the tests above would prove nothing."""
    steps = adi.stream(model, PROMPTS[0], adi.FullDepth(), max_new_tokens=TOKENS)
    next(steps)
    assert not nothing_held(model)
    steps.close()  # type: ignore[attr-defined]


def test_random_exits_may_be_interrupted_too() -> None:
    """Heads are another caller of the network: of transformers' modules."""
    model = adi.load(tiny("llama"))
    exits = random_exits(model, (2, 4), adi.Threshold("entropy", 99.0))
    wanted = adi.generate(model, PROMPTS[0], adi.Verified(exits), max_new_tokens=TOKENS).token_ids
    for call in range(1, 12):
        with interrupted(model.backbone, call), suppress(KeyboardInterrupt):
            adi.generate(model, PROMPTS[0], adi.Verified(exits), max_new_tokens=TOKENS)
        assert adi.generate(model, PROMPTS[0], adi.Verified(exits), max_new_tokens=TOKENS).token_ids == wanted
