"""Who runs in a benchmark: what all contestants share, and adi's own modes.

Peers stand in ``measure/peers``; a contestant's process in ``measure/process``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from adi.artifact import Exits, bare_exits, load_exits
from adi.decoding.policies import FullDepth, Lookup, Policy, Reflex, Static, Verified
from adi.errors import AdiError
from adi.measure.bench.sweep import Sweep, sweep
from adi.measure.bench.timing import Outcome, Task, Together, timed, timed_together
from adi.model.load import BACKENDS, Model, load

MODES = ("full", "verified", "reflex", "lookup", "static")
LOOKING = ("verified", "reflex", "static")  # the modes that ask exits
BARE_SHARE = 0.75  # where the model's own head is asked when there are no trained exits


@dataclass(frozen=True)
class Setting:
    """What all contestants share.

    ``exits`` names trained exits, None the model's own head; ``risk`` or ``threshold`` is for reflex; ``backend`` is of adi's
    modes; ``static`` is the depth and draft length of static mode; ``context`` the longest sequence that will come.
    """

    model: str
    exits: str | None
    threshold: float | None
    threads: int
    seed: int
    backend: str = "auto"
    static: tuple[int, int] | None = None
    context: int = 2048
    risk: float | None = None


@dataclass(frozen=True)
class Runner:
    """A loaded contestant. ``details`` go into its entry of the result; adi's modes also encode, know what ends,
    sweep, and run batches."""

    run: Callable[[Task], Outcome]
    details: Mapping[str, Any]
    encode: Callable[[str], tuple[int, ...]] | None = None
    ends: frozenset[int] = field(default=frozenset())
    sweep: Callable[[Sequence[tuple[int, ...]], int], Sweep] | None = None
    batch: Callable[[Sequence[Task]], Together] | None = None


def adi_runner(mode: str, precision: str, setting: Setting) -> Runner:
    """adi in one of its modes. Static mode without ``setting.static`` can only sweep for it."""
    model = adi_model(precision, setting)
    exits = _exits(model, mode, setting) if mode in LOOKING else None
    policy = None if mode == "static" and setting.static is None else _policy(mode, exits, setting)
    if mode not in ("full", "reflex"):
        model.backbone.prepare((), drafts=True, wait=True)
    spec = model.backbone.spec
    raw = model.tokenizer is not None and not model.tokenizer.has_chat_template
    bare = replace(model, tokenizer=None)  # tokens in, tokens out, as for everybody

    def run(task: Task) -> Outcome:
        assert policy is not None, "static mode needs a depth and a draft length"
        return timed(bare, policy, task.token_ids, task.max_new_tokens)

    return Runner(
        run,
        {"about": f"adi, {spec.backend} engine, {spec.precision}", "backend": spec.backend, "spec": asdict(spec)}
        | ({"static": list(setting.static)} if mode == "static" and setting.static is not None else {}),
        lambda prompt: model.encode(prompt, raw=raw),
        model.eos_ids,
        None if exits is None else lambda prompts, most: sweep(bare, exits, prompts, most),
        None if policy is None else lambda tasks: timed_together(bare, policy, tasks),
    )


def backend_for(backend: str, precision: str) -> str:
    """The engine for a precision: where "auto" is asked for one that only openvino has, openvino."""
    return "openvino" if backend == "auto" and precision not in ("auto", *BACKENDS["hf"]) else backend


def adi_model(precision: str, setting: Setting) -> Model:
    """The model in this precision, on the engine that has it."""
    backend = backend_for(setting.backend, precision)
    return load(setting.model, backend=backend, precision=precision, threads=setting.threads)


def _exits(model: Model, mode: str, setting: Setting) -> Exits | None:
    """Those that were given, else none in verified mode (memory alone drafts), and a bare one for the others."""
    if setting.exits:
        return load_exits(setting.exits)
    if mode == "verified":
        return None
    spec = model.backbone.spec
    wanted = setting.static[0] if setting.static else BARE_SHARE * spec.layers
    return bare_exits(model, (min((d for d in spec.stops if d < spec.layers), key=lambda d: abs(d - wanted)),))


def _policy(mode: str, exits: Exits | None, setting: Setting) -> Policy:
    if mode == "full":
        return FullDepth()
    if mode == "lookup":
        return Lookup()
    if mode == "verified":
        return Verified(exits)
    if exits is None:
        raise AdiError(f"mode {mode!r} is not known; choose among {', '.join(MODES)}.")
    if mode == "static":
        assert setting.static is not None
        return Static(exits, *setting.static)
    return Reflex(exits, thresholds=setting.threshold, risk=setting.risk)
