"""The benchmark: its statistics against what they mean, resuming, and real runs on a tiny model."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

import adi
from adi.errors import AdiError
from adi.measure.bench.outcomes import Outcome, Runner, Setting, Sweep, SweepPoint, Task
from adi.measure.bench.run import Extent, bench, of_length
from adi.measure.bench.summary import agreement, leading_share, ratio_entries, ratio_entry, run_entry
from adi.measure.bench.systems import DRAFT_LENGTHS, adi_runner, backend_for, sweep
from adi.measure.bench.worker import QUIET, System, failure, serve
from adi.prompts import PromptItem
from support import bench_in_threads, invoke

SETTING = Setting("m", None, None, 1, 0)


def system(name: str, speeds: list[float], token: int = 7, ttft: float = 0.1) -> System:
    outcomes = {p: [Outcome((token,) * 10, 10 / speed, ttft)] for p, speed in enumerate(speeds)}
    return System(name, SETTING, outcomes=outcomes)


ITEMS = [PromptItem((str(p),), "code" if p < 2 else "chat") for p in range(5)]


def test_ratios_are_medians_over_prompts_of_paired_speeds() -> None:
    fast, slow = system("adi:a", [20, 10, 90, 40, 8]), system("b", [10, 10, 30, 10, 10], ttft=0.3)
    found = ratio_entry(fast, slow, ITEMS, 0)
    assert found["median"] == pytest.approx(2.0)
    assert found["low"] <= found["median"] <= found["high"]
    assert found["per_category"] == pytest.approx({"code": 1.5, "chat": median([3, 4, 0.8])})
    assert [found[f"ttft_{k}"] for k in ("low", "median", "high")] == pytest.approx([3.0] * 3), "its first token comes sooner"
    del slow.outcomes[2]
    assert ratio_entry(fast, slow, ITEMS, 0)["median"] == pytest.approx(1.5), "only prompts that both ran"


def test_ratios_are_of_adis_modes_against_everybody_who_ran() -> None:
    everybody = [
        system("adi:full:fp32", [1]),
        system("adi:lookup:fp32", [1]),
        system("b", [1]),
        system("c", []),
    ]
    assert [(r["a"], r["b"]) for r in ratio_entries(everybody, ITEMS, 0)] == [
        ("adi:full:fp32", "adi:lookup:fp32"),
        ("adi:full:fp32", "b"),
        ("adi:lookup:fp32", "adi:full:fp32"),
        ("adi:lookup:fp32", "b"),
    ]


def test_match_is_the_share_of_prompts_with_the_same_tokens() -> None:
    one, other = system("adi:a", [1, 1, 1, 1]), system("b", [1, 1, 1, 1])
    assert agreement(one, other, [0, 1, 2, 3], lambda a, b: a == b) == 1
    other.outcomes[2] = [Outcome((7, 7, 2), 1.0, 0.1)]
    assert agreement(one, other, [0, 1, 2, 3], lambda a, b: a == b) == 0.75
    assert agreement(one, other, [0, 1, 2, 3], leading_share) == pytest.approx((3 + 0.2) / 4)
    assert agreement(one, None, [0], leading_share) is None


@pytest.mark.parametrize(
    ("a", "b", "share"),
    [((1, 2), (1, 2), 1.0), ((1, 2, 3), (1, 2), 2 / 3), ((9, 2), (1, 2), 0.0), ((), (), 1.0), ((), (1,), 0)],
)
def test_the_leading_share_ends_at_the_first_difference(a: tuple[int, ...], b: tuple[int, ...], share: float) -> None:
    assert leading_share(a, b) == leading_share(b, a) == pytest.approx(share)


def test_peers_are_compared_with_full_depth_in_their_number_format() -> None:
    full = [system(f"adi:full:{p}", [1], token) for token, p in enumerate(("fp32", "int8", "int4"))]
    wanted = {"llama.cpp": "int4", "openvino-genai:gguf": "int4", "openvino-genai-lookup:int8": "int8", "economize": "fp32"}
    for name, precision in (wanted | {"hf:bf16": "fp32"}).items():
        entry = run_entry(system(name, [1], 2), full, ITEMS)
        assert (entry["match_with"], entry["match"]) == (f"adi:full:{precision}", float(precision == "int4")), name
    assert run_entry(system("b", [1]), [], ITEMS)["match"] is None


def test_a_failed_system_has_all_keys_and_its_error() -> None:
    failed = replace(system("b", []), error="no")
    entry = run_entry(failed, [], ITEMS)
    assert entry["error"] == "no"
    assert entry["tokens_per_second"] is entry["peak_bytes"] is entry["per_category"] is None


def test_precisions_that_only_openvino_has_go_there() -> None:
    assert [backend_for("auto", p) for p in ("auto", "fp32", "bf16", "int8", "int4")] == ["auto"] * 3 + ["openvino"] * 2
    assert backend_for("hf", "int8") == "hf", "what was asked for is refused later, not changed"


@pytest.mark.parametrize("tokens", [12, 30, 77])
def test_prompts_of_one_length_keep_their_frame(tiny_model: adi.Model, tokens: int) -> None:
    made = of_length("the dog and the fox", tokens, tiny_model.encode)
    assert len(made) == tokens
    whole = tiny_model.encode("the dog and the fox")
    assert made[:3] == whole[:3]
    assert made[-2:] == whole[-2:], "the chat template still asks for an answer"
    with pytest.raises(ValueError, match="the chat template alone takes"):
        of_length("the dog", 2, tiny_model.encode)


def test_the_sweep_tries_every_depth_and_length_and_keeps_the_fastest(llama: adi.Model) -> None:
    found = sweep(llama, adi.bare_exits(llama, (2, 4)), [(1, 2, 3), (4, 5, 6)], 6)
    assert {(t.depth, t.draft_tokens) for t in found.grid} == {(d, k) for d in (2, 4) for k in DRAFT_LENGTHS}
    assert all(t.tokens_per_second > 0 and t.accepted_share is not None for t in found.grid)
    grid = (SweepPoint(2, 1, 5.0, 0.1), SweepPoint(4, 2, 9.0, 0.2), SweepPoint(4, 6, 8.0, 0.3))
    assert Sweep(1, 6, 7.0, grid).to_json()["best"] == [4, 2]


def test_static_mode_always_drafts_from_its_depth(tiny_folder: Path) -> None:
    setting = Setting(str(tiny_folder), None, None, 1, 0, static=(4, 3))
    task = Task((5, 6, 7, 8), 12, frozenset())
    full, static = (adi_runner(mode, "fp32", setting) for mode in ("full", "static"))
    got = static.run(task)
    assert got.token_ids == full.run(task).token_ids
    assert got.drafted is not None
    assert got.rounds is not None
    assert got.drafted >= 3 * (got.rounds - 1) - (1 + 2 + 3), "three in every round but the first, less where the end is near"
    assert static.details["static"] == [4, 3]
    assert static.details["spec"]["layers"] == 6


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": f"the fox number {i}", "category": "even" if i % 2 == 0 else "odd"} for i in range(4)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_a_run_on_a_tiny_model(tiny_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench_in_threads(monkeypatch)
    out = tmp_path / "r.json"
    args = ["--prompts", prompts, "--modes", "full,verified,lookup", "--peers", "hf:fp32,hf-lookup:fp32,llama.cpp"]
    done = invoke(tiny_folder, *args, "-n", 6, "--threads", 1, "--json", out, "--prompt-tokens", 20, "--precision", "fp32")
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    runs = {run["name"]: run for run in found["runs"]}
    modes = [f"adi:{mode}:fp32" for mode in ("full", "verified", "lookup")]
    assert list(runs) == [*modes, "hf:fp32", "hf-lookup:fp32", "llama.cpp"]
    assert runs["llama.cpp"]["error"] in ("needs a .gguf file", "llama_cpp is not installed (pip install 'adi-lm[peers]')")
    for name in list(runs)[:-1]:
        assert runs[name]["match"] == runs[name]["match_tokens"] == 1, "the same model says the same"
        assert runs[name]["tokens_per_second"] > 0
        assert runs[name]["ttft_seconds"] > 0
        assert runs[name]["peak_bytes"] > 10**7
        assert runs[name]["about"]
        assert set(runs[name]["per_category"]) == {"even", "odd"}
    for name in modes:
        assert (runs[name]["backend"], runs[name]["spec"]["layers"]) in (("openvino", 6), ("hf", 6))
    assert {(r["a"], r["b"]) for r in found["ratios"]} == {(a, b) for a in modes for b in list(runs)[:-1] if a != b}
    assert found["prompts_hash"]
    assert found["versions"]["torch"]
    assert (found["precision"], found["threads"], found["prompt_tokens"]) == (["fp32"], 1, 20)
    assert "llama.cpp did not run" in done.stdout
    assert not out.with_name("r.json.partial").exists()


def test_the_sweep_goes_into_the_result(tiny_folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench_in_threads(monkeypatch)
    monkeypatch.setattr("adi.measure.bench.run.SWEEP_TOKENS", 4)
    setting = Setting(str(tiny_folder), None, None, 1, 0)
    found = bench(["adi:static:fp32"], [PromptItem(("the dog",), "x")], setting, Extent(4, sweep=True))
    (run,) = found["runs"]
    assert run["sweep"]["best"] == run["static"] in [[4, k] for k in DRAFT_LENGTHS]
    assert run["sweep"]["full_tokens_per_second"] > 0


def test_an_interrupted_run_loses_nothing_it_had_finished(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench_in_threads(monkeypatch)
    out, setting, asked = tmp_path / "r.json", Setting(str(tiny_folder), None, None, 1, 0), []
    items = [PromptItem((f"the dog {i}",), "x") for i in range(3)]
    names = ["adi:full:fp32", "adi:lookup:fp32"]

    def interrupt(done: int, total: int, what: str) -> None:
        if done == 5:  # in the third prompt
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(names, items, setting, Extent(4), result=out, progress=interrupt)
    partial = out.with_name("r.json.partial")
    kept = json.loads(partial.read_text())
    assert {name: set(c["outcomes"]) for name, c in kept["systems"].items()} == {n: {"0", "1"} for n in names}
    kept["systems"]["adi:lookup:fp32"]["outcomes"]["0"][0]["ttft_seconds"] = 4321.0
    partial.write_text(json.dumps(kept))
    found = bench(names, items, setting, Extent(4), result=out, progress=lambda *step: asked.append(step))
    assert [done for done, total, _ in asked if total] == [5, 6], "only the third prompt was left"
    ratio = next(r for r in found["ratios"] if r["a"] == names[1])
    assert ratio["ttft_low"] < 0.01, "the first prompt's figures are those that were kept"
    assert all(run["match"] == 1 for run in found["runs"])
    with pytest.raises(ValueError, match="unfinished benchmark with another max_new_tokens"):
        bench(names, items, setting, Extent(5), result=out)
    partial.write_text("{}")
    with pytest.raises(ValueError, match="not an unfinished benchmark"):
        bench(names, items, setting, Extent(4), result=out)


def test_a_system_that_dies_is_a_line_in_the_result(tiny_folder: Path) -> None:
    one = System("adi:full:fp32", Setting(str(tiny_folder), None, None, 1, 0))
    one.start()
    assert one.ready()
    one._process.kill()
    one._process.join()
    assert one.run(Task((1, 2), 3, frozenset())) is None
    assert one.error == "its process died"
    one.stop()


def test_idle_workers_sleep_and_never_see_an_interruption(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that spin while another system runs would slow it down; what the user has set stays."""
    monkeypatch.setenv("KMP_BLOCKTIME", "7")
    before = dict(os.environ)
    one = System("hf:fp32", Setting(str(tiny_folder), None, None, 2, 0))
    one.start()
    try:
        assert one.ready()
        assert one.run(Task((1, 2, 3), 8, frozenset())) is not None
        place = Path(f"/proc/{one._process.pid}")
        if place.exists():
            has = dict(line.split("=", 1) for line in (place / "environ").read_text().split("\0") if "=" in line)
            assert {name: has[name] for name in QUIET} == {**QUIET, "KMP_BLOCKTIME": "7"} | {
                name: before[name] for name in QUIET if name in before
            }
            masks = dict(line.split(":\t") for line in (place / "status").read_text().splitlines() if ":\t" in line)
            assert int(masks["SigBlk"], 16) >> (signal.SIGINT - 1) & 1, "Ctrl-C does not reach it"
    finally:
        one.stop()
    assert dict(os.environ) == before, "the parent's own environment is as it was"


