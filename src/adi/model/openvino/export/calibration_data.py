"""Texts to which rounded weights are fitted: prompts of the package, as a chat and as plain text."""

from __future__ import annotations

from itertools import chain

from adi.model.tokenizer import Tokenizer
from adi.prompts import read_prompts

WINDOW = 512
WINDOWS = 12  # of each kind: about 12,000 tokens in all


def calibration_texts(tokenizer: Tokenizer | None) -> list[tuple[int, ...]]:
    """Windows of 512 token ids; none without a tokenizer."""
    if tokenizer is None:
        return []
    prompts = [item.prompt for item in read_prompts("train")]
    half = len(prompts) // 2
    kinds = [[tokenizer.encode(prompt + "\n\n") for prompt in prompts[half:]]]
    if tokenizer.has_chat_template:
        kinds.append([tokenizer.chat([{"role": "user", "content": prompt}]) for prompt in prompts[:half]])
    windows = []
    for kind in kinds:
        ids = tuple(chain.from_iterable(kind))[: WINDOW * WINDOWS]
        windows += [ids[at : at + WINDOW] for at in range(0, len(ids), WINDOW)]
    return [window for window in windows if len(window) > 1]
