"""What an exposure study trains: its grid of parts, and the folder in which they are kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from msgspec import Meta

from adi.errors import UsageError
from adi.schema import Natural, Positive, Record

Shape = Literal["looped", "plain"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
SETTINGS = "study.json"
Price = Annotated[float, Meta(ge=0, le=100)]


class Part(Record, frozen=True):
    """One model to train: a shape, a price on depth (nats for a full pass) and a seed."""

    shape: Shape
    price: Price
    seed: Natural

    @property
    def name(self) -> str:
        """The stem of its file."""
        return f"{self.shape}-{self.price:g}-{self.seed}"


class ExposureSettings(Record, frozen=True):
    """The grid of an exposure study and the size of each part: steps of training on items, and most exposures of one."""

    prices: tuple[Price, ...] = (0.0, 0.03, 0.1, 0.3)
    seeds: tuple[Natural, ...] = (0, 1, 2)
    shapes: tuple[Shape, ...] = SHAPES
    steps: Positive = 500
    most_exposures: Positive = 256

    def parts(self) -> Iterator[Part]:
        """The parts seed by seed, so that a stopped study has whole comparisons."""
        for seed in self.seeds:
            for shape in self.shapes:
                for price in self.prices:
                    yield Part(shape, price, seed)

    def __post_init__(self) -> None:
        if self.most_exposures & (self.most_exposures - 1):
            raise UsageError(
                f"most_exposures is {self.most_exposures}; items come 0, 1, 2, 4, 8, ... times, so it must be a power of 2."
            )
