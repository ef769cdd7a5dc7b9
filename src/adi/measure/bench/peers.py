"""The tools that people use today, each as its makers document it, on the same tokens: greedy, no text built, no cache
kept from one prompt to the next. Every one is an optional extra; what does not run here says why."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from adi.errors import UsageError
from adi.measure.bench.genai_export import genai_export
from adi.measure.bench.outcomes import BatchOutcome, Outcome, Runner, Setting, Task
from adi.model.hub import READING, gguf_file, quiet_transformers, source_folder

DRAFT_TOKENS, NGRAM = 10, 3  # of prompt lookup, where a tool leaves the choice to its user
LLAMA_DRAFT_TOKENS = 2  # what llama-cpp-python's documentation advises on a processor
EXIT_SHARE = 0.93  # where untrained early exits draft: of the depths 8, 22 and 28 of the default model's 30 the fastest
MOST_BATCHED = 1 << 20
HOW = {
    "fp32": "fp32 weights",
    "int8": "int8 weights, asymmetric, per channel (NNCF)",
    "int4": "int4 weights, asymmetric, groups of 128 or the largest that fits, embedding and head in int8 (NNCF)",
}
Times = list[float]


def build_peer(name: str, setting: Setting) -> Runner:
    """The peer of that name; AdiError lists what there is."""
    if name not in PEERS:
        raise UsageError(f"system {name!r} is not known; there are {', '.join(PEERS)} and adi:MODE[:PRECISION].")
    return PEERS[name](setting)


def transformers_peer(precision: str, kind: str, setting: Setting) -> Runner:
    """transformers ``generate``: plain, with prompt lookup, or drafting at an early exit of the model itself."""
    import torch

    model = _transformers(precision, setting)
    extra: dict[str, Any] = {
        "hf": {},
        "hf-lookup": {"prompt_lookup_num_tokens": DRAFT_TOKENS},
        "hf-early-exit": {"assistant_early_exit": _early_exit(model)[0]},
    }[kind]

    def generate(task: Task, times: Times) -> Sequence[int]:
        clock = SimpleNamespace(put=lambda _: times.append(time.perf_counter()), end=lambda: None)
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([task.token_ids]),
                attention_mask=torch.ones(1, len(task.token_ids), dtype=torch.long),
                max_new_tokens=task.max_new_tokens,
                do_sample=False,
                eos_token_id=sorted(task.ends) or None,
                pad_token_id=min(task.ends, default=0),
                streamer=clock,
                **extra,
            )
        del times[0]  # the prompt is put first
        return out[0, len(task.token_ids) :].tolist()  # type: ignore[no-any-return]

    options = "".join(f", {name} {value}" for name, value in extra.items())
    return _runner(generate, f"transformers generate, {precision}{options}")


def economize_peer(setting: Setting) -> Runner:
    """economize's early exit: self-speculative decoding through the model's own head, verified greedily."""
    import economize
    import torch
    from economize.techniques.early_exit import EarlyExitConfig

    base = _transformers("fp32", setting)
    (depth, layers), decoding = _early_exit(base), economize.DecodeConfig()
    model = economize.apply(base, EarlyExitConfig(exit_layer=depth, head="shared"), decoding=decoding)

    def generate(task: Task, times: Times) -> Sequence[int]:
        def ended(ids: Any) -> bool:
            times.append(time.perf_counter())
            return int(ids[-1]) in task.ends

        return model.decode(torch.tensor(task.token_ids), task.max_new_tokens, stop=ended).tokens.tolist()  # type: ignore[no-any-return]

    about = f"economize early_exit after {depth} of {layers} blocks, untrained, cycles of {decoding.cycle_length}, fp32"
    return _runner(generate, about)


def llama_peer(lookup: bool, setting: Setting) -> Runner:
    """llama.cpp through llama-cpp-python, on the GGUF file itself; logits of all rows only where drafts need them."""
    import llama_cpp
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    path = gguf_path(setting)
    model = llama_cpp.Llama(
        str(path),
        n_ctx=setting.context + LLAMA_DRAFT_TOKENS,
        n_threads=setting.threads,
        n_threads_batch=setting.threads,
        logits_all=lookup,
        draft_model=LlamaPromptLookupDecoding(num_pred_tokens=LLAMA_DRAFT_TOKENS) if lookup else None,
        seed=setting.seed,
        verbose=False,
    )

    def generate(task: Task, times: Times) -> Sequence[int]:
        tokens: list[int] = []
        model.reset()  # or a prompt that begins like the last one would find its work done
        for token in model.generate(list(task.token_ids), temp=0.0, repeat_penalty=1.0):
            times.append(time.perf_counter())
            tokens.append(int(token))
            if len(tokens) == task.max_new_tokens or tokens[-1] in task.ends:
                break
        return tokens

    how = f", prompt lookup of {LLAMA_DRAFT_TOKENS} tokens" if lookup else ""
    return _runner(generate, f"llama-cpp-python on {path.name}{how}")


def genai_peer(weights: str, lookup: bool, setting: Setting) -> Runner:
    """OpenVINO GenAI's ``LLMPipeline``: on the GGUF file that it reads itself, or on an exported graph (int8, int4)."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    source = gguf_path(setting) if weights == "gguf" else genai_folder(weights, setting)
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": setting.threads, "scheduler_config": _scheduler(genai)}
    pipeline = genai.LLMPipeline(source, "CPU", options | ({"prompt_lookup": True} if lookup else {}))
    drafts = {"num_assistant_tokens": DRAFT_TOKENS, "max_ngram_size": NGRAM} if lookup else {}

    class Clock(genai.StreamerBase):  # type: ignore[misc]
        def __init__(self, times: Times) -> None:
            super().__init__()
            self.times = times

        def write(self, token: Any) -> Any:
            self.times.append(time.perf_counter())
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    def generate(task: Task, times: Times) -> Sequence[int]:
        config = genai.GenerationConfig(max_new_tokens=task.max_new_tokens, do_sample=False, **drafts)
        config.stop_token_ids = set(task.ends)
        ids = ov.Tensor(np.array([task.token_ids], dtype=np.int64))
        return pipeline.generate(ids, config, Clock(times)).tokens[0]  # type: ignore[no-any-return]

    made = f"on {source.name}, read by itself" if weights == "gguf" else f"on a stateful graph with {HOW[weights]}"
    how = f", prompt lookup of {DRAFT_TOKENS} tokens, runs of {NGRAM}" if lookup else ""
    found = _runner(generate, f"OpenVINO GenAI {made}{how}; no prefix cache, all else at its defaults")
    return found if lookup else replace(found, batch=functools.partial(_genai_batch, source, setting.threads))


