"""Starts and memory beside GenAI: ``python tools/starts.py llama-1b --export --json docs/results/starts_1b.json``.

Every start is a process of its own; the systems take turns (``--rounds``, after one that is not counted). Told are seconds from
the process's start to the first token of a short prompt, resident memory after loading and after two calls, and how many times
as long the first call takes as the second, on other tokens; what passes cost is not known beforehand. ``--export`` also makes
adi's export in an empty cache and tells its peak; ``--again 1000,4000`` times prompts of such lengths and the same ones once
more, with prefix caches. MODEL is a name as of ``adi bench`` or one of its shapes (random weights).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from adi.cache import cache_folder
from adi.files import write_json

SYSTEMS = ("adi:full:int8", "adi:verified:int8", "openvino-genai:int8")
PROMPT, TOKENS = 32, 24
EXPORT_TIMES, EXPORT_MORE = 1.4, 10**9  # of the checkpoint's bytes, and bytes beside: what making an export may take
RESIDENT_TIMES, RESIDENT_MORE = 1.35, 500_000_000  # the same of compressed weights, beside KV memory, while decoding
MB = 1e-6


def prompt(call: int, length: int = PROMPT) -> list[int]:
    """Token ids that begin differently for each call."""
    return [1000 + (7 * i + 311 * call) % 9000 for i in range(length)]


def adi_calls(name: str, model: str, threads: int) -> dict[str, Any]:
    """Load adi, generate twice."""
    import adi

    _, mode, precision = name.split(":")
    loaded = adi.load(model, precision=precision, threads=threads)
    found: dict[str, Any] = {"loaded_bytes": resident("VmRSS")}
    policy = {"full": adi.FullDepth(), "verified": None}[mode]
    for call in range(2):
        start = time.perf_counter()
        for token in adi.stream(loaded, prompt(call), policy, max_new_tokens=TOKENS, stop_at_eos=False):
            found.setdefault("first_token", time.time())
            del token
        found[f"call_{call}"] = time.perf_counter() - start
    engine: Any = loaded.backbone
    return found | {"kv_bytes": engine.pool.block_bytes * engine.pool.blocks, "resident_bytes": resident("VmRSS")}


def genai_calls(folder: str, threads: int) -> dict[str, Any]:
    """Load OpenVINO GenAI at its defaults, generate twice."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    pipeline = genai.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads)
    found: dict[str, Any] = {"loaded_bytes": resident("VmRSS")}

    def put(_: Any) -> Any:
        found.setdefault("first_token", time.time())
        return genai.StreamingStatus.RUNNING

    class Clock(genai.StreamerBase):  # type: ignore[misc]
        write = staticmethod(put)

        def end(self) -> None:
            pass

    config = genai.GenerationConfig(max_new_tokens=TOKENS, do_sample=False, ignore_eos=True)
    for call in range(2):
        start = time.perf_counter()
        pipeline.generate(ov.Tensor(np.array([prompt(call)], dtype=np.int64)), config, Clock())
        found[f"call_{call}"] = time.perf_counter() - start
    return found | {"resident_bytes": resident("VmRSS")}


def adi_again(precision: str, model: str, lengths: list[int], threads: int) -> dict[str, Any]:
    """Seconds to the first token of a prompt of each length, and of the same prompt again."""
    import adi

    loaded = adi.load(model, precision=precision, threads=threads)

    def first(ids: list[int], kept: adi.PrefixCache | None) -> float:
        start = time.perf_counter()
        stream = adi.stream(loaded, ids, adi.FullDepth(), max_new_tokens=2, stop_at_eos=False, prefix_cache=kept)
        next(stream)
        seconds = time.perf_counter() - start
        stream.close()  # type: ignore[attr-defined]
        return seconds

    first(prompt(0), None)
    with adi.PrefixCache(loaded) as kept:
        return {str(n): [first(prompt(n, n), kept) for _ in range(2)] for n in lengths}


