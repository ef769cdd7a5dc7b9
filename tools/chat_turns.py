"""Seconds to the first token of each turn of a chat: with a prefix cache, without, and of that turn's own message alone.

Messages of so many tokens and greedy answers, each turn in the three ways in turn, a conversation of its own for each repeat.
Prints a line of JSON for each turn: medians, and how many times the message alone it takes. Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

import adi


def first_token(model: adi.Model, ids: tuple[int, ...], kept: adi.PrefixCache | None) -> float:
    """Seconds to it; what follows is not waited for."""
    start = time.perf_counter()
    stream = adi.stream(model, ids, max_new_tokens=2, stop_at_eos=False, prefix_cache=kept)
    next(stream)
    seconds = time.perf_counter() - start
    stream.close()  # type: ignore[attr-defined]
    return seconds


def conversation(model: adi.Model, turns: int, message: int, answer: int, seed: int) -> list[tuple[float, float, float]]:
    """Seconds of each turn: with what was kept, without, and of its message alone."""
    dice, found = random.Random(seed), list[tuple[float, float, float]]()
    talk: tuple[int, ...] = ()
    with adi.PrefixCache(model) as kept:
        for _ in range(turns):
            new = tuple(dice.randrange(300, model.backbone.spec.vocabulary) for _ in range(message))
            talk = (*talk, *new)
            ways = (talk, kept), (talk, None), (new, None)
            found.append(tuple(first_token(model, *way) for way in ways))  # type: ignore[arg-type]
            said = adi.generate(model, talk, max_new_tokens=answer, stop_at_eos=False, prefix_cache=kept)
            talk = (*talk, *said.token_ids)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--message", type=int, default=100, help="tokens of a message")
    parser.add_argument("--answer", type=int, default=250, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=10)
    given = parser.parse_args()
    model = adi.load(given.model, precision=given.precision)
    model.backbone.prepare((), drafts=True, wait=True)
    sizes = given.turns, given.message, given.answer
    conversation(model, *sizes, -1)  # whatever is made on first use
    runs = [conversation(model, *sizes, seed) for seed in range(given.repeats)]
    for turn in range(given.turns):
        kept, anew, alone = (statistics.median(run[turn][way] for run in runs) for way in range(3))
        ratio = statistics.median(run[turn][0] / run[turn][2] for run in runs)
        tokens = given.message * (turn + 1) + given.answer * turn
        line = {"turn": turn + 1, "prompt_tokens": tokens, "kept_s": round(kept, 4), "anew_s": round(anew, 4)}
        print(json.dumps({**line, "message_alone_s": round(alone, 4), "kept_to_alone": round(ratio, 3)}))


if __name__ == "__main__":
    main()
