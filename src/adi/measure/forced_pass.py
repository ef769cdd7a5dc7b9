"""One full pass over a known text, stopped at chosen depths: what every later measurement of exits starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from adi.decoding.generate import generate
from adi.decoding.policies import FullDepth
from adi.decoding.scheduler import generate_batch
from adi.model.backbone import Rows, States
from adi.model.load import Model

TOGETHER = 16


@dataclass(frozen=True)
class Text:
    """A sequence whose rows ``start - 1 ...`` say the model's own greedy answer."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class ForcedPass:
    """The states of a text's answer rows at each depth, and the full model's token there, ``[N]``."""

    at: dict[int, States]
    token_N: Tensor


def answer(model: Model, prompt: str, max_new_tokens: int) -> Text:
    """The model's greedy answer at full depth, as text to measure on."""
    raw = model.tokenizer is not None and not model.tokenizer.has_chat_template
    given = generate(model, prompt, FullDepth(), max_new_tokens=max_new_tokens, raw=raw)
    return Text(given.prompt_ids + given.token_ids, len(given.prompt_ids))


def forced_pass(model: Model, text: Text, depths: Sequence[int]) -> ForcedPass:
    """Run a text once, stopping at ``depths``; keeps the rows that say the answer."""
    backbone = model.backbone
    cache, ids, hidden_TD, lo = backbone.new_cache(), text.ids[:-1], None, 0
    rows, at = slice(text.start - 1, len(ids)), {}
    for hi in (*depths, backbone.spec.layers):
        (states,) = backbone.forward([Rows(cache, 0, ids, hidden_TD)], lo, hi, mlp=backbone.has_mlp_tap)
        mlp_TF = None if states.mlp_TF is None else states.mlp_TF[rows]
        at[hi] = States(states.hidden_TD[rows], states.before_TD[rows], mlp_TF)
        hidden_TD, lo = states.hidden_TD, hi
    if (close := getattr(cache, "close", None)) is not None:
        close()
    return ForcedPass(at, backbone.logits(at.pop(backbone.spec.layers).hidden_TD).argmax(-1))


def answers(model: Model, prompts: Sequence[str], max_new_tokens: int) -> list[Text]:
    """The model's greedy answers at full depth, all together."""
    raw = model.tokenizer is not None and not model.tokenizer.has_chat_template
    found = generate_batch(model, prompts, FullDepth(), max_new_tokens=max_new_tokens, raw=raw, most=TOGETHER)
    return [Text(given.prompt_ids + given.token_ids, len(given.prompt_ids)) for given in found]
