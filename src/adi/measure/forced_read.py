"""What every depth says of every token of an answer: one full pass over a finished text, stopped at each exit.

From it follows, without running anything again, what reflex decoding would have said and where, at any thresholds. That
is exact as long as the text is the same, because skipped layers are filled exactly: a shallow state is a function of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adi.artifact import Exits
from adi.decoding.scheduler import sharing
from adi.exits.signals import Measured, Prediction, entropy, top_probability
from adi.model.backbone import Backbone, Rows

TOGETHER = 16  # texts under way
CHUNK_ROWS = 48  # of an answer in a pass
HEAD_ROWS = 64
READ: dict[str, Callable[[Prediction | Measured], Tensor]] = {"top_probability": top_probability, "entropy": entropy}

Text = tuple[tuple[int, ...], tuple[int, ...]]  # prompt and answer, as token ids


@dataclass(frozen=True)
class ForcedRead:
    """An answer of T tokens and what E exits said at each.

    ``said_T`` are the answer's own tokens, ``full_T`` full depth's in the same contexts, ``token_ET`` the exits'.
    ``signals`` are each exit's top probability and entropy, ``[E, T]``. ``regret_T`` and ``regret_ET`` say how much less likely
    than ``full_T`` the answer's and the exits' tokens are to the full model, in nats, at least 0; ``log_T`` is the
    log-probability of ``said_T``.
    """

    prompt_ids: tuple[int, ...]
    said_T: Tensor
    full_T: Tensor
    token_ET: Tensor
    signals: Mapping[str, Tensor]
    regret_T: Tensor
    regret_ET: Tensor
    log_T: Tensor


def forced_read(backbone: Backbone, exits: Exits | None, texts: Sequence[Text]) -> list[ForcedRead]:
    """Read texts at every exit and at full depth; without ``exits`` at full depth alone. Refuses another model's exits."""
    found: list[ForcedRead] = []
    for at in range(0, len(texts), TOGETHER):
        found += _tell(backbone, exits, texts[at : at + TOGETHER])
    return found


def _tell(backbone: Backbone, exits: Exits | None, texts: Sequence[Text]) -> list[ForcedRead]:
    depths = () if exits is None else exits.depths
    at = _states(backbone, texts, (*depths, backbone.spec.layers))
    said_N = torch.tensor([token for _, said in texts for token in said])
    token_EN = torch.zeros((len(depths), len(said_N)), dtype=torch.long)
    seen = {name: torch.zeros((len(depths), len(said_N))) for name in READ}
    for e, depth in enumerate(depths):
        assert exits is not None
        said = exits.reader(backbone)(depth, at[depth])
        token_EN[e] = _tokens(said)
        for name, measure in READ.items():
            seen[name][e] = measure(said).float().cpu()
    wanted_RN = torch.cat([said_N[None], token_EN])
    full, logs = [], []
    for place in torch.arange(len(said_N)).split(HEAD_ROWS):
        logs_TV = backbone.logits(at[backbone.spec.layers][place]).float().log_softmax(-1).cpu()
        full.append(logs_TV.argmax(-1))
        logs.append(logs_TV.gather(1, torch.cat([full[-1][None], wanted_RN[:, place]]).T).T)
    full_N, logs_RN = torch.cat(full), torch.cat(logs, 1)
    regret_RN = (logs_RN[:1] - logs_RN[1:]).clamp_min(0)
    told, start = [], 0
    for prompt_ids, answer in texts:
        row = slice(start, start := start + len(answer))
        signals = {name: values_EN[:, row] for name, values_EN in seen.items()}
        regrets = (regret_RN[0, row], regret_RN[1:, row])
        told.append(ForcedRead(prompt_ids, said_N[row], full_N[row], token_EN[:, row], signals, *regrets, logs_RN[1, row]))
    return told


def _states(backbone: Backbone, texts: Sequence[Text], depths: Sequence[int]) -> dict[int, Tensor]:
    """The states of all rows that say an answer, text by text, at each of these depths, ``[N, D]``."""
    caches = [backbone.new_cache() for _ in texts]
    kept: dict[int, list[list[Tensor]]] = {depth: [[] for _ in texts] for depth in depths}
    ids = [(*prompt, *said[:-1]) for prompt, said in texts]
    begun = [0] * len(texts)
    ends = [len(prompt) for prompt, _ in texts]
    try:
        while waiting := [i for i in range(len(texts)) if begun[i] < ends[i]]:
            live = [waiting[j] for j in sharing([ends[i] - begun[i] for i in waiting], backbone.spec.merged_rows)]
            hidden: list[Tensor | None] = [None] * len(live)
            lo = 0
            for hi in depths:
                rows = [Rows(caches[i], begun[i], ids[i][begun[i] : ends[i]], h) for i, h in zip(live, hidden, strict=True)]
                hidden = [states.hidden_TD for states in backbone.forward(rows, lo, hi)]
                for i, h in zip(live, hidden, strict=True):
                    assert h is not None
                    kept[hi][i].append(h[-1:] if begun[i] == 0 else h)
                lo = hi
            for i in live:
                begun[i], ends[i] = ends[i], min(ends[i] + CHUNK_ROWS, len(ids[i]))
    finally:
        for cache in caches:
            close = getattr(cache, "close", None)
            if close is not None:
                close()
    return {depth: torch.cat([part for parts in found for part in parts]) for depth, found in kept.items()}


def _tokens(said: Prediction | Measured) -> Tensor:
    """Each row's likeliest token."""
    place_T = (said.rows.place_T if isinstance(said, Measured) else said.log_probs_TS.argmax(-1)).long().cpu()
    return place_T if said.ids_S is None else said.ids_S.cpu()[place_T]