def genai_again(folder: str, lengths: list[int], threads: int) -> dict[str, Any]:
    """The same by OpenVINO GenAI with its prefix cache on."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduling = genai.SchedulerConfig()
    scheduling.enable_prefix_caching = True
    pipeline = genai.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads, scheduler_config=scheduling)
    config = genai.GenerationConfig(max_new_tokens=1, do_sample=False, ignore_eos=True)

    def first(ids: list[int]) -> float:
        start = time.perf_counter()
        pipeline.generate(ov.Tensor(np.array([ids], dtype=np.int64)), config)
        return time.perf_counter() - start

    first(prompt(0))
    return {str(n): [first(prompt(n, n)) for _ in range(2)] for n in lengths}


def resident(which: str) -> int:
    """This process's resident memory now ("VmRSS") or at its largest ("VmHWM"), file pages included."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{which}:")[1].split()[0])


def child(name: str, model: str, threads: int, again: list[int]) -> None:
    """What the process of one start prints."""
    found: dict[str, Any] = {}
    if name == "export":
        import adi

        adi.load(model, precision="int8", threads=threads)
    elif again:
        precision = name.rpartition(":")[2]
        own = name.startswith("adi:")
        found = adi_again(precision, model, again, threads) if own else genai_again(model, again, threads)
    else:
        found = adi_calls(name, model, threads) if name.startswith("adi:") else genai_calls(model, threads)
    print(json.dumps(found | {"peak_bytes": resident("VmHWM")}))


