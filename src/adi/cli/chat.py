"""``adi chat``: a conversation, coloured by depth."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from adi.cli.options import (
    BackendOption,
    DeviceOption,
    DraftOption,
    ExitsOption,
    HabitsOption,
    MinPOption,
    ModelOption,
    ModeOption,
    PenaltyOption,
    PrecisionOption,
    ReflexOptions,
    RiskKindOption,
    RiskOption,
    SeedOption,
    Source,
    SpotOption,
    TemperatureOption,
    ThresholdOption,
    TokensOption,
    TopKOption,
    TopPOption,
    TriggerOption,
    likely_stops,
    policy_for,
)
from adi.decoding.sampling import Sampling
from adi.errors import AdiError

if TYPE_CHECKING:
    from adi.decoding.policies import Policy
    from adi.decoding.records import Generation, Step
    from adi.decoding.session import Session
    from adi.model.load import Model

HELP = "/reset starts over, /depth shows the last answer's figures, /bye (or Ctrl-D) ends."


def chat(
    model: ModelOption = "smollm2-135m",
    exits: ExitsOption = None,
    mode: ModeOption = "verified",
    system: Annotated[str | None, typer.Option("--system", help="A system message to begin with.")] = None,
    max_new_tokens: TokensOption = 256,
    threshold: ThresholdOption = None,
    trigger: TriggerOption = None,
    draft_tokens: DraftOption = None,
    habits: HabitsOption = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = None,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = None,
    risk: RiskOption = None,
    kind: RiskKindOption = "disagreement",
    spot_check: SpotOption = 0.0,
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Talk with a model. Ctrl-C stops an answer, not the conversation."""
    from adi.cli.paint import legend
    from adi.decoding.policies import depths_of

    out = Console(highlight=False)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    stops = likely_stops(model, mode, exits, (threshold, trigger, draft_tokens) == (None,) * 3)
    loaded = Source(model, backend, precision, device).load(Console(stderr=True), stops)
    policy = policy_for(loaded, mode, exits, threshold, trigger, draft_tokens, habits, ReflexOptions(risk, kind, spot_check))
    if loaded.tokenizer is None or not loaded.tokenizer.has_chat_template:
        raise AdiError(f"{model} has no chat template, so it cannot hold a conversation; use adi run --raw.")
    if out.is_terminal:
        out.print(HELP, style="dim")
        out.print(legend(depths_of(policy), loaded.backbone.spec.layers))
    _Conversation(out, loaded, policy, sampling, max_new_tokens, system).hold()


class _Conversation:
    """What has been said, and what may be said to it."""

    def __init__(
        self, out: Console, model: Model, policy: Policy, sampling: Sampling, max_new_tokens: int, system: str | None
    ) -> None:
        self._out, self._model, self._policy = out, model, policy
        self._sampling, self._max_new_tokens = sampling, max_new_tokens
        self._start = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._start)
        self._last = "no answer yet"

    def hold(self) -> None:
        """Until the user ends it."""
        while (said := _ask(self._out)) is not None:
            if said == "/reset":
                self._messages = list(self._start)
            elif said == "/depth":
                self._out.print(self._last, markup=False, soft_wrap=True)
            elif said.startswith("/"):
                self._out.print(f"unknown command {said}. {HELP}", markup=False, soft_wrap=True)
            elif said:
                self._answer(said)

    def _answer(self, said: str) -> None:
        """One turn; a refused one leaves no trace."""
        from adi.cli.run import drift_line
        from adi.decoding.policies import depths_of
        from adi.decoding.session import Session

        messages = [*self._messages, {"role": "user", "content": said}]
        sampling = self._sampling.of_prompt(len(messages))
        try:
            session = Session(self._model, messages, self._policy, max_new_tokens=self._max_new_tokens, sampling=sampling)
        except ValueError as error:
            self._out.print(f"{error} Say /reset to start over.", style="red", markup=False)
            return
        self._messages = messages  # said, even where the answer is interrupted or fails
        generation = _answered(self._out, session, depths_of(self._policy))
        self._messages.append({"role": "assistant", "content": generation.text})
        drift = "" if generation.drift is None else "\n" + drift_line(generation.drift)
        self._last = f"{generation.summary()}{drift}"


def _answered(out: Console, session: Session, depths: Sequence[int]) -> Generation:
    """The answer, painted as it comes; an interruption keeps what has come."""
    from adi.cli.paint import Painter

    steps: list[Step] = []
    with contextlib.suppress(KeyboardInterrupt):
        for step in Painter(out, depths).follow(session):
            steps.append(step)  # one by one
    return session.generation(steps)


def _ask(out: Console) -> str | None:
    """The next line of the conversation, or None at its end."""
    try:
        said = input("> " if out.is_terminal else "").strip()
    except (EOFError, KeyboardInterrupt):
        out.print()
        return None
    return None if said == "/bye" else said
