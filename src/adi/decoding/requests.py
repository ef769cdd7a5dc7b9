"""What one sequence asks for while it decodes, and what it tells: plain values between the loop and whoever runs the model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from adi.decoding.drafting.rounds import DraftRound

if TYPE_CHECKING:
    from torch import Tensor


class DepthOutput(Protocol):
    """What one row gives at one depth; ``exits.exit_output.ExitOutput`` is the real one."""

    @property
    def depth(self) -> int: ...
    @property
    def token(self) -> int: ...
    @property
    def signals(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Forward:
    """Keep the first ``keep`` positions, append ``ids``, bring all rows to depth ``to``; answered with the last ``read`` rows'
    outputs there."""

    keep: int
    ids: tuple[int, ...]
    to: int
    read: int = 1


@dataclass(frozen=True)
class ExitCheck:
    """One depth read for one token, and whether the trigger fired there."""

    output: DepthOutput
    fired: bool


@dataclass(frozen=True)
class DraftToken:
    """A drafted token with every depth read for it, of which the last one fired.

    ``level`` is its drafter: "memory" (n-grams) or "drafter" (both at ``depth`` 0, without checks; the latter with its
    probability as ``confidence``), or "exit". ``density_V`` is what it was drawn from, None where it was not drawn.
    """

    token: int
    depth: int
    checks: tuple[ExitCheck, ...] = ()
    level: str = "exit"
    confidence: float | None = None
    density_V: Tensor | None = None


@dataclass(frozen=True)
class Emitted:
    """A final token: ``draft`` is the draft it was, ``rejected`` are the drafts that it replaces. ``verified``: full depth
    had the last word on it."""

    token: int
    depth: int
    checks: tuple[ExitCheck, ...]
    round: int
    draft: DraftToken | None = None
    rejected: tuple[DraftToken, ...] = ()
    verified: bool = True


@dataclass(frozen=True)
class Fallback:
    """Drift was found, the running risk being above ``lower`` and so above ``level``; all that follows is verified."""

    level: float
    lower: float


Yields = Forward | DraftRound | DraftToken | Emitted | Fallback
Replies = Sequence[DepthOutput]
SequenceLogic = Generator[Yields, Replies, None]


class TokenRule(Protocol):
    """The token that follows ``text``, whose last row gave ``output``; a ``draft`` is accepted if it is that token.

    ``likeliest`` is greedy, ``sampler.Sampler`` draws. It is called once for every final token, in order.
    """

    def __call__(self, text: Sequence[int], output: DepthOutput, draft: DraftToken | None = None, /) -> int: ...


def likeliest(text: Sequence[int], output: DepthOutput, draft: DraftToken | None = None, /) -> int:
    """Greedy decoding: the likeliest token."""
    return output.token


@dataclass(frozen=True)
class Request:
    """What is to be generated: at most ``budget`` tokens after ``prompt``, up to one that ``ends`` the text, each final by
    ``rule``, on a model of ``layers`` blocks."""

    prompt: tuple[int, ...]
    budget: int
    layers: int
    ends: Callable[[int], bool]
    rule: TokenRule = likeliest
