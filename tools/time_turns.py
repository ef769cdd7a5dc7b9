"""Milliseconds of a turn that runs again against those of a block of its own, of the same size, on the compiled engine.

A looped model of so many turns and a Llama of as many blocks, both with random weights, decode one token after a short text.
Prints a line of JSON for each width. Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
import transformers

from adi.model.backbone import Rows
from adi.model.looped import LoopedConfig, LoopedForCausalLM
from adi.model.openvino import OpenVinoBackbone, export_and_open

PAST, REPEATS = 64, 60


def engines(width: int, turns: int, precision: str) -> tuple[OpenVinoBackbone, OpenVinoBackbone]:
    """The looped model and the other one."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 512,
        "hidden_size": width,
        "intermediate_size": 8 * width // 3 // 32 * 32,
        "num_attention_heads": width // 64,
    }
    looped = LoopedForCausalLM(LoopedConfig(**sizes, turns=turns, injection="none")).eval()
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=turns)).eval()
    made = [export_and_open(model, name=type(model).__name__, precision=precision) for model in (looped, plain)]
    for backbone in made:
        backbone.prepare((), drafts=True, wait=True)
    return made[0], made[1]


def seconds(backbone: OpenVinoBackbone, rows: int) -> float:
    """Of one pass through all blocks, by one block."""
    with backbone.new_cache() as cache:
        backbone.forward([Rows(cache, 0, tuple(range(PAST)), None)], 0, backbone.spec.layers)
        start = time.perf_counter()
        for _ in range(8):
            backbone.forward([Rows(cache, PAST, tuple(range(rows)), None)], 0, backbone.spec.layers)
        return (time.perf_counter() - start) / 8 / backbone.spec.layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="128,576,1024")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--precision", default="int8")
    given = parser.parse_args()
    for width in map(int, given.widths.split(",")):
        both = engines(width, given.turns, given.precision)
        taken = np.array([[seconds(backbone, given.rows) for backbone in both] for _ in range(REPEATS + 1)][1:])
        turn, block = 1000 * np.median(taken, 0)
        low, high = np.quantile(taken[:, 1] / taken[:, 0], (0.025, 0.975))
        found = {"width": width, "turns": given.turns, "rows": given.rows, "precision": given.precision}
        print(json.dumps({**found, "turn_ms": turn, "block_ms": block, "block_by_turn": [low, block / turn, high]}), flush=True)


if __name__ == "__main__":
    main()
