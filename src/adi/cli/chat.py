"""``adi chat``: a conversation, coloured by depth."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console

from adi.cli.shared.conversation import ChatOptions
from adi.cli.shared.options import DecodingOptions, EngineOptions, ModelOption, SamplingOptions, TokensOption, option
from adi.cli.shared.output import out, say
from adi.errors import AdiError, ModelError

if TYPE_CHECKING:
    from adi.decoding.policies import Policy
    from adi.decoding.records import Generation, Step
    from adi.decoding.sampling import Sampling
    from adi.decoding.session import Session
    from adi.model.load import Model
    from adi.model.prefix_cache import PrefixCache

ANSWER_SHARE = 0.25
HELP = "/reset starts over, /depth shows the last answer's figures, /bye (or Ctrl-D) ends."


def chat(
    model: ModelOption = "smollm2-135m",
    system: Annotated[str | None, option("--system", help="A system message to begin with.")] = None,
    max_new_tokens: TokensOption = 256,
    *,
    decoding: DecodingOptions,
    sampling: SamplingOptions,
    template: ChatOptions,
    engine: EngineOptions,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, not the conversation."""
    from adi.cli.shared.paint import legend
    from adi.model.prefix_cache import PrefixCache

    console, drawn, more = out(), sampling.sampling(), template.settings()
    loaded, policy = decoding.load(engine, model)
    if loaded.tokenizer is None or not (loaded.tokenizer.has_chat_template or "chat_template" in more):
        raise ModelError(f"{model} has no chat template, so it cannot hold a conversation; use adi run --raw.")
    if console.is_terminal:
        say(console, HELP, "dim")
        console.print(legend(policy.depths, loaded.backbone.spec.layers))
    start = [{"role": "system", "content": system}] if system else []
    with PrefixCache(loaded) as kept:
        _Conversation(console, loaded, policy, max_new_tokens, more, drawn, start, kept).hold()


@dataclass
class _Conversation:
    """The messages to begin with, the turns so far, and how they are answered."""

    console: Console
    model: Model
    policy: Policy
    most: int  # tokens of an answer; 0 for as many as fit
    template: dict[str, Any]
    sampling: Sampling
    start: list[dict[str, str]]
    kept: PrefixCache  # so that a turn reads what is new in it
    turns: list[dict[str, str]] = field(default_factory=list)
    last: str = "no answer yet"

    def hold(self) -> None:
        """Until the user ends it."""
        while (line := _ask(self.console)) is not None:
            if line == "/reset":
                self.turns = []
            elif line == "/depth":
                say(self.console, self.last)
            elif line.startswith("/"):
                say(self.console, f"unknown command {line}. {HELP}")
            elif line:
                self._answer(line)

    def _answer(self, line: str) -> None:
        """One turn; a refused one leaves no trace. Where the context runs short, the oldest turns are left out."""
        from adi.cli.run import drift_line
        from adi.decoding.session import Session

        turns = [*self.turns, {"role": "user", "content": line}]
        sampling = self.sampling.of_prompt(len(self.start) + len(turns))
        try:
            ids, length = self._fitting(turns)
            options: dict[str, Any] = {"sampling": sampling, "max_new_tokens": length, "prefix_cache": self.kept}
            session = Session(self.model, ids, self.policy, **options)
        except AdiError as error:
            say(self.console, f"{error} Type /reset to start over.", "red")
            return
        if forgotten := len(self.turns) + 1 - len(turns):
            say(self.console, f"The context is full: the oldest {forgotten} messages are forgotten.", "dim")
        self.turns = turns  # kept, even where the answer is interrupted or fails
        generation = _answered(self.console, session, self.policy.depths)
        self.turns.append({"role": "assistant", "content": generation.text})
        drift = "" if generation.drift is None else "\n" + drift_line(generation.drift)
        self.last = f"{generation.summary()}{drift}"

    def _fitting(self, turns: list[dict[str, str]]) -> tuple[tuple[int, ...], int | None]:
        """The token ids of the messages, and how long an answer may be; the oldest of the turns are taken out until it has the
        length asked for, or at least a quarter of the context."""
        context = self.model.backbone.spec.context
        while True:
            ids = self.model.encode([*self.start, *turns], **self.template)
            if context is None:
                return ids, self.most or None
            room = context - len(ids)
            if room >= min(self.most or context, context * ANSWER_SHARE) or len(turns) == 1:
                return ids, min(self.most or room, room) if room > 0 else None
            del turns[:2]


def _answered(console: Console, session: Session, depths: Sequence[int]) -> Generation:
    """The answer, painted as it comes; an interruption keeps what has come."""
    from adi.cli.shared.paint import Painter

    steps: list[Step] = []
    with contextlib.suppress(KeyboardInterrupt):
        for step in Painter(console, depths).follow(session):
            steps.append(step)  # one by one
    return session.generation(steps)


def _ask(console: Console) -> str | None:
    """The next line of the conversation, or None at its end."""
    try:
        line = input("> " if console.is_terminal else "").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None
    return None if line == "/bye" else line
