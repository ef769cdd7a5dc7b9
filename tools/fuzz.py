"""Coverage-guided fuzzing, by atheris, of everything that is read from a file.

``pip install atheris``, then ``python tools/fuzz.py exits|trace|result|prompts FOLDER [SECONDS]``; FOLDER keeps the inputs that
reached new code. A file that adi did not write is a ``ValueError``, one sentence; any other error stops the fuzzer and is shown
with its input. ``tests/test_fuzz_*.py`` test the same readers by hypothesis, which knows what such files look like.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["adi"]):
    import adi
    from adi import artifact
    from adi.measure.bench.report import read_result
    from adi.measure.trace import read_trace, trace_of, write_trace
    from adi.prompts import read_prompts

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
WORK = Path(tempfile.mkdtemp(prefix="adi-fuzz-"))


def exits(given: Path) -> None:
    """The page of a folder of exits beside tensors that were written for another."""
    (WORK / "exits").mkdir(exist_ok=True)
    shutil.copy(given, WORK / "exits" / "exits.json")
    artifact.load_exits(WORK / "exits")


READERS: dict[str, Callable[[Path], object]] = {
    "exits": exits,
    "trace": read_trace,
    "result": read_result,
    "prompts": read_prompts,
}


def seeds(what: str, corpus: Path) -> None:
    """True files to begin with."""
    corpus.mkdir(parents=True, exist_ok=True)
    page = artifact.SHIPPED / "smollm2-135m"
    if what == "exits":
        tensors = artifact._read_arrays(page / "exits.safetensors", artifact._digest(page / "exits.safetensors"))
        artifact._read_arrays = lambda path, digest: tensors  # type: ignore[assignment]  # past the digest, which a forger writes too
        shutil.copy(page / "exits.json", corpus / "seed")
    elif what == "result":
        shutil.copy(RESULTS / "ttft.json", corpus / "seed")
    elif what == "prompts":
        (corpus / "seed").write_text('{"prompt": "a", "category": "b"}\n{"turns": ["a", "b"], "category": "c"}\n')
    else:
        policy = adi.Verified(adi.load_exits("smollm2-135m"))
        generation = adi.generate(adi.load("smollm2-135m"), "Hi", policy, max_new_tokens=3)
        write_trace(trace_of(generation, policy, "Hi"), corpus / "seed")


def main(what: str, corpus: Path, seconds: int) -> None:
    seeds(what, corpus)
    reader, given = READERS[what], WORK / "given.json"

    def once(data: bytes) -> None:
        given.write_bytes(data)
        try:
            reader(given)
        except ValueError as error:
            if "\n" in str(error):
                raise AssertionError(f"not one sentence: {error}") from error

    limits = [f"-max_total_time={seconds}", "-max_len=65536", "-rss_limit_mb=8000", "-timeout=20"]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 60)
