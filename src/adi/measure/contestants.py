"""Who runs in a benchmark: adi's own modes and the tools that people use today, each behind one function.

A contestant is loaded in a process of its own, so that its memory is its own and its failure nobody else's.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from adi.decoding.policies import FullDepth, Policy, Reflex, Verified
from adi.decoding.records import Step
from adi.decoding.session import Session
from adi.exits.artifact import Exits, bare_exits, load_exits
from adi.model.checkpoint import Model, load, quiet_transformers, source_folder


@dataclass(frozen=True)
class Setting:
    """What all contestants share. ``exits`` names trained exits, None the model's own head; ``threshold`` is for reflex."""

    model: str
    exits: str | None
    threshold: float | None
    threads: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """One generation: its tokens, wall-clock seconds for all of it and to the first token; rounds and drafts where known."""

    token_ids: tuple[int, ...]
    seconds: float
    ttft_seconds: float
    rounds: int | None = None
    drafted: int | None = None
    accepted: int | None = None


Run = Callable[[tuple[int, ...], int], Outcome]


def adi_runner(mode: str, precision: str, setting: Setting) -> tuple[Run, Callable[[str], tuple[int, ...]]]:
    """adi in one of its modes; also gives the encoder that turns a prompt into the tokens everybody gets."""
    model = load(setting.model, precision=precision)
    policy = _policy(mode, model, setting)

    def run(ids: tuple[int, ...], max_new_tokens: int) -> Outcome:
        session = Session(model, ids, policy, max_new_tokens=max_new_tokens)
        start = time.perf_counter()
        steps = [event for event in session if isinstance(event, Step)]
        seconds = time.perf_counter() - start
        c = session.counters
        return Outcome(tuple(s.token for s in steps), seconds, steps[0].seconds, c.rounds, c.drafted, c.accepted)

    raw = model.tokenizer is not None and not model.tokenizer.has_chat_template
    return run, lambda prompt: model.encode(prompt, raw=raw)


def _policy(mode: str, model: Model, setting: Setting) -> Policy:
    if mode == "full":
        return FullDepth()
    layers = model.backbone.spec.layers
    exits: Exits = load_exits(setting.exits) if setting.exits else bare_exits(model, (round(0.75 * layers),))
    if mode == "verified":
        return Verified(exits)
    if setting.threshold is None:
        raise ValueError("reflex mode needs a threshold (--threshold): nothing is calibrated yet.")
    return Reflex(exits, thresholds=setting.threshold)


def transformers_runner(precision: str, setting: Setting, **extra: Any) -> Run:
    """transformers ``generate``, greedy; ``extra`` are its own options (prompt lookup, early-exit assistant)."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    folder = source_folder(setting.model, lambda _: None)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    class FirstToken(BaseStreamer):  # type: ignore[misc]
        """Notes when the first new token arrives (the prompt is put first)."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def run(ids: tuple[int, ...], max_new_tokens: int) -> Outcome:
        streamer, start = FirstToken(), time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                streamer=streamer,
                **extra,
            )
        seconds = time.perf_counter() - start
        first = streamer.times[1] - start if len(streamer.times) > 1 else seconds
        return Outcome(tuple(out[0, len(ids) :].tolist()), seconds, first)

    return run


def build(name: str, setting: Setting) -> tuple[Run, Callable[[str], tuple[int, ...]] | None]:
    """The contestant of that name; ValueError lists what there is."""
    kind, _, rest = name.partition(":")
    if kind == "adi":
        mode, _, precision = rest.partition(":")
        return adi_runner(mode, precision or "auto", setting)
    if kind == "hf" and rest in ("fp32", "bf16"):
        return transformers_runner(rest, setting), None
    if kind == "hf-lookup" and rest in ("fp32", "bf16"):
        return transformers_runner(rest, setting, prompt_lookup_num_tokens=10), None
    if kind == "hf-early-exit" and rest in ("fp32", "bf16"):
        return transformers_runner(rest, setting, assistant_early_exit=_early(setting)), None
    raise ValueError(f"contestant {name!r} is not known; there are {', '.join(PEERS)} and adi:MODE[:PRECISION].")


PEERS = tuple(f"{kind}:{precision}" for kind in ("hf", "hf-lookup", "hf-early-exit") for precision in ("fp32", "bf16"))


def _early(setting: Setting) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source_folder(setting.model, lambda _: None))
    return round(0.75 * int(config.get_text_config().num_hidden_layers))


def serve(connection: Connection, name: str, setting: Setting) -> None:
    """A contestant's process: load, then answer ("encode", text) and ("run", ids, n) until told None; then its peak memory."""
    import torch

    torch.set_num_threads(setting.threads)
    torch.manual_seed(setting.seed)
    try:
        run, encode = build(name, setting)
        connection.send(("ready", None))
    except Exception as error:  # whatever keeps a contestant from running is its result
        connection.send(("error", f"{type(error).__name__}: {error}"))
        return
    while (order := connection.recv()) is not None:
        try:
            if order[0] == "encode":
                assert encode is not None, f"{name} cannot encode"
                connection.send(("ok", encode(order[1])))
            else:
                connection.send(("ok", run(order[1], order[2])))
        except Exception as error:
            connection.send(("error", f"{type(error).__name__}: {error}"))
    connection.send(("peak", peak_bytes()))


def peak_bytes() -> int:
    """The largest resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
