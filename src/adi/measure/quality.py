"""What fewer bits cost: perplexity on text nobody trained on, and how far the predictions move from float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss

from adi.decoding.teacher_forcing import ForcedPass, KnownText, forced_pass, full_logits
from adi.errors import UsageError
from adi.measure.provenance import provenance
from adi.model.backbone import Backbone
from adi.model.hub import Notice
from adi.model.load import load
from adi.model.tokenizer import Tokenizer
from adi.prompts import read_prompts

WINDOW = 512
ROWS = 64


@dataclass(frozen=True)
class PrecisionQuality:
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
    kv_precision: str = "auto"


def quality(
    source: str,
    precisions: Sequence[str],
    *,
    kv_precisions: Sequence[str] = ("auto",),
    text: str | None = None,
    tokens: int = 6144,
    command: str = "",
    notice: Notice = lambda _: None,
) -> dict[str, Any]:
    """Measure a model's precisions on the compiled engine against transformers' modules in float32.

    Args:
        source: as for ``load``.
        precisions: of the compiled engine; kv_precisions: of its keys and values, each with each of these.
        text: what to read; by default the built-in bench prompts, one after the other.
        tokens: read at most so many, in windows of 512.

    Raises:
        AdiError: text of fewer than two tokens, and whatever ``load`` raises.
    """
    reference = load(source, backend="hf", precision="fp32", device="cpu", notice=notice)
    if reference.tokenizer is None:
        raise UsageError(f"{source} has no tokenizer, so there is no text to read.")
    read = text if text is not None else "\n\n".join(item.prompt for item in read_prompts("bench"))
    windows = windows_of(reference.tokenizer, read, tokens)
    if not windows:
        raise UsageError(f"the text {read!r:.40} has fewer than two tokens; give more.")
    found = []
    for precision, kept in product(precisions, kv_precisions):
        model = load(source, backend="openvino", precision=precision, kv_precision=kept, notice=notice)
        notice(f"Reading {sum(map(len, windows)):,} tokens in {model.backbone.spec.numbers}")
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


def compare(one: Backbone, reference: Backbone, windows: Sequence[Sequence[int]], rows: int = ROWS) -> PrecisionQuality:
    """Both engines over the same windows of token ids; of the text only four numbers a token are kept, of ``rows`` tokens at a
    time all logits."""
    texts = [KnownText(tuple(window)) for window in windows]
    passes = zip(forced_pass(one, texts), forced_pass(reference, texts), strict=True)
    found = [_compared(one, reference, *pair, rows) for pair in passes]
    mine_N, theirs_N = torch.cat([rows_4T[:2, :-1] for rows_4T in found], 1)  # the last row predicts a token nobody knows
    moved_N, same_N = torch.cat([rows_4T[2:] for rows_4T in found], 1)
    worse_N = theirs_N - mine_N
    ratio = math.exp(worse_N.mean())
    return PrecisionQuality(
        backend=one.spec.backend,
        precision=one.spec.precision,
        perplexity=math.exp(-mine_N.mean()),
        ratio=ratio,
        ratio_error=ratio * float(worse_N.std(correction=0)) / math.sqrt(len(worse_N)),
        divergence=float(moved_N.mean()),
        same_token=float(same_N.mean()),
        row_invariant=one.spec.row_invariant,
        kv_precision=one.spec.kv_precision,
    )


def _compared(one: Backbone, reference: Backbone, mine: ForcedPass, theirs: ForcedPass, rows: int) -> Tensor:
    """Each row's log-probability of the token that follows by both, their divergence, and whether both find the same one
    likeliest, ``[4, T]``."""
    next_T, parts = torch.tensor([*mine.text.ids[1:], 0]), []
    logits = (full_logits(one, mine.deep_ND, rows), full_logits(reference, theirs.deep_ND, rows))
    for a_RV, b_RV, next_R in zip(*logits, next_T.split(rows), strict=True):
        a, b = a_RV.log_softmax(-1), b_RV.log_softmax(-1)
        given = (-nll_loss(logs, next_R, reduction="none") for logs in (a, b))
        moved_R = kl_div(a, b, reduction="none", log_target=True).sum(-1)
        parts.append(torch.stack([column.double() for column in (*given, moved_R, a.argmax(-1) == b.argmax(-1))]))
    return torch.cat(parts, 1)
