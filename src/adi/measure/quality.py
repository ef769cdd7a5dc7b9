"""What fewer bits cost: perplexity on text nobody trained on, and how far the predictions move from float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from adi.measure.circumstances import circumstances
from adi.model.backbone import Backbone, Rows
from adi.model.checkpoint import load
from adi.model.sources import Notice
from adi.prompts import read_prompts

WINDOW = 512


@dataclass(frozen=True)
class Quality:
    """One precision against float32 on the same text: perplexity and its ratio, mean KL divergence in nats per token, and the
    share of tokens at which both find the same one likeliest."""

    backend: str
    precision: str
    perplexity: float
    ratio: float
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
        raise ValueError(f"{source} has no tokenizer, so there is no text to read.")
    read = text if text is not None else "\n\n".join(item.prompt for item in read_prompts("bench"))
    ids = reference.tokenizer.encode(read)[:tokens]
    windows = [ids[at : at + WINDOW] for at in range(0, len(ids), WINDOW)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise ValueError("the text has fewer than two tokens; give more.")
    found = []
    for precision in precisions:
        notice(f"Reading {sum(map(len, windows)):,} tokens in {precision}")
        model = load(source, backend="openvino", precision=precision, notice=notice)
        found.append(asdict(compare(model.backbone, reference.backbone, windows)))
    about = circumstances(command, read_prompts("bench") if text is None else [])
    return {"format": "adi-quality", "version": 1, **about, "tokens": sum(map(len, windows)), "precisions": found}


def compare(one: Backbone, reference: Backbone, windows: Sequence[Sequence[int]]) -> Quality:
    """Both engines over the same windows of token ids; nothing of the text is kept but sums."""
    mine = theirs = moved = 0.0
    same = count = 0
    for window in windows:
        ids = tuple(window)
        a_TV, b_TV = _log_probs(one, ids), _log_probs(reference, ids)
        next_T = torch.tensor(ids[1:])
        mine -= float(a_TV[:-1].gather(1, next_T[:, None]).sum())
        theirs -= float(b_TV[:-1].gather(1, next_T[:, None]).sum())
        moved += float((b_TV.exp() * (b_TV - a_TV)).sum())
        same += int((a_TV.argmax(-1) == b_TV.argmax(-1)).sum())
        count += len(ids)
    predicted = count - len(windows)
    return Quality(
        backend=one.spec.backend,
        precision=one.spec.precision,
        perplexity=math.exp(mine / predicted),
        ratio=math.exp((mine - theirs) / predicted),
        divergence=moved / count,
        same_token=same / count,
        row_invariant=one.spec.row_invariant,
    )


def _log_probs(backbone: Backbone, ids: tuple[int, ...]) -> Tensor:
    cache = backbone.new_cache()
    (states,) = backbone.forward([Rows(cache, 0, ids, None)], 0, backbone.spec.layers)
    return backbone.logits(states.hidden_TD).float().log_softmax(-1)
