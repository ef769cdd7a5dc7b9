"""A model of the user's while adi runs on it: others may call it, load it again, change it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as t

import adi
from adi.model.hf.passes import Steps
from families import tiny

PROMPT = [5, 17, 9, 5, 17]
TOKENS = 16
FAMILIES = ("llama", "gemma3", "gpt2", "opt", "lfm2", "qwen3_moe")


def own(model: Any, ids: list[int] | None = None, tokens: int = TOKENS) -> tuple[int, ...]:
    ids = PROMPT if ids is None else ids
    return tuple(model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)[0, len(ids) :].tolist())


def says(model: adi.Model, ids: list[int] | None = None) -> tuple[int, ...]:
    verified = adi.Verified(adi.bare_exits(model, (2,)), adi.Always((2,)), 3)
    return adi.generate(model, PROMPT if ids is None else ids, verified, max_new_tokens=TOKENS).token_ids


def a_copy(family: str = "llama") -> Any:
    return copy.deepcopy(tiny(family))


@contextmanager
def between_blocks(call: Callable[[], object]) -> Iterator[None]:
    """``call``, in a thread of its own, while a pass of adi's stands between two blocks."""
    step = Steps.step
    seen: list[int] = []
    busy: list[int] = []

    def interrupted(self: Steps, *given: Any) -> Any:
        if self._run is not None and self._run.calls == 1 and len(seen) < 4 and not busy:
            seen.append(1)
            busy.append(1)
            with ThreadPoolExecutor(1) as other:
                other.submit(call).result()
            busy.clear()
        return step(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Steps, "step", interrupted)
        yield
    assert len(seen) == 4


# A3
@pytest.mark.parametrize("family", FAMILIES)
def test_others_may_call_the_model_in_the_middle_of_a_pass(family: str) -> None:
    hf = tiny(family)
    model, wanted, logits = adi.load(hf), own(hf), hf(torch.tensor([PROMPT])).logits
    theirs: list[bool] = []

    def call() -> None:
        theirs.append(torch.equal(hf(torch.tensor([PROMPT])).logits, logits) and own(hf, tokens=3) == wanted[:3])

    with between_blocks(call):
        assert says(model) == wanted
    assert all(theirs)


# A3
def test_others_may_call_the_model_all_the_while() -> None:
    hf = tiny("llama")
    model, wanted, done = adi.load(hf), own(hf), threading.Event()

    def call() -> int:
        logits = hf(torch.tensor([PROMPT])).logits
        while not done.is_set():
            assert torch.equal(hf(torch.tensor([PROMPT])).logits, logits)
            assert hf.generation_config is not None
        return 1

    with ThreadPoolExecutor(2) as threads:
        calling = threads.submit(call)
        try:
            assert [says(model) for _ in range(6)] == [wanted] * 6
        finally:
            done.set()
        assert calling.result()


# A4
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_each_thread_may_load_the_same_object(family: str) -> None:
    hf = tiny(family)
    prompts = [[i, i + 1, i] for i in range(4, 10)]
    wanted = [own(hf, ids) for ids in prompts]
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(lambda ids: says(adi.load(hf), ids), prompts)) == wanted
    models = [adi.load(hf), adi.load(hf)]
    with between_blocks(lambda: says(models[1])):
        assert says(models[0]) == own(hf)


def test_a_twin_takes_no_second_copy_of_the_weights() -> None:
    hf = tiny("gemma3")
    backbone: Any = adi.load(hf).backbone
    mine = {id(p): p for p in backbone._split.model.parameters()}
    assert set(mine) == {id(p) for p in hf.parameters()}
    tables = [b for b in hf.buffers() if b.numel() > 64]
    assert {b.data_ptr() for b in tables} <= {b.data_ptr() for b in backbone._split.model.buffers()}


def other_block(model: Any) -> None:
    model.model.layers[2] = copy.deepcopy(model.model.layers[4])
    model.model.layers[2].self_attn.layer_idx = 2


CHANGES: dict[str, Callable[[Any], object]] = {
    "a block is replaced": other_block,
    "a matrix is replaced": lambda m: setattr(m.model.layers[1].mlp, "up_proj", torch.nn.Linear(32, 64)),
    "weights change in place": lambda m: m.model.layers[3].mlp.down_proj.weight.data.mul_(3),
    "another precision": lambda m: m.bfloat16(),
    "a hook that steers": lambda m: m.model.layers[3].register_forward_hook(lambda _, a, out: out + 0.5),
    "a hook on what enters": lambda m: m.model.layers[2].register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:])),
    "a hook that only looks": lambda m: m.model.layers[3].register_forward_hook(lambda _, a, out: None),
    "a hook on a part": lambda m: m.model.layers[1].mlp.register_forward_hook(lambda _, a, out: -out),
    "a forward of its own": lambda m: setattr(m.model.layers[1].mlp, "forward", lambda x: 0.1 * x),
    "a block as compile() leaves it": lambda m: setattr(m.model.layers[1], "_compiled_call_impl", m.model.layers[1]._call_impl),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_is_changed_after_loading_is_seen(change: str) -> None:
    hf = a_copy()
    model = adi.load(hf)
    before = says(model)
    CHANGES[change](hf)
    assert says(model) == own(hf)
    assert says(adi.load(hf)) == own(hf), "and what was changed before loading"
    assert before == own(tiny("llama"))


