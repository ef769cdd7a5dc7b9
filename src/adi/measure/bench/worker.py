"""A system's process: its memory is its own, and its failure nobody else's."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from adi.errors import AdiError
from adi.measure.bench.outcomes import BatchOutcome, Outcome, Runner, Setting, Sweep, Task
from adi.measure.bench.peers import HOW, build_peer, genai_folder, model_folder
from adi.measure.bench.systems import adi_model, adi_runner, backend_for

# Threads that have nothing to do soon sleep instead of spinning where another system runs. Not at once: llama.cpp's threads
# meet hundreds of times in a token, and without any spinning it runs at a third of its speed.
QUIET = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(eq=False)
class System:
    """One process under test, what it gave for every prompt (several times), and why it stopped if it did."""

    name: str
    setting: Setting
    error: str | None = None
    peak_bytes: int = 0
    resident_bytes: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    ends: frozenset[int] = field(default=frozenset())
    outcomes: dict[int, list[Outcome]] = field(default_factory=dict)
    sweep: Sweep | None = None
    batches: dict[int, dict[int, BatchOutcome]] = field(default_factory=dict)  # by size and first prompt
    batch_error: str | None = None

    def start(self) -> None:
        """Begin to load it in a process of its own. One that failed before stays out."""
        if self.error is None:
            self._process, self._pipe = _spawned(serve, self.name, self.setting)

    def ready(self) -> bool:
        """Wait until it is loaded; where it cannot run, ``error`` is why."""
        if self.error is None and (loaded := self._receive()) is not None:
            self.details, self.ends = loaded
        return self.error is None

    def ask(self, *order: Any) -> Any:
        """Send an order and wait for its answer; None once something went wrong, which ``error`` then holds."""
        if self.error is None:
            with suppress(OSError):  # it died, which shows when its answer is awaited
                self._pipe.send(order)
            return self._receive()
        return None

    def run(self, task: Task) -> Outcome | None:
        """One generation, and what memory it has needed so far."""
        outcome: Outcome | None = self.ask("run", task)
        if outcome is not None and not outcome.token_ids:
            self.error = "it gave no token"
            return None
        peak, self.resident_bytes = self.ask("memory") or (0, self.resident_bytes)
        self.peak_bytes = max(self.peak_bytes, peak)
        return outcome

    def stop(self) -> None:
        """End the process, if there is one."""
        if not hasattr(self, "_process"):
            return
        self._pipe.close()  # which it takes as the end
        self._process.join(timeout=10)
        self._process.terminate()

    def _receive(self) -> Any:
        try:
            value, self.error = self._pipe.recv()
        except (EOFError, OSError):
            value, self.error = None, "its process died"
        return value


def prepare(names: Sequence[str], setting: Setting) -> None:
    """Make, in a process of its own, what is made once and then kept, so that it counts in nobody's memory."""
    if not (jobs := list(dict.fromkeys(job for name in names for job in _first_use(name, setting)))):
        return
    process, pipe = _spawned(_prepare, jobs, setting)
    with suppress(EOFError):  # the systems will report what is wrong
        pipe.recv()
    process.join()


def serve(connection: Connection, name: str, setting: Setting) -> None:
    """Load, then answer ("memory",) and orders to call the ``Runner``, such as ("run", task), until the pipe is closed.

    An answer is a value and None, or None and an error.
    """
    _settle(setting)
    with suppress(EOFError, OSError):  # nobody is there any more
        try:
            runner = build(name, setting)
        except Exception as error:  # whatever keeps a system from running is its result
            connection.send((None, failure(error)))
            return
        connection.send(((dict(runner.details), runner.ends), None))
        while True:
            what, *given = connection.recv()
            answer: tuple[Any, str | None]
            try:
                answer = (peak_bytes(), resident_bytes()) if what == "memory" else getattr(runner, what)(*given), None
            except Exception as error:
                answer = None, failure(error)
            connection.send(answer)


def build(name: str, setting: Setting) -> Runner:
    """The system of that name."""
    kind, _, rest = name.partition(":")
    if kind == "adi":
        mode, _, precision = rest.partition(":")
        return adi_runner(mode, precision or "auto", setting)
    return build_peer(name, setting)


def failure(error: Exception) -> str:
    """An error in one line; one that is no user's mistake may be a bug, so its traceback goes to standard error."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed (pip install 'adi-lm[peers]')"
    line = " ".join(str(error).split())[:300]
    if isinstance(error, AdiError):
        return line
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {line}"


def peak_bytes() -> int:
    """The largest resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """The resident memory that this process has now; its largest where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_bytes()
    return pages * resource.getpagesize()


def _first_use(name: str, setting: Setting) -> Iterator[tuple[Any, ...]]:
    """What a system would have to make if it came first: functions, each with its arguments."""
    kind, _, rest = name.partition(":")
    if kind == "adi" and backend_for(setting.backend, precision := rest.partition(":")[2]) != "hf":
        yield adi_model, precision, setting
    elif kind.startswith("openvino-genai") and rest in HOW:
        yield genai_folder, rest, setting
    elif not Path(setting.model).is_dir():
        yield model_folder, setting


def _prepare(connection: Connection, jobs: Sequence[tuple[Any, ...]], setting: Setting) -> None:
    _settle(setting)
    for make, *given in jobs:
        with suppress(Exception):  # the system that needs it will meet the same and report it
            make(*given)
    with suppress(OSError):
        connection.send(None)


def _settle(setting: Setting) -> None:
    import torch

    torch.set_num_threads(setting.threads)
    torch.manual_seed(setting.seed)


def _spawned(target: Callable[..., None], *args: Any) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *args), daemon=True)
    with _for_workers():
        process.start()
    theirs.close()
    return process, ours


@contextmanager
def _for_workers() -> Iterator[None]:
    """What is started meanwhile has the variables of ``QUIET``, unless the user has set them, and never sees Ctrl-C: an
    interruption is the benchmark's own business."""
    resource_tracker.ensure_running()  # it would be started with the first process, and unblock the signal
    new = {name: value for name, value in QUIET.items() if name not in os.environ}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
