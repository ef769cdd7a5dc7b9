"""What fewer bits cost: perplexity on text nobody trained on, and how far the predictions move from float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from adi.errors import AdiError
from adi.measure.provenance import provenance
from adi.model.backbone import Backbone, Rows
from adi.model.hub import Notice
from adi.model.load import load
from adi.model.tokenizer import Tokenizer
from adi.prompts import read_prompts

WINDOW = 512
ROWS = 64  # whose logits are in memory at a time: a vocabulary may have 262,144 tokens
NOTHING = -1  # what follows a window's last token is not asked


@dataclass(frozen=True)
class Quality:
    """One precision against float32 on the same text: perplexity and its ratio with its standard error (tokens taken for
    independent), mean KL divergence in nats per token, and the share of tokens at which both find the same one likeliest."""

    backend: str
    precision: str
    perplexity: float
    ratio: float
    ratio_error: float
    divergence: float
    same_token: float
    row_invariant: bool | None


def quality(
    source: str,
    precisions: Sequence[str],
    *,
    text: str | None = None,
    tokens: int = 6144,
    command: str = "",
    notice: Notice = lambda _: None,
) -> dict[str, Any]:
    """Measure a model's precisions on the compiled engine against transformers' modules in float32.

    Args:
        source: as for ``load``.
        precisions: of the compiled engine.
        text: what to read; by default the built-in bench prompts, one after the other.
        tokens: read at most so many, in windows of 512.

    Raises:
        ValueError: text of fewer than two tokens, and whatever ``load`` raises.
    """
    reference = load(source, backend="hf", precision="fp32", device="cpu", notice=notice)
    if reference.tokenizer is None:
        raise AdiError(f"{source} has no tokenizer, so there is no text to read.")
    read = text if text is not None else "\n\n".join(item.prompt for item in read_prompts("bench"))
    windows = windows_of(reference.tokenizer, read, tokens)
    if not windows:
        raise AdiError("the text has fewer than two tokens; give more.")
    found = []
    for precision in precisions:
        notice(f"Reading {sum(map(len, windows)):,} tokens in {precision}")
        model = load(source, backend="openvino", precision=precision, notice=notice)
        found.append(asdict(compare(model.backbone, reference.backbone, windows)))
    about = provenance(command, read_prompts("bench") if text is None else [])
    return {"format": "adi-quality", "version": 1, **about, "tokens": sum(map(len, windows)), "precisions": found}


def windows_of(tokenizer: Tokenizer, text: str, tokens: int) -> list[tuple[int, ...]]:
    """At most so many tokens of a text in windows of 512, each begun as this tokenizer begins any text: a model trained with
    such a beginning reads badly without."""
    begin = tokenizer.encode("")
    ids = tokenizer.encode(text)[len(begin) :]
    windows, at = [], 0
    for taken in range(0, tokens, WINDOW):
        room = max(0, min(WINDOW, tokens - taken) - len(begin))
        windows.append((*begin, *ids[at : at + room]))
        at += room
    return [window for window in windows if len(window) > max(1, len(begin))]


def compare(one: Backbone, reference: Backbone, windows: Sequence[Sequence[int]]) -> Quality:
    """Both engines over the same windows of token ids; nothing of the text is kept but sums."""
    mine = theirs = moved = squares = 0.0
    same = count = 0
    for window in windows:
        ids = tuple(window)
        next_T = torch.tensor([*ids[1:], NOTHING])
        parts = (_states(one, ids).split(ROWS), _states(reference, ids).split(ROWS), next_T.split(ROWS))
        for mine_TD, theirs_TD, told_T in zip(*parts, strict=True):
            a_TV, b_TV = one.logits(mine_TD).log_softmax(-1), reference.logits(theirs_TD).log_softmax(-1)
            told_N1 = told_T[told_T != NOTHING][:, None]
            a_N1, b_N1 = (x_TV[: len(told_N1)].gather(1, told_N1).double() for x_TV in (a_TV, b_TV))
            mine -= float(a_N1.sum())
            theirs -= float(b_N1.sum())
            squares += float((b_N1 - a_N1).square().sum())
            moved += float((b_TV.exp() * (b_TV - a_TV)).sum())
            same += int((a_TV.argmax(-1) == b_TV.argmax(-1)).sum())
        count += len(ids)
    predicted = count - len(windows)
    worse = (mine - theirs) / predicted
    return Quality(
        backend=one.spec.backend,
        precision=one.spec.precision,
        perplexity=math.exp(mine / predicted),
        ratio=math.exp(worse),
        ratio_error=math.exp(worse) * math.sqrt(max(squares / predicted - worse**2, 0.0) / predicted),
        divergence=moved / count,
        same_token=same / count,
        row_invariant=one.spec.row_invariant,
    )


def _states(backbone: Backbone, ids: tuple[int, ...]) -> Tensor:
    """The last states of a text, ``[T, D]``."""
    cache = backbone.new_cache()
    (states,) = backbone.forward([Rows(cache, 0, ids, None)], 0, backbone.spec.layers)
    if (close := getattr(cache, "close", None)) is not None:
        close()
    return states.hidden_TD
