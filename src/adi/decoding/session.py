"""``Session``: one generation under way, its loop served by a frontier and told as events."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Unpack

from adi.arguments import real, several, whole
from adi.artifact import Reader
from adi.decoding.drafting.rounds import DraftRound
from adi.decoding.drafting.trial import Trials
from adi.decoding.frontier import Frontier, HeadPass
from adi.decoding.policies import Policy, required
from adi.decoding.processors import LogitsProcessor, constraint, fields_for, logits_processors, penalties, token_ids
from adi.decoding.records import (
    Candidate,
    Counters,
    Draft,
    Drafted,
    DriftFound,
    Event,
    Generation,
    Look,
    Rejected,
    Step,
)
from adi.decoding.requests import DraftToken, Emitted, ExitCheck, Fallback, Forward, Request, TokenRule, likeliest
from adi.decoding.sampling import Sampling
from adi.decoding.scheduler import Scheduler, Served, Work
from adi.decoding.speculate import speculate
from adi.decoding.stop_strings import StopStrings
from adi.errors import UsageError
from adi.exits.exit_output import ExitOutput
from adi.exits.signals import SIGNALS, Prediction
from adi.model.backbone import Backbone, States
from adi.model.load import Model
from adi.model.prefix_cache import PrefixCache, checked
from adi.model.prompt import Prompt, PromptKeywords
from adi.model.tokenizer import Detokenizer
from adi.risk.free_energy import least_free_energy


class Session:
    """One generation. Iterating gives events: ``Drafted``, ``Rejected`` and, for every final token, ``Step``.

    Raises AdiError before any work for a prompt or an option without meaning, among them a prompt that with
    ``max_new_tokens`` would pass the model's context. ``Scheduler`` runs several at once.
    """

    def __init__(
        self,
        model: Model,
        prompt: Prompt,
        policy: Policy | None = None,
        *,
        max_new_tokens: int | None = 256,
        stop: str | Sequence[str] | None = (),
        stop_token_ids: Sequence[int] | int | None = (),
        stop_at_eos: bool = True,
        skip_special_tokens: bool = True,
        logprobs: int | None = None,
        price: float | None = None,
        sampling: Sampling | None = None,
        logits_processor: Sequence[LogitsProcessor] = (),
        response_format: Mapping[str, Any] | None = None,
        grammar: str | None = None,
        prefix_cache: PrefixCache | None = None,
        **reading: Unpack[PromptKeywords],
    ) -> None:
        started = time.perf_counter()
        self._asked = required(policy, model)
        self.model, self.policy = model, self._asked.in_force()
        self.mode = self._asked.mode
        self.sampling = None if sampling is None or sampling.plain else sampling.settled()
        self._fields, self._own = fields_for(model, sampling or Sampling()), tuple(logits_processor or ())
        self._constraint = constraint(model, response_format, grammar)
        if self._constraint is not None and not stop_at_eos:
            raise UsageError(f"stop_at_eos is {stop_at_eos}, and the text of a grammar ends with an end token; leave it out.")
        drawn = self.sampling is not None and self.sampling.draws
        self._plain = not (drawn or self._fields or self._own or self._constraint)
        self._asked.check(model, not self._plain)
        self.prompt_ids = model.encode(prompt, **reading)
        self._stop = StopStrings(several(stop) + several(model.generation.get("stop_strings") if stop_at_eos else None)).stops
        self._logprobs = None if logprobs is None else whole("logprobs", logprobs, 0)
        self._price = None if price is None else real("price", price, "0 or more, nats for a full pass", lambda p: p >= 0)
        self._skip_special = skip_special_tokens
        self.budget = _budget(model, len(self.prompt_ids), max_new_tokens)
        self._eos_ids: frozenset[int] = model.eos_ids if stop_at_eos else frozenset()
        self._end_ids = self._eos_ids | token_ids("stop_token_ids", stop_token_ids, model)
        if self.sampling is not None and (self.sampling.min_new_tokens or 0) > self.budget:
            raise UsageError(f"min_new_tokens is {self.sampling.min_new_tokens}, more than max_new_tokens, {self.budget}.")
        before = time.perf_counter()
        self.policy.prepare(model)
        self.prefix_cache = checked(prefix_cache, model)
        self._begin()
        self._started = started + time.perf_counter() - before  # measuring and compiling are not this generation's time

    def _begin(self) -> None:
        """Everything that changes while it runs."""
        backbone = self.model.backbone
        self.request = Request(self.prompt_ids, self.budget, backbone.spec.layers, self._end_ids.__contains__, self._rule())
        self.strategy = strategy = self.policy.strategy(self.request, self.model)
        self._read: Reader | None = None if strategy.exits is None else strategy.exits.reader(backbone)
        trigger = self.policy.exit_trigger
        mlp = self._logprobs is not None or any(SIGNALS[name].reads == "mlp" for name in (trigger.needs if trigger else ()))
        backbone.prepare(strategy.stops, drafts=strategy.draft_tokens > 0 and strategy.verification.always)
        self.frontier = Frontier(backbone, mlp=mlp and backbone.has_mlp_tap)
        self.finish = "length"
        self._detokenizer = Detokenizer(self.model.tokenizer, not self._skip_special)
        self._spelled: dict[int, str] = {}
        self._tells = False  # whether the next pass teaches the costs
        self._tokens: list[int] = []
        self._rounds = self._drafted = self._accepted = 0
        self._seconds: float | None = None
        self._fell_at: int | None = None if self.policy is self._asked else 0
        self._begun = False

    def __iter__(self) -> Iterator[Event]:
        """The events, in order, once; ending early (closing the iterator) leaves the model as it was."""
        with Scheduler[Session](self.model.backbone, prefix_cache=self.prefix_cache) as scheduler:
            scheduler.add(self)
            for _, event in scheduler:
                yield event
        for error in scheduler.failed.values():
            raise error

    def steps(self) -> Iterator[Step]:
        """Its final tokens alone, as soon as each is final."""
        return (event for event in self if isinstance(event, Step))

    def run(self) -> Work:
        """For a driver: events, and between them what is needed of the network (see ``Schedulable``)."""
        if self._begun:
            raise RuntimeError("a session runs once; make another for another generation.")
        self._begun = True
        try:
            yield from self._work()
        finally:
            self.close()

    def close(self) -> None:
        """Free its KV memory; it cannot go on."""
        self.frontier.close()

    @property
    def trials(self) -> Trials | None:
        """Those of all sequences with its drafter, where costs decide what it drafts."""
        costs = self.strategy.costs
        return None if costs is None else costs.correction.trials

    def stops(self) -> StopStrings:
        """Looks for the stop strings in the text, and in the text with its special tokens."""
        return StopStrings(self._stop, self._special)

    def restart(self) -> None:
        """Be as new; ``run`` will give the same again, sampled and spot-checked by the same dice."""
        verification = self.strategy.verification
        self._begin()
        self.strategy.verification = verification.restarted()

    def complete(self, stopped: bool) -> None:
        """The text came to its end."""
        self._seconds = time.perf_counter() - self._started
        if stopped:
            self.finish = "stop"
        if self.strategy.costs is not None:
            self.strategy.costs.keep()
        self.policy.on_finished(self._tokens)

    @property
    def counters(self) -> Counters:
        """What it has cost so far."""
        seconds = time.perf_counter() - self._started if self._seconds is None else self._seconds
        f = self.frontier
        return Counters(self._rounds, self._drafted, self._accepted, f.row_blocks, f.block_passes, seconds, f.reused)

    @property
    def text_ids(self) -> tuple[int, ...]:
        """The prompt and the tokens so far."""
        return (*self.prompt_ids, *self._tokens)

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
            precision=spec.numbers,
            layers=spec.layers,
            finish=self.finish,
            counters=self.counters,
            full_price=self._price,
            sampling=None if self.sampling is None else self.sampling.to_json(),
            **self._asked.result(self.strategy.verification, self._fell_at),
        )

    def _rule(self) -> TokenRule:
        """How final tokens come of full depth's outputs."""
        if self._price is not None:
            import torch  # noqa: F401  now, not while the first token is timed
        if self._plain:
            return likeliest
        from adi.decoding.sampler import Sampler  # with torch, which greedy decoding on the compiled engine does without

        sampling, prompt = self.sampling or Sampling(), self.prompt_ids
        own = [*penalties(sampling, len(prompt)), *self._own]
        if self._constraint is not None:
            own.append(self._constraint.processor(len(prompt)))
        processors = logits_processors(self.model, self._fields, prompt, self.budget, own)
        return Sampler(sampling, processors, self.model.backbone.spec.vocabulary)

    def _work(self) -> Work:
        """Serve the loop's requests, tell what happens."""
        loop = speculate(self.request, self.strategy)
        reply: Any = None
        while True:
            try:
                item = loop.send(reply)
            except StopIteration:
                return
            reply = None
            match item:
                case Forward():
                    reply = yield from self._forward(item)
                case DraftRound():
                    yield self._with_drafter(item)
                    if item.error is not None:
                        raise item.error
                    self._tells = item.tells
                case DraftToken():
                    self._drafted += 1
                    yield Drafted(self._draft(item))
                case Emitted():
                    if item.rejected:
                        yield Rejected(len(item.rejected))
                    if item.depth < self.request.layers:
                        (self.frontier.propagate if self.strategy.propagate else self.frontier.settle)()
                    yield self._step(item)
                case Fallback():
                    self._fell_at = len(self._tokens)
                    yield DriftFound(self._fell_at, item.level, item.lower)

    def _with_drafter(self, item: DraftRound) -> DraftRound:
        """Where the drafter begins: at the last state that has one."""
        if item.drafter and (drafting := self.strategy.drafting) is not None:
            last = self.frontier.last_state(item.position - 2)
            item.drafting, item.start = drafting, functools.partial(drafting.start, last)
        return item

    def _forward(self, request: Forward) -> Generator[Any, Any, list[ExitOutput]]:
        """Do one request on the frontier and read its last rows there."""
        frontier, costs = self.frontier, self.strategy.costs
        replies: list[Served] = []
        if request.keep:
            frontier.rollback(request.keep)
            frontier.append(request.ids)
        else:
            frontier.read(request.ids)
        while (ahead := frontier.next_pass(request.to)) is not None:
            replies.append((yield ahead))
            frontier.absorb(*replies[-1].result)
        assert frontier.last is not None
        states = _last(frontier.last, request.read)
        if request.to < self.request.layers:
            assert self._read is not None
            assert self.strategy.exits is not None
            states = _last((yield from frontier.look(request.to)), request.read)
            read = functools.partial(self._read, request.to, states)
            return [ExitOutput(request.to, read, states, probe=self.strategy.exits.probe)]
        replies.append((yield HeadPass(states, logits=self._reads_logits)))
        if costs is not None and self._tells and len(replies) == 2 and replies[0].rows == (rows := replies[1].rows):
            costs.passed(rows, sum(reply.seconds for reply in replies))
        self._tells = False
        return [self._full_output(_row(states, i), score) for i, score in enumerate(replies[-1].result)]

    def _full_output(self, row: States, score: Any) -> ExitOutput:
        """Of one row at full depth, whose score is its likeliest token, or its logits where they are read."""
        token, logits_V = (None, score) if self._reads_logits else (score, None)
        predict = functools.partial(_full_prediction, self.model.backbone, row)
        return ExitOutput(self.request.layers, predict, row, token, logits_V)

    @property
    def _reads_logits(self) -> bool:
        return not self._plain or self._price is not None

    def _step(self, item: Emitted) -> Step:
        draft = item.draft
        self._rounds = item.round
        self._drafted += draft is not None and not item.verified
        self._accepted += draft is not None and item.verified
        checks = item.checks if draft is None else draft.checks
        seen = checks[-1].output.signals if checks else {}
        signals = dict(getattr(seen, "seen", {}))  # before the candidates' records, which measure all
        if draft is not None and draft.confidence is not None:
            signals["top_probability"] = draft.confidence
        step = Step(
            index=len(self._tokens),
            token=item.token,
            text=self._text(item.token),
            depth=item.depth,
            level="full" if draft is None else draft.level,
            round=item.round,
            drafted=draft is not None,
            accepted=draft is not None and item.verified,
            signals=signals,
            looks=self._looks(item) if self._logprobs is not None else (),
            rejected=tuple(self._draft(rejected) for rejected in item.rejected),
            seconds=time.perf_counter() - self._started,
            **self._free_energy(item),
        )
        self._tokens.append(item.token)
        return step

    def _free_energy(self, item: Emitted) -> dict[str, float]:
        """Surprise, price and regret of a final token, where there is a price."""
        if self._price is None:
            return {}
        rate, levels, surprise = self._price / self.request.layers, dict[int, float](), math.inf
        for check in item.checks:
            assert isinstance(check.output, ExitOutput)
            surprise = check.output.surprise(item.token)  # in the end that of the deepest
            levels[check.output.depth] = surprise + rate * check.output.depth
        levels[item.depth] = level = surprise + rate * item.depth
        regret = level - least_free_energy(tuple(levels.values())) if math.isfinite(level) else level
        return {"surprise": surprise, "price": rate * item.depth, "regret": regret}

    def _text(self, token: int) -> str:
        """What the next token adds to the text."""
        text = self._detokenizer.push(token)
        if token in self._end_ids:
            self.finish = "eos" if token in self._eos_ids else "stop"
        if token in self._end_ids or len(self._tokens) == self.budget - 1:
            text += self._detokenizer.finish()
        return text

    def _draft(self, draft: DraftToken) -> Draft:
        return Draft(draft.token, self._spell(draft.token), draft.depth, draft.level)

    def _looks(self, item: Emitted) -> tuple[Look, ...]:
        """Every depth read; the token itself is among the candidates of the last one, which decided."""
        *others, last = item.checks
        return (*(self._look(check, None, item.token) for check in others), self._look(last, item.token, item.token))

    def _look(self, check: ExitCheck, token: int | None, final: int) -> Look:
        output = check.output
        assert isinstance(output, ExitOutput)
        found = tuple(Candidate(t, self._spell(t), p) for t, p in output.candidates(self._logprobs or 0, token))
        signals = {name: output.signals[name] for name in output.signals}
        surprise = None if self._price is None else output.surprise(final)
        return Look(output.depth, output.token, self._spell(output.token), check.fired, signals, found, surprise)

    def _special(self, token: int) -> str:
        """How a token is spelled that the text leaves out; an end token ends the text anyway."""
        tokenizer = self.model.tokenizer
        shown = tokenizer is None or not self._skip_special or token in self._end_ids
        return "" if shown or tokenizer is None else tokenizer.left_out(token)

    def _spell(self, token: int) -> str:
        """The token's own text; a draft's is asked for when it is made and again when it is thrown away."""
        if (text := self._spelled.get(token)) is None:
            tokenizer = self.model.tokenizer
            text = self._spelled[token] = tokenizer.decode([token], not self._skip_special) if tokenizer else str(token)
        return text


