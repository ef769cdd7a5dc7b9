"""The adaptive proposer on tiny models, its drafter right as often as the test wants: exactly full depth's tokens."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import adi
from adi.decoding import policies as policies_module
from adi.decoding import speculate as speculate_module
from adi.decoding.drafting.rounds import DraftRound
from adi.decoding.drafting.trial import ROWS, RoundClock, Trials
from adi.decoding.requests import DepthOutput
from adi.drafters.history import History
from adi.drafters.network import DraftGuess, Drafting
from conftest import exits_with_drafter
from families import VOCABULARY, tiny
from scripted import UntaughtCosts

PROMPTS = [[1, 2, 3], [5], [7, 7, 7, 7], [100, 3, 50, 9, 100, 3], [(7 * i) % VOCABULARY for i in range(40)]]
LONG = 28


FLAT = UntaughtCosts({1: 26.0, 4: 28.0, 8: 31.0, 16: 40.0}, 0.5)


@dataclass
class Oracle:
    """Stands in for the drafter: says the full model's next token with chance ``right``, else another one."""

    truths: dict[tuple[int, ...], tuple[int, ...]]
    right: float = 1.0
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    favourite: int | None = None  # what it says when it is wrong; None for anything

    def place(self, session: Any, item: DraftRound) -> DraftRound:
        """Where in which text the drafter begins is its state."""
        truth = (*session.prompt_ids, *self.truths[session.prompt_ids])
        assert truth[item.position - 1] == item.last, "the first guess follows the last final token"
        assert session.frontier.length >= item.position - 1
        item.drafting = session.strategy.drafting
        item.state = torch.tensor([[list(self.truths).index(session.prompt_ids), item.position]])
        return item

    def step(self, tokens: Sequence[int], state_TD: torch.Tensor) -> tuple[list[DraftGuess], torch.Tensor]:
        return [self.guess(*row) for row in state_TD.tolist()], state_TD + torch.tensor([[0, 1]])

    def guess(self, text: int, at: int) -> DraftGuess:
        truth = [token for part in list(self.truths.items())[text] for token in part]
        good = self.dice.random() < self.right
        other = self.favourite if self.favourite is not None else self.dice.randrange(VOCABULARY)
        said = (truth[at] if at < len(truth) else 0) if good else other
        return DraftGuess(said, {"top_probability": self.dice.uniform(0.6, 0.99)})


@cache
def loud() -> Any:
    """The tiny llama with wider weights, whose texts repeat themselves less."""
    model = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter *= 3
    return model


@pytest.fixture(params=["hf", "int8"])
def model(request: pytest.FixtureRequest, compiled: dict[str, adi.Model]) -> adi.Model:
    if request.param == "int8":
        pytest.importorskip("openvino")
    if request.param == "hf":
        compiled.setdefault("hf", adi.load(loud()))
    elif request.param not in compiled:
        from adi.model.openvino import export_and_open

        compiled[request.param] = adi.Model(
            export_and_open(tiny("llama"), name="llama", precision=request.param), None, frozenset()
        )
    return compiled[request.param]


@pytest.fixture(scope="module")
def compiled() -> dict[str, adi.Model]:
    return {}


@pytest.fixture(autouse=True)
def _steady(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies_module, "cost_model_of", lambda *_: FLAT.copy())


@cache
def full_texts(model: adi.Model, length: int = LONG) -> dict[tuple[int, ...], tuple[int, ...]]:
    options: dict[str, Any] = {"max_new_tokens": length + 8, "stop_at_eos": False}
    return {tuple(p): adi.generate(model, p, adi.FullDepth(), **options).token_ids for p in PROMPTS}


@pytest.fixture
def oracle(model: adi.Model, monkeypatch: pytest.MonkeyPatch) -> Oracle:
    made = Oracle(full_texts(model))
    monkeypatch.setattr(adi.Session, "_with_drafter", lambda session, item: made.place(session, item) if item.drafter else item)
    monkeypatch.setattr(Drafting, "try_once", lambda _: None)
    monkeypatch.setattr(Drafting, "step", lambda _, tokens, state: made.step(tokens, state))
    return made


def ending(model: adi.Model, eos: int) -> adi.Model:
    return adi.Model(model.backbone, None, frozenset({eos}))


def history(path: Path, *texts: Sequence[int]) -> History:
    known = History.open(path / f"h{len(list(path.iterdir()))}", fingerprint="ours", vocabulary=VOCABULARY)
    for text in texts:
        known.learn(text)
    return known


