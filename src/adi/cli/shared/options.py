"""Options that several commands share, in groups, and the values that they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from adi.cli.shared.output import err
from adi.decoding.sampling import Sampling
from adi.errors import AdiError, ModelError, UsageError
from adi.progress import Reporter

if TYPE_CHECKING:
    from adi.artifact import Exits
    from adi.decoding.policies import Policy
    from adi.drafters.history import History
    from adi.exits.triggers import Trigger
    from adi.model.load import Model
    from adi.prompts import PromptItem

MODEL_HELP = "smollm2-135m, a Hugging Face hub id, a folder, or a .gguf file; products, a looped model."
DEMO_PROMPT = "Why is the sky blue?"


def option(*names: str, help: str, panel: str | None = None, rare: bool = False, **more: Any) -> Any:
    """A typer option; a ``rare`` one is shown by ``--help-all`` only."""
    return typer.Option(*names, help=help, rich_help_panel=panel, hidden=rare, **more)


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
ModelOption = Annotated[str, option("--model", "-m", metavar="MODEL", help=MODEL_HELP, panel="Model")]
ExitsOption = Annotated[
    str | None,
    option(
        "--exits",
        "-e",
        metavar="DIR",
        help="Folder of trained exits and drafter; 'bare' or 'bare:8,16' for the model's own head at those depths. By default "
        "those shipped for the model; of a looped model its own head and gate after each turn.",
        panel="Decoding",
    ),
]
BackendOption = Annotated[str, option("--backend", help="auto (openvino on a CPU, where it can), hf, openvino.", panel="Model")]
RayOption = Annotated[
    str | None,
    option(
        "--ray", metavar="ADDRESS", help="Generate text on this Ray cluster; auto: the one here, local: a new one.", rare=True
    ),
]
KVPrecisionOption = Annotated[
    str, option("--kv-precision", help="int8: keys and values in 8 bits, of openvino.", panel="Model", rare=True)
]
DeviceOption = Annotated[str, option("--device", help="auto, cpu, cuda, ...", panel="Model")]
RiskKindOption = Annotated[
    Literal["disagreement", "log_loss"],
    option("--kind", help="Which risk: a share of tokens, or nats.", panel="Reflex mode", rare=True),
]
TokensOption = Annotated[
    int, option("--max-new-tokens", "-n", min=0, help="Most tokens to generate; 0: as many as the context holds.")
]
AnswerTokensOption = Annotated[int, option("--max-new-tokens", "-n", min=1, help="Length of the answers.")]
LimitOption = Annotated[int, option("--limit", min=1, help="Use so many prompts, spread evenly over the file.")]
PromptsOption = Annotated[str, option("--prompts", help="A JSONL prompt file, or a set by name: bench, train, workloads.")]
JsonOption = Annotated[bool, option("--json", help="Print one JSON document instead.")]
JsonFileOption = Annotated[Path | None, option("--json", metavar="FILE", help="Write the result here.")]


@dataclass(frozen=True)
class EngineOptions:
    """Which engine runs the model."""

    backend: BackendOption = "auto"
    precision: Annotated[
        str,
        option(
            "--precision",
            help="auto (int8 on openvino), fp32, int8, int4, int8-bf16, int4-bf16; of hf fp32, bf16, fp16.",
            panel="Model",
        ),
    ] = "auto"
    device: DeviceOption = "auto"
    memory: Annotated[
        int | None,
        option(
            "--memory", metavar="MB", help="What copies of the weights may take for speed; 0: none.", panel="Model", rare=True
        ),
    ] = None
    kv_precision: KVPrecisionOption = "auto"

    def load(self, model: str, stops: Sequence[int] = ()) -> Model:
        """The model; what takes long is reported on standard error. Ready at once to stop at ``stops``."""
        from adi.model.load import load

        with Reporter(err(), f"Loading {model}") as progress:
            settings: dict[str, Any] = {
                "backend": self.backend,
                "precision": self.precision,
                "device": self.device,
                "memory": self.memory,
                "kv_precision": self.kv_precision,
            }
            return load(model, **settings, stops=stops, notice=lambda text: progress(0, 0, text))


@dataclass(frozen=True)
class TextOptions:
    """How a prompt is read and where its text ends."""

    stop: Annotated[list[str] | None, option("--stop", help="Text that ends the output; may be repeated.")] = None
    stop_token_ids: Annotated[
        str | None, option("--stop-token-ids", metavar="IDS", help="Tokens that end the output, such as 2,504.", rare=True)
    ] = None
    raw: Annotated[bool, option("--raw", help="Give the prompt to the model as it is, without a chat template.")] = False
    special_tokens: Annotated[
        bool,
        option("--special-tokens", help="Read special tokens spelled in the prompt, such as <|im_end|>, as tokens.", rare=True),
    ] = False
    keep_special_tokens: Annotated[
        bool, option("--keep-special-tokens", help="Spell special tokens in the text, such as [TOOL_CALLS].", rare=True)
    ] = False
    ignore_eos: Annotated[bool, option("--ignore-eos", help="Generate on past the end of the answer.", rare=True)] = False
    response_format: Annotated[
        str | None,
        option(
            "--response-format", metavar="JSON", help="json_object, or OpenAI's response_format as JSON or a file.", rare=True
        ),
    ] = None
    grammar: Annotated[
        Path | None,
        option("--grammar", metavar="FILE", help="A grammar of the text, in llguidance's Lark.", rare=True),
    ] = None

    def settings(self) -> dict[str, Any]:
        """As ``generate`` takes them."""
        if "" in (self.stop or ()):
            raise UsageError("--stop is ''; give a text of at least one character.")
        ends: dict[str, Any] = {"stop": tuple(self.stop or ()), "stop_at_eos": not self.ignore_eos}
        if self.stop_token_ids is not None:
            ends["stop_token_ids"] = whole_numbers("--stop-token-ids", self.stop_token_ids)
        ends["skip_special_tokens"] = not self.keep_special_tokens
        if self.response_format is not None:
            ends["response_format"] = read_object("--response-format", self.response_format)
        if self.grammar is not None:
            from adi.files import read_text

            ends["grammar"] = read_text(self.grammar, "grammar")
        return {**ends, "raw": self.raw, "special_tokens": self.special_tokens}


_sampling = partial(option, panel="Sampling")
_penalty = partial(option, panel="Penalties", rare=True)


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn."""

    temperature: Annotated[float, _sampling("--temperature", "-t", help="0 is greedy; 1 samples the model's distribution.")] = (
        0.0
    )
    top_k: Annotated[int | None, _sampling("--top-k", help="Sample among so many likeliest tokens.")] = None
    top_p: Annotated[float, _sampling("--top-p", help="Sample among the likeliest tokens of this total probability.")] = 1.0
    min_p: Annotated[
        float, _sampling("--min-p", help="Sample among tokens with this share of the likeliest one's probability.", rare=True)
    ] = 0.0
    repetition_penalty: Annotated[
        float | None,
        _sampling("--repetition-penalty", help="Above 1: tokens of the text so far become less likely.", rare=True),
    ] = None
    seed: Annotated[int | None, _sampling("--seed", help="The same seed samples the same text.")] = None
    frequency_penalty: Annotated[
        float, _penalty("--frequency-penalty", help="Subtracted from a token's logit for each time it was generated.")
    ] = 0.0
    presence_penalty: Annotated[
        float, _penalty("--presence-penalty", help="Subtracted from a token's logit once it was generated.")
    ] = 0.0
    no_repeat_ngram_size: Annotated[
        int | None, _penalty("--no-repeat-ngram-size", help="No n-gram of so many tokens stands twice in the text.")
    ] = None
    min_new_tokens: Annotated[int | None, _penalty("--min-new-tokens", help="No end of the answer before so many tokens.")] = (
        None
    )
    bad_words: Annotated[list[str] | None, _penalty("--bad-word", help="Never write this; may be repeated.")] = None
    logit_bias: Annotated[
        str | None, _penalty("--logit-bias", metavar="ID=BIAS,...", help="Added to tokens' logits, such as 504=-100,7=2.5.")
    ] = None

    def sampling(self) -> Sampling:
        given = {**vars(self), "bad_words": tuple(self.bad_words or ()), "logit_bias": biases(self.logit_bias)}
        return Sampling(**given)


