"""What most callers want: ``generate`` a text, ``stream`` its steps, ``generate_batch`` many in shared passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, TypedDict, Unpack, cast, overload

from adi.arguments import whole
from adi.decoding.policies import Policy
from adi.decoding.processors import LogitsProcessor
from adi.decoding.records import Generation, Step
from adi.decoding.sampling import Sampling
from adi.decoding.scheduler import LEAST_SHARED, MOST, Observer, Scheduler
from adi.decoding.session import Session
from adi.errors import AdiError, MemoryFullError
from adi.model.load import Model
from adi.model.prefix_cache import PrefixCache, alike
from adi.model.prompt import Prompt, PromptKeywords, opened_batch


class SamplingKeywords(TypedDict, total=False):
    """How tokens are drawn, by the fields of ``Sampling``; what is left out has its default."""

    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float | None
    seed: int | None
    frequency_penalty: float
    presence_penalty: float
    no_repeat_ngram_size: int | None
    min_new_tokens: int | None
    bad_words: Sequence[str | Sequence[int]]
    logit_bias: Mapping[int, float] | None


class GenerateKeywords(SamplingKeywords, PromptKeywords, total=False):
    """Options of ``stream``, ``generate`` and ``generate_batch``, described and with their defaults at ``stream``."""

    max_new_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | int | None
    stop_at_eos: bool
    skip_special_tokens: bool
    logprobs: int | None
    price: float | None
    logits_processor: Sequence[LogitsProcessor]
    response_format: Mapping[str, Any] | None
    grammar: str | None
    prefix_cache: PrefixCache | None


class BatchMemoryError(MemoryFullError):
    """A text of a batch for which KV memory does not suffice even while no other runs.

    ``prompts`` are the indices of all such texts, ``finished`` the other texts of the batch by their indices.
    """

    def __init__(self, message: str, prompts: Sequence[int], finished: Mapping[int, Generation]) -> None:
        super().__init__(message)
        self.prompts, self.finished = tuple(prompts), dict(finished)


def stream(
    model: Model,
    prompt: Prompt,
    policy: Policy | None = None,
    **options: Unpack[GenerateKeywords],
) -> Iterator[Step]:
    """Generate token by token; one ``Step`` for each as soon as it is final.

    Args:
        model: from ``adi.load``.
        prompt: a text (one user message, in the model's chat template), a list of chat messages, or token ids: a list, a tensor
            or array, with a batch axis of one or without, or what a tokenizer returns, whose padding is taken out.
        policy: by default ``Verified``, with the exits shipped for the model where there are some; or ``FullDepth()``,
            ``Verified(exits)``, ``Reflex(exits, ...)``, ``Lookup()``, ``Static(exits, depth, draft_tokens)``.
        max_new_tokens: at most so many tokens, by default 256; None for as many as the model's context still holds.
        stop: texts that end the output; they are not part of it. One may be or hold a special token, such as ``<|im_end|>``.
        stop_token_ids: tokens that end the output beside the model's own; like those they are part of it.
        stop_at_eos: False generates on past the model's end-of-text tokens.
        raw: leave the chat template out.
        special_tokens: read what the prompt spells like a special token, such as ``<|im_end|>``, as that token. By default it
            is text, so that a text from elsewhere cannot end the user's turn.
        continue_final: whether the last message is to be continued, not answered; by default where it is the assistant's.
        tools: JSON schemas or functions, for a chat template that reads them.
        chat_template: another one than the tokenizer's: Jinja, or a file of it.
        template_options: what else the chat template reads, such as ``{"enable_thinking": False}``.
        skip_special_tokens: False spells special tokens in the text, such as ``[TOOL_CALLS]``, which else only the ids hold.
        logprobs: give ``Step.logprobs``, of this many likeliest tokens and of the one drawn; and, in ``Step.looks``, as many
            candidates and all signals of every depth read (slower).
        price: nats for a full pass: give the free energy of every token, ``Step.surprise``, ``price`` and ``regret``.
        temperature, top_k, top_p, min_p, seed: how tokens are drawn, as ``Sampling`` describes; greedy by default. The same
            seed gives the same text, at full depth and verified alike; verified, the distribution is the full model's
            (docs/exactness.md).
        repetition_penalty, frequency_penalty, presence_penalty, no_repeat_ngram_size, min_new_tokens, bad_words, logit_bias:
            what changes the logits first, as ``Sampling`` describes; by default the model's own generation config does.
        logits_processor: functions of your own, applied after those: each takes the token ids so far ``[1, T]`` and scores
            ``[1, V]`` in float32, and gives scores, as in transformers. It is called once for every token of the text, in
            order, and what it gives must depend on the ids alone: in a batch a text may begin again.
        response_format: the form of the text, as in OpenAI's API: ``{"type": "json_object"}``, or ``{"type": "json_schema",
            "json_schema": {"schema": ...}}``. Needs llguidance (the extra ``grammar``).
        grammar: a grammar that the text follows, in llguidance's Lark.
        prefix_cache: an ``adi.PrefixCache(model)``, what was computed of earlier prompts: the text starts where its prompt
            first differs from all of them, with the same bits, and leaves there what it computes.

    Raises:
        AdiError: before any work, for a prompt or option without meaning.
    """
    return Session(model, prompt, policy, **_split(options)).steps()


def _split(options: GenerateKeywords) -> dict[str, Any]:
    """As ``Session`` takes them, with a ``Sampling``."""
    drawn = {name: value for name, value in options.items() if name in SamplingKeywords.__annotations__}
    rest = {name: value for name, value in options.items() if name not in drawn}
    return {**rest, "sampling": Sampling(**cast("SamplingKeywords", drawn))}


@overload
def generate(
    model: Model, prompt: Prompt, policy: Policy | None = None, *, n: None = None, **options: Unpack[GenerateKeywords]
) -> Generation: ...
@overload
def generate(
    model: Model, prompt: Prompt, policy: Policy | None = None, *, n: int, **options: Unpack[GenerateKeywords]
) -> list[Generation]: ...
def generate(
    model: Model, prompt: Prompt, policy: Policy | None = None, *, n: int | None = None, **options: Unpack[GenerateKeywords]
) -> Generation | list[Generation]:
    """Generate a whole text: ``stream`` joined. Arguments and errors are those of ``stream``.

    With ``n``, a list of so many texts, those of ``generate_batch([prompt] * n, ...)``; the prompt is read once.
    """
    if n is None:
        session = Session(model, prompt, policy, **_split(options))
        return session.generation(list(session.steps()))
    given, count = _split(options), whole("n", n, 1)
    sampling: Sampling = given.pop("sampling").settled()
    first = Session(model, prompt, policy, sampling=sampling.of_prompt(0), **given)
    given = {name: value for name, value in given.items() if name not in PromptKeywords.__annotations__}
    ways = [sampling.of_prompt(i) for i in range(1, count)]
    others = [Session(model, first.prompt_ids, policy, sampling=way, **given) for way in ways]
    return _together(model, [first, *others], MOST, None)


def generate_batch(
    model: Model,
    prompts: Sequence[Prompt],
    policy: Policy | None = None,
    *,
    most: int = MOST,
    observer: Observer[Session] | None = None,
    **options: Unpack[GenerateKeywords],
) -> list[Generation]:
    """Generate for all prompts together; the results, in their order, are those of ``generate`` for each alone.

    On an engine whose rows do not depend on each other (``spec.row_invariant``) they are the same bit for bit, in every
    precision. Where KV memory is full, the texts that came last begin again when others have ended, which costs time only. What
    prompts have in common is read once, with and without a ``prefix_cache``.

    Args:
        prompts: each as for ``generate``; none gives an empty list.
        most: so many sequences run at once at most; the others wait, and join as texts end and KV memory is free.
        seed: each prompt draws with its own, ``prompt_seed(seed, its index)``, which gives the same text to ``generate``.
        observer: sees what the network computes for each prompt's session.
        model, policy, and all other options: as for ``generate``.

    Raises:
        AdiError: before any work, for an option or a prompt without meaning (the prompt is named by its index); and, as
            ``BatchMemoryError`` with all other texts, where a text does not fit in KV memory even alone.
    """
    given = _split(options)
    sampling: Sampling = given.pop("sampling").settled()
    sessions, count = list[Session](), whole("most", most, 1)
    for i, prompt in enumerate(opened_batch(prompts)):
        try:
            sessions.append(Session(model, prompt, policy, sampling=sampling.of_prompt(i), **given))
        except AdiError as error:
            raise type(error)(f"prompt {i}: {error}") from None
    return _together(model, sessions, count, observer)


def _together(model: Model, sessions: Sequence[Session], most: int, observer: Observer[Session] | None) -> list[Generation]:
    """The texts of all."""
    steps: dict[Session, list[Step]] = {session: [] for session in sessions}
    with ExitStack() as stack:
        kept = next((session.prefix_cache for session in sessions), None)
        if kept is None and observer is None and _begin_alike(sessions):  # an observer is to see all that a text computes
            kept = stack.enter_context(PrefixCache(model, answers=False))
        made = Scheduler(model.backbone, most=most, observer=observer, prefix_cache=kept, patient=True)
        scheduler = stack.enter_context(made)
        for session in sessions:
            scheduler.add(session)
        for session, event in scheduler:
            if isinstance(event, Step):
                steps[session].append(event)
    for failure in scheduler.failed.values():
        if not isinstance(failure, MemoryFullError):
            raise failure
    failed = scheduler.failed
    texts = {i: session.generation(steps[session]) for i, session in enumerate(sessions) if session not in failed}
    if unfit := [(i, str(failed[session])) for i, session in enumerate(sessions) if session in failed]:
        first, message = unfit[0]
        raise BatchMemoryError(f"prompt {first}: {message}", [i for i, _ in unfit], texts)
    return list(texts.values())


def _begin_alike(sessions: Sequence[Session]) -> bool:
    """Whether two of the prompts begin with the same tokens, so many that it is worth while to read them once."""
    prompts = sorted(session.prompt_ids for session in sessions)
    return any(alike(a[:LEAST_SHARED], b[:LEAST_SHARED]) == LEAST_SHARED for a, b in pairwise(prompts))
