"""Pages of memory under compiled weights: huge ones, where Linux gives them on request, and none under what they were made of.

Reading weights is most of a token's time.
Packed weights lie in many small blocks of memory, and a pass reads all of them once. In pages of 2 MiB instead of 4 KiB that is
faster and varies less from process to process: measured on SmolLM2-135M at int4, four pairs of processes, 9.1 against 10.2 ms a
token in the engine. Only memory that came into being while a model was compiled is asked for, so that what else the process
holds (a sparse array, another library's heap) stays as it is. ``ADI_HUGE_PAGES=0`` turns it off.

The files of an export are mapped, and compiling reads all of them: their pages are let go afterwards, and come back where the
few that are still wanted (rows of the embedding) are read again.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from adi.machine import give_back_memory

HUGE = 2 << 20
ENTRY = 8  # bytes in /proc/self/pagemap, the highest bit of which says that a page is in memory
FILLED = 3 / 4
MADV_DONTNEED, MADV_HUGEPAGE, MADV_COLLAPSE = 4, 14, 25  # linux/mman.h; the last since Linux 6.1
SWITCH = "ADI_HUGE_PAGES"
Range = tuple[int, int]  # addresses, the second one exclusive


class HugePages:
    """Notes what memory is mapped during ``noting`` and asks for huge pages under it in ``request``; after ``noting`` pages of
    files in ``folder`` are let go."""

    def __init__(self, folder: Path | None = None) -> None:
        self.ranges: list[Range] = []
        self._folder = folder and folder.resolve()  # as the system names what is mapped
        self.wanted = sys.platform == "linux" and os.environ.get(SWITCH) != "0"

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Whatever this process maps in this block, without a file behind it, is compiled weights."""
        before = mapped() if self.wanted else []
        yield
        if self.wanted:
            self.ranges += without(mapped(), before)
        if self._folder is not None:
            _advise(mapped(self._folder), MADV_DONTNEED)

    def request(self) -> threading.Thread | None:
        """Ask in the background, for half a second, and once; None where there is nothing to ask for. Contents stay what they
        are, and a kernel that does not know the request says no."""
        ranges, self.ranges = self.ranges, []
        if not ranges:
            return None
        thread = threading.Thread(target=_collapse, args=(ranges,), name="adi-huge-pages", daemon=True)
        thread.start()
        return thread


def mapped(folder: Path | None = None) -> list[Range]:
    """This process's writable memory without a file behind it, or what it maps of files in a folder; ascending."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if str(folder) + os.sep in fields[-1] if folder else fields[1].startswith("rw") and len(fields) < 6:
                low, _, high = fields[0].partition("-")
                found.append((int(low, 16), int(high, 16)))
    return found


def without(ranges: Sequence[Range], taken: Sequence[Range]) -> list[Range]:
    """What of ``ranges`` lies in none of ``taken``; all are ascending and disjoint."""
    left, same = [], set(taken)
    for low, high in ranges:
        if (low, high) in same:
            continue  # most are
        for begin, end in taken:
            if end > low and begin < high:
                if begin > low:
                    left.append((low, begin))
                low = min(end, high)
        if low < high:
            left.append((low, high))
    return left


def let_go(folder: Path) -> None:
    """Have pages of files in a folder leave memory, as far as nothing was written to them."""
    folder = folder.resolve()
    with contextlib.suppress(OSError, ValueError):
        for part in Path("/proc/self/smaps").read_text().split("VmFlags"):
            head, _, rest = part.lstrip(":").partition("Size:")
            if f"{folder}{os.sep}" in head and " 0 kB" in rest.partition("Anonymous:")[2][:20]:
                low, _, high = head.split("\n")[-2 if head.endswith("\n") else -1].split()[0].partition("-")
                _advise([(int(low, 16), int(high, 16))], MADV_DONTNEED)


def _collapse(ranges: Sequence[Range]) -> None:
    give_back_memory()  # or pages of it would be filled for nobody
    _advise(_filled(ranges), MADV_HUGEPAGE, MADV_COLLAPSE)


def _filled(ranges: Sequence[Range]) -> list[Range]:
    """The parts of these ranges that a huge page can lie under and that are in use almost all over."""
    found = []
    with contextlib.suppress(OSError), Path("/proc/self/pagemap").open("rb", 0) as pages:
        for low, high in ranges:
            for at in range(-(-low // HUGE) * HUGE, high // HUGE * HUGE, HUGE):
                pages.seek(at // mmap.PAGESIZE * ENTRY)
                flags = pages.read(HUGE // mmap.PAGESIZE * ENTRY)[ENTRY - 1 :: ENTRY]
                if sum(flag >> 7 for flag in flags) >= FILLED * len(flags):
                    found.append((at, at + HUGE))
    return found


def _advise(ranges: Sequence[Range], *advice: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for low, high in ranges:
            for one in advice:
                libc.madvise(low, high - low, one)
