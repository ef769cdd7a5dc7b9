"""The drivers that most callers want: ``stream`` keeps a session's steps, ``generate`` joins them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from adi.decoding.policies import Policy
from adi.decoding.records import Generation, Step
from adi.decoding.sampling import Sampling
from adi.decoding.session import Session
from adi.model.load import Model
from adi.model.tokenizer import Prompt


def stream(
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
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> Iterator[Step]:
    """Generate token by token; one ``Step`` for each as soon as it is final.

    Args:
        model: from ``adi.load``.
        prompt: a string (one user message, in the model's chat template), a list of chat messages, or token ids.
        policy: ``FullDepth()`` (the default), ``Verified(exits)``, ``Reflex(exits, ...)`` or ``Lookup()``.
        max_new_tokens: at most so many tokens.
        stop: texts that end the output; they are not part of it.
        stop_at_eos: False generates on past the model's end-of-text tokens.
        raw: leave the chat template out.
        special_tokens: read what the prompt spells like a special token, such as ``<|im_end|>``, as that token. By default it
            is text, so that a text from elsewhere cannot end the user's turn.
        candidates: record, at every depth looked at, this many candidate tokens and all signals (slower).
        temperature, top_k, top_p, min_p, repetition_penalty, seed: how tokens are drawn, as ``Sampling`` describes; greedy by
            default. A seed says the same text again, at full depth and verified alike; verified, the distribution is the
            full model's (docs/exactness.md).

    Raises:
        ValueError: before any work, for a prompt or option that cannot be meant.
    """
    session = Session(
        model,
        prompt,
        policy,
        max_new_tokens=max_new_tokens,
        stop=stop,
        stop_at_eos=stop_at_eos,
        raw=raw,
        special_tokens=special_tokens,
        candidates=candidates,
        sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed),
    )
    return (event for event in session if isinstance(event, Step))


def generate(
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
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> Generation:
    """Generate a whole text: ``stream`` joined. Arguments and errors are those of ``stream``."""
    session = Session(
        model,
        prompt,
        policy,
        max_new_tokens=max_new_tokens,
        stop=stop,
        stop_at_eos=stop_at_eos,
        raw=raw,
        special_tokens=special_tokens,
        candidates=candidates,
        sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed),
    )
    return session.generation([event for event in session if isinstance(event, Step)])
