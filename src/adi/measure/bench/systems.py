"""adi's own modes as systems of a benchmark, and the sweep for the best static choice."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import product
from statistics import median

from adi.artifact import Exits, bare_exits, load_exits
from adi.decoding.generate import generate_batch
from adi.decoding.policies import FullDepth, Lookup, Policy, Reflex, Static, Verified
from adi.decoding.session import Session
from adi.decoding.teacher_forcing import encoded
from adi.errors import UsageError
from adi.measure.bench.outcomes import BatchOutcome, Ids, Outcome, Runner, Setting, Sweep, SweepPoint, Task, accepted_share
from adi.model.load import BACKENDS, Model, default_tokenizer, load

BARE_SHARE = 0.75  # where the model's own head drafts when there are no trained exits
DRAFT_LENGTHS = (1, 2, 4, 6)
WARM_UP_TOKENS = 4


def adi_runner(mode: str, precision: str, setting: Setting) -> Runner:
    """adi in one of its modes. Static mode without ``setting.static`` can only sweep for it."""
    if mode not in MODES:
        raise UsageError(f"mode {mode!r} is not known; choose among {', '.join(MODES)}.")
    model = adi_model(precision, setting)
    policy = POLICIES[mode](model, setting)
    model.backbone.prepare((), drafts=mode not in ("full", "reflex"), wait=True)
    spec = model.backbone.spec
    bare = replace(model.plain(), tokenizer=None)  # tokens in, tokens out, as for everybody

    def run(task: Task) -> Outcome:
        assert policy is not None, "static mode needs a depth and a draft length"
        return timed(bare, policy, task.token_ids, task.max_new_tokens)

    return Runner(
        run,
        {"about": f"adi, {spec.backend} engine, {spec.numbers}", "backend": spec.backend, "spec": asdict(spec)}
        | ({"static": list(setting.static)} if mode == "static" and setting.static is not None else {}),
        lambda prompt: encoded(model, [prompt])[0],
        model.eos_ids,
        (lambda prompts, most: sweep(bare, _exits(model, setting), prompts, most)) if mode == "static" else None,
        None if policy is None else lambda tasks: timed_batch(bare, policy, tasks),
    )


def backend_for(backend: str, precision: str) -> str:
    """The engine for a precision: where "auto" is asked for one that only openvino has, openvino."""
    return "openvino" if backend == "auto" and precision not in ("auto", *BACKENDS["hf"]) else backend


def adi_model(precision: str, setting: Setting) -> Model:
    """The model in this precision, on the engine that has it; one without a tokenizer gets the default model's."""
    backend = backend_for(setting.backend, precision)
    kept = setting.kv_precision
    model = load(setting.model, backend=backend, precision=precision, threads=setting.threads, kv_precision=kept)
    return model if model.tokenizer is not None else replace(model, tokenizer=default_tokenizer())


def _exits(model: Model, setting: Setting) -> Exits:
    """Those that were given, else a bare one."""
    if setting.exits:
        return load_exits(setting.exits)
    spec = model.backbone.spec
    wanted = setting.static[0] if setting.static else BARE_SHARE * spec.layers
    return bare_exits(model, (min((d for d in spec.stops if d < spec.layers), key=lambda d: abs(d - wanted)),))


POLICIES: dict[str, Callable[[Model, Setting], Policy | None]] = {
    "full": lambda model, setting: FullDepth(),
    "verified": lambda model, setting: Verified(load_exits(setting.exits) if setting.exits else None),  # None: n-grams alone
    "reflex": lambda model, setting: Reflex(_exits(model, setting), thresholds=setting.threshold, risk=setting.risk),
    "lookup": lambda model, setting: Lookup(),
    "static": lambda model, setting: None if setting.static is None else Static(_exits(model, setting), *setting.static),
}
MODES = tuple(POLICIES)


def timed(model: Model, policy: Policy, token_ids: Ids, max_new_tokens: int) -> Outcome:
    """One generation by adi with its wall-clock times, the session's own making included."""
    start = time.perf_counter()
    session = Session(model, token_ids, policy, max_new_tokens=max_new_tokens)
    steps = list(session.steps())
    seconds, c = time.perf_counter() - start, session.counters
    return Outcome(tuple(s.token for s in steps), seconds, steps[0].seconds, c.rounds, c.drafted, c.accepted)


def timed_batch(model: Model, policy: Policy, tasks: Sequence[Task]) -> BatchOutcome:
    """All these generations, of the same length at most, in one batch."""
    (most,) = {task.max_new_tokens for task in tasks}
    start = time.perf_counter()
    found = generate_batch(model, [task.token_ids for task in tasks], policy, max_new_tokens=most, most=len(tasks))
    return BatchOutcome(tuple(text.token_ids for text in found), time.perf_counter() - start)


def sweep(model: Model, exits: Exits, prompts: Sequence[Ids], max_new_tokens: int) -> Sweep:
    """Every depth that can draft with every draft length on the same prompts, in turn: a drifting machine favours none."""
    choices = list(product(Static.depths_of(exits), DRAFT_LENGTHS))
    policies: list[Policy] = [FullDepth(), *(Static(exits, *choice) for choice in choices)]
    for policy in policies:
        timed(model, policy, prompts[0], WARM_UP_TOKENS)
    by_prompt = [[timed(model, policy, ids, max_new_tokens) for policy in policies] for ids in prompts]
    full, *found = zip(*by_prompt, strict=True)
    points = [
        SweepPoint(*choice, median(o.tokens_per_second for o in outcomes), accepted_share(outcomes))
        for choice, outcomes in zip(choices, found, strict=True)
    ]
    return Sweep(len(prompts), max_new_tokens, median(o.tokens_per_second for o in full), tuple(points))
