"""``train_looped``: a looped model on a task, under a price on depth, by transformers' Trainer; what ``adi train`` runs.

A run that was stopped resumes from its last checkpoint, to the bit: batches are drawn by their number. Being a ``Trainer``, it
runs on a GPU, on several, or under FSDP by Accelerate's configuration: each process takes its share of every batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta, field
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from adi.errors import AdiError, FileError, UsageError
from adi.files import whole_file, write_text
from adi.model.hub import quiet_transformers
from adi.model.looped import LoopedConfig, LoopedForCausalLM
from adi.progress import Progress, no_progress
from adi.schema import NonNegative, Positive, Record, Share, claim
from adi.tasks.products import Batch
from adi.tasks.registry import Problem, most_hops, task_named
from adi.training.looped.growth import Growth
from adi.training.looped.shaping import Shaper, Shaping
from adi.training.price import OBJECTIVES, Price, costs, watch

EMA, CARRY = "ema.safetensors", "carry.safetensors"
SETTINGS = "train.json"


class TrainSettings(Record, frozen=True):
    """What ``adi train`` reads: the task, the model's form (fields of ``LoopedConfig``), the objective and its schedule.

    The first ``even`` of the steps weigh all turns alike at price 0, so that each learns to answer; then, over ``ramp``,
    price and floor go to their values; the last ``gate_only`` train the gate alone. ``price`` and ``tau`` are in nats; with
    ``highest_price`` each step draws one log-uniformly between the two, and the gate takes it (``gate_price``). Objective
    "last" has a loss at the last turn only and no gate: with ``gate_only`` 0, a network of a fixed depth to compare with.
    ``ema`` 0 keeps no average of the weights. With ``patience`` the loss at the final price of 256 held-out items is taken
    every ``save_every`` steps once the ramp is over, and training ends where so many in a row were no better.

    Over the first ``easy_first`` of the steps the hardest items of a task with hops grow from one hop to all (``Growth``), the
    turns with them, and only the later half of the turns has a loss.

    With ``gradient_turns`` the even steps are deep supervision (TRM, Jolicoeur-Martineau 2025): a step runs so many turns from
    the state in which the last step left its items, without gradient to earlier turns, and items that have had all their
    turns give way to new ones. Far more steps for the same compute. Until they end the gate knows the turns of one step only:
    what it is to learn comes after them. ``shaping`` is the rule of a sparse model's prototypes (``training.looped``), which
    stay as they began under "none"; ``active`` the share of units that the rule "price" lets speak.
    """

    task: str
    model: dict[str, Any] = field(default_factory=dict)
    objective: Literal["price", "plsd", "ouro", "pondernet", "act", "trm", "last"] = "price"
    steps: Positive = 3000
    batch: Positive = 64
    learning_rate: Annotated[float, Meta(gt=0, le=1)] = 1e-3
    weight_decay: NonNegative = 0.05
    warmup: Positive = 100
    price: Annotated[float, Meta(ge=0, le=100)] = 0.05
    highest_price: Annotated[float, Meta(gt=0, le=100)] | None = None
    tau: Annotated[float, Meta(gt=0)] = 0.05
    gate_tau: Annotated[float, Meta(gt=0)] = 0.005
    floor: Share = 0.2
    prior: NonNegative = 0.2
    even: Share = 0.4
    ramp: Share = 0.2
    gate_only: Share = 0.05
    easy_first: Share = 0.0
    gradient_turns: Positive | None = None
    patience: Positive | None = None
    ema: Annotated[float, Meta(ge=0, lt=1)] = 0.995
    shaping: Shaping = "none"
    active: Share = 0.25
    seed: int = 0
    save_every: Positive = 250

    def at(self, step: int) -> tuple[float, float, bool]:
        """How far the ramp is, 0 to 1, the floor, and whether the gate learns alone, at a step."""
        done = step / self.steps
        ramp = min(1.0, max(0.0, (done - self.even) / self.ramp)) if self.ramp else float(done >= self.even)
        return ramp, 1 - (1 - self.floor) * ramp, done >= 1 - self.gate_only

    def config(self, task: Problem) -> LoopedConfig:
        """The model's; UsageError for a field that ``LoopedConfig`` does not have."""
        shape = {"vocab_size": task.vocabulary, "causal": task.causal, "shifted_labels": False, "task": task.name}
        shape |= {"max_position_embeddings": max(task.length, 512) if task.causal else task.length}
        shape |= {} if task.causal else {"positions": "learned", "place_features": task.place_features}
        known = LoopedConfig().to_dict()
        if unknown := [name for name in self.model if name not in known]:
            raise UsageError(f"model.{unknown[0]} is no field of a looped model; it has {', '.join(sorted(known))}.")
        if (self.highest_price is not None or self.model.get("gate_price")) and not 0 < self.price < (self.highest_price or 0):
            raise UsageError(
                f"price is {self.price:g} and highest_price {self.highest_price}; a gate that takes the price learns from a "
                "range: a price above 0, and a highest_price above that."
            )
        if self.shaping != "none" and self.model.get("sparse") not in ("mlp", "all"):
            raise UsageError(
                f"shaping is {self.shaping!r}, a rule for units with prototypes, and model.sparse is "
                f"{self.model.get('sparse', 'none')!r}: set it to mlp or all."
            )
        if self.highest_price is not None:
            shape |= {"gate_price": True, "price_range": [self.price, self.highest_price]}
        if self.easy_first:
            most_hops(task)
            if self.gradient_turns:
                raise UsageError(f"gradient_turns={self.gradient_turns} keeps items that easy_first changes: leave one out.")
        config = LoopedConfig(**{**shape, **self.model})
        if (self.gradient_turns or 0) > config.turns:
            raise UsageError(f"gradient_turns={self.gradient_turns} is more than all turns of an item, {config.turns}.")
        if self.gradient_turns and config.injection == "none":
            raise UsageError(
                f"gradient_turns={self.gradient_turns} needs an injection, not {config.injection!r}: a state kept between "
                "steps must meet its input again; set model.injection to concat or add."
            )
        return config


