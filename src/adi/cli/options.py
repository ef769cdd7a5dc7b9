"""Options that several commands share, and how they become values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from adi.errors import AdiError

if TYPE_CHECKING:
    from adi.artifact import Exits
    from adi.decoding.policies import Policy
    from adi.drafters.history import History
    from adi.exits.triggers import Trigger
    from adi.model.load import Model

MODEL_HELP = "smollm2-135m, a Hugging Face hub id, a folder, or a .gguf file."
MODES = ("verified", "reflex", "full", "lookup")
DEMO_PROMPT = "Why is the sky blue?"

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
ModelOption = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help=MODEL_HELP)]
ExitsOption = Annotated[
    str | None,
    typer.Option(
        "--exits",
        "-e",
        metavar="DIR",
        help="Folder of trained exits; 'bare' or 'bare:8,16' for the model's own final head at those depths. "
        "By default those shipped for the model.",
    ),
]
BackendOption = Annotated[str, typer.Option("--backend", help="auto (openvino on a CPU, where it can), hf, or openvino.")]
PrecisionOption = Annotated[
    str,
    typer.Option("--precision", help="auto (int8 on openvino), fp32, int8, int4; of hf fp32, bf16, fp16."),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, ...")]
ModeOption = Annotated[str, typer.Option("--mode", help=f"{', '.join(MODES)}.")]
ThresholdOption = Annotated[
    float | None,
    typer.Option("--threshold", help="Replace the trigger's threshold at every depth (needed, or --trigger, in reflex mode)."),
]
TriggerOption = Annotated[
    str | None, typer.Option("--trigger", metavar="JSON", help="Replace the trigger: JSON text or a file holding it.")
]
DraftOption = Annotated[
    int | None, typer.Option("--draft-tokens", help="Most tokens drafted before they are verified (6; in lookup mode 10).")
]
RiskOption = Annotated[
    float | None,
    typer.Option("--risk", help="In reflex mode: a level that adi calibrate certified, such as 0.02 of the tokens."),
]
RiskKindOption = Annotated[str, typer.Option("--kind", help="Which risk: disagreement (share of tokens), log_loss (nats).")]
SpotOption = Annotated[
    float, typer.Option("--spot-check", help="In reflex mode, with --risk: check this share of tokens at full depth.")
]
SkippedOption = Annotated[
    str,
    typer.Option("--skipped", help="In reflex mode, keys and values of skipped blocks: exact (later), propagate (hf only)."),
]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Generate at most so many tokens.")]
RawOption = Annotated[bool, typer.Option("--raw", help="Give the text to the model as it is, without a chat template.")]
SpecialOption = Annotated[
    bool, typer.Option("--special-tokens", help="Read special tokens that the prompt spells, such as <|im_end|>, as such.")
]
IgnoreEosOption = Annotated[bool, typer.Option("--ignore-eos", help="Generate on past the end of the answer.")]
HabitsOption = Annotated[
    Path | None,
    typer.Option(
        "--habits", metavar="FILE", help="Remember outputs here, and draft from them (off by default: it is private text)."
    ),
]
TemperatureOption = Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy; 1 draws as the model believes.")]
TopKOption = Annotated[int | None, typer.Option("--top-k", help="Draw among so many likeliest tokens.")]
TopPOption = Annotated[float, typer.Option("--top-p", help="Draw among the likeliest tokens that have this much together.")]
MinPOption = Annotated[float, typer.Option("--min-p", help="Draw among tokens with this share of the likeliest's chance.")]
PenaltyOption = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1: tokens that stood in the text before become less likely.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Draw the same again; by default another one every time.")]
StopOption = Annotated[list[str] | None, typer.Option("--stop", help="Text that ends the output; may be repeated.")]


@dataclass(frozen=True)
class ReflexOptions:
    """What only reflex mode knows, under the names that ``Reflex`` has for it."""

    risk: float | None = None
    kind: str = "disagreement"
    spot_check: float = 0.0
    skipped: str = "exact"


@dataclass(frozen=True)
class Source:
    """Which model to load, and how."""

    model: str
    backend: str = "auto"
    precision: str = "auto"
    device: str = "auto"

    def load(self, console: Console, stops: Sequence[int] = ()) -> Model:
        """The model, with what takes long told on ``console``; ready at once to stop at ``stops``."""
        from adi.model.load import load

        with console.status(f"Loading {escape(self.model)}") as status:

            def notice(text: str) -> None:
                if console.is_terminal:
                    status.update(escape(text))
                else:
                    console.print(text, markup=False, highlight=False, soft_wrap=True)

            settings: dict[str, Any] = {"backend": self.backend, "precision": self.precision, "device": self.device}
            return load(self.model, **settings, stops=stops, notice=notice)


def likely_stops(model: str, mode: str, exits: str | None, by_controller: bool = True) -> tuple[int, ...]:
    """Where the trigger saved with the exits will look, read without torch: a hint, so anything unclear is no stop.

    Nowhere, where the controller decides (``by_controller``: no rule was given) and the exits have a drafter.
    """
    from adi.files import expanded, package_data, read_json

    shipped = package_data("exits")
    if mode not in ("verified", "reflex"):
        return ()
    try:
        folder = expanded(exits) if exits is not None else shipped / model
        folder = shipped / exits if exits is not None and not folder.is_dir() else folder
        written = read_json(folder / "exits.json", "exits file")
        if mode == "verified" and by_controller and "drafter" in written["report"]:
            return ()
        at = written["trigger"]["at"]
        return tuple(sorted(int(depth) for depth in at))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return ()


def exits_for(model: Model, given: str | None) -> Exits:
    """The exits named on the command line, else those shipped for the model; ValueError says how to get some."""
    from adi.artifact import bare_exits, load_exits, shipped

    if given == "bare" or (given or "").startswith("bare:"):
        layers = model.backbone.spec.layers
        spread = {min(max(1, round(layers * share)), layers - 1) for share in (0.5, 0.75, 0.9)}
        depths = _depths(given[5:]) if given is not None and given != "bare" else tuple(sorted(spread))
        exits = bare_exits(model, depths)
    elif given is not None:
        exits = load_exits(given)
    elif model.source in shipped():
        exits = load_exits(model.source)
    else:
        raise AdiError(
            f"no exits are shipped for {model.source!r}. Train some with 'adi tune {model.source} --out DIR' and give "
            "--exits DIR, or try the model's own head with --exits bare, or run --mode full."
        )
    exits.check(model.backbone)
    return exits


def policy_for(
    model: Model,
    mode: str,
    exits: str | None,
    threshold: float | None,
    trigger: str | None,
    draft_tokens: int | None,
    habits: Path | None = None,
    reflex: ReflexOptions | None = None,
) -> Policy:
    """The policy that the options describe; ValueError for a combination that cannot be meant.

    Verified mode without exits of this model's own drafts from memory alone.
    """
    from adi.decoding.policies import FullDepth, Lookup, Reflex, Verified
    from adi.exits.triggers import with_thresholds

    if mode not in MODES:
        raise AdiError(f"mode {mode!r} is not known; choose one of {', '.join(MODES)}.")
    if threshold is not None and trigger is not None:
        raise AdiError("give --threshold or --trigger, not both.")
    watched = reflex or ReflexOptions()
    given = {
        "--exits": exits,
        "--threshold": threshold,
        "--trigger": trigger,
        "--draft-tokens": draft_tokens,
        "--habits": habits,
        "--risk": watched.risk,
        "--spot-check": watched.spot_check or None,
        "--skipped": None if watched.skipped == "exact" else watched.skipped,
    }
    _require_meaning(mode, given)
    if mode == "full":
        return FullDepth()
    if mode == "lookup":
        return Lookup() if draft_tokens is None else Lookup(draft_tokens)
    known = opened_habits(model, habits)
    if mode == "verified" and exits is None and not _shipped_for(model) and (threshold, trigger, draft_tokens) == (None,) * 3:
        return Verified(habits=known)
    chosen = exits_for(model, exits)
    rule = read_trigger(trigger) if trigger is not None else None
    if mode == "verified":
        if threshold is not None:
            rule = with_thresholds(chosen.trigger, threshold)
        return Verified(chosen, trigger=rule, draft_tokens=draft_tokens, habits=known)
    if sum(value is not None for value in (rule, threshold, watched.risk)) != 1:
        raise AdiError(
            "reflex mode lets drafts stand, so it needs to be told how surely: --risk R, a level that adi calibrate certified "
            "for these exits; or, uncalibrated, --threshold X (for the shipped exits an entropy in nats such as 0.3) or "
            "--trigger JSON. Give one of them."
        )
    return Reflex(chosen, thresholds=threshold, trigger=rule, **asdict(watched))


def _require_meaning(mode: str, given: Mapping[str, object]) -> None:
    """ValueError for options that mean nothing in this mode."""
    unused: dict[str, tuple[str, ...]] = {
        "full": tuple(given),
        "lookup": ("--exits", "--threshold", "--trigger", "--habits", "--risk", "--spot-check", "--skipped"),
        "reflex": ("--draft-tokens", "--habits"),
        "verified": ("--risk", "--spot-check", "--skipped"),
    }
    if wrong := [name for name in unused[mode] if given[name] is not None]:
        raise AdiError(f"{', '.join(wrong)} means nothing in {mode} mode; leave it out or choose another --mode.")


def require_folder(out: Path) -> None:
    """ValueError where --out is a file."""
    if out.exists() and not out.is_dir():
        raise AdiError(f"--out {out} is a file; give a folder.")


def _shipped_for(model: Model) -> bool:
    from adi.artifact import shipped

    return model.source in shipped()


def opened_habits(model: Model, path: Path | None) -> History | None:
    """The habits in a file, made where there is none; ValueError for those of another tokenizer."""
    if path is None:
        return None
    from adi.drafters.history import History
    from adi.model.tokenizer import tokenizer_fingerprint

    if model.tokenizer is None:
        raise AdiError("--habits needs a model with a tokenizer, whose texts it remembers.")
    vocabulary = model.backbone.spec.vocabulary
    return History.open(path, fingerprint=tokenizer_fingerprint(model.tokenizer), vocabulary=vocabulary)


def read_trigger(text: str) -> Trigger:
    """A trigger from JSON text or from a file that holds it."""
    from adi.exits.triggers import trigger_from_json
    from adi.files import expanded, parse_json, read_text

    source = text
    if not text.lstrip().startswith("{"):
        try:
            source = read_text(expanded(text), "trigger")
        except ValueError as error:
            raise AdiError(f"{error} Give JSON text or a file.") from None
    try:
        value: Any = parse_json(source)
    except ValueError as error:
        raise AdiError(f"the trigger is not JSON: {error}.") from None
    return trigger_from_json(value)


def parse_depths(text: str | None) -> tuple[int, ...] | None:
    """Depths from "8,16,24"; None stays None."""
    return None if text is None else _depths(text)


def _depths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise AdiError(f"depths are whole numbers with commas, such as 8,16,24, not {text!r}.") from None
