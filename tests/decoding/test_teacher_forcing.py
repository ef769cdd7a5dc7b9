"""One pass over known texts against its slow twin, which runs the model token by token, one text after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("openvino")

import adi
from adi.decoding.teacher_forcing import ForcedPass, KnownText, forced_pass, forced_readings, full_tokens, own_answers
from adi.errors import MemoryFullError
from adi.model.backbone import Rows
from adi.model.hf import HfBackbone
from adi.model.openvino import OpenVinoBackbone
from conftest import random_exits
from engines import IDS, Cached, engine, folder_of, model_of

DEPTHS = (2, 4)
LONG = tuple(IDS * 3)[:150]
# Prompts of one row, few rows and more than a pass may share; answers of one token and of more than one chunk.
ANSWERS = [(LONG[:5], LONG[5:20]), (LONG[:80], LONG[80:150]), (LONG[3:4], LONG[9:10]), (LONG[:7], LONG[20:95])]
TEXTS = [KnownText.of_answer(*answer) for answer in ANSWERS]


def token_by_token(backbone: Any, text: KnownText) -> ForcedPass:
    """The prompt in one pass, as in decoding, and then one row at a time."""
    cache, layers = backbone.new_cache(), backbone.spec.layers
    parts: dict[str, dict[int, list[torch.Tensor]]] = {
        name: {d: [] for d in (*DEPTHS, layers)} for name in ("hidden", "before")
    }
    prefill = len(text.ids) if text.prefill is None else text.prefill
    for start, end in ((0, prefill), *((at, at + 1) for at in range(prefill, len(text.ids)))):
        hidden_TD, lo = None, 0
        for hi in (*DEPTHS, layers):
            (states,) = backbone.forward([Rows(cache, start, text.ids[start:end], hidden_TD, start < prefill)], lo, hi)
            hidden_TD, lo = states.hidden_TD, hi
            parts["hidden"][hi].append(states.hidden_TD)
            parts["before"][hi].append(states.before_TD)
    rows = {name: {d: torch.cat(p)[text.first :] for d, p in kept.items()} for name, kept in parts.items()}
    return ForcedPass(text, rows["hidden"], rows["before"], {})


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_batched_chunks_have_the_bits_of_one_token_at_a_time(made: Cached, precision: str) -> None:
    backbone = engine(made, "llama", precision)
    together = list(forced_pass(backbone, TEXTS, DEPTHS, details=True))
    for text, seen in zip(TEXTS, together, strict=True):
        (alone,) = forced_pass(backbone, [text], DEPTHS, details=True)
        slow = token_by_token(backbone, text)
        assert seen.text == text
        assert sorted(seen.hidden) == [2, 4, backbone.spec.layers]
        for depth in seen.hidden:
            for one in (seen, alone):
                assert torch.equal(one.hidden[depth], slow.hidden[depth])
                assert torch.equal(one.before[depth], slow.before[depth])
            assert torch.equal(seen.mlp[depth], alone.mlp[depth])
        assert torch.equal(seen.deep_ND, seen.hidden[backbone.spec.layers])


def test_modules_of_transformers_give_the_same_in_chunks_and_token_by_token(llama: adi.Model) -> None:
    for seen in forced_pass(llama.backbone, TEXTS, DEPTHS):
        slow = token_by_token(llama.backbone, seen.text)
        assert seen.before == seen.mlp == {}
        for depth, hidden_ND in seen.hidden.items():
            torch.testing.assert_close(hidden_ND, slow.hidden[depth], atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            hf = llama.backbone.model(torch.tensor([seen.text.ids]), output_hidden_states=True)  # type: ignore[attr-defined]
        torch.testing.assert_close(seen.hidden[4], hf.hidden_states[4][0, seen.text.first :], atol=1e-5, rtol=1e-4)
        assert torch.equal(full_tokens(llama.backbone, seen.deep_ND), hf.logits[0, seen.text.first :].argmax(-1))


def test_a_text_without_an_answer_runs_in_one_pass_and_shows_all_its_rows(made: Cached) -> None:
    backbone, text = engine(made, "llama"), KnownText(LONG[:90])
    (seen,) = forced_pass(backbone, [text])
    (states,) = backbone.forward([Rows(backbone.new_cache(), 0, text.ids, None)], 0, backbone.spec.layers)
    assert list(seen.hidden) == [backbone.spec.layers]
    assert torch.equal(seen.deep_ND, states.hidden_TD)


def test_kv_memory_is_given_back_and_texts_wait_for_it() -> None:
    HfBackbone(model_of("llama"))
    backbone = OpenVinoBackbone.open(folder_of("llama"))
    wanted = list(forced_pass(backbone, TEXTS, DEPTHS))
    assert backbone.pool.used == 0
    small = OpenVinoBackbone.open(folder_of("llama"), kv_bytes=5 * backbone.pool.block_bytes)  # the longest text's
    for one, two in zip(forced_pass(small, TEXTS, DEPTHS), wanted, strict=True):
        assert torch.equal(one.deep_ND, two.deep_ND)
    assert small.pool.used == 0
    begun: Iterator[ForcedPass] = forced_pass(small, TEXTS, DEPTHS)
    next(begun)
    begun.close()  # type: ignore[attr-defined]
    assert small.pool.used == 0
    with pytest.raises(MemoryFullError):
        list(forced_pass(small, [KnownText(LONG + LONG)]))
    assert small.pool.used == 0


def test_results_come_in_order_while_later_texts_have_not_begun(llama: adi.Model) -> None:
    given: list[int] = []

    def texts() -> Iterator[KnownText]:
        for i in range(40):
            given.append(i)
            yield KnownText(IDS[: 5 + i % 7])

    for i, seen in enumerate(forced_pass(llama.backbone, texts())):
        assert len(seen.deep_ND) == 5 + i % 7
        assert len(given) < i + 20
    assert given == list(range(40))


@pytest.mark.parametrize("compiled", [True, False])
def test_readings_are_what_heads_and_the_full_model_give_row_by_row(made: Cached, llama: adi.Model, compiled: bool) -> None:
    backbone: Any = engine(made, "llama") if compiled else llama.backbone
    model = adi.Model(backbone=backbone, tokenizer=None, eos_ids=frozenset())
    exits = random_exits(model, DEPTHS, adi.Never())
    read = exits.reader(backbone)
    for (prompt, answer), one in zip(ANSWERS, forced_readings(backbone, exits, ANSWERS), strict=True):
        assert (one.prompt_ids, tuple(one.answer_T.tolist())) == (prompt, answer)
        slow = token_by_token(backbone, KnownText.of_answer(prompt, answer))
        for t in {0, len(answer) // 2, len(answer) - 1}:
            log_V = backbone.logits(slow.deep_ND[t : t + 1]).log_softmax(-1)[0]
            assert int(one.full_T[t]) == int(log_V.argmax())
            assert float(one.regret_T[t]) == pytest.approx(float(log_V.max() - log_V[answer[t]]), abs=1e-4)
            for e, depth in enumerate(DEPTHS):
                head = read(depth, slow.hidden[depth][t : t + 1])
                assert head.ids_S is not None
                token = int(head.ids_S[head.log_probs_TS[0].argmax()])
                assert int(one.exit_ET[e, t]) == token
                top = float(head.log_probs_TS[0].max().exp())
                assert float(one.signals["top_probability"][e, t]) == pytest.approx(top, abs=1e-5)
                assert float(one.regret_ET[e, t]) == pytest.approx(float(log_V.max() - log_V[token]), abs=1e-4)
        assert torch.equal(forced_readings(backbone, None, [(prompt, answer)])[0].regret_T, one.regret_T)


def test_a_models_own_answer_is_what_full_depth_predicts(tiny_model: adi.Model) -> None:
    answers = own_answers(tiny_model, ["hello", "the fox"], 8)
    assert [a.token_ids for a in answers] == [
        adi.generate(tiny_model, p, adi.FullDepth(), max_new_tokens=8).token_ids for p in ("hello", "the fox")
    ]
    for one in forced_readings(tiny_model.backbone, None, [(a.prompt_ids, a.token_ids) for a in answers]):
        assert torch.equal(one.answer_T, one.full_T)
        assert float(one.regret_T.max()) == 0
