"""How deep a model decides each question, and how surprised it is on the way."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from adi.measure.exposure.facts import LENGTH, MOST_HOPS, NAMES, Facts, Key, Text, batch_of
from adi.measure.halting_controls import first_turns
from adi.model.looped import LoopedForCausalLM

MENTIONS = (1, 2, 4, 8)
AT_ONCE = 256


@dataclass(frozen=True)
class Question:
    """A place of a text where an answer is due; ``item`` None for a fresh question; ``mention`` of it in this text."""

    text: int
    place: int
    answer: int
    hops: int
    item: int | None = None
    mention: int = 1


@dataclass(frozen=True)
class Probes:
    """Texts, and the questions in them that are observed."""

    texts: list[Text]
    questions: list[Question]


def item_probes(facts: Facts, items: Sequence[int], contexts: int, seed: int) -> Probes:
    """Each of these items, by number, once in ``contexts`` texts of fresh questions, at a random place."""
    made = Probes([], [])
    for n in items:
        item = facts.items[n]
        for context in range(contexts):
            text = facts.text(random.Random(f"{seed} probe {n} {context}"), [item], repeated=0.0)
            place = place_of(text, item.key)
            made.questions.append(Question(len(made.texts), place, item.answer, item.hops, n))
            made.texts.append(text)
    return made


def place_of(text: Text, key: Key) -> int:
    """Where the answer of this question is first due."""
    return next(place for place in text.due if tuple(text.ids[place - len(key) + 1 : place + 1]) == key)


def repeat_probes(facts: Facts, count: int, seed: int) -> Probes:
    """Fresh questions of two hops, each eight times in one text: its first, second, fourth and eighth mention."""
    made = Probes([], [])
    for n in range(count):
        dice, text, met = random.Random(f"{seed} repeat {n}"), Text(), 0
        hops = 2
        key = facts.fresh(dice, hops)
        while True:
            again = met < MENTIONS[-1] and (
                len(text.ids) + (hops + 2) * (MENTIONS[-1] - met) + 6 > LENGTH or dice.random() < 0.5
            )
            said: Key = key if again else facts.fresh(dice)
            if not text.say(said, facts.answers(said)):
                break
            met += again
            if again and met in MENTIONS:
                made.questions.append(Question(len(made.texts), text.due[-1], facts.answers(key)[-1], hops, None, met))
        made.texts.append(text)
    return made


@dataclass(frozen=True)
class Observed:
    """Q questions by turn: ``loss_RQ`` in nats, likeliest answers ``said_RQ``, the gate's logits ``halt_RQ``; last entropy."""

    questions: list[Question]
    loss_RQ: np.ndarray
    said_RQ: np.ndarray
    halt_RQ: np.ndarray
    entropy_Q: np.ndarray

    @cached_property
    def settled(self) -> np.ndarray:
        """The turn, from 1, from which on the likeliest answer is full depth's."""
        same_RQ = self.said_RQ == self.said_RQ[-1]
        return np.asarray(len(same_RQ) - np.cumprod(same_RQ[::-1], 0).sum(0) + 1)

    @cached_property
    def halted(self) -> np.ndarray:
        """The turn, from 1, at which the gate halts."""
        return first_turns(self.halt_RQ, 0.0) + 1

    def right(self, turn: int = -1) -> np.ndarray:
        return np.asarray(self.said_RQ[turn] == [q.answer for q in self.questions])


@torch.no_grad()
def observe(model: LoopedForCausalLM, probes: Probes) -> Observed:
    """All turns of the model at the questions."""
    model.eval()
    parts = []
    of_text = np.array([q.text for q in probes.questions])
    for first in range(0, len(probes.texts), AT_ONCE):
        ids_BT = torch.tensor(batch_of(probes.texts[first : first + AT_ONCE]).ids_BT)
        mine = [probes.questions[n] for n in np.flatnonzero((of_text >= first) & (of_text < first + AT_ONCE))]
        read_RBTD = torch.stack(model.model(input_ids=ids_BT)[0])
        read_RQD = read_RBTD[:, [q.text - first for q in mine], [q.place for q in mine]]
        logs_RQV = model.lm_head(read_RQD).log_softmax(-1)
        answer_Q = torch.tensor([q.answer for q in mine])
        loss_RQ = -logs_RQV.gather(-1, answer_Q.expand(len(logs_RQV), -1)[..., None])[..., 0]
        entropy_Q = -(logs_RQV[-1].exp() * logs_RQV[-1]).sum(-1)
        parts.append((loss_RQ, logs_RQV.argmax(-1), model.gate(read_RQD), entropy_Q))
    joined = [torch.cat(part, -1).numpy() for part in zip(*parts, strict=True)]
    return Observed(probes.questions, joined[0].astype(np.float64), joined[1], joined[2], joined[3].astype(np.float64))


def frequency(facts: Facts, texts: int) -> np.ndarray:
    """The expected number of times that each item's name and answer come in so many texts, each, ``[items]``."""
    every = texts * LENGTH / (0.5 * MOST_HOPS + 2.5) / NAMES
    names, answers = np.full(NAMES + 1, every), np.full(NAMES + 1, every)
    for item in facts.items:
        names[item.key[0]] += item.exposures
        answers[item.answer] += item.exposures
    return np.array([names[item.key[0]] + answers[item.answer] for item in facts.items])


def columns(seen: Observed) -> dict[str, list[Any]]:
    """What is kept of the questions that were observed, a list for each quantity."""
    asked = {name: [getattr(q, name) for q in seen.questions] for name in ("item", "hops", "place", "mention")}
    found = {
        "settled": seen.settled,
        "halted": seen.halted,
        "surprise_first": seen.loss_RQ[0].round(5),
        "surprise_full": seen.loss_RQ[-1].round(5),
        "entropy": seen.entropy_Q.round(5),
        "right_first": seen.right(0).astype(int),
        "right_full": seen.right().astype(int),
    }
    return asked | {name: values.tolist() for name, values in found.items()}
