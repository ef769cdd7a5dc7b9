"""The transformers engine on tiny random models of 35 families: any split is the model's own forward."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers as t
from transformers.modeling_outputs import BaseModelOutputWithPast

import adi
from adi.model.backbone import Rows, States
from adi.model.hf import HfBackbone
from adi.model.hf.weights import fingerprint
from families import FAMILIES, IDS, LAYERS, VOCABULARY, C, own_logits, tiny

PROMPT = 14
SEEN: dict[str, int] = {}


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_there_are_enough_families() -> None:
    assert len(FAMILIES) >= 24


@pytest.mark.parametrize("split", [1, 2, 5])
def test_any_split_gives_the_models_own_logits(family: str, split: int) -> None:
    model = tiny(family)
    backbone, wanted = HfBackbone(model), own_logits(tiny(family), IDS)
    cache, layers = backbone.new_cache(), backbone.spec.layers
    (prefill,) = backbone.forward([Rows(cache, 0, IDS[:PROMPT], None)], 0, layers)
    torch.testing.assert_close(backbone.logits(prefill.hidden_TD), wanted[:PROMPT], atol=1e-4, rtol=0)
    ahead = [backbone.forward([Rows(cache, i, IDS[i : i + 1], None)], 0, split)[0] for i in range(PROMPT, len(IDS))]
    (deep,) = backbone.forward([Rows(cache, PROMPT, IDS[PROMPT:], States.joined(ahead))], split, layers)
    torch.testing.assert_close(backbone.logits(deep.hidden_TD), wanted[PROMPT:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [0, 3, 11, 20])
def test_rollback_is_a_smaller_start(family: str, length: int) -> None:
    backbone = HfBackbone(tiny(family))
    cache, layers = backbone.new_cache(), backbone.spec.layers
    wrong = IDS[:length] + tuple((i + 1) % VOCABULARY for i in IDS[length:])
    backbone.forward([Rows(cache, 0, wrong, None)], 0, layers)
    (states,) = backbone.forward([Rows(cache, length, IDS[length:], None)], 0, layers)
    wanted = own_logits(tiny(family), IDS)[length:]
    torch.testing.assert_close(backbone.logits(states.hidden_TD), wanted, atol=1e-4, rtol=0)


def test_verified_generation_is_transformers_greedy(family: str) -> None:
    hf = tiny(family)
    model = adi.load(hf)
    prompt = list(IDS[:PROMPT])
    with torch.no_grad():
        wanted = hf.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, PROMPT:].tolist()
    exits = adi.bare_exits(model, (2, 4))
    ragged = adi.AnyOf((adi.Threshold("stability", 0.6), adi.Threshold("top_probability", {4: 0.0})))
    for trigger in (adi.Threshold("top_probability", 0.0), ragged):
        got = adi.generate(model, prompt, adi.Verified(exits, trigger, draft_tokens=4), max_new_tokens=24)
        assert list(got.token_ids) == wanted
        SEEN[family] = SEEN.get(family, 0) + got.counters.accepted
        assert got.counters.drafted > 0


def test_drafts_were_accepted_and_rejected_in_most_families() -> None:
    """Runs after the test above, whose comparison would mean little if no draft had ever stood."""
    if len(SEEN) < len(FAMILIES):
        pytest.skip("needs the whole file to have run")
    assert sum(accepted > 0 for accepted in SEEN.values()) >= 24, SEEN


def test_mlp_activations_are_what_the_down_projection_reads() -> None:
    model = tiny("llama")
    backbone = HfBackbone(model)
    (states,) = backbone.forward([Rows(backbone.new_cache(), 0, IDS, None)], 0, 3, mlp=True)
    block = model.model.layers[2]
    with torch.no_grad():
        after = model(torch.tensor([IDS]), output_hidden_states=True).hidden_states[2][0]
        attended = after + block.self_attn(
            block.input_layernorm(after)[None],
            position_embeddings=model.model.rotary_emb(after[None], torch.arange(len(IDS))[None]),
            attention_mask=torch.full((len(IDS), len(IDS)), float("-inf")).triu(1)[None, None],
        )[0].squeeze(0)
        x = block.post_attention_layernorm(attended)
        wanted = block.mlp.act_fn(block.mlp.gate_proj(x)) * block.mlp.up_proj(x)
    assert states.mlp_TF is not None
    torch.testing.assert_close(states.mlp_TF, wanted, atol=1e-5, rtol=1e-4)


def test_experts_have_no_mlp_tap() -> None:
    assert not HfBackbone(tiny("mixtral")).has_mlp_tap
    wide_heads = {**FAMILIES["qwen3_moe"][1], "head_dim": 16}  # attention's output matrix also leads down to the width
    assert not HfBackbone(t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**wide_heads)).eval()).has_mlp_tap
    assert HfBackbone(tiny("gemma3")).has_mlp_tap
    assert HfBackbone(tiny("gpt2")).has_mlp_tap


def test_threads_may_share_a_model() -> None:
    model = adi.load(tiny("llama"))
    exits = adi.bare_exits(model, (2, 4))
    policy = adi.Verified(exits, adi.Threshold("top_probability", 0.0))
    wanted = [adi.generate(model, [i, i + 1], adi.FullDepth(), max_new_tokens=12).token_ids for i in range(4, 10)]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda i: adi.generate(model, [i, i + 1], policy, max_new_tokens=12).token_ids, range(4, 10)))
    assert got == wanted


def _snapshot(model: Any) -> list[Any]:
    kept: list[Any] = [model.training, fingerprint(model)]
    for module in model.modules():
        kept.append((sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks)))
    return kept


def test_the_users_model_is_left_as_it_was_found() -> None:
    hf = tiny("gemma3")
    before = _snapshot(hf)
    model = adi.load(hf)
    exits = adi.bare_exits(model, (2,))
    adi.generate(model, [3, 4, 5], adi.Verified(exits, adi.Threshold("hoyer", 0.0)), max_new_tokens=6, logprobs=2)
    assert _snapshot(hf) == before
    half = adi.stream(model, [3, 4, 5], adi.Verified(exits, draft_tokens=6), max_new_tokens=6)
    next(half)
    assert _snapshot(hf) == before, "also between two tokens of a stream"


def test_the_users_model_is_left_as_it_was_found_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny("qwen2")
    before, backbone = _snapshot(hf), HfBackbone(tiny("qwen2"))

    def burst(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory, say")

    with monkeypatch.context() as patch:
        patch.setattr(hf.model.layers[3].mlp, "forward", burst)
        with pytest.raises(RuntimeError, match="out of memory"):
            backbone.forward([Rows(backbone.new_cache(), 0, IDS, None)], 0, LAYERS, mlp=True)
    assert _snapshot(hf) == before


def test_a_users_own_forward_on_a_block_survives() -> None:
    hf = tiny("olmo")
    block, calls = hf.model.layers[1], []
    original = block.forward
    block.forward = lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    mine = block.forward
    try:
        adi.generate(adi.load(hf), [3, 4], adi.FullDepth(), max_new_tokens=2)
        assert block.forward is mine
        assert calls
    finally:
        del block.forward


REFUSED = {
    "Rwkv": (
        "RwkvForCausalLM",
        t.RwkvConfig,
        dict(hidden_size=32, num_hidden_layers=2, vocab_size=64, attention_hidden_size=32),
    ),
    "T5": ("T5ForConditionalGeneration", t.T5Config, dict(d_model=32, d_ff=64, num_layers=2, num_heads=4, vocab_size=64)),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_split_is_refused_by_name(name: str) -> None:
    kind, config, settings = REFUSED[name]
    model = getattr(t, kind)(config(**settings)).eval()
    with pytest.raises(ValueError, match=rf"^{kind} cannot be split between blocks: .{{20,}}"):
        HfBackbone(model)


def test_something_between_the_blocks_is_refused() -> None:
    class Doubling(t.LlamaModel):
        """Scales the state between two blocks, which skip-and-inject would lose."""

        def forward(self, input_ids: Any, position_ids: Any = None, past_key_values: Any = None, **_: Any) -> Any:
            x = self.embed_tokens(input_ids)
            turns = self.rotary_emb(x, torch.arange(x.shape[1])[None] if position_ids is None else position_ids)
            for i, layer in enumerate(self.layers):
                x = layer(x * (2 if i == 3 else 1), position_embeddings=turns, past_key_values=past_key_values)
            return BaseModelOutputWithPast(last_hidden_state=self.norm(x))

    hf = t.LlamaForCausalLM(t.LlamaConfig(**C, num_key_value_heads=2)).eval()
    hf.model = Doubling(hf.config).eval()
    with pytest.raises(ValueError, match="between block 2 and block 3"):
        HfBackbone(hf)


def test_a_model_in_training_mode_is_refused() -> None:
    model = t.LlamaForCausalLM(t.LlamaConfig(**C, num_key_value_heads=2))
    model.train()
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        HfBackbone(model)


def test_options_that_a_model_in_memory_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="precision 'bf16' was asked for"):
        adi.load(tiny("llama"), precision="bf16")
    assert adi.load(tiny("llama"), precision="fp32", device="cpu").backbone.spec.precision == "fp32"


def test_the_fingerprint_names_weights_not_precision() -> None:
    model = tiny("phi")
    rounded = t.PhiForCausalLM(model.config).eval()
    rounded.load_state_dict(model.state_dict())
    assert fingerprint(rounded.bfloat16()) == fingerprint(model)
    with torch.no_grad():
        rounded.float().model.layers[2].mlp.fc1.weight += 0.5
    assert fingerprint(rounded) != fingerprint(model)


def test_the_readout_is_the_models_own_head(family: str) -> None:
    backbone = HfBackbone(tiny(family))
    readout = backbone.readout()
    hidden_TD = torch.randn(5, backbone.spec.width, generator=torch.Generator().manual_seed(2))
    x = hidden_TD - hidden_TD.mean(-1, keepdim=True) if readout.norm == "layer" else hidden_TD
    x = x / (x.square().mean(-1, keepdim=True) + readout.eps).sqrt() * readout.gain_D + readout.shift_D
    logits = x @ readout.weight_VD.T + (0 if readout.bias_V is None else readout.bias_V)
    capped = getattr(backbone.model.config, "final_logit_softcapping", None)
    got = readout.scale * logits
    got = capped * torch.tanh(got / capped) if capped else got
    torch.testing.assert_close(got, backbone.logits(hidden_TD), atol=2e-3, rtol=2e-3)


SMALL_GPT: dict[str, int] = dict(n_embd=32, n_layer=3, n_head=4, n_positions=48, vocab_size=VOCABULARY)
CONTEXTS: dict[str, tuple[str, Any]] = {
    "max_seq_len": (
        "MptForCausalLM",
        t.MptConfig(d_model=32, n_heads=4, n_layers=3, expansion_ratio=2, max_seq_len=48, vocab_size=VOCABULARY),
    ),
    "max_target_positions": (
        "WhisperForCausalLM",
        t.WhisperConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            decoder_layers=3,
            decoder_attention_heads=4,
            decoder_ffn_dim=64,
            max_target_positions=48,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "n_positions": ("GPT2LMHeadModel", t.GPT2Config(**SMALL_GPT)),
    "n_positions of CTRL": (
        "CTRLLMHeadModel",
        t.CTRLConfig(**SMALL_GPT, dff=64),
    ),
}


# A24
@pytest.mark.parametrize("name", list(CONTEXTS))
def test_a_context_is_found_under_any_of_its_names(name: str) -> None:
    kind, config = CONTEXTS[name]
    hf = getattr(t, kind)(config).eval()
    hf.generation_config.eos_token_id = None
    model = adi.load(hf)
    assert model.backbone.spec.context == 48
    wanted = hf.generate(torch.tensor([IDS]), max_new_tokens=48 - len(IDS), do_sample=False)[0, len(IDS) :].tolist()
    for policy in (adi.Verified(), adi.Verified(adi.bare_exits(model, (1,)), adi.Always((1,)), 4)):
        got = adi.generate(model, IDS, policy, max_new_tokens=48 - len(IDS))
        assert list(got.token_ids) == wanted
        with pytest.raises(ValueError, match="context is 48 tokens"):
            adi.generate(model, IDS, policy, max_new_tokens=60)
