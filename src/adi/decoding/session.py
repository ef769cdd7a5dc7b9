"""``Session``: one sequence's logic driven against a frontier, telling what happens as events."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from adi.artifact import Reader
from adi.decoding.checks import check_count, check_length, check_reflex, check_signals
from adi.decoding.controller import MOST_DRAFTS
from adi.decoding.frontier import BlockPass, Frontier, HeadPass
from adi.decoding.policies import FullDepth, Lookup, Policy, Reflex, Verified, in_force, name_of, trigger_of
from adi.decoding.records import (
    Candidate,
    Counters,
    Draft,
    Drafted,
    DriftFound,
    Event,
    Generation,
    Look,
    Step,
    TakenBack,
)
from adi.decoding.reflex import Fallback, told_of
from adi.decoding.sampling import Sampling
from adi.decoding.speculate import DraftStep, DraftToken, Emitted, ExitCheck, Forward, Request
from adi.decoding.stop_strings import StopStrings
from adi.decoding.strategy import rule_of, strategy_of
from adi.drafters.network import DraftGuess
from adi.exits.exit_output import ExitOutput
from adi.exits.signals import SIGNALS, Prediction
from adi.exits.triggers import Trigger
from adi.model.backbone import Backbone, States
from adi.model.load import Model
from adi.model.tokenizer import Detokenizer, Prompt

COSTED_ROWS = MOST_DRAFTS + 1


class Session:
    """One generation under way. Iterating gives events: ``Drafted``, ``TakenBack`` and, for every final token, ``Step``.

    Raises ValueError before any work for a prompt or an option that cannot be meant, among them a prompt that with
    ``max_new_tokens`` would pass the model's context.
    """

    def __init__(
        self,
        model: Model,
        prompt: Prompt,
        policy: Policy | None = None,
        *,
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        stop_at_eos: bool = True,
        raw: bool = False,
        special_tokens: bool = False,
        candidates: int = 0,
        sampling: Sampling | None = None,
    ) -> None:
        self._started = time.perf_counter()
        self._asked = policy if policy is not None else FullDepth()
        self.mode = name_of(self._asked)
        self.model, self.policy = model, in_force(self._asked)
        self.sampling = None if sampling is None or sampling.plain else sampling.settled()
        check_reflex(model, self._asked, self.sampling is not None)
        check_count("candidates", candidates, 0)
        self.prompt_ids = model.encode(prompt, raw=raw, special_tokens=special_tokens)
        self.finish = "length"
        self._candidates = candidates
        self._detokenizer = Detokenizer(model.tokenizer)
        self._stop = StopStrings((stop,) if isinstance(stop, str) else tuple(stop))
        self._rounds = self._drafted = self._accepted = self._index = 0
        self._budget, self._begun, self._seconds = max_new_tokens, False, 0.0
        self._answer: Any = None
        self._probe = getattr(getattr(self.policy, "exits", None), "probe", None)
        self._ends: Callable[[int], bool] = (lambda token: token in model.eos_ids) if stop_at_eos else (lambda _: False)
        check_length(model, len(self.prompt_ids), max_new_tokens)
        trigger, depths, self._read = self._exits()
        check_signals(model, trigger)
        self.plan = plan = Request(
            prompt=self.prompt_ids,
            budget=max_new_tokens,
            layers=model.backbone.spec.layers,
            stops=tuple(d for d in depths if trigger.may_fire(d)),
            trigger=trigger,
            ends=self._ends,
            rule=rule_of(self.sampling),
        )
        shows_mlp = any(SIGNALS[name].reads == "mlp" for name in trigger.needs) or candidates > 0
        model.backbone.prepare(plan.stops, drafts=isinstance(self.policy, (Verified, Lookup)))
        self.frontier = Frontier(model.backbone, mlp=shows_mlp and model.backbone.has_mlp_tap)
        self._logic = strategy_of(self.policy, plan, model.backbone)
        self._state: Any = None  # the drafter's, as its engine has it
        self._said: list[int] = []
        self._spelled: dict[int, str] = {}
        self._alone = False
        self._fell_at: int | None = 0 if self.policy is not self._asked else None

    def __iter__(self) -> Iterator[Event]:
        """The events, in order, once; ending early (closing the iterator) leaves the model as it was."""
        backbone, self._alone = self.model.backbone, True
        for item in self.work():
            if isinstance(item, BlockPass):
                (states,) = backbone.forward([item.rows], item.lo, item.hi, mlp=self.frontier.mlp)
                self.answer((item, states))
            elif isinstance(item, HeadPass):
                self.answer(item.met(backbone))
            else:
                yield item

    def work(self) -> Generator[BlockPass | HeadPass | Event, None, None]:
        """Events, and between them what the session needs of the network, each to be met by ``answer`` before going on.

        Who drives it may meet the needs of many sessions together. A ``BlockPass`` is answered with itself, or with a lower
        part of it, and the states that this gave; a ``HeadPass`` with what it gives for each of its rows.
        """
        if self._begun:
            raise RuntimeError("a session runs once; make another for another generation.")
        self._begun = True
        events: Iterator[Any] = self._events()
        try:
            yield from self._stop.watch(events)  # which lets pass what is no step
        finally:
            self.frontier.close()
        self._seconds = time.perf_counter() - self._started
        if self._stop.hit:
            self.finish = "stop"
        if isinstance(self.policy, Verified) and self.policy.habits is not None:
            try:
                self.policy.habits.learn(self._said)
            except ValueError as error:  # a file that was damaged or a full disk meanwhile; the text is there
                warnings.warn(f"this text was not remembered: {error}", stacklevel=2)

    def answer(self, value: Any) -> None:
        """What was asked for last."""
        self._answer = value

    @property
    def counters(self) -> Counters:
        """What it has cost so far."""
        seconds = self._seconds or time.perf_counter() - self._started
        f = self.frontier
        return Counters(self._rounds, self._drafted, self._accepted, f.row_blocks, f.block_passes, seconds)

    def generation(self, steps: Sequence[Step]) -> Generation:
        """The finished text of these steps."""
        spec = self.model.backbone.spec
        return Generation(
            text="".join(step.text for step in steps),
            token_ids=tuple(step.token for step in steps),
            prompt_ids=self.prompt_ids,
            steps=tuple(steps),
            mode=self.mode,
            model=spec.name,
            backend=spec.backend,
            precision=spec.precision,
            layers=spec.layers,
            finish=self.finish,
            counters=self.counters,
            sampling=None if self.sampling is None else self.sampling.to_json(),
            **told_of(self._asked, self._logic.spot, self._fell_at),
        )

    def _exits(self) -> tuple[Trigger, tuple[int, ...], Reader]:
        exits = getattr(self.policy, "exits", None)
        if exits is None or (isinstance(self.policy, Verified) and (self.policy.adaptive or self.policy.drafts_at_once)):
            return trigger_of(self.policy), (), _no_reader
        return trigger_of(self.policy), exits.depths, exits.reader(self.model.backbone)

    def _guess(self, request: DraftStep) -> DraftGuess:
        """One step of the drafter."""
        drafting, costs = self._logic.drafting, self._logic.costs
        assert drafting is not None
        started = time.perf_counter()
        if request.fresh:
            self._state = drafting.start(self.frontier.newest(request.known - 1))
        assert self._state is not None
        guessed, self._state = drafting.step(request.after, self._state)
        if costs is not None:
            costs.drafted(time.perf_counter() - started, request.fresh)
        return guessed

    def _events(self) -> Iterator[BlockPass | HeadPass | Event]:
        """Serve the sequence's requests, pass on what it says."""
        sequence = self._logic.sequence
        reply: Sequence[Any] | None = None
        while True:
            try:
                said = next(sequence) if reply is None else sequence.send(reply)
            except StopIteration:
                return
            reply = None
            match said:
                case Forward():
                    reply = yield from self._serve(said)
                case DraftStep():
                    reply = [self._guess(said)]
                case DraftToken():
                    self._drafted += 1
                    yield Drafted(self._draft(said))
                case Emitted():
                    if said.rejected:
                        yield TakenBack(len(said.rejected))
                    if said.depth < self.frontier.backbone.spec.layers and getattr(self.policy, "skipped", "") == "propagate":
                        self.frontier.propagate()
                    yield self._step(said)
                case Fallback():
                    self._fell_at = self._index
                    yield DriftFound(self._index, said.level, said.lower)

    def _serve(self, request: Forward) -> Generator[BlockPass | HeadPass, None, list[ExitOutput]]:
        """Do one request on the frontier and read its last rows there."""
        frontier, spec = self.frontier, self.model.backbone.spec
        started = time.perf_counter()
        frontier.rollback(request.keep)
        frontier.append(request.ids)
        while (ahead := frontier.next_pass(request.to)) is not None:
            yield ahead
            frontier.absorb(*self._answer)
        assert frontier.last is not None
        states = frontier.last[-request.read :]
        if request.to < spec.layers:
            read = functools.partial(self._read, request.to, states)
            return [ExitOutput(request.to, read, states, probe=self._probe)]
        yield HeadPass(states, whole=self.sampling is not None)
        if self._alone and self._logic.costs is not None and len(request.ids) <= COSTED_ROWS:
            self._logic.costs.passed(len(request.ids), time.perf_counter() - started)
        readings = []
        for i, said in enumerate(self._answer):
            row, (token, logits_V) = states[i : i + 1], (said, None) if self.sampling is None else (None, said)
            predict = functools.partial(_full_prediction, self.model.backbone, row)
            readings.append(ExitOutput(request.to, predict, row, token, logits_V))
        return readings

    def _step(self, said: Emitted) -> Step:
        unverified = isinstance(self.policy, Reflex) and self._fell_at is None
        self._rounds = said.round
        drafted = said.draft is not None
        if drafted and unverified:
            self._drafted += 1
        accepted = drafted and not unverified
        self._accepted += accepted
        text = self._detokenizer.push(said.token)
        if self._ends(said.token):
            self.finish = "eos"
        if self.finish == "eos" or self._index == self._budget - 1:
            text += self._detokenizer.finish()
        deciders = said.draft.glances if said.draft else said.glances
        seen = deciders[-1].reading.signals if deciders else {}
        read = dict(getattr(seen, "seen", {}))  # before the looks, which ask for everything
        if said.draft is not None and said.draft.confidence is not None:
            read["top_probability"] = said.draft.confidence
        looks = tuple(self._look(glance) for glance in said.glances) if self._candidates else ()
        step = Step(
            index=self._index,
            token=said.token,
            text=text,
            depth=said.depth,
            level=said.draft.level if said.draft is not None else "full",
            round=said.round,
            drafted=drafted,
            accepted=accepted,
            signals=read,
            looks=looks,
            rejected=tuple(self._draft(p) for p in said.rejected),
            seconds=time.perf_counter() - self._started,
        )
        self._index += 1
        self._said.append(said.token)
        return step

    def _draft(self, proposed: DraftToken) -> Draft:
        return Draft(proposed.token, self._spell(proposed.token), proposed.depth, proposed.level)

    def _look(self, glance: ExitCheck) -> Look:
        reading = glance.reading
        assert isinstance(reading, ExitOutput)
        found = tuple(Candidate(t, self._spell(t), p) for t, p in reading.candidates(self._candidates))
        signals = {name: reading.signals[name] for name in reading.signals}
        return Look(reading.depth, reading.token, self._spell(reading.token), glance.fired, signals, found)

    def _spell(self, token: int) -> str:
        """The token's own text; a draft's is asked for when it is made and again when it is thrown away."""
        if (text := self._spelled.get(token)) is None:
            text = self._spelled[token] = self.model.tokenizer.decode([token]) if self.model.tokenizer else str(token)
        return text


def _full_prediction(backbone: Backbone, states: States) -> Prediction:
    return Prediction(backbone.logits(states).log_softmax(-1))


def _no_reader(depth: int, states: object) -> Prediction:
    raise AssertionError("full depth looks at no exit")
