"""Exits folders that somebody damaged or forged: a sentence, never another error, never a wait, never code that runs."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import adi
from adi.artifact import _digest
from adi.drafters.datastore import Datastore
from adi.risk.certificate import Certificate
from conftest import exits_with_drafter, random_probe
from damage import bombs, changed, damaged, endless, nested, only_value_errors, workplace

NAMES = ("exits.json", "exits.safetensors")
KINDS = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64),
]
_KEPT: dict[str, Any] = {}


@pytest.fixture(scope="module", autouse=True)
def _keep(llama: adi.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Exits with all that a folder may hold: heads, drafter, probe, answers, certificates."""
    spec = llama.backbone.spec
    rule = adi.AnyOf((adi.Threshold("entropy", {2: 3.0, 4: 4.0}), adi.Weighted({"margin": 1.0}, 0.5, {2: 0.9}, 1)))
    stated = dict(sequences=100, max_new_tokens=8, observed=0.01, mean_depth=4.0, text_hash="a", fingerprint=spec.fingerprint)
    certificate = Certificate("ltt", "log_loss", 0.1, 0.05, rule, nats=4.0, precision="fp32", **stated)  # type: ignore[arg-type]
    exits = replace(
        exits_with_drafter(llama),
        trigger=rule,
        probe=random_probe(spec.width, (2, 4)),
        answers=Datastore.of([[1, 2, 3, 4, 5], [6, 7, 8]]),
        habits=Datastore.of([[3, 4, 5]], "habits"),
        certificates=(certificate,),
        report={"drafter": {"acceptance": {"9": 0.9, "3": 0.2}}},
    )
    place = tmp_path_factory.mktemp("exits")
    exits.save(place)
    _KEPT.update(place=place, model=llama, tensors=load_file(place / NAMES[1]), json=json.loads((place / NAMES[0]).read_text()))
    yield
    _KEPT.clear()


def whole() -> tuple[Path, Path]:
    return _KEPT["place"] / NAMES[0], _KEPT["place"] / NAMES[1]


def sealed(folder: Path, value: Any = None) -> None:
    """Give the JSON the digest of the tensors beside it, as a forger would."""
    value = _KEPT["json"] if value is None else value
    if isinstance(value, dict) and value.get("tensors") == _KEPT["json"]["tensors"]:
        value = {**value, "tensors": _digest(folder / NAMES[1])}
    (folder / NAMES[0]).write_text(json.dumps(value))


def used(folder: Path) -> None:
    """Load, and where that goes well use what was loaded in every way; whatever it is, verified text is full depth's."""
    exits = only_value_errors(lambda: adi.load_exits(folder))
    if exits is None:
        return
    model, ids = _KEPT["model"], (1, 2, 3)
    json.dumps([exits.trigger.to_json(), [c.to_json() for c in exits.certificates]])
    for certificate in exits.certificates:
        certificate.sentence()
        only_value_errors(lambda certificate=certificate: certificate.check(model.backbone.spec))
    policies = [lambda: adi.Verified(exits), lambda: adi.Verified(exits, draft_tokens=3)]
    full = adi.generate(model, ids, adi.FullDepth(), max_new_tokens=3).token_ids
    for made in policies:
        text = only_value_errors(lambda made=made: adi.generate(model, ids, made(), max_new_tokens=3))
        assert text is None or text.token_ids == full


def test_whole_exits_are_used() -> None:
    """Or the rest of this file would prove nothing."""
    exits = adi.load_exits(_KEPT["place"])
    assert exits.drafter is not None
    assert exits.probe is not None
    assert exits.answers is not None
    assert exits.certificates
    for policy in (adi.Verified(exits), adi.Verified(exits, draft_tokens=3)):
        assert adi.generate(_KEPT["model"], (1, 2, 3), policy, max_new_tokens=3).token_ids


@settings(max_examples=60)
@given(st.data())
def test_damaged_json_files(data: st.DataObject) -> None:
    with workplace(*whole()) as folder:
        (folder / NAMES[0]).write_bytes(data.draw(damaged(whole()[0].read_bytes())))
        used(folder)


@settings(max_examples=80)
@given(st.data())
def test_other_values_in_any_place_of_the_json(data: st.DataObject) -> None:
    with workplace(*whole()) as folder:
        sealed(folder, data.draw(changed(_KEPT["json"])))
        used(folder)


@settings(max_examples=60)
@given(st.data())
def test_damaged_tensor_files_with_a_right_digest(data: st.DataObject) -> None:
    with workplace(*whole()) as folder:
        head = 8 + struct.unpack("<Q", whole()[1].read_bytes()[:8])[0]  # most of the damage where most can be said wrong
        content = whole()[1].read_bytes()
        begin = data.draw(damaged(content[:head])) + content[head:]
        (folder / NAMES[1]).write_bytes(data.draw(st.sampled_from([begin, data.draw(damaged(content))])))
        sealed(folder)
        used(folder)


