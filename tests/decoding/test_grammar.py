"""Texts that follow a grammar: the same whatever drafts, alone and together, and again after a restart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance")

import adi
from adi.errors import ModelError, UsageError
from support import PET, PETS, adi_

GRAMMAR = 'start: ("ab" | "cd")+ "."'
WAYS: list[Any] = [adi.FullDepth(), adi.Lookup(), adi.Verified()]


@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "seed": 4, "top_p": 0.9}])
@pytest.mark.parametrize("form", [{"response_format": PET}, {"grammar": GRAMMAR}], ids=["schema", "grammar"])
def test_drafting_changes_nothing(tiny_model: adi.Model, form: Any, drawn: Any) -> None:
    texts = [adi.generate(tiny_model, "ab cd ab", way, max_new_tokens=40, **form, **drawn) for way in WAYS]
    assert len({one.token_ids for one in texts}) == 1
    if "response_format" in form:
        value = json.loads(texts[0].text)
        assert value in PETS
        assert texts[0].text == json.dumps(value)
    else:
        assert texts[0].text.replace("ab", "").replace("cd", "") in ("", ".")


def test_exits_are_judged_under_the_mask(tiny_model: adi.Model) -> None:
    exits = adi.bare_exits(tiny_model, (2, 4))
    way = adi.Verified(exits, adi.Always((2,)), draft_tokens=3)
    given: Any = {"max_new_tokens": 30, "response_format": PET, "temperature": 1, "seed": 8}
    assert adi.generate(tiny_model, "hi", way, **given).token_ids == adi.generate(tiny_model, "hi", WAYS[0], **given).token_ids


def test_together_as_alone(tiny_model: adi.Model) -> None:
    given: Any = {"max_new_tokens": 30, "grammar": GRAMMAR, "temperature": 1}
    many = adi.generate_batch(tiny_model, ["one", "two", "three"], seed=6, **given)
    alone = [adi.generate(tiny_model, p, seed=adi.prompt_seed(6, i), **given) for i, p in enumerate(["one", "two", "three"])]
    assert [one.text for one in many] == [one.text for one in alone]
    assert [one.text for one in adi.generate(tiny_model, "two", n=2, seed=1, **given)] == [
        adi.generate(tiny_model, "two", seed=adi.prompt_seed(1, i), **given).text for i in range(2)
    ]


def test_a_restart_gives_the_same(tiny_model: adi.Model) -> None:
    session = adi.Session(tiny_model, "hi", max_new_tokens=20, response_format=PET)
    scheduler = adi.Scheduler(tiny_model.backbone)
    scheduler.add(session)
    for _ in range(9):
        scheduler.step()
    (entry,) = scheduler._running
    entry.restart()
    tokens = [event.token for _, event in scheduler if isinstance(event, adi.Step)]
    whole = adi.generate(tiny_model, "hi", max_new_tokens=20, response_format=PET).token_ids
    assert tuple(tokens) == whole[len(whole) - len(tokens) :]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"grammar": "start: foo"}, "unknown name"),
        ({"grammar": 5}, "grammar is 5"),
        ({"grammar": GRAMMAR, "response_format": PET}, "give a Lark grammar, or the other"),
        ({"grammar": GRAMMAR, "stop_at_eos": False}, "stop_at_eos is False"),
        ({"response_format": {"type": "xml"}}, "'xml'"),
        ({"response_format": "json"}, "'json'"),
        ({"response_format": {"type": "json_schema"}}, "None; it needs 'schema'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "wat"}}}}, "wat"),
    ],
)
def test_forms_without_meaning_are_refused(tiny_model: adi.Model, given: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        adi.generate(tiny_model, "hi", **given)


def test_a_model_without_a_tokenizer_is_refused(llama: adi.Model) -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        adi.generate(llama, [1, 2], grammar=GRAMMAR)


def test_from_the_shell(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pet.json").write_text(json.dumps(PET))
    options = ("hi", "--model", tiny_folder, "--backend", "hf", "--json", "-n", 40)
    said = adi_("run", *options, "--response-format", tmp_path / "pet.json")
    assert json.loads(json.loads(said.stdout)["text"])["kind"] in ("cat", "dog")
    (tmp_path / "g.lark").write_text(GRAMMAR)
    assert json.loads(adi_("run", *options, "--grammar", tmp_path / "g.lark").stdout)["text"][:2] in ("ab", "cd")
    assert "neither JSON text" in adi_("run", *options, "--response-format", "{").output
