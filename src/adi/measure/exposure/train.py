"""Training one model of the study: the objective of ``adi train``, on texts whose items come by a calendar."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adi.files import whole_file
from adi.measure.exposure.facts import Facts
from adi.measure.exposure.network import TURNS, network
from adi.measure.exposure.settings import ExposureSettings, Part
from adi.model.looped import HaltingGate, LoopedForCausalLM
from adi.tasks.products import Batch
from adi.training.price import Price, costs, priced
from adi.training.trainer import load_weights, schedule

SCHOOL, SCHOOL_BATCH, SCHOOL_RATE = 400, 24, 4e-3
BATCH, RATE, GATE_STEPS, LOOKS = 12, 2e-3, 120, 6
Watch = Callable[[LoopedForCausalLM, int], Any]  # told the model and the steps done


class Life:
    """A model from its first step to its last.

    At school it meets no item and no price: it learns the world, and to answer after every turn. Models of one shape and seed
    share that; it is trained once, and kept in the study's folder. Then come the items, under the price.
    """

    def __init__(self, part: Part, settings: ExposureSettings) -> None:
        self.part, self.steps, self.facts = part, settings.steps, Facts(part.seed, settings.most_exposures)
        self.school_steps = min(SCHOOL, 2 * settings.steps)
        self.model = network(part.shape, part.seed)
        self.trunk_steps = max(1, round(0.95 * self.steps))  # then the gate learns alone
        self.calendar = self.facts.calendar(BATCH * self.trunk_steps)

    def live(self, folder: Path, watch: Watch, progress: Callable[[int], None]) -> list[Any]:
        """Train to the end; what ``watch`` found at school's end and at each sixth of the rest."""
        stored = folder / f"school-{self.part.shape}-{self.part.seed}.pt"
        if not stored.exists():
            self.school(progress)
            with whole_file(stored) as fresh:
                torch.save(self.model.state_dict(), fresh)
        load_weights(self.model, stored)
        seen, optimizer = [watch(self.model, 0)], adamw(self.model, RATE)
        for step in range(self.steps):
            set_rate(optimizer, RATE * min(1.0, (step + 1) / 20, 0.1 + (self.steps - step) / (0.1 * self.steps)))
            batch = self.facts.batch(self.calendar, step * BATCH, BATCH)
            learn(self.model, optimizer, batch, Price(self.part.price), step >= self.trunk_steps)
            progress(step + 1)
            if LOOKS * (step + 1) // self.steps > LOOKS * step // self.steps:
                seen.append(watch(self.model, step + 1))
        self.model.eval()
        return seen

    def school(self, progress: Callable[[int], None]) -> None:
        """Learn the world from fresh questions; all turns weigh alike."""
        optimizer = adamw(self.model, SCHOOL_RATE)
        for step in range(self.school_steps):
            set_rate(optimizer, SCHOOL_RATE * schedule(step / self.school_steps))
            learn(self.model, optimizer, self.facts.batch({}, -(step + 1) * SCHOOL_BATCH, SCHOOL_BATCH), Price(0.0, floor=1.0))
            progress(0)

    def gate_only(self, price: float) -> LoopedForCausalLM:
        """The model with a fresh gate, which learns alone at another price, on texts of its past."""
        twin = deepcopy(self.model)
        twin.gate = HaltingGate(twin.config)
        twin.gate.apply(twin._init_weights)
        optimizer = adamw(twin.gate, RATE)
        for step in range(GATE_STEPS):
            set_rate(optimizer, RATE * schedule(step / GATE_STEPS))
            batch = self.facts.batch(self.calendar, step * BATCH, BATCH)
            ids_BT, labels_BT = torch.tensor(batch.ids_BT), torch.tensor(batch.labels_BT)
            with torch.no_grad():
                read_RBTD = torch.stack(twin.model(input_ids=ids_BT)[0])
                loss_RN = twin.losses(twin.lm_head(read_RBTD), labels_BT)
            halt_RN = twin.gate(read_RBTD)[:, labels_BT != -100]
            descend(twin.gate, optimizer, priced(loss_RN, halt_RN, costs(TURNS), Price(price)).gate)
        return twin


def learn(model: LoopedForCausalLM, optimizer: Any, batch: Batch, price: Price, gate_only: bool = False) -> None:
    """A step of the objective on one batch."""
    ids_BT, labels_BT = torch.tensor(batch.ids_BT), torch.tensor(batch.labels_BT)
    read_RBTD = torch.stack(model.model(input_ids=ids_BT)[0])[:, labels_BT != -100]
    loss_RN = -model.lm_head(read_RBTD).log_softmax(-1).gather(-1, _index(labels_BT, len(read_RBTD)))[..., 0]
    terms = priced(loss_RN, model.gate(read_RBTD.detach()), costs(len(loss_RN)), price)
    descend(model, optimizer, terms.gate if gate_only else terms.loss + terms.gate)


def _index(labels_BT: Tensor, turns: int) -> Tensor:
    labels_N = labels_BT[labels_BT != -100]
    return labels_N.expand(turns, -1)[..., None]


def descend(module: Any, optimizer: Any, loss: Tensor) -> None:
    """Take a step down a loss."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()


def adamw(module: Any, rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)


def set_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