def _last(states: States, count: int) -> States:
    """The last rows: mostly all there are, of which no view is made."""
    return states if len(states) == count else states[-count:]


def _row(states: States, place: int) -> States:
    return states if len(states) == 1 else states[place : place + 1]


def _full_prediction(backbone: Backbone, states: States) -> Prediction:
    return Prediction(backbone.logits(states).log_softmax(-1))


def _budget(model: Model, prompt: int, asked: int | None) -> int:
    """How many tokens at most: what was asked for or, for None, what the context still holds; UsageError for more than that."""
    new = None if asked is None else whole("max_new_tokens", asked, 1, None, ", or None for what the context holds")
    spec = model.backbone.spec
    context = spec.context
    other = f", or take backend='hf' (--backend hf), which runs {spec.stated_context}" if spec.is_cut else ""
    if context is None:
        if new is None:
            raise UsageError(
                f"max_new_tokens is {asked}, but this model states no context that could be filled; give a number."
            )
        return new
    if prompt >= context:
        raise UsageError(
            f"the prompt has {prompt} tokens, and the model's context of {context} leaves none for an answer; shorten "
            f"it{other}."
        )
    if new is not None and new >= context:
        raise UsageError(
            f"max_new_tokens is {new}, and the model's context is {context} tokens, of which the prompt takes {prompt}; lower "
            f"it to at most {context - prompt}, or give None (-n 0 in the shell) for what fits{other}."
        )
    if new is not None and prompt + new > context:
        raise UsageError(
            f"the prompt has {prompt} tokens and max_new_tokens is {new}, together more than the model's context of "
            f"{context}; shorten the prompt to at most {context - new} tokens, or give None (-n 0 in the shell) for what "
            f"fits{other}."
        )
    return context - prompt if new is None else new