_decoding = partial(option, panel="Decoding")
_reflex = partial(option, panel="Reflex mode")


@dataclass(frozen=True)
class DecodingOptions:
    """Which policy decodes."""

    mode: Annotated[
        Literal["verified", "reflex", "full", "lookup"],
        _decoding(
            "--mode",
            help="Drafts verified at full depth; early exits without verification; every block for every token; prompt lookup.",
        ),
    ] = "verified"
    exits: ExitsOption = None
    draft_tokens: Annotated[
        int | None, _decoding("--draft-tokens", min=1, help="Most tokens drafted per round (6; in lookup mode 10).")
    ] = None
    history: Annotated[
        Path | None,
        _decoding(
            "--history", metavar="FILE", help="Remember outputs here and draft from them (off by default: private text)."
        ),
    ] = None
    trigger: Annotated[
        str | None,
        _decoding("--trigger", metavar="JSON", help="Replace the exits' trigger: JSON or a file that holds it.", rare=True),
    ] = None
    threshold: Annotated[float | None, _decoding("--threshold", help="Replace the trigger's threshold at every depth.")] = None
    risk: Annotated[float | None, _reflex("--risk", help="A level certified by adi calibrate, such as 0.02 of the tokens.")] = (
        None
    )
    kind: RiskKindOption = "disagreement"
    spot_check: Annotated[
        float, _reflex("--spot-check", help="With --risk: check this share of tokens at full depth.", rare=True)
    ] = 0.0
    skipped: Annotated[
        Literal["exact", "propagate"],
        _reflex("--skipped", help="KV cache of skipped blocks: computed later, or propagated (hf only).", rare=True),
    ] = "exact"

    @property
    def by_rule(self) -> bool:
        """Whether a rule was given in the place of the controller."""
        return (self.threshold, self.trigger, self.draft_tokens) != (None, None, None)

    def load(self, engine: EngineOptions, model: str) -> tuple[Model, Policy]:
        """The model, ready to stop where the policy is likely to, and the policy."""
        exits = self._judged(model)
        loaded = engine.load(model, likely_stops(model, self.mode, self.exits, not self.by_rule))
        return loaded, self.policy(loaded, exits)

    def _judged(self, model: str) -> Exits | str | None:
        """What of it needs no model: AdiError for what has no meaning, and the exits where they are read from a folder."""
        from adi.artifact import Exits, shipped
        from adi.files import require_writable
        from adi.risk.certificate import find

        self._check()
        require_writable(self.history)
        if self.trigger is not None:
            read_trigger(self.trigger)
        theirs = model if (self.by_rule or self.mode == "reflex") and model in shipped() else None
        exits = judged_exits(self.exits if self.exits is not None else theirs)
        if isinstance(exits, Exits):
            self._by_exits(exits, None)
        elif exits is not None and self.risk is not None:
            find((), self.kind, self.risk, self.skipped)  # nothing is certified for bare exits
        return exits

    def policy(self, model: Model, exits: Exits | str | None) -> Policy:
        """The policy; ``exits`` as ``exits_for`` takes them."""
        from adi.decoding.policies import FullDepth, Lookup, default_policy

        if self.mode == "full":
            return FullDepth()
        if self.mode == "lookup":
            return Lookup() if self.draft_tokens is None else Lookup(self.draft_tokens)
        history = opened_history(model, self.history)
        if self.mode == "verified" and self.exits is None and not self.by_rule:
            return replace(default_policy(model), history=history)
        return self._by_exits(exits_for(model, exits), history)

    def _by_exits(self, exits: Exits, history: History | None) -> Policy:
        """The policy with these exits; AdiError for options that do not fit them."""
        from adi.decoding.policies import Reflex, Verified
        from adi.exits.triggers import with_thresholds

        rule = read_trigger(self.trigger) if self.trigger is not None else None
        if self.mode == "verified":
            if self.threshold is not None:
                rule = with_thresholds(exits.trigger, self.threshold)
            return Verified(exits, trigger=rule, draft_tokens=self.draft_tokens, history=history)
        reflex: dict[str, Any] = {"kind": self.kind, "spot_check": self.spot_check, "skipped": self.skipped}
        return Reflex(exits, thresholds=self.threshold, trigger=rule, risk=self.risk, **reflex)

    def _check(self) -> None:
        """UsageError for options that mean nothing in this mode, or contradict each other."""
        if self.threshold is not None and self.trigger is not None:
            raise UsageError(
                f"--threshold {self.threshold:g} and --trigger {self.trigger:.40} say different things; give one of them, "
                "not both."
            )
        of_mode = {
            "full": (),
            "lookup": ("draft_tokens",),
            "verified": ("exits", "draft_tokens", "history", "trigger", "threshold"),
            "reflex": ("exits", "trigger", "threshold", "risk", "kind", "spot_check", "skipped"),
        }
        default = DecodingOptions(self.mode)
        changed = [name for name in vars(default) if getattr(self, name) != getattr(default, name)]
        if wrong := [f"--{name.replace('_', '-')}" for name in changed if name not in of_mode[self.mode]]:
            raise UsageError(f"{', '.join(wrong)} means nothing in {self.mode} mode; leave it out or choose another --mode.")
        rules = sum(value is not None for value in (self.trigger, self.threshold, self.risk))
        if self.mode == "reflex" and rules != 1:
            raise UsageError(
                f"reflex mode does not verify, so it needs a rule for when to exit, and got {rules}: --risk R, a level "
                "that adi calibrate "
                "certified for these exits; or, uncalibrated, --threshold X (for the shipped exits an entropy in nats such as "
                "0.3) or --trigger JSON. Give one of them."
            )


