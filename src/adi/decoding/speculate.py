"""Speculative decoding of one sequence: propose, verify, accept, roll back. Every policy is this one loop.

A generator that yields what it needs (``Forward``, ``DraftRound``) and is sent the outputs. It never calls a model, so a driver
may run one sequence or merge the requests of many, and a test may answer from a script. Between requests it yields what has
happened: drafts, final tokens, a fall-back.

Greedy verification after Stern et al. 2018 (blockwise parallel decoding) and Leviathan et al. 2023 (speculative decoding).
Drafts may come from the same network, stopped early, whose states the frontier keeps, so that verifying computes the rest only.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from adi.decoding.requests import DraftToken, Emitted, ExitCheck, Fallback, Forward, Replies, Request, SequenceLogic, Yields

if TYPE_CHECKING:
    from adi.artifact import Exits
    from adi.decoding.drafting.cost_model import CostModel
    from adi.drafters.network import Drafting


@dataclass(frozen=True)
class Proposal:
    """Drafts that may follow the text. Of text and drafts in a row, the first ``known`` tokens have entered the network.

    ``checks`` are the exits read for one more token, none of which fired. Example: a text of 5 tokens and 2 drafts, the second
    of which ends the text. Drafts from n-grams ran nothing: ``known`` is 4, as the last token has not entered. Verifying
    appends token 5 and draft 1 (nothing follows draft 2, so it stays out) and reads both rows. Drafts from an exit: token 5
    and draft 1 have run up to the exit, ``known`` is 6, and verifying appends nothing and runs the blocks above.
    """

    known: int
    drafts: Sequence[DraftToken] = ()
    checks: tuple[ExitCheck, ...] = ()


Proposing = Generator[Yields, Replies, Proposal]


class Proposer(Protocol):
    """Makes drafts; ``decoding.drafting.proposers`` has one for exits and one for n-gram matches and the drafter."""

    def propose(self, text: Sequence[int], most: int) -> Proposing:
        """At most ``most`` drafts after ``text``, whose last token has not entered the network. No draft follows one that ends
        the text."""
        ...

    def on_verified(self, accepted: int) -> None:
        """Full depth accepted so many drafts of the last proposal."""
        return


class Verification:
    """Which drafts full depth verifies: here all of them, so that the text is exactly full depth's."""

    always = True
    checked = differed = 0  # drafts spot-checked, and those of them that full depth did not give

    def drift(self) -> Fallback | None:
        """Where verification begins in mid-text, once: why."""
        return None

    def should_verify(self) -> bool:
        """Of the next drafts; decided before they are made."""
        return True

    def on_verified(self, proposal: Proposal, outputs: Replies) -> None:
        """Full depth's outputs for a proposal that was due."""

    def restarted(self) -> Verification:
        """The same for the same sequence, which is decoded again from its beginning."""
        return self


@dataclass
class Strategy:
    """How one sequence decodes: who proposes, how many tokens a round at most, and which of them are verified.

    ``exits`` are read at depths ``stops``. ``drafting`` is the drafter at work, ``costs`` are told what passes take.
    ``propagate``: blocks that a final token skipped get keys and values from its exit's state.
    """

    proposer: Proposer
    draft_tokens: int
    verification: Verification = field(default_factory=Verification)
    exits: Exits | None = None
    stops: tuple[int, ...] = ()
    drafting: Drafting | None = None
    costs: CostModel | None = None
    propagate: bool = False


def speculate(request: Request, strategy: Strategy) -> SequenceLogic:
    """Decode one sequence in rounds: at most ``draft_tokens`` drafts, then full depth's word on them and one token more.

    Where verification is not due, one draft at a time is final as it is. Without drafts this is ordinary decoding.
    """
    verification, layers = strategy.verification, request.layers
    (output,) = yield Forward(0, request.prompt, layers)  # prefill
    text, rounds = [*request.prompt, request.rule(request.prompt, output)], 1
    yield Emitted(text[-1], layers, (ExitCheck(output, False),), rounds)
    while (left := request.budget + len(request.prompt) - len(text)) > 0 and not request.ends(text[-1]):
        if (drift := verification.drift()) is not None:
            yield drift
        always, due = verification.always, verification.should_verify()
        most = min(strategy.draft_tokens, left - 1) if always else 1
        proposal = yield from strategy.proposer.propose(text, most)
        if due or not proposal.drafts:
            rounds += 1
            yield from proposal.drafts
            outputs = yield _verifying(request, text, proposal, always)
            emitted = accept(request, text, proposal, outputs, rounds)
            strategy.proposer.on_verified(sum(one.draft is not None for one in emitted))
            if due:
                verification.on_verified(proposal, outputs)
        else:
            emitted = [_unverified(request, text, proposal.drafts[0], rounds)]
        text.extend(one.token for one in emitted)
        yield from emitted


def _verifying(request: Request, text: Sequence[int], proposal: Proposal, one_more: bool) -> Forward:
    """Bring text and drafts to full depth. Nothing need follow a draft that ends the text, nor the last one if not
    ``one_more`` token is wanted: it stays out of the network."""
    tokens = [*text, *(draft.token for draft in proposal.drafts)]
    if proposal.drafts and (request.ends(tokens[-1]) or not one_more):
        tokens.pop()
    return Forward(proposal.known, tuple(tokens[proposal.known :]), request.layers, len(tokens) - len(text) + 1)


def accept(request: Request, text: Sequence[int], proposal: Proposal, outputs: Replies, rounds: int) -> list[Emitted]:
    """The drafts that full depth agrees with, and the token that it gives after them, where it was asked for one."""
    known, emitted = list(text), list[Emitted]()
    for place, output in enumerate(outputs):
        draft = proposal.drafts[place] if place < len(proposal.drafts) else None
        token = request.rule(known, output, draft)
        checks = (*(proposal.checks if draft is None else draft.checks), ExitCheck(output, False))
        if draft is None or token != draft.token:
            return [*emitted, Emitted(token, request.layers, checks, rounds, None, tuple(proposal.drafts[place:]))]
        emitted.append(Emitted(token, draft.depth, checks, rounds, draft))
        known.append(token)
    return emitted


def _unverified(request: Request, text: Sequence[int], draft: DraftToken, rounds: int) -> Emitted:
    """The token by the exit that fired: its likeliest, or one drawn from its distribution."""
    token = request.rule(text, draft.checks[-1].output)
    return Emitted(token, draft.depth, draft.checks, rounds, replace(draft, token=token), verified=False)
