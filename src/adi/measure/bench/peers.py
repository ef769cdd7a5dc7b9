"""The tools that people use today, each as its makers document it, on the same tokens: greedy, no text built, no cache
kept from one prompt to the next. Every one is an optional extra; what does not run here says why."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adi.errors import AdiError
from adi.measure.bench.genai_export import export, place
from adi.measure.bench.systems import Runner, Setting
from adi.measure.bench.timing import Outcome, Task
from adi.model.hub import gguf_file, quiet_transformers, source_folder

DRAFT_TOKENS, NGRAM = 10, 3  # of prompt lookup, where a tool leaves the choice to its user
LLAMA_DRAFT_TOKENS = 2  # what llama-cpp-python's documentation advises on a processor
EXIT_SHARE = 0.93  # where untrained early exits draft: of the depths 8, 22 and 28 of the default model's 30 the fastest
MOST_BATCHED = 1 << 20


def build_peer(name: str, setting: Setting) -> Runner:
    """The peer of that name; ValueError lists what there is."""
    if name not in PEERS:
        raise AdiError(f"contestant {name!r} is not known; there are {', '.join(PEERS)} and adi:MODE[:PRECISION].")
    return PEERS[name](setting)


def transformers_peer(precision: str, kind: str, setting: Setting) -> Runner:
    """transformers ``generate``: plain, with prompt lookup, or drafting at an early exit of the model itself."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    model = _transformers(precision, setting)
    depth, _ = _early(model)
    extra: dict[str, Any] = {
        "hf": {},
        "hf-lookup": {"prompt_lookup_num_tokens": DRAFT_TOKENS},
        "hf-early-exit": {"assistant_early_exit": depth},
    }[kind]

    class Clock(BaseStreamer):  # type: ignore[misc]
        """Notes when tokens arrive (the prompt is put first)."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def run(task: Task) -> Outcome:
        streamer, start = Clock(), time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([task.token_ids]),
                attention_mask=torch.ones(1, len(task.token_ids), dtype=torch.long),
                max_new_tokens=task.max_new_tokens,
                do_sample=False,
                eos_token_id=sorted(task.ends) or None,
                pad_token_id=min(task.ends, default=0),
                streamer=streamer,
                **extra,
            )
        seconds = time.perf_counter() - start
        first = streamer.times[1] - start if len(streamer.times) > 1 else seconds
        return Outcome(tuple(out[0, len(task.token_ids) :].tolist()), seconds, first)

    said = "".join(f", {name} {value}" for name, value in extra.items())
    return Runner(run, {"about": f"transformers generate, {precision}{said}"})


def economize_peer(setting: Setting) -> Runner:
    """economize's early exit: self-speculative decoding through the model's own head, verified greedily."""
    import economize
    import torch
    from economize.techniques.early_exit import EarlyExitConfig

    base = _transformers("fp32", setting)
    (depth, layers), decoding = _early(base), economize.DecodeConfig()
    model = economize.apply(base, EarlyExitConfig(exit_layer=depth, head="shared"), decoding=decoding)

    def run(task: Task) -> Outcome:
        times: list[float] = []

        def ended(ids: Any) -> bool:
            times.append(time.perf_counter())
            return int(ids[-1]) in task.ends

        start = time.perf_counter()
        found = model.decode(torch.tensor(task.token_ids), task.max_new_tokens, stop=ended)
        seconds = time.perf_counter() - start
        first = times[0] - start if times else seconds
        return Outcome(tuple(found.tokens.tolist()), seconds, first)

    about = f"economize early_exit after {depth} of {layers} blocks, untrained, cycles of {decoding.cycle_length}, fp32"
    return Runner(run, {"about": about})


def _transformers(precision: str, setting: Setting) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    dtype, folder = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], source_folder(setting.model, lambda _: None)
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()


def _early(model: Any) -> tuple[int, int]:
    """Where an untrained exit drafts, and the number of blocks."""
    layers = int(model.config.get_text_config().num_hidden_layers)
    return max(1, min(round(EXIT_SHARE * layers), layers - 1)), layers


def llama_peer(lookup: bool, setting: Setting) -> Runner:
    """llama.cpp through llama-cpp-python, on the GGUF file itself; logits of all rows only where drafts need them."""
    import llama_cpp
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    path = _gguf(setting)
    draft = LlamaPromptLookupDecoding(num_pred_tokens=LLAMA_DRAFT_TOKENS) if lookup else None
    model = llama_cpp.Llama(
        str(path),
        n_ctx=setting.context + LLAMA_DRAFT_TOKENS,
        n_threads=setting.threads,
        n_threads_batch=setting.threads,
        logits_all=lookup,
        draft_model=draft,
        seed=setting.seed,
        verbose=False,
    )

    def run(task: Task) -> Outcome:
        said: list[int] = []
        first, start = 0.0, time.perf_counter()
        model.reset()  # or a prompt that begins like the last one would find its work done
        for token in model.generate(list(task.token_ids), temp=0.0, repeat_penalty=1.0):
            if not said:
                first = time.perf_counter() - start
            said.append(int(token))
            if len(said) == task.max_new_tokens or said[-1] in task.ends:
                break
        return Outcome(tuple(said), time.perf_counter() - start, first)

    how = f", prompt lookup of {LLAMA_DRAFT_TOKENS} tokens" if lookup else ""
    return Runner(run, {"about": f"llama-cpp-python on {path.name}{how}"})


def genai_peer(weights: str, lookup: bool, setting: Setting) -> Runner:
    """OpenVINO GenAI's ``LLMPipeline``: on the GGUF file that it reads itself, or on an exported graph (int8, int4)."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    source = _gguf(setting) if weights == "gguf" else place(Path(source_folder(setting.model, lambda _: None)), weights)
    if weights != "gguf" and not source.is_dir():
        export(Path(source_folder(setting.model, lambda _: None)), weights)
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": setting.threads, "scheduler_config": _scheduler(genai)}
    pipeline = genai.LLMPipeline(source, "CPU", options | ({"prompt_lookup": True} if lookup else {}))
    drafts = {"num_assistant_tokens": DRAFT_TOKENS, "max_ngram_size": NGRAM} if lookup else {}

    class Clock(genai.StreamerBase):  # type: ignore[misc]
        """Notes when tokens arrive."""

        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []

        def write(self, token: Any) -> Any:
            self.times.append(time.perf_counter())
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    def run(task: Task) -> Outcome:
        config = genai.GenerationConfig(max_new_tokens=task.max_new_tokens, do_sample=False, **drafts)
        config.stop_token_ids = set(task.ends)
        ids, streamer = ov.Tensor(np.array([task.token_ids], dtype=np.int64)), Clock()
        start = time.perf_counter()
        found = pipeline.generate(ids, config, streamer)
        seconds = time.perf_counter() - start
        first = streamer.times[0] - start if streamer.times else seconds
        return Outcome(tuple(found.tokens[0]), seconds, first)

    made = f"on {source.name}, read by itself" if weights == "gguf" else f"on a stateful graph with {HOW[weights]}"
    how = f", prompt lookup of {DRAFT_TOKENS} tokens, runs of {NGRAM}" if lookup else ""
    return Runner(run, {"about": f"OpenVINO GenAI {made}{how}; no prefix cache, all else at its defaults"})


