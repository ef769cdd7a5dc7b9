"""What a step costs in Python after a few tokens and after many: the same, on both engines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
import transformers as t

pytest.importorskip("openvino")

import adi
from adi.model.hf import HfBackbone
from adi.model.load import Model
from adi.model.openvino import export_and_open

SHORT, LONG, STEPS = 96, 2016, 24  # both at the same place of a block of KV memory


def operations(step: Callable[[], object]) -> int:
    """Operations of Python's that a call takes."""
    count = 0

    def note(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return note

    before = sys.gettrace()
    sys.settrace(note)
    try:
        step()
    finally:
        sys.settrace(before)
    return count


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    return t.LlamaForCausalLM(t.LlamaConfig(**size, num_hidden_layers=2, max_position_embeddings=LONG + STEPS)).eval()


@pytest.mark.parametrize("kind", ["openvino", "hf"])
@pytest.mark.parametrize("policy", [adi.FullDepth(), adi.Lookup()], ids=["full", "lookup"])
def test_a_step_takes_as_many_operations_after_a_long_text_as_after_a_short_one(
    network: Any, kind: str, policy: adi.Policy
) -> None:
    backbone = HfBackbone(network) if kind == "hf" else export_and_open(network, name="long", precision="fp32")
    model, found = Model(backbone, None, frozenset()), {}
    for length in (SHORT, LONG):
        ids = tuple(torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(1)).tolist())
        steps = adi.Session(model, ids, policy, max_new_tokens=STEPS).steps()
        for _ in range(STEPS // 4):
            next(steps)
        found[length] = min(operations(lambda steps=steps: next(steps)) for _ in range(STEPS // 2))
        steps.close()  # type: ignore[attr-defined]
    print(found)
    assert found[LONG] <= 1.02 * found[SHORT], found
