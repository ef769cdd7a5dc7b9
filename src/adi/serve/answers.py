"""Completions in OpenAI's shapes: whole, or as a stream of chunks."""

from __future__ import annotations

import math
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

import adi
from adi.decoding.records import Drafted, DriftFound, Event, Generation, Rejected, Step
from adi.measure.trace import FORMAT, VERSION, rounded, trace_of
from adi.schema import to_json
from adi.serve.asking import Asked
from adi.serve.errors import ApiError
from adi.serve.jobs import Answer, Job, JobPart
from adi.serve.scores import Scored, Scores, spelled
from adi.serve.tool_calls import ToolCalls

LEAST_LOG = -9999.0  # JSON has no infinity
FINISHES = {"eos": "stop", "stop": "stop", "length": "length"}
DONE = b"data: [DONE]\n\n"


class Completions:
    """The answers of one job, as they grow. Subclasses say how the protocol spells them."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, asked: Asked, job: Job, name: str, usage_in_stream: bool) -> None:
        self.asked, self.job, self._usage_in_stream = asked, job, usage_in_stream
        self.steps: list[list[Step]] = [[] for _ in range(asked.answers)]
        self._calls = [ToolCalls() for _ in range(asked.answers)]
        spec = asked.model.backbone.spec
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        numbers = spec.numbers.replace(" with KV memory in ", "-kv-")
        self._head["system_fingerprint"] = f"adi-{adi.__version__}-{numbers}-{spec.fingerprint[:8]}"

    async def whole(self) -> dict[str, Any]:
        """The response, once all is there."""
        async for part in self.job.parts():
            if part.index < len(self.steps):
                self.steps[part.index] += [event for event in part.events if isinstance(event, Step)]
        generations = self._generations()
        choices = [self.choice(i, one) for i, one in enumerate(generations)] or self.echoes()
        return {**self._head, "object": self.kind, "choices": choices, **self._costs(generations)}

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events, one chunk for what a pass gave."""
        try:
            for i in range(self.asked.answers):
                for delta in self.begin(i):
                    yield self._chunk(i, delta)
            async for part in self.job.parts():
                for chunk in self._chunks(part):
                    yield chunk
            if self._usage_in_stream:
                yield self._event({"choices": [], **self._costs(self._generations())})
            yield DONE
        except ApiError as error:
            yield b"data: " + msgspec.json.encode(error.body()) + b"\n\n"

    def _chunks(self, part: JobPart) -> list[bytes]:
        steps = [event for event in part.events if isinstance(event, Step)]
        self.steps[part.index] += steps
        text, calls = "".join(step.text for step in steps), list[dict[str, Any]]()
        if self.asked.parses_calls:
            splitter = self._calls[part.index]
            text, calls = splitter.push(text)
            text += splitter.rest() if part.ended else ""
        more: dict[str, Any] = {}
        if self.asked.logprobs is not None:
            more["logprobs"] = self.logprobs(steps)
        if self.asked.trace:
            more["adi"] = {"events": [_told(event) for event in part.events]}
        found = []
        if text or calls or (steps and "logprobs" in more) or (part.events and "adi" in more):
            found.append(self._chunk(part.index, self.delta(text, calls), **more))
        if part.ended:
            found.append(self._chunk(part.index, self.delta("", []), finish_reason=self._finish(part.index)))
        return found

    def _finish(self, index: int) -> str:
        answer: Answer = self.job.sequences[index]
        return "tool_calls" if self._calls[index].count else FINISHES[answer.finish]

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> bytes:
        usage = {"usage": None} if self._usage_in_stream else {}
        choice = {"index": index, **delta, "logprobs": None, "finish_reason": finish_reason, **more}
        return self._event({"choices": [choice], **usage})

    def _event(self, what: dict[str, Any]) -> bytes:
        return b"data: " + msgspec.json.encode({**self._head, "object": self.chunk_kind, **what}) + b"\n\n"

    def _generations(self) -> list[Generation]:
        return [self.job.sequences[i].generation(steps) for i, steps in enumerate(self.steps)]

    def _costs(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """What it took: ``usage``, and ``metrics`` in vLLM's shape with depth beside."""
        prompt, completion = sum(map(len, self.asked.prompts)), sum(len(one.steps) for one in generations)
        cached = sum(one.counters.reused for one in generations)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        usage["prompt_tokens_details"] = {"cached_tokens": cached}  # type: ignore[assignment]
        costs: dict[str, Any] = {"usage": usage}
        if generations:
            most = max(one.strategy.draft_tokens for one in self.job.sequences[: len(generations)])
            costs["metrics"] = {"speculative_decoding": speculation(generations, most), "depth": depth(generations)}
            costs["adi"] = _kind(generations[0])
        return costs

    def _own(self, generation: Generation) -> dict[str, Any]:
        """What of one answer is adi's alone, where it was asked for."""
        found: dict[str, Any] = {}
        if self.asked.options["price"] is not None and (free := generation.summary().free_energy) is not None:
            found["free_energy"] = free.to_json()
        if self.asked.trace:
            trace = trace_of(generation, self.asked.policy, spelled(self.asked.model, generation.prompt_ids)).to_json()
            found["trace"] = {"format": FORMAT, "version": VERSION, **rounded(trace, drop=True)}
        return {"adi": found} if found else {}

    def begin(self, index: int) -> list[dict[str, Any]]:
        """What comes before the answer's first token."""
        raise NotImplementedError

    def delta(self, text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        """A further piece."""
        raise NotImplementedError

    def logprobs(self, steps: Sequence[Step]) -> dict[str, Any]:
        """Of these steps."""
        raise NotImplementedError

    def choice(self, index: int, generation: Generation) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def echoes(self) -> list[dict[str, Any]]:
        """Prompts without answers."""
        return []


class ChatCompletions(Completions):
    """``/v1/chat/completions``."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def begin(self, index: int) -> list[dict[str, Any]]:
        return [{"delta": {"role": "assistant", "content": ""}}]

    def delta(self, text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        return {"delta": {**({"content": text} if text else {}), **({"tool_calls": calls} if calls else {})}}

    def logprobs(self, steps: Sequence[Step]) -> dict[str, Any]:
        places = [_entry(_scored(step)[0]) | {"top_logprobs": [_entry(one) for one in self._top(step)]} for step in steps]
        return {"content": places, "refusal": None}

    def _top(self, step: Step) -> list[Scored]:
        return _scored(step)[1][: self.asked.logprobs]

    def choice(self, index: int, generation: Generation) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": generation.text, "refusal": None}
        splitter = self._calls[index]
        if self.asked.parses_calls:
            text, calls = splitter.push(generation.text)
            message["content"] = text + splitter.rest() or (None if calls else "")
            if calls:
                message["tool_calls"] = [{name: value for name, value in call.items() if name != "index"} for call in calls]
        logprobs = None if self.asked.logprobs is None else self.logprobs(generation.steps)
        finish = self._finish(index)
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": finish,
            **self._own(generation),
        }


class TextCompletions(Completions):
    """``/v1/completions``."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def begin(self, index: int) -> list[dict[str, Any]]:
        return [{"text": self._echoed(index)}] if self.asked.echo else []

    def delta(self, text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        return {"text": text}

    def logprobs(self, steps: Sequence[Step]) -> dict[str, Any]:
        return _as_lists([_scored(step) for step in steps], self.asked.logprobs or 0, 0)

    def choice(self, index: int, generation: Generation) -> dict[str, Any]:
        logprobs = None
        if self.asked.logprobs is not None:
            places = [*self._prompt_scores(index // self.asked.n), *map(_scored, generation.steps)]
            logprobs = _as_lists(places, self.asked.logprobs, 0)
        text, finish = self._echoed(index) + generation.text, self._finish(index)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish, **self._own(generation)}

    def echoes(self) -> list[dict[str, Any]]:
        found = []
        for i, text in enumerate(self.asked.echo or ()):
            logprobs = None if self.asked.scored is None else _as_lists(self._prompt_scores(i), self.asked.scored, 0)
            found.append({"index": i, "text": text, "logprobs": logprobs, "finish_reason": "length"})
        return found

    def _echoed(self, index: int) -> str:
        return "" if self.asked.echo is None else self.asked.echo[index // self.asked.n]

    def _prompt_scores(self, prompt: int) -> list[tuple[Scored, list[Scored]]]:
        """Of the tokens of a prompt, the first of which has none; nothing where they were not asked for."""
        if self.asked.scored is None:
            return []
        scores: Scores = self.job.sequences[self.asked.answers + prompt]
        first = Scored(scores.prompt_ids[0], spelled(self.asked.model, scores.prompt_ids[:1]), math.nan)
        rest = [(_of(found, token), found) for token, found in zip(scores.prompt_ids[1:], scores.found, strict=True)]
        return [(first, []), *rest]


def _scored(step: Step) -> tuple[Scored, list[Scored]]:
    """The token with its log-probability, and the likeliest ones."""
    logs = step.logprobs
    found = [Scored(one.token, one.text, logs[one.token]) for one in step.looks[-1].candidates]
    return _of(found, step.token), found


def _of(found: Sequence[Scored], token: int) -> Scored:
    return next(one for one in found if one.token == token)


def _finite(log: float) -> float | None:
    return None if math.isnan(log) else max(log, LEAST_LOG)


def _entry(one: Scored) -> dict[str, Any]:
    """As chat completions spell it; a part of a character has no bytes that the text would tell."""
    known = None if "\ufffd" in one.text else list(one.text.encode())
    return {"token": one.text, "logprob": _finite(one.logprob), "bytes": known}


def _as_lists(places: Sequence[tuple[Scored, list[Scored]]], count: int, offset: int) -> dict[str, Any]:
    """As completions spell them."""
    offsets, tops = list[int](), list[dict[str, float | None] | None]()
    for one, found in places:
        offsets.append(offset)
        offset += len(one.text)
        best = [one, *reversed(found[:count])]  # of those that are spelled alike the likeliest stands
        tops.append({each.text: _finite(each.logprob) for each in best} if found else None)
    return {
        "tokens": [one.text for one, _ in places],
        "token_logprobs": [_finite(one.logprob) for one, _ in places],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _told(event: Event) -> dict[str, Any]:
    """An event as the page reads it."""
    match event:
        case Drafted():
            return {"drafted": to_json(event.draft)}
        case Rejected():
            return {"rejected": event.count}
        case DriftFound():
            return {"drift": {"index": event.index, "level": event.level, "lower": event.lower}}
    known = ("text", "token", "depth", "level", "round", "drafted", "accepted", "surprise", "price")
    return {"token": {name: value for name in known if (value := getattr(event, name)) is not None}}


def speculation(generations: Sequence[Generation], most: int) -> dict[str, Any]:
    """Acceptance of drafts in vLLM's shape: ``acceptance_histogram[i]`` are the rounds with drafts of which i were accepted."""
    histogram, drafted, accepted = Counter[int](), 0, 0
    for generation in generations:
        rounds = defaultdict[int, list[Step]](list)
        for step in generation.steps:
            rounds[step.round].append(step)
        for steps in rounds.values():
            right, wrong = sum(step.accepted for step in steps), sum(len(step.rejected) for step in steps)
            if right + wrong:
                histogram[right] += 1
                drafted += right + wrong
                accepted += right
    steps_with_drafts = sum(histogram.values())
    return {
        "mean_acceptance_length": 1 + accepted / steps_with_drafts if steps_with_drafts else 1.0,
        "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
        "acceptance_histogram": [histogram[i] for i in range(max(histogram, default=0) + 1)],
        "num_spec_steps": steps_with_drafts,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "num_spec_tokens": most,
    }


def depth(generations: Sequence[Generation]) -> dict[str, Any]:
    """Blocks that had run when tokens were chosen: mean, and tokens by depth and by what proposed them."""
    steps = [step for generation in generations for step in generation.steps]
    histogram, levels = Counter(step.depth for step in steps), Counter(step.level for step in steps)
    return {
        "mean": sum(d * n for d, n in histogram.items()) / len(steps) if steps else 0.0,
        "layers": generations[0].layers,
        "histogram": {str(d): histogram[d] for d in sorted(histogram)},
        "levels": dict(levels),
    }


def _kind(generation: Generation) -> dict[str, Any]:
    """How the text was made, and what is promised of it."""
    known = {"mode": generation.mode, "verified": generation.verified}
    if generation.certified is not None:
        known["certified"] = generation.certified
    if generation.drift is not None:
        known["drift"] = to_json(generation.drift)
    return known