def likely_stops(model: str, mode: str, exits: str | None, by_controller: bool = True) -> tuple[int, ...]:
    """Where the trigger saved with the exits stops, read without torch: a hint, so anything unclear is no stop.

    Nowhere, where the controller decides (``by_controller``: no rule was given).
    """
    from adi.files import expanded, package_data, read_json

    if mode not in ("verified", "reflex") or (mode == "verified" and by_controller):
        return ()
    try:
        folder = package_data("exits") / (model if exits is None else exits)
        folder = expanded(exits) if exits is not None and not folder.is_dir() else folder
        written = read_json(folder / "exits.json", "exits file")
        at = written["trigger"]["at"]
        return tuple(sorted(int(depth) for depth in at))
    except (AdiError, OSError, ValueError, KeyError, TypeError, OverflowError):  # what a foreign file may hold
        return ()


def judged_exits(given: str | None) -> Exits | str | None:
    """The exits of a folder, which need no model to be read; AdiError for none, and for depths of bare ones that are none."""
    from adi.artifact import load_exits

    name, _, depths = (given or "").partition(":")
    if name == "bare" and depths:
        whole_numbers("depths", depths)
    return given if given is None or name == "bare" else load_exits(given)


def exits_for(model: Model, given: Exits | str | None) -> Exits:
    """The exits as ``judged_exits`` gives them, those shipped for the model by default; ModelError says how to get some."""
    from adi.artifact import Exits, bare_exits, shipped_for
    from adi.model.load import LOOPED

    if isinstance(given, Exits):
        exits = given
    elif given is not None:
        depths = given.partition(":")[2]
        exits = bare_exits(model, whole_numbers("depths", depths) if depths else None)
    elif (found := shipped_for(model.backbone.spec.fingerprint)) is not None:
        exits = found
    elif model.backbone.spec.family == LOOPED:
        exits = bare_exits(model)  # each turn was trained to answer
    else:
        raise ModelError(
            f"no exits are shipped for {model.source!r}. Train some with 'adi tune {model.source} --out DIR' and give "
            "--exits DIR, or try the model's own head with --exits bare, or run --mode full."
        )
    exits.check(model.backbone)
    return exits


