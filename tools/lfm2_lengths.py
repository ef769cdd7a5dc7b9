"""Processor time of a token by length on transformers' modules, for adi and for transformers itself: short convolutions beside
attention (the shape of LFM2, random weights, width 1024). Prints a line for each length; the two take turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import DynamicCache, Lfm2Config, Lfm2ForCausalLM

from adi.model.backbone import Rows
from adi.model.hf import HfBackbone

PART = 512  # rows of a pass over the prompt


def shaped(width: int, layers: int) -> Lfm2ForCausalLM:
    """Two convolutions, then attention, and so on."""
    torch.manual_seed(0)
    return Lfm2ForCausalLM(
        Lfm2Config(
            vocab_size=1024,
            hidden_size=width,
            intermediate_size=5 * width // 2,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 128,
            full_attn_idxs=[*range(2, layers, 3)],
        )
    ).eval()


def adi_passes(model: Lfm2ForCausalLM) -> Callable[[list[int]], object]:
    """Runs the next tokens of one text."""
    backbone = HfBackbone(model)
    cache, at = backbone.new_cache(), 0

    def run(ids: list[int]) -> None:
        nonlocal at
        backbone.greedy(backbone.forward([Rows(cache, at, tuple(ids), None)], 0, backbone.spec.layers)[0][-1:])
        at += len(ids)

    return run


def own_passes(model: Lfm2ForCausalLM) -> Callable[[list[int]], object]:
    """The same by transformers alone."""
    cache = DynamicCache(config=model.config)

    def run(ids: list[int]) -> None:
        with torch.no_grad():
            model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--lengths", default="128,1024,4096,8192")
    parser.add_argument("--tokens", type=int, default=24)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = shaped(given.width, given.layers)
    both, at, first = (adi_passes(model), own_passes(model)), 0, np.ones(2)
    for length in map(int, given.lengths.split(",")):
        for start in range(at, length, PART):
            for run in both:
                run([*range(7, 7 + min(PART, length - start))])
        taken = np.empty((given.tokens, 2))
        for i in range(given.tokens):
            for which, run in enumerate(both):
                begun = time.process_time()
                run([7 + i])
                taken[i, which] = time.process_time() - begun
        at, median = length + given.tokens, np.median(taken, axis=0)
        first = median if first[0] == 1 else first
        ratios = np.percentile(taken[:, 0] / taken[:, 1], (25, 50, 75))
        print(
            f"after {length:5}: adi {1e3 * median[0]:6.1f} ms, transformers {1e3 * median[1]:6.1f} ms, "
            f"ratio {ratios[1]:.3f} ({ratios[0]:.3f} to {ratios[2]:.3f}); against after the first length: "
            f"adi {median[0] / first[0]:.2f}, transformers {median[1] / first[1]:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