def _genai_batch(source: Path, threads: int, tasks: Sequence[Task]) -> BatchOutcome:
    """All at once by GenAI's continuous batching, its scheduler at its defaults but without the memory of earlier prompts."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    pipeline = _genai_pipeline(source, threads)
    configs = []
    for task in tasks:
        configs.append(genai.GenerationConfig(max_new_tokens=task.max_new_tokens, do_sample=False))
        configs[-1].stop_token_ids = set(task.ends)
    ids = [ov.Tensor(np.array([task.token_ids], dtype=np.int64)) for task in tasks]
    start = time.perf_counter()
    found = pipeline.generate(ids, configs)
    seconds = time.perf_counter() - start
    return BatchOutcome(tuple(tuple(map(int, one.m_generation_ids[0])) for one in found), seconds)


@functools.cache
def _genai_pipeline(source: Path, threads: int) -> Any:
    import openvino_genai as genai

    scheduling = genai.SchedulerConfig()
    scheduling.enable_prefix_caching = False
    return genai.ContinuousBatchingPipeline(source, scheduling, "CPU", {"INFERENCE_NUM_THREADS": threads})


def genai_folder(weights: str, setting: Setting) -> Path:
    """The exported graph for GenAI, made once."""
    return genai_export(model_folder(setting), weights)


def model_folder(setting: Setting) -> Path:
    """The model's transformers folder, fetched or converted once."""
    return Path(source_folder(setting.model, lambda _: None))


def _runner(generate: Callable[[Task, Times], Sequence[int]], about: str) -> Runner:
    """Runs and times ``generate``, which appends the time of each token as it comes."""

    def run(task: Task) -> Outcome:
        times: Times = []
        start = time.perf_counter()
        tokens = generate(task, times)
        seconds = time.perf_counter() - start
        return Outcome(tuple(map(int, tokens)), seconds, times[0] - start if times else seconds)

    return Runner(run, {"about": about})


def _transformers(precision: str, setting: Setting) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    with quiet_transformers(), READING:
        return AutoModelForCausalLM.from_pretrained(model_folder(setting), dtype=dtype, trust_remote_code=False).eval()


def _early_exit(model: Any) -> tuple[int, int]:
    """Where an untrained exit drafts, and the number of blocks."""
    layers = int(model.config.get_text_config().num_hidden_layers)
    return max(1, min(round(EXIT_SHARE * layers), layers - 1)), layers


def _scheduler(genai: Any) -> Any:
    """The pipeline's own scheduling for one sequence, but without its memory of earlier prompts."""
    found = genai.SchedulerConfig()
    found.enable_prefix_caching = False
    found.dynamic_split_fuse = False
    found.max_num_batched_tokens = MOST_BATCHED
    return found


def gguf_path(setting: Setting) -> Path:
    """The model's GGUF file; AdiError where it is none."""
    if (path := gguf_file(setting.model)) is None:
        raise UsageError("needs a .gguf file")
    return path


PEERS: dict[str, Callable[[Setting], Runner]] = {
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
