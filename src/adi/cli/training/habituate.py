"""``adi habituate``: make a workload cheap, and see what it gave."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from adi.cli.shared.options import (
    AnswerTokensOption,
    DeviceOption,
    EngineOptions,
    JsonOption,
    ModelArgument,
    RayOption,
    chosen_among,
    listed,
    option,
)
from adi.cli.shared.output import command_line, err, out, say, show_json
from adi.errors import UsageError
from adi.files import require_writable, write_json, write_text
from adi.progress import Reporter
from adi.prompts import read_prompts

if TYPE_CHECKING:
    from adi.artifact import Exits
    from adi.model.load import Model
    from adi.training.habituate import HabitOptions
    from adi.training.train_model import ModelOptions


TRAIN_MINUTES = 180.0
_rare = partial(option, panel="Training", rare=True)


@dataclass(frozen=True)
class HabituatingOptions:
    """The fields of ``HabitOptions``."""

    minutes: Annotated[float, option("--minutes", help="What all parts together may take on this machine.")] = 60.0
    max_new_tokens: AnswerTokensOption = 128
    seed: Annotated[int, _rare("--seed", help="Of the split, the order and initial weights.")] = 0

    def options(self) -> HabitOptions:
        from adi.training.habituate import HabitOptions

        return HabitOptions(**vars(self))


@dataclass(frozen=True)
class LearningOptions:
    """Whether the model's own blocks learn too."""

    train_model: Annotated[
        bool, option("--train-model", help="Train the model's own blocks too, and compare with the original.", panel="Training")
    ] = False
    train_minutes: Annotated[float, _rare("--train-minutes", help="What that may take besides.")] = TRAIN_MINUTES

    def options(self, seed: int) -> ModelOptions | None:
        from adi.training.train_model import ModelOptions

        if not self.train_model and self.train_minutes != TRAIN_MINUTES:
            raise UsageError(f"--train-minutes {self.train_minutes:g} is for --train-model; give both, or leave it out.")
        return ModelOptions(minutes=self.train_minutes, seed=seed) if self.train_model else None


@dataclass(frozen=True)
class UsedOptions:
    """How the model will be used: in which precisions, and with which exits to begin with."""

    keep: Annotated[
        str | None, option("--keep", help="Exits to begin with; by default those shipped for the model, if there are some.")
    ] = None
    precision: Annotated[
        str, option("--precision", help="Precisions in which it will be used, with commas: int4,int8.", panel="Model")
    ] = "auto"
    device: DeviceOption = "auto"

    def check(self) -> None:
        """UsageError for precisions that are none."""
        from adi.model.load import BACKENDS

        chosen_among(("auto", *BACKENDS["auto"]), "--precision", self.precision)

    def engines(self, model: str | Path) -> list[Model]:
        """The model in every precision."""
        options = [EngineOptions(precision=name, device=self.device) for name in listed(self.precision)]
        return [one.load(str(model)) for one in options]

    def load(self, model: str) -> tuple[Model, list[Model], Exits | None]:
        """The model to train beside, the engines, and the exits."""
        from adi.artifact import load_exits, shipped_for
        from adi.model.load import check_engine

        kept = None if self.keep is None else load_exits(self.keep)
        for name in listed(self.precision):
            check_engine("auto", name)
        loaded = EngineOptions(backend="hf", device=self.device).load(model)
        return loaded, self.engines(model), kept or shipped_for(loaded.backbone.spec.fingerprint)


def habituate(
    model: ModelArgument,
    prompts: Annotated[
        str, option("--prompts", help="Your prompts, JSONL with 'prompt' and 'category', or 'workloads' (built in, 300).")
    ],
    folder: Annotated[
        Path,
        option("--out", "-o", metavar="DIR", file_okay=False, help="Folder for all that is made; a stopped run resumes there."),
    ],
    others: Annotated[
        str, _rare("--others", help="Prompts of other work, which must not become slower: a JSONL file or a set by name.")
    ] = "bench",
    measure_again: Annotated[
        bool, option("--measure-again", help="Measure anew on all held-out prompts, with whatever was trained.")
    ] = False,
    json_out: JsonOption = False,
    ray: RayOption = None,
    *,
    used: UsedOptions,
    habits: HabituatingOptions,
    learning: LearningOptions,
) -> None:
    """Make your kind of work cheap: drafter, memory and exits learn from the model's own answers.

    The model stays as it is, unless --train-model, and output full depth's. A quarter of the prompts is held out; the page in
    --out compares before and after on these and on other prompts. A stopped run resumes with the same command.
    """
    from adi.measure.habits.page import habits_page
    from adi.measure.habits.run import habituate as work
    from adi.measure.habits.run import verdict
    from adi.training.workers import use_cluster

    used.check()
    options, train = habits.options(), learning.options(habits.seed)
    items, other_items = read_prompts(prompts), read_prompts(others)
    require_writable(folder / "exits.json", page := folder / "habits.html", result := folder / "habits.json")
    loaded, engines, kept = used.load(model)
    use_cluster(engines, model, ray)
    (folder / "work").mkdir(parents=True, exist_ok=True)
    with Reporter(err(), log=folder / "work" / "log.txt") as report:
        found = work(
            loaded,
            engines,
            folder,
            items,
            kept,
            options,
            others=() if loaded.tokenizer is None else other_items,
            talk=() if loaded.tokenizer is None else read_prompts("train"),
            command=command_line(),
            measure_again=measure_again,
            train=train,
            reload=used.engines,
            progress=report,
        )
    write_json(result, found)
    write_text(page, habits_page(found))
    show_json(found) if json_out else _say_verdict(verdict(found))
    history = f" --history {folder / 'history'}" if loaded.tokenizer else ""
    say(err(), f"Page: {page}. Use them: adi run --model {model} --exits {folder}{history} 'your prompt'")


def _say_verdict(lines: Iterable[str]) -> None:
    for line in lines:
        say(out(), line)