def rounds_of(got: adi.Generation) -> Iterator[tuple[str, int, int]]:
    """Of every round with drafts: who drafted, how many, and how many were accepted."""
    for number in range(2, got.counters.rounds + 1):
        steps = [s for s in got.steps if s.round == number]
        accepted = [s for s in steps if s.drafted]
        rejected = sum(len(s.rejected) for s in steps)
        if accepted or rejected:
            yield (accepted[0].level if accepted else "?"), len(accepted) + rejected, len(accepted)


def test_memory_alone_and_an_untrained_drafter_say_what_full_depth_says(model: adi.Model, tmp_path: Path) -> None:
    truths = full_texts(model)
    exits = exits_with_drafter(model)
    known = history(tmp_path, *truths.values())
    levels = Counter[str]()
    for policy in (
        adi.Verified(),
        adi.Verified(memory=False),
        adi.Verified(exits),
        adi.Verified(exits, memory=False),
        adi.Verified(history=history(tmp_path)),
        adi.Verified(exits, history=known),
    ):
        for prompt in PROMPTS:
            for length in (LONG, 2, 1):
                got = adi.generate(model, prompt, policy, max_new_tokens=length, stop_at_eos=False)
                assert got.token_ids == truths[tuple(prompt)][:length]
                assert got.finish == "length"
                levels.update(s.level for s in got.steps)
                assert all((s.depth == model.backbone.spec.layers) == (s.level == "full") for s in got.steps)
    assert set(levels) <= {"memory", "drafter", "full"}
    assert levels["memory"] > 20
    assert levels["full"] > 20


@pytest.mark.parametrize("right", [0.3, 0.7, 0.9, 1.0])
def test_any_share_of_right_drafts_gives_full_depths_tokens(model: adi.Model, oracle: Oracle, right: float) -> None:
    oracle.right = right
    exits = exits_with_drafter(model)
    levels, accepted, rejected = Counter[str](), 0, 0
    for policy in (adi.Verified(exits, memory=False), adi.Verified(exits)):
        for prompt in PROMPTS:
            for length in (LONG, 1, 2):
                got = adi.generate(model, prompt, policy, max_new_tokens=length, stop_at_eos=False)
                assert got.token_ids == oracle.truths[tuple(prompt)][:length]
                levels.update(s.level for s in got.steps)
                accepted += got.counters.accepted
                rejected += got.counters.drafted - got.counters.accepted
                if length == LONG and right == 1.0:
                    assert got.counters.rounds < LONG
    assert accepted > 0
    assert (rejected > 0) or right == 1.0
    assert "drafter" in levels
    assert set(levels) <= {"memory", "drafter", "full"}


def test_chains_are_rolled_back_at_every_length(oracle: Oracle, model: adi.Model) -> None:
    exits = exits_with_drafter(model)
    seen = set[tuple[int, int]]()
    for seed in range(6):
        for prompt in PROMPTS:
            oracle.dice, oracle.right = random.Random(seed), 0.85
            got = adi.generate(model, prompt, adi.Verified(exits, memory=False), max_new_tokens=LONG, stop_at_eos=False)
            assert got.token_ids == oracle.truths[tuple(prompt)][:LONG]
            seen.update((drafts, agreed) for _, drafts, agreed in rounds_of(got))
    assert {0, 1, 2} <= {agreed for drafts, agreed in seen if agreed < drafts}
    assert any(agreed == drafts >= 3 for drafts, agreed in seen)


@pytest.mark.parametrize("where", [0, 1, 11])
def test_texts_end_where_full_depths_do(model: adi.Model, oracle: Oracle, tmp_path: Path, where: int) -> None:
    exits = exits_with_drafter(model)
    drafted_end = 0
    for prompt in PROMPTS:
        truth = oracle.truths[tuple(prompt)]
        short = ending(model, truth[where])
        wanted = truth[: truth.index(truth[where]) + 1]
        known = history(tmp_path, truth)
        for right in (0.4, 1.0):
            oracle.right, oracle.favourite = right, truth[where]  # wrong drafts are endings that full depth refuses
            for policy in (adi.Verified(exits), adi.Verified(exits, memory=False), adi.Verified(history=known, memory=False)):
                got = adi.generate(short, prompt, policy, max_new_tokens=LONG)
                assert (got.token_ids, got.finish) == (wanted, "eos")
                drafted_end += got.steps[-1].drafted
                for length in (1, 2):
                    cut = adi.generate(short, prompt, policy, max_new_tokens=length)
                    assert cut.token_ids == wanted[:length]
                free = adi.generate(short, prompt, policy, max_new_tokens=LONG, stop_at_eos=False)
                assert free.token_ids == truth[:LONG]
    assert where < 2 or drafted_end > 0


