"""Training text from Ray workers: each makes whole groups of texts, which follow from seed and number alone.

What they make is what one process makes, whoever makes it, so a worker that dies costs its group's time, and a stopped run
goes on with the first group that is missing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count, islice
from pathlib import Path
from typing import Any

from adi.clusters import join_cluster
from adi.files import whole_file, write_text
from adi.model.load import Model, load
from adi.progress import Progress
from adi.training.generate_data import WORKERS, GenerateOptions, generate_group, sides, tokens_in

Shards = list[tuple[str, bytes]]


@lru_cache(maxsize=2)
def _loaded(source: str, backend: str, precision: str) -> Model:
    return load(source, backend=backend, precision=precision)


def _group(
    source: str, backend: str, precision: str, prompts: Sequence[tuple[int, ...]], options: GenerateOptions, number: int
) -> tuple[int, Shards]:
    """In a worker: the files of one group."""
    with tempfile.TemporaryDirectory() as folder:
        paths = generate_group(_loaded(source, backend, precision), prompts, Path(folder), options, number)
        return number, [(path.name, path.read_bytes()) for path in paths]


@dataclass(frozen=True)
class RayWorkers:
    """Generates text on the Ray cluster that ``ray.init`` joined, in tasks of ``cpus`` processor cores. ``source`` is the model
    by a name or path that the workers can read."""

    source: str
    backend: str
    precision: str
    cpus: float = 1.0

    def __call__(
        self, prompts: Sequence[tuple[int, ...]], folder: Path, options: GenerateOptions, progress: Progress
    ) -> tuple[list[Path], list[Path]]:
        """As ``generate_data.generate_shards``."""
        folder.mkdir(parents=True, exist_ok=True)
        written = [[folder / name for name in mark.read_text().split()] for mark in sorted(folder.glob("group-*"))]
        done = tokens_in(path for group in written for path in group)
        for number, shards in self._in_order(prompts, options, len(written)):
            if done >= options.tokens or not shards:
                break
            for name, data in shards:
                with whole_file(folder / name) as fresh:
                    fresh.write_bytes(data)
            written.append([folder / name for name, _ in shards])
            write_text(folder / f"group-{number:05d}", "\n".join(name for name, _ in shards))
            done += tokens_in(written[-1])
            progress(min(done, options.tokens), options.tokens, f"generating text on Ray, {self.precision}")
        return sides(path for group in written for path in group)

    def _in_order(
        self, prompts: Sequence[tuple[int, ...]], options: GenerateOptions, first: int
    ) -> Iterator[tuple[int, Shards]]:
        """Groups from ``first`` on, as many at once as the cluster has cores for; Ray runs those of a dead worker again."""
        import ray

        cluster: Any = ray
        task: Any = ray.remote(num_cpus=self.cpus, max_retries=-1)(_group)
        shared, at_once = ray.put(list(prompts)), max(1, int(cluster.cluster_resources().get("CPU", 1) / self.cpus))
        begin = partial(task.remote, self.source, self.backend, self.precision, shared, options)
        numbers = count(first)
        running = [begin(number) for number in islice(numbers, at_once)]
        try:
            while True:
                yield ray.get(running.pop(0))
                running.append(begin(next(numbers)))
        finally:
            for one in running:
                ray.cancel(one)


def use_cluster(models: Sequence[Model], source: str, address: str | None) -> None:
    """From now on these models, all of ``source``, generate training text on the Ray cluster at this address; None: here."""
    if address is None:
        return
    join_cluster(address)
    known = str(Path(source).resolve()) if Path(source).exists() else source  # workers have another working directory
    for model in models:
        model.notes[WORKERS] = RayWorkers(known, model.backbone.spec.backend, model.backbone.spec.precision)