def opened_history(model: Model, path: Path | None) -> History | None:
    """The history in a file, made where there is none; AdiError for one of another tokenizer."""
    if path is None:
        return None
    from adi.drafters.history import History
    from adi.model.tokenizer import tokenizer_fingerprint

    if model.tokenizer is None:
        raise ModelError(
            f"--history {path} needs a tokenizer, whose texts it remembers, and {model.source!r} has none; leave it out."
        )
    vocabulary = model.backbone.spec.vocabulary
    return History.open(path, fingerprint=tokenizer_fingerprint(model.tokenizer), vocabulary=vocabulary)


def read_trigger(text: str) -> Trigger:
    """A trigger from JSON text or from a file that holds it."""
    from adi.exits.triggers import trigger_from_json

    return trigger_from_json(read_object("--trigger", text))


def read_object(name: str, text: str) -> Any:
    """The JSON object that an option gives, as text or as a file that holds it; "json_object" is a ``type`` by itself."""
    from adi.files import expanded, parse_json, read_json

    if text == "json_object":
        return {"type": text}
    try:
        return parse_json(text) if text.lstrip().startswith("{") else read_json(expanded(text), name.lstrip("-"))
    except ValueError as error:
        raise UsageError(f"{name} is neither JSON text nor a file of it: {str(error).rstrip('.')}.") from None


def biases(text: str | None) -> dict[int, float] | None:
    """Biases by token id from "504=-100,7=2.5"."""
    try:
        return {int(token): float(bias) for token, bias in (part.split("=") for part in text.split(","))} if text else None
    except ValueError:
        raise UsageError(f"--logit-bias is token ids with numbers, such as 504=-100,7=2.5, not {text!r}.") from None


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """Numbers from "8,16,24"."""
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise UsageError(f"{name} are whole numbers with commas, such as 8,16,24, not {text!r}.") from None


def numbers(name: str, text: str) -> tuple[float, ...]:
    """Numbers from "0.01,0.1"."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise UsageError(f"{name} are numbers with commas, such as 0.01,0.1, not {text!r}.") from None


def listed(text: str) -> list[str]:
    """The parts of "a,b"."""
    return [part.strip() for part in text.split(",") if part.strip()]


def chosen_among(known: Sequence[str], name: str, text: str) -> list[str]:
    """The parts of a list with commas that option ``name`` takes; UsageError for none or an unknown one."""
    if not (given := listed(text)):
        raise UsageError(f"{name} is empty; choose among {', '.join(known)}.")
    if unknown := [part for part in given if part not in known]:
        raise UsageError(f"{name} {unknown[0]!r} is not known; choose among {', '.join(known)}.")
    return given


def chosen_prompts(source: str, limit: int | None) -> list[PromptItem]:
    """``limit`` prompts (all for None), evenly over the file, so that every category is there."""
    from adi.prompts import read_prompts, spread

    items = read_prompts(source)
    return items if limit is None else spread(items, limit)
