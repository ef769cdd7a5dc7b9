"""A tiny model with a tokenizer and a chat template, in memory and as a folder; one thread, so that runs repeat."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TERMINAL_WIDTH"] = "1000"  # of typer's boxes: where a message wraps depends on the length of temporary paths

import pytest
from hypothesis import settings

import adi

if TYPE_CHECKING:  # the rest is imported where it is used: xdist's first process runs no test, and would hold all of it
    from adi.drafters.network import Drafter
    from adi.exits.probe import Net, Probe

settings.register_profile("adi", deadline=None)  # how long a case takes is the machine's business
settings.load_profile("adi")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SAMPLE = "the quick brown fox jumps over the lazy dog and then the dog sleeps; 12 plus 30 is 42. é 日本 😀 " * 4


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under xdist a file's tests share a worker, and those of the real model one that begins with them: so one worker holds it,
    before other tests' memory is there, and it is exported once."""
    if not getattr(config.option, "loadgroup", False):
        return
    for item in items:
        real = item.get_closest_marker("real") is not None
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group("real" if real else item.nodeid.split("::")[0]))
    many = Counter(item.nodeid.split("::")[0] for item in items)
    items.sort(key=lambda item: (item.get_closest_marker("real") is None, -many[item.nodeid.split("::")[0]]))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _modules_stay() -> None:
    """What was imported and collected is no garbage: nobody has to look through its million objects after every file."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _given_back() -> Iterator[None]:
    """What a file's tests held goes back to the system before those of the next, and what torch keeps of every traced model."""
    import torch

    yield
    torch._C._jit_clear_class_registry()
    torch.jit._state._clear_class_state()
    for name in ("last_value", "last_traceback", "last_exc"):  # which keep all that a test had that failed
        vars(sys).pop(name, None)
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the run's own, shared by its workers: an export is made once, and the user's cache is left alone."""
    run = tmp_path_factory.getbasetemp()
    folder = (run.parent if "PYTEST_XDIST_WORKER" in os.environ else run) / "adi-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADI_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 300 tokens, so that characters may span several tokens."""
    import transformers as t
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    raw = FastTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator([SAMPLE], trainer)
    return t.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def tiny_hf(tiny_tokenizer: Any) -> Any:
    """A llama of 6 blocks over that tokenizer; its context is 512 tokens."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    config = t.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=304,
        max_position_embeddings=512,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    model = t.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    return model


@pytest.fixture(scope="session")
def tiny_folder(tiny_hf: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_hf.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_hf: Any, tiny_tokenizer: Any) -> adi.Model:
    return adi.load(tiny_hf, tokenizer=tiny_tokenizer)


@pytest.fixture(scope="session")
def llama() -> adi.Model:
    """A tiny llama without tokenizer: prompts are token ids."""
    from families import tiny

    return adi.load(tiny("llama"))


@pytest.fixture(scope="module")
def sharp(tiny_hf: Any, tiny_tokenizer: Any) -> adi.Model:
    """The tiny model with a louder head: a random model is sure of nothing, and then there is nothing to learn."""
    import torch

    loud = copy.deepcopy(tiny_hf)
    with torch.no_grad():
        loud.lm_head.weight *= 6
    return adi.load(loud, tokenizer=tiny_tokenizer)


def random_exits(model: adi.Model, depths: tuple[int, ...], trigger: adi.Trigger, size: int = 40) -> adi.Exits:
    """Exits whose heads were never trained: random, but well formed."""
    import torch

    from adi.exits.heads import Adapter, Heads

    spec = model.backbone.spec
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return (0.1 * torch.randn(shape, generator=generator)).half().float()

    def adapter() -> Adapter:
        gain = (1 + draw(spec.width)).half().float()
        matrices = (draw(spec.width, 4), draw(spec.width, 4))
        return Adapter(gain, draw(spec.width), *matrices, draw(spec.width), draw(1))

    adapters = {depth: adapter() for depth in depths}
    ids = torch.randperm(spec.vocabulary, generator=generator)[:size].sort().values
    base = (spec.fingerprint, spec.name, spec.layers, spec.width, spec.vocabulary)
    return adi.Exits(*base, depths, trigger, Heads(ids, adapters), {"note": "random"}, {"command": "none"})


def random_drafter(model: adi.Model, size: int = 40, hidden: int = 24) -> Drafter:
    """A drafter that was never trained, with every weight other than it begins, in half precision."""
    import torch

    from adi.drafters.network import fresh_drafter

    spec, generator = model.backbone.spec, torch.Generator().manual_seed(2)
    ids = torch.randperm(spec.vocabulary, generator=generator)[:size].sort().values
    net = fresh_drafter(model.backbone.readout(), ids, hidden, generator)
    return net.map(lambda w: (w + 0.1 * torch.randn(w.shape, generator=generator)).half().float())


def exits_with_drafter(model: adi.Model, size: int = 40, hidden: int = 24) -> adi.Exits:
    """Untrained exits with an untrained drafter."""
    return replace(random_exits(model, (2, 4), adi.Never()), drafter=random_drafter(model, size, hidden))


def random_probe(width: int, depths: tuple[int, ...], hidden: int = 3) -> Probe:
    """A probe that was never trained."""
    import torch

    from adi.exits.probe import HEAD_FEATURES, Net, Probe

    generator = torch.Generator().manual_seed(5)

    def net(features: int) -> Net:
        shapes = {"skip_F": (features,), "in_HF": (hidden, features), "inner_H": (hidden,), "out_H": (hidden,), "bias": (1,)}
        return Net(**{name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()})

    return Probe({depth: net(width) for depth in depths}, {depth: net(width + HEAD_FEATURES) for depth in depths})


def probed_exits(model: adi.Model, depths: tuple[int, ...]) -> adi.Exits:
    """Untrained exits with an untrained probe."""
    return replace(random_exits(model, depths, adi.Never()), probe=random_probe(model.backbone.spec.width, depths))


@pytest.fixture(scope="module")
def made() -> dict[Any, Any]:
    """Engines that the module's tests have made, by family and precision."""
    return {}


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of two cores on this machine alone, and only for as long as it is used: its processes hold memory."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()