class _Pipe:
    """A connection that gives these orders, and keeps what it is sent."""

    def __init__(self, *orders: Any) -> None:
        self.orders, self.sent = list(orders), list[Any]()

    def recv(self) -> Any:
        if not self.orders:
            raise EOFError
        return self.orders.pop(0)

    def send(self, answer: Any) -> None:
        self.sent.append(answer)


def test_a_bug_in_a_worker_shows_its_traceback_and_a_users_mistake_does_not(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slip(task: Task) -> Outcome:
        raise ValueError("zip() argument 2 is shorter")

    monkeypatch.setattr("adi.measure.bench.worker.build", lambda *_: Runner(slip, {"about": "x"}))
    pipe = _Pipe(("run", None))
    serve(pipe, "adi:full", SETTING)  # type: ignore[arg-type]
    assert pipe.sent == [(({"about": "x"}, frozenset()), None), (None, "ValueError: zip() argument 2 is shorter")]
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "in slip" in shown
    assert failure(AdiError("needs\n it")) == "needs it"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--modes", "fast"], "--modes 'fast' is not known"),
        (["--modes", ""], "--modes is empty"),
        (["--limit", "0"], "Invalid value for '--limit'"),
        (["--threads", "0"], "Invalid value for '--threads'"),
        (["--prompt-tokens", "0"], "Invalid value for '--prompt-tokens'"),
        (["--peers", "abacus"], "--peers 'abacus' is not known; choose among llama.cpp"),
        (["--precision", "int5"], "--precision 'int5' is not known"),
        (["--precision", ","], "--precision is empty"),
        (["--modes", "full,reflex"], "reflex mode needs --risk R"),
        (["--modes", "full,reflex", "--risk", "0.1", "--threshold", "1"], "reflex mode needs --risk R"),
        (["--modes", "full", "--risk", "0.1"], "--risk 0.1 is of reflex mode"),
        (["--json", "{folder}"], "it is a folder. Name a file."),
        (["--modes", "full,static"], "static mode needs --static DEPTH,K or --sweep, one of them, and got none"),
        (["--sweep"], "--sweep is of static mode; put static into --modes"),
        (["--modes", "static", "--static", "deep"], "--static is DEPTH,K"),
        (["--prompts", "{folder}/none.jsonl"], "cannot read the prompts"),
        (["--prompts", "{folder}/config.json"], "config.json, line 1 is not"),
        (["--json", "/proc/no/r.json"], "cannot write"),
    ],
)
def test_mistakes_are_refused_before_any_work(args: list[str], complaint: str, tiny_folder: Path) -> None:
    done = invoke(*(a.format(folder=tiny_folder) for a in args))
    assert done.exit_code == 2, done.output
    assert complaint in " ".join(done.output.split())