@settings(max_examples=80)
@given(st.data())
def test_tensors_of_other_kinds_and_shapes(data: st.DataObject) -> None:
    with workplace(*whole()) as folder:
        tensors = dict(_KEPT["tensors"])
        name = data.draw(st.sampled_from(sorted(tensors)))
        kind = data.draw(st.sampled_from(KINDS))
        if data.draw(st.booleans()):
            shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
            tensors[name] = torch.zeros(shape).to(kind)
        else:
            tensors[name] = tensors[name].to(kind)
        if data.draw(st.booleans()) and tensors[name].dtype in (torch.float16, torch.float32, torch.float64):
            tensors[name] = tensors[name].double() * data.draw(st.sampled_from([float("nan"), float("inf"), 1e300]))
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / NAMES[1])
        sealed(folder)
        used(folder)


HEADERS: dict[str, bytes] = {
    "a header of terabytes": struct.pack("<Q", 1 << 42) + b"{}",
    "a header of all there can be": struct.pack("<Q", (1 << 64) - 1),
    "no JSON": struct.pack("<Q", 4) + b"\xff\xfe\x00\x01",
    "deep JSON": struct.pack("<Q", 40_000) + nested().encode(),
    "a list": struct.pack("<Q", 2) + b"[]",
}
ENTRIES: dict[str, Any] = {
    "terabytes of tensor": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]},
    "more than there is": {"dtype": "F16", "shape": [64], "data_offsets": [0, 128]},
    "a shape that overflows": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]},
    "a shape that is empty and vast": {"dtype": "F32", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]},
    "places below zero": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
    "places the other way round": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
    "a kind that nobody knows": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]},
    "no places": {"dtype": "F32", "shape": [1]},
}


@pytest.mark.parametrize("name", [*HEADERS, *ENTRIES])
def test_headers_that_claim_what_cannot_be(name: str, tmp_path: Path) -> None:
    with workplace(*whole()) as folder:
        if name in HEADERS:
            content = HEADERS[name]
        else:
            header = json.dumps({"ids_S": ENTRIES[name]}).encode()
            content = struct.pack("<Q", len(header)) + header + bytes(8)
        (folder / NAMES[1]).write_bytes(content)
        sealed(folder)
        with pytest.raises(ValueError, match="damaged"):
            adi.load_exits(folder)


@pytest.mark.parametrize(
    "text", [nested(), nested('{"a":', "}"), '{"format":' + "9" * 9000 + "}", "NaN", "[1e999]", '"\\ud800"']
)
def test_absurd_json(text: str) -> None:
    with workplace(*whole()) as folder:
        (folder / NAMES[0]).write_text(text)
        with pytest.raises(ValueError, match=r"damaged|not an exits file"):
            adi.load_exits(folder)


def test_a_trigger_nested_without_end() -> None:
    rule: dict[str, Any] = {"kind": "never"}
    for _ in range(200):
        rule = {"kind": "any", "parts": [rule]}
    with workplace(*whole()) as folder:
        sealed(folder, {**_KEPT["json"], "trigger": rule})
        with pytest.raises(ValueError, match="nested more than"):
            adi.load_exits(folder)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_is_not_waited_for(name: str) -> None:
    for make in (os.mkfifo, os.mkdir, endless, lambda path: path.symlink_to(path)):
        with workplace(*whole()) as folder:
            (folder / name).unlink()
            make(folder / name)
            with pytest.raises(ValueError, match=r"cannot read|not a file"):
                adi.load_exits(folder)


@pytest.mark.parametrize("name", NAMES)
def test_oversized_files_are_not_read(name: str) -> None:
    with workplace(*whole()) as folder:
        os.truncate(folder / name, 9 << 30)  # takes no disk: the file has a hole
        with pytest.raises(ValueError, match=r"has 9663676416 bytes"):
            adi.load_exits(folder)


@pytest.mark.parametrize(
    "name", ["..", "../exits", "/dev/null", "/dev/zero", "a\x00b", "a" * 5000, "\ud800", "~nobody-such/x", ""]
)
def test_names_that_lead_elsewhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"exits|home"):
        adi.load_exits(name)


def test_names_of_tensors_are_no_paths() -> None:
    with workplace(*whole()) as folder:
        save_file({**_KEPT["tensors"], "../../outside": torch.zeros(1), "/etc/outside": torch.zeros(1)}, folder / NAMES[1])
        sealed(folder)
        before = sorted(folder.parent.iterdir())
        with pytest.raises(ValueError, match="unknown tensors"):
            adi.load_exits(folder)
        assert sorted(folder.parent.iterdir()) == before
        assert sorted(p.name for p in folder.iterdir()) == sorted(NAMES)


def test_no_code_runs(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for content in bombs(marker, tmp_path / "bomb"):
        for name in NAMES:
            with workplace(*whole()) as folder:
                (folder / name).write_bytes(content)
                if name == NAMES[1]:
                    sealed(folder)
                with pytest.raises(ValueError, match=r"damaged|exits"):
                    adi.load_exits(folder)
    assert not marker.exists()


def test_the_bomb_is_one(tmp_path: Path) -> None:
    """Or the test before would prove nothing."""
    import pickle

    pickle.loads(bombs(tmp_path / "ran", tmp_path / "bomb")[0]).close()
    assert (tmp_path / "ran").exists()