@dataclass(frozen=True)
class Batches(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The batch of each step, the same whenever it is asked for; split among so many processes, which Accelerate gives the
    entries in turn."""

    task: Problem
    settings: TrainSettings
    processes: int = 1

    def __len__(self) -> int:
        return self.settings.steps * self.processes

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        step, process = divmod(n, self.processes)
        drawn = self.task.batch(self.settings.batch, (self.settings.seed, step))
        return _share(drawn, process, self.processes)


def _share(drawn: Batch, process: int, processes: int) -> dict[str, Tensor]:
    mine = slice(process, None, processes)
    return {"input_ids": torch.tensor(drawn.ids_BT[mine]), "labels": torch.tensor(drawn.labels_BT[mine])}


class Carry:
    """The items of deep supervision between two steps: ids, labels, state and the number of turns each has had."""

    def __init__(self) -> None:
        self.parts: dict[str, Tensor] = {}

    def enter(self, fresh: dict[str, Tensor], config: LoopedConfig) -> dict[str, Tensor]:
        """The items of this step: those that have had all their turns give way to fresh ones, at a state of zeros."""
        ids_BT = fresh["input_ids"]
        if not self.parts:
            state = torch.zeros(*ids_BT.shape, config.hidden_size * config.states, device=ids_BT.device)
            spread = torch.arange(len(ids_BT), device=ids_BT.device) * config.turns // len(ids_BT)
            self.parts = {**fresh, "state": state, "had": spread}  # begun at all ages, so that some leave at each step
        done_B = self.parts["had"] >= config.turns
        for name, part in self.parts.items():
            new = fresh[name][: int(done_B.sum())] if name in fresh else torch.zeros_like(part[done_B])
            self.parts[name] = part.index_put((done_B,), new)
        return self.parts

    def leave(self, state: Tensor, turns: int) -> None:
        """Keep what the step ended in."""
        self.parts["state"], self.parts["had"] = state.detach(), self.parts["had"] + turns


class PriceTrainer(Trainer):  # type: ignore[misc]
    """A ``Trainer`` whose loss is an objective of ``training.price`` over the turns of a looped model."""

    def __init__(self, task: Problem, settings: TrainSettings, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.task, self.settings = task, settings
        self.latest: dict[str, float] = {}
        self.carry, self.growth = Carry(), Growth(task)
        self.shaper = None if settings.shaping == "none" else Shaper(self.model, settings.shaping, settings.active)

    optimizer: Any

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW, without decay of gains, biases and embeddings of places."""
        if self.optimizer is None:
            parameters = list(self.model.parameters())
            groups: list[dict[str, Any]] = [
                {"params": [p for p in parameters if p.dim() > 1]},
                {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
            ]
            options: Any = {"lr": self.settings.learning_rate, "betas": (0.9, 0.98), "weight_decay": self.settings.weight_decay}
            self.optimizer = torch.optim.AdamW(groups, **options)
        return self.optimizer

    def training_step(self, *given: Any, **more: Any) -> Any:
        """With the rule of sparse layers, where there is one."""
        loss = super().training_step(*given, **more)
        if self.shaper is not None:
            self.shaper.finish()
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        """The trunk's loss and the gate's, at this step's price; AdiError where it is no number."""
        settings = self.settings
        at = self.state.global_step if model.training else settings.steps  # held-out items: at the final price
        ramp, floor, gate_only = settings.at(at)
        price = drawn_price(settings, at)
        carried = settings.gradient_turns if at < settings.even * settings.steps else None
        if carried:
            inputs = self.carry.enter(inputs, self.model.config)
        growing = model.training and at < settings.easy_first * settings.steps
        if growing:
            drawn = self.growth.batch(settings.batch, (settings.seed, at))
            share = _share(drawn, self.accelerator.process_index, self.accelerator.num_processes)
            inputs = {name: part.to(inputs["labels"].device) for name, part in share.items()}
        turns = carried or min(self.model.config.turns, self.growth.hops + 1 if growing else self.model.config.turns)
        out = model(inputs["input_ids"], state=inputs.get("state"), turns=turns, output_turns=True, price=price)
        loss_RN = self.model.losses(out.turn_logits, inputs["labels"])
        halt_RN = out.halt_logits[:, inputs["labels"] != -100]
        if self.task.unit == "item":
            count = len(inputs["labels"])
            loss_RN = loss_RN.unflatten(1, (count, -1)).sum(-1)
            halt_RN = out.halt_logits.mean(-1)
        settled = Price(price * ramp, settings.tau, settings.gate_tau, floor, settings.prior)
        cost_R = costs(len(loss_RN)).to(loss_RN)
        terms = OBJECTIVES[settings.objective](loss_RN, halt_RN, cost_R, settled)
        if growing:  # the state on the way may be a step of the answer, which is no guess of the answer
            terms = replace(terms, loss=loss_RN[(turns - 1) // 2 :].mean())
            known = inputs["labels"] != -100
            right = (out.turn_logits[-1].argmax(-1) == inputs["labels"])[known].float().mean()
            self.growth.judge(self.accelerator.reduce(right, "mean"))
        scale = 1.0 if self.task.unit == "place" else len(inputs["labels"]) / int((inputs["labels"] != -100).sum())
        loss = terms.gate if gate_only and model.training else terms.loss * scale + terms.gate
        if carried:
            self.carry.leave(out.state, carried)
        if not bool(torch.isfinite(loss)):
            raise AdiError(f"the loss of step {at} is {loss.item()}; the last good checkpoint is in {self.args.output_dir}.")
        if not model.training:
            return (loss, out) if return_outputs else loss
        self.latest |= {"loss": float(terms.loss.detach()), "gate": float(terms.gate.detach())}
        if "turns" not in self.latest or at % self.args.logging_steps == 0:
            self.latest |= watch(halt_RN)
            self.log(self.latest.copy())
        if isinstance(model, DistributedDataParallel):  # gradients are only gathered where every weight has one
            loss = loss + 0.0 * torch.stack([p.sum() for p in self.model.parameters()]).sum()
        return (loss, out) if return_outputs else loss


def drawn_price(settings: TrainSettings, step: int) -> float:
    """The price of a step: the one, or log-uniform up to the highest."""
    if settings.highest_price is None:
        return settings.price
    share = torch.rand((), generator=torch.Generator().manual_seed(settings.seed * 1_000_003 + step)).item()
    return float(settings.price ** (1 - share) * settings.highest_price**share)


class _Average(TrainerCallback):  # type: ignore[misc]
    """Keeps the exponential average of the weights (all published recursions lose much without); saves it, and what deep
    supervision carries, beside each checkpoint."""

    trainer: PriceTrainer

    def __init__(self, model: LoopedForCausalLM, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        with torch.no_grad():
            for name, p in model.named_parameters():
                whole = p.full_tensor() if isinstance(p, DTensor) else p
                self.weights[name].lerp_(whole.to(self.weights[name]), 1 - decay)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """While the gate learns alone nothing else moves, by momentum neither: with several processes it has gradients of 0."""
        if self.trainer.settings.at(state.global_step)[2]:
            for name, p in model.named_parameters():
                if not name.startswith("gate."):
                    p.grad = None

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            with whole_file(folder / EMA) as fresh:
                save_file(self.weights, fresh)
        with whole_file(folder / _carry_file(args)) as fresh:
            save_file(self.trainer.carry.parts | self.trainer.growth.state, fresh)

    def resume(self, folder: str) -> None:
        carry = _carry_file(self.trainer.args)
        for name in (EMA, carry):
            if not (Path(folder) / name).exists():
                raise FileError(
                    f"the checkpoint {folder} lacks {name}; delete that folder to resume from the one before, or resume "
                    "with as many processes as began."
                )
        self.weights, kept = load_file(Path(folder) / EMA), load_file(Path(folder) / carry)
        self.trainer.growth.state = {name: kept.pop(name) for name in self.trainer.growth.state}
        self.trainer.carry.parts = kept


def _carry_file(args: TrainingArguments) -> str:
    """Each process carries items of its own."""
    return CARRY if args.world_size == 1 else f"carry-{args.process_index + 1}-of-{args.world_size}.safetensors"


class _Reports(TrainerCallback):  # type: ignore[misc]
    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        latest = self.trainer.latest
        if not state.is_world_process_zero:
            return
        turns = f"turns {latest['turns']:.2f} +- {latest['turns_spread']:.2f}"
        self.progress(state.global_step, state.max_steps, f"loss {latest['loss']:.3f}, gate {latest['gate']:.3f}, {turns}")


def train_looped(settings: TrainSettings, out: Path, progress: Progress = no_progress) -> LoopedForCausalLM:
    """Train, or resume, in ``out/work``; the averaged model is saved to ``out`` with ``train.json``, and given back in
    evaluation mode.

    Of several processes (``accelerate launch``, ``torchrun``) each takes its share of a step's batch, which stays as large as
    the settings say; the first one reports and writes the model. UsageError where ``out`` was begun with other settings, and
    for a batch that cannot be split evenly.
    """
    task = task_named(settings.task)
    config, work = settings.config(task), out / "work"
    args = _arguments(settings, work)
    if settings.shaping != "none" and args.world_size > 1:
        raise UsageError(f"shaping = {settings.shaping!r} needs all gradients in one process, and there are {args.world_size}.")
    if settings.batch % args.world_size:
        raise UsageError(
            f"batch = {settings.batch} does not split evenly among {args.world_size} processes: choose a multiple."
        )
    claim(out / SETTINGS, settings)
    torch.manual_seed(settings.seed)
    model = LoopedForCausalLM(config)
    average, reports = _Average(model, settings.ema), _Reports(progress)
    trainer = PriceTrainer(
        task,
        settings,
        model=model,
        args=args,
        train_dataset=Batches(task, settings, args.world_size),
        data_collator=lambda items: items[0],
        eval_dataset=_held_out(task, settings) if settings.patience else None,
        callbacks=[average, reports, *([EarlyStoppingCallback(settings.patience)] if settings.patience else ())],
    )
    average.trainer = reports.trainer = trainer
    trainer.remove_callback(_printer(trainer))
    last = get_last_checkpoint(str(work)) if work.is_dir() else None
    if last is not None:
        average.resume(last)
    with quiet_transformers():
        trainer.train(resume_from_checkpoint=last)
    config.use_cache, config.architectures = True, [LoopedForCausalLM.__name__]  # the Trainer turned the first off
    trained = LoopedForCausalLM(config)
    trained.load_state_dict(average.weights, strict=False)
    if trainer.is_world_process_zero():
        with whole_file(out / "model.safetensors") as fresh:
            save_file(trained.state_dict(), fresh, {"format": "pt"})
        write_text(out / "config.json", config.to_json_string())
    trainer.accelerator.wait_for_everyone()
    trained.eval()
    return trained


def _arguments(settings: TrainSettings, work: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work),
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=settings.warmup,
        max_grad_norm=1.0,
        save_steps=settings.save_every,
        save_total_limit=2,
        logging_steps=100,
        report_to=_reporters(),
        seed=settings.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        eval_strategy="steps" if settings.patience else "no",
        eval_steps=settings.save_every,
        eval_delay=min(settings.steps, round((settings.even + settings.ramp) * settings.steps)),
        per_device_eval_batch_size=1,
        prediction_loss_only=True,
        metric_for_best_model="loss" if settings.patience else None,
        greater_is_better=False,
        ddp_find_unused_parameters=False,
        train_sampling_strategy="sequential",
    )


def _held_out(task: Problem, settings: TrainSettings) -> list[dict[str, Tensor]]:
    drawn = [task.batch(64, (settings.seed, n), test=True) for n in range(4)]
    return [{"input_ids": torch.tensor(each.ids_BT), "labels": torch.tensor(each.labels_BT)} for each in drawn]


def _reporters() -> list[str]:
    from transformers.integrations import is_tensorboard_available

    return ["tensorboard"] if is_tensorboard_available() else []


def _printer(trainer: Trainer) -> Any:
    from transformers import PrinterCallback

    return PrinterCallback