def test_a_batch_says_what_full_depth_says_to_each(
    model: adi.Model, oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def always(_: RoundClock, trials: Trials | None, *rest: Any) -> None:
        if trials is not None:
            trials.drafts = ROWS  # whether it pays by the clock is not asked here

    monkeypatch.setattr(RoundClock, "begin", always)
    if model.backbone.spec.backend != "hf" and not model.backbone.spec.row_invariant:
        pytest.skip("rows depend on their company on this machine")
    exits = exits_with_drafter(model)
    oracle.right = 0.8
    eos = oracle.truths[tuple(PROMPTS[0])][9]
    known = history(tmp_path, *oracle.truths.values())
    for policy in (adi.Verified(), adi.Verified(exits), adi.Verified(exits, memory=False), adi.Verified(history=known)):
        for some in (model, ending(model, eos)):
            for length in (LONG, 1, 2):
                full = adi.generate_batch(some, PROMPTS, adi.FullDepth(), max_new_tokens=length)
                got = adi.generate_batch(some, PROMPTS, policy, max_new_tokens=length, most=4)
                assert [(g.token_ids, g.finish) for g in got] == [(f.token_ids, f.finish) for f in full]
                assert length < LONG or sum(g.counters.accepted for g in got) > 0


def test_a_broken_acceptance_rule_would_be_seen(oracle: Oracle, model: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first draft of a round is let through whatever full depth says: the tests above would fail."""
    accept = speculate_module.accept

    @dataclass(frozen=True)
    class Agreeing:
        token: int
        depth: int
        signals: Any

    def gullible(wanted: Any, text: Sequence[int], proposal: Any, outputs: Sequence[DepthOutput], rounds: int) -> Any:
        changed: list[DepthOutput] = list(outputs)
        if proposal.drafts:
            changed[0] = Agreeing(proposal.drafts[0].token, changed[0].depth, {})
        return accept(wanted, text, proposal, changed, rounds)

    def unplaced(self: Oracle, session: Any, item: DraftRound) -> DraftRound:
        item.drafting, item.state = session.strategy.drafting, torch.zeros(1, 2, dtype=torch.int64)
        return item

    monkeypatch.setattr(speculate_module, "accept", gullible)
    monkeypatch.setattr(Oracle, "place", unplaced)
    monkeypatch.setattr(Oracle, "guess", lambda *_: DraftGuess(0, {"top_probability": 0.9}))
    exits, differ = exits_with_drafter(model), 0
    oracle.right = 0.5
    for prompt in PROMPTS:
        got = adi.generate(model, prompt, adi.Verified(exits, memory=False), max_new_tokens=LONG, stop_at_eos=False)
        differ += got.token_ids != oracle.truths[tuple(prompt)][:LONG]
    assert differ == len(PROMPTS)


def test_a_history_takes_fewer_rounds_the_second_time_and_change_nothing_else(model: adi.Model, tmp_path: Path) -> None:
    truths, known = full_texts(model), history(tmp_path)
    policy = adi.Verified(history=known)
    first = [adi.generate(model, p, policy, max_new_tokens=LONG, stop_at_eos=False) for p in PROMPTS[:3]]
    assert known.info().sequences == len({g.token_ids for g in first})
    again = [adi.generate(model, p, policy, max_new_tokens=LONG, stop_at_eos=False) for p in PROMPTS[:3]]
    for one, two in zip(first, again, strict=True):
        assert two.token_ids == one.token_ids == truths[one.prompt_ids][:LONG]
        assert two.counters.rounds <= one.counters.rounds
    assert sum(g.counters.rounds for g in again) < 0.7 * sum(g.counters.rounds for g in first)
    for prompt in PROMPTS[3:]:
        got = adi.generate(model, prompt, policy, max_new_tokens=LONG, stop_at_eos=False)
        assert got.token_ids == truths[tuple(prompt)][:LONG]
    stream, before = adi.stream(model, [90, 91], policy, max_new_tokens=LONG), known.info().sequences
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert known.info().sequences == before, "a text left early is not learned"


def test_what_the_controller_does_not_decide_is_refused(model: adi.Model, tmp_path: Path) -> None:
    exits = exits_with_drafter(model)
    assert adi.Verified().adaptive
    assert adi.Verified(exits).adaptive
    assert not adi.Verified(exits, draft_tokens=3).adaptive
    assert adi.Verified(replace(exits, drafter=None)).adaptive
    for bad in ({"draft_tokens": 3}, {"trigger": adi.Never()}):
        with pytest.raises(ValueError, match="needs exits"):
            adi.Verified(**bad)
    with pytest.raises(ValueError, match="a history is read by the controller"):
        adi.Verified(adi.bare_exits(model, (2,)), draft_tokens=2, history=history(tmp_path))
