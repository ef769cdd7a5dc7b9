"""Checkpoints of Ouro's shape, made here with random weights, give the logits of a small reference of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

import adi
from adi.errors import AdiError
from adi.model.looped import LoopedForCausalLM

STATED: dict[str, Any] = {
    "model_type": "ouro",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "total_ut_steps": 3,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000.0,
    "early_exit_threshold": 1.0,
}
IDS = (1, 2, 3, 4, 5, 6, 1, 2)


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = LlamaAttention(config, 0), LlamaMLP(config)
        for name in ("input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2"):
            setattr(self, name, LlamaRMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, x: Tensor, angles: Any) -> Tensor:
        mixed, _ = self.self_attn(self.input_layernorm(x), position_embeddings=angles, attention_mask=None)
        x = x + self.input_layernorm_2(mixed)
        return x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))  # type: ignore[no-any-return]


class Reference(nn.Module):
    """What Ouro's report says: the list of layers again and again, a norm behind each turn, a linear gate, one head."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {name: value for name, value in STATED.items() if name not in ("model_type", "rope_theta")}
        config = LlamaConfig(**sizes, rope_parameters={"rope_type": "default", "rope_theta": STATED["rope_theta"]})
        config._attn_implementation = "sdpa"
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(32, 16)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(2))
        self.model.norm = LlamaRMSNorm(16, 1e-6)
        self.model.early_exit_gate = nn.Linear(16, 1)
        self.lm_head = nn.Linear(16, 32, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        x, logits, gates = model.embed_tokens(ids), [], []
        angles = self.rotary(x, torch.arange(ids.shape[1])[None])
        for _ in range(3):
            for layer in model.layers:
                x = layer(x, angles)
            x = model.norm(x)
            logits.append(self.lm_head(x))
            gates.append(model.early_exit_gate(x)[..., 0])
        return torch.stack(logits), torch.stack(gates)


@pytest.fixture
def reference() -> Reference:
    torch.manual_seed(1)
    made = Reference().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.normal_(0, 0.3)
    return made


@pytest.fixture
def folder(tmp_path: Path, reference: Reference) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(STATED))
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def test_logits_and_gate_of_every_turn_are_the_references(folder: Path, reference: Reference) -> None:
    found, (logits, gates) = LoopedForCausalLM.from_ouro(folder), reference(torch.tensor([IDS]))
    every = found(torch.tensor([IDS]), output_turns=True)
    assert torch.allclose(every.turn_logits, logits, atol=1e-4)
    assert torch.allclose(every.halt_logits, gates, atol=1e-4)


def test_it_decodes_from_its_turns_and_is_saved(folder: Path, reference: Reference, tmp_path: Path) -> None:
    model = LoopedForCausalLM.from_ouro(folder)
    model.save_pretrained(tmp_path / "ours")
    loaded, text = adi.load(LoopedForCausalLM.from_pretrained(tmp_path / "ours").eval()), list(IDS)
    for _ in range(8):
        text.append(int(reference(torch.tensor([text]))[0][-1, 0, -1].argmax()))
    exits = adi.bare_exits(loaded)
    assert (exits.depths, exits.trigger) == ((1, 2), adi.Threshold("gate", 0.5))
    found = adi.generate(loaded, IDS, adi.Verified(exits, draft_tokens=3), max_new_tokens=8)
    assert found.token_ids == tuple(text[len(IDS) :])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling in .* is .*yarn.*; of Ouro's shape only None is known"),
        ({"num_key_value_heads": 1}, "num_key_value_heads in .* is 1; of Ouro's shape only 2 is known"),
        ({"model_type": "llama"}, "model_type in .* is 'llama'"),
        ({"num_hidden_layers": 3}, r"lacks 11 weights, such as model\.layers\.2\.input_layernorm\.weight"),
        ({"num_hidden_layers": 1}, r"has no place here for 11 weights, such as model\.layers\.1\.input_layernorm\.weight"),
        ({"intermediate_size": 16}, r"has the shape \(\d+, \d+\), and its configuration says"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_what_does_not_fit_ends_in_a_sentence(folder: Path, change: dict[str, Any], match: str) -> None:
    (folder / "config.json").write_text(json.dumps(STATED | change))
    with pytest.raises(AdiError, match=match):
        LoopedForCausalLM.from_ouro(folder)


def test_missing_and_damaged_weights_end_in_a_sentence(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.early_exit_gate.bias"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(AdiError, match=r"lacks 1 weights, such as model\.early_exit_gate\.bias"):
        LoopedForCausalLM.from_ouro(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(AdiError, match="damaged"):
        LoopedForCausalLM.from_ouro(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(AdiError, match="no weights"):
        LoopedForCausalLM.from_ouro(folder)