def test_a_precision_that_changes_is_what_the_spec_says() -> None:
    hf = a_copy()
    model = adi.load(hf)
    hf.half()
    says(model)
    assert model.backbone.spec.precision == "fp16"
    weights = model.backbone.spec.fingerprint
    other_block(hf)
    says(model)
    assert model.backbone.spec.fingerprint != weights


def test_an_embedding_that_was_made_longer_is_seen() -> None:
    hf = a_copy()
    model = adi.load(hf)
    hf.resize_token_embeddings(140, mean_resizing=False)
    assert says(model, [5, 139, 7]) == own(hf, [5, 139, 7])
    with pytest.raises(ValueError, match=r"token id 140 is outside the vocabulary \[0, 140\)"):
        says(model, [140])


def test_training_mode_is_looked_for_whenever_a_text_begins() -> None:
    hf = a_copy("gpt2")
    model, wanted = adi.load(hf), own(hf)
    steps = adi.stream(model, PROMPT, adi.FullDepth(), max_new_tokens=TOKENS)
    begun = next(steps).token
    hf.train()
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is in training mode; call model\.eval\(\) first"):
        says(model)
    assert (begun, *(step.token for step in steps)) == wanted, "a text under way ends as it began"
    hf.eval()
    assert says(model) == wanted
    hf.transformer.h[1].mlp.train()
    with pytest.raises(ValueError, match=r"training mode \(transformer\.h\.1\.mlp\.dropout\)"):
        says(model)
    hf.eval()


def test_a_text_under_way_ends_with_the_blocks_it_began_with() -> None:
    hf = a_copy()
    model, wanted = adi.load(hf), own(hf)
    steps = adi.stream(model, PROMPT, adi.FullDepth(), max_new_tokens=TOKENS)
    begun = next(steps).token
    other_block(hf)
    other = says(model)
    assert (begun, *(step.token for step in steps)) == wanted
    assert other == own(hf)


# A22
def test_a_weight_that_is_no_number_is_named() -> None:
    hf = a_copy()
    hf.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"its weight model\.layers\.2\.mlp\.up_proj\.weight holds NaN"):
        adi.load(hf)


def only_the_last(module: Any, args: Any, out: Any) -> Any:
    return torch.cat([out[:, :-1], out[:, -1:] + 1], 1)


def only_a_prompt(module: Any, args: Any, out: Any) -> Any:
    return out + 1 if out.shape[1] > 1 else out


def others_forward(model: Any) -> None:
    own_forward = model.model.layers[3].forward
    model.model.layers[3].forward = lambda *args, **kwargs: own_forward(*args, **kwargs) * kwargs["position_ids"].shape[1]


UNFIT: dict[str, Callable[[Any], object]] = {
    "the last token of a pass": lambda m: m.model.layers[2].register_forward_hook(only_the_last),
    "the last token, late": lambda m: m.model.layers[5].register_forward_hook(only_the_last),
    "the last token of what is read out": lambda m: m.model.register_forward_hook(
        lambda _, args, out: out.__setitem__("last_hidden_state", only_the_last(_, args, out[0]))
    ),
    "prompts only": lambda m: m.model.layers[1].register_forward_hook(only_a_prompt),
    "prompts only, late": lambda m: m.model.layers[4].register_forward_hook(only_a_prompt),
    "a forward of its own": others_forward,
}


# A22
@pytest.mark.parametrize("name", list(UNFIT))
def test_hooks_that_look_beside_a_token_are_refused_by_name(name: str) -> None:
    hf = a_copy()
    model = adi.load(hf)
    UNFIT[name](hf)
    for use in (lambda: adi.load(hf), lambda: says(model)):
        with pytest.raises(ValueError, match=r"with hooks or a forward of its own on model(\.layers\.\d)?\) cannot be split"):
            use()


def test_a_compiled_model_runs_as_what_was_compiled() -> None:
    hf = a_copy()
    compiled = torch.compile(hf, backend="eager")
    for i in range(2):
        hf.model.layers[i] = torch.compile(hf.model.layers[i], backend="eager")
    assert says(adi.load(compiled)) == own(tiny("llama"))


def test_a_model_that_has_no_weights_yet_is_refused() -> None:
    with torch.device("meta"):
        empty = t.LlamaForCausalLM(tiny("llama").config).eval()
    with pytest.raises(ValueError, match="has no weights yet: they are on the meta device"):
        adi.load(empty)