def started(name: str, model: str, threads: int, cache: Path, again: str = "") -> dict[str, Any]:
    """One start in a process of its own, seconds to its first token among what it found."""
    begun = time.time()
    command = [sys.executable, __file__, model, "--child", name, "--threads", str(threads), "--again", again]
    ran = subprocess.run(command, env={**os.environ, "ADI_CACHE": str(cache)}, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{name} did not run: {ran.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found | {"start_seconds": found.pop("first_token", time.time()) - begun}


@contextmanager
def without_costs() -> Iterator[Path]:
    """The cache, but for what passes cost."""
    with tempfile.TemporaryDirectory() as folder:
        for part in cache_folder().iterdir():
            if part.name != "costs":
                (Path(folder) / part.name).symlink_to(part)
        yield Path(folder)


def places(names: list[str], model: str, threads: int) -> dict[str, str]:
    """What each system opens; made where it is not there."""
    from adi.measure.bench.outcomes import Setting
    from adi.measure.bench.peers import genai_folder
    from adi.measure.bench.worker import prepare

    setting = Setting(model, None, None, threads, 0)
    prepare(names, setting)
    return {name: model if name.startswith("adi:") else str(genai_folder(name.split(":")[1], setting)) for name in names}


def read_again(where: dict[str, str], lengths: str, threads: int) -> list[dict[str, Any]]:
    """A row for each system and length; full depth stands for all of adi's modes."""
    rows = []
    for name, place in where.items():
        if "verified" not in name:
            found = started(name, place, threads, cache_folder(), lengths)
            rows += [{"system": name, "positions": int(n), "seconds": found[n]} for n in lengths.split(",")]
    return rows


def measure(where: dict[str, str], rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row for each system: medians over rounds, and of starts and calls the quartiles."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in where}
    for turn in range(rounds + 1):
        for name, place in where.items():
            with without_costs() as cache:
                one = started(name, place, threads, cache)
            found[name] += [one] if turn else []
            print(name, one, file=sys.stderr, flush=True)
    return [_row(name, runs, found) for name, runs in found.items()]


def _row(name: str, runs: list[dict[str, Any]], all_runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    row: dict[str, Any] = {"system": name, "runs": len(runs), "first_call": spread([r["call_0"] / r["call_1"] for r in runs])}
    row |= {key: median(r[key] for r in runs) for key in ("loaded_bytes", "resident_bytes", "peak_bytes")}
    row |= {"start_seconds": spread([r["start_seconds"] for r in runs]), "kv_bytes": runs[0].get("kv_bytes")}
    peer = all_runs.get(f"openvino-genai:{name.rpartition(':')[2]}", [])
    if name.startswith("adi:") and peer:
        row["start_times"] = spread([a["start_seconds"] / b["start_seconds"] for a, b in zip(runs, peer, strict=True)])
    return row


def spread(values: list[float]) -> list[float]:
    """The median and the quartiles."""
    quarters = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return [median(values), quarters[0], quarters[2]]


def weight_bytes(model: str, precision: str) -> int:
    """What the export's compressed weights take on disk."""
    from adi.model.hub import source_folder
    from adi.model.openvino.manifest import recall

    folder = recall(Path(source_folder(model, lambda _: None)), precision)
    return sum(path.stat().st_size for path in folder.glob("*.bin")) if folder else 0


def exported(model: str, threads: int) -> dict[str, Any]:
    """The peak of making adi's int8 export, and what is allowed."""
    from adi.model.hub import source_folder

    place = source_folder(model, lambda _: None)
    checkpoint = sum(path.stat().st_size for path in Path(place).glob("*.safetensors"))
    with tempfile.TemporaryDirectory() as folder:
        one = started("export", place, threads, Path(folder))
    allowed = int(EXPORT_TIMES * checkpoint + EXPORT_MORE)
    return {"checkpoint_bytes": checkpoint, "allowed_bytes": allowed} | {k: one[k] for k in ("peak_bytes", "start_seconds")}


def _told(values: list[float]) -> str:
    return f"{values[0]:.2f} ({values[1]:.2f} to {values[2]:.2f})"


def starts_table(found: dict[str, Any]) -> str:
    """A Markdown table: a row for each system, and a sentence on the export."""
    head = ["", "start, s", "x GenAI", "loaded, MB", "after two calls, MB", "allowed, MB", "peak, MB", "first call / second"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in found["rows"]:
        memory = [f"{MB * row[key]:.0f}" for key in ("loaded_bytes", "resident_bytes")]
        allowed = f"{MB * row['allowed_bytes']:.0f}" if "allowed_bytes" in row else ""
        times = _told(row["start_times"]) if "start_times" in row else ""
        cells = [
            _told(row["start_seconds"]),
            times,
            *memory,
            allowed,
            f"{MB * row['peak_bytes']:.0f}",
            _told(row["first_call"]),
        ]
        lines.append("| " + " | ".join([f"`{row['system']}`", *cells]) + " |")
    if (one := found.get("export")) is not None:
        sizes = [f"{MB * one[key]:,.0f} MB" for key in ("checkpoint_bytes", "peak_bytes", "allowed_bytes")]
        lines += ["", "Making the int8 export of a checkpoint of {} peaks at {}; allowed are {}.".format(*sizes)]
    return "\n".join(lines)


def main() -> None:
    about = argparse.ArgumentParser(description="Starts and memory beside GenAI.")
    about.add_argument("model", nargs="?", default="smollm2-135m")
    about.add_argument("--systems", default=",".join(SYSTEMS))
    about.add_argument("--rounds", type=int, default=5)
    about.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    about.add_argument("--export", action="store_true")
    about.add_argument("--json", type=Path)
    about.add_argument("--again", default="")
    about.add_argument("--child", help=argparse.SUPPRESS)
    given = about.parse_args()
    if given.child is not None:
        child(given.child, given.model, given.threads, [int(n) for n in given.again.split(",") if n])
        return
    from adi.measure.bench.shapes import SHAPES, shaped
    from adi.measure.provenance import provenance
    from adi.prompts import read_prompts

    model = str(shaped(given.model)) if given.model in SHAPES else given.model
    where = places(given.systems.split(","), model, given.threads)
    rows = measure(where, given.rounds, given.threads)
    for row in rows:
        if row["kv_bytes"] is not None:
            weights = weight_bytes(model, row["system"].rpartition(":")[2])
            row["allowed_bytes"] = int(RESIDENT_TIMES * weights + row["kv_bytes"] + RESIDENT_MORE)
    command = "python " + shlex.join(sys.argv)
    found = {
        "format": "adi-starts",
        "version": 1,
        **provenance(command, read_prompts("bench")),
        "model": given.model,
        "rows": rows,
    }
    if given.export:
        found["export"] = exported(model, given.threads)
    if given.again:
        found["again"] = read_again(where, given.again, given.threads)
    if given.json is not None:
        write_json(given.json, found)
    print(starts_table(found))


if __name__ == "__main__":
    main()