HOW = {
    "int8": "int8 weights, asymmetric, per channel (NNCF)",
    "int4": "int4 weights, asymmetric, groups of 128 or the largest that fits, embedding and head in int8 (NNCF)",
}


def _scheduler(genai: Any) -> Any:
    """The pipeline's own scheduling for one sequence, but without its memory of earlier prompts."""
    found = genai.SchedulerConfig()
    found.enable_prefix_caching = False
    found.dynamic_split_fuse = False
    found.max_num_batched_tokens = MOST_BATCHED
    return found


def _gguf(setting: Setting) -> Path:
    if (path := gguf_file(setting.model)) is None:
        raise AdiError("needs a .gguf file")
    return path


Peer = Callable[[Setting], Runner]
PEERS: dict[str, Peer] = {
    "llama.cpp": functools.partial(llama_peer, False),
    "llama.cpp-lookup": functools.partial(llama_peer, True),
    **{f"openvino-genai:{w}": functools.partial(genai_peer, w, False) for w in ("int4", "int8", "gguf")},
    **{f"openvino-genai-lookup:{w}": functools.partial(genai_peer, w, True) for w in ("int4", "int8", "gguf")},
    **{
        f"{kind}:{precision}": functools.partial(transformers_peer, precision, kind)
        for kind in ("hf", "hf-lookup", "hf-early-exit")
        for precision in ("fp32", "bf16")
    },
    "economize": economize_peer,
}
