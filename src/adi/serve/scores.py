"""Log-probabilities of a known text, for ``echo`` with ``logprobs``: a sequence of the driver like any other."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

from adi.decoding.frontier import Frontier, HeadPass
from adi.decoding.scheduler import Work
from adi.decoding.stop_strings import StopStrings
from adi.model.load import Model


def spelled(model: Model, ids: Sequence[int]) -> str:
    """The text of token ids, with special tokens."""
    return " ".join(map(str, ids)) if model.tokenizer is None else model.tokenizer.decode(list(ids), special=True)


class Scored(NamedTuple):
    """A token, how it is spelled, and its log-probability."""

    token: int
    text: str
    logprob: float


class _Whole(Frontier):
    """Takes nothing over from earlier texts: every row is to be seen."""

    def reuse(self, *given: object) -> None:
        return


class Scores:
    """What full depth gives each token of ``ids`` after the first, and its ``count`` likeliest tokens in each place.

    ``found[i]`` are those for token ``i + 1``, likeliest first, the token itself among them.
    """

    def __init__(self, model: Model, ids: Sequence[int], count: int) -> None:
        self.model, self.prompt_ids, self._count = model, tuple(ids), count
        self.begun: float | None = None
        self.ended, self.budget, self.trials = False, 0, None
        self.restart()

    def restart(self) -> None:
        """Be as new."""
        self.frontier, self.found = _Whole(self.model.backbone), list[list[Scored]]()

    @property
    def text_ids(self) -> tuple[int, ...]:
        """The text, to which it adds nothing."""
        return self.prompt_ids

    def stops(self) -> StopStrings:
        """None: it writes nothing."""
        return StopStrings(())

    def run(self) -> Work:
        """Its passes; each one's rows are scored before the next one runs."""
        self.begun = self.begun or perf_counter()
        spec, frontier = self.model.backbone.spec, self.frontier
        frontier.read(self.prompt_ids)
        while (ahead := frontier.next_pass(spec.layers)) is not None:
            reply = yield ahead
            assert reply is not None
            done, states = reply.result
            frontier.absorb(done, states)
            if done.hi < spec.layers:
                continue
            for first in range(0, len(states), spec.merged_rows):
                part = states[first : first + spec.merged_rows]
                reply = yield HeadPass(part, logits=True)
                assert reply is not None
                self._read(done.rows.start + first, reply.result)

    def _read(self, position: int, logits_TV: Any) -> None:
        """Rows from ``position`` on, each of which predicts the token after it."""
        for place, logs_V in enumerate(logits_TV.float().log_softmax(-1), position + 1):
            if place < len(self.prompt_ids):
                token = self.prompt_ids[place]
                best = {int(i): float(logs_V[i]) for i in logs_V.topk(self._count).indices} if self._count else {}
                best.setdefault(token, float(logs_V[token]))
                self.found.append([Scored(i, spelled(self.model, [i]), log) for i, log in best.items()])

    def complete(self, stopped: bool) -> None:
        """All of it is scored."""
        self.ended = True

    def close(self) -> None:
        """Free its KV memory."""
        self.frontier.close()
