"""A transformers model with adi's ``generate``: called as before, the same tokens."""

from __future__ import annotations

import asyncio
import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import transformers as t

import adi
from adi.errors import UsageError

PROMPT = [[5, 9, 31, 40, 5, 9, 31, 40, 5]]


@pytest.fixture(scope="module")
def plain(tiny_hf: Any) -> Any:
    return copy.deepcopy(tiny_hf)


@pytest.fixture(scope="module")
def attached(tiny_hf: Any) -> Iterator[Any]:
    model = copy.deepcopy(tiny_hf)
    assert adi.attach(model, adi.Lookup()) is model
    yield model
    del model.generate
    assert model.generate.__func__ is t.GenerationMixin.generate


def both(plain: Any, attached: Any, **options: Any) -> tuple[Any, Any]:
    ids = torch.tensor(options.pop("ids", PROMPT))
    return plain.generate(ids, **copy.deepcopy(options)), attached.generate(ids, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 24},
        {"max_length": 30},
        {"max_new_tokens": 24, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 24, "eos_token_id": [0, 17, 40]},
        {"max_new_tokens": 24, "min_new_tokens": 8, "eos_token_id": 46},
        {"max_new_tokens": 12, "bad_words_ids": [[46], [130]]},
        {"max_new_tokens": 12, "num_return_sequences": 1, "return_dict_in_generate": True},
        {"max_new_tokens": 9, "prefix_allowed_tokens_fn": lambda batch, ids: [5, 6, 7, 8 + len(ids) % 3]},
    ],
    ids=lambda options: "-".join(options),
)
def test_greedy_tokens_are_transformers_own(plain: Any, attached: Any, options: Any) -> None:
    theirs, ours = both(plain, attached, **options)
    if "return_dict_in_generate" in options:
        theirs, ours = theirs.sequences, ours.sequences
    assert torch.equal(theirs, ours)


def test_padded_rows_of_a_batch(plain: Any, attached: Any) -> None:
    ids, mask = torch.tensor([[0, 0, 5, 9, 31], [7, 8, 5, 9, 31]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    given = {"attention_mask": mask, "max_new_tokens": 16, "eos_token_id": [46, 86], "pad_token_id": 1}
    assert torch.equal(plain.generate(ids, **given), attached.generate(input_ids=ids, **given))


def test_a_streamer_and_criteria_see_every_token(plain: Any, attached: Any, tiny_tokenizer: Any) -> None:
    class Seen:
        def __init__(self) -> None:
            self.put_, self.ended = list[int](), 0

        def put(self, value: Any) -> None:
            self.put_ += value.reshape(-1).tolist()

        def end(self) -> None:
            self.ended += 1

    class Ends(t.StoppingCriteria):  # type: ignore[misc]
        def __call__(self, ids: Any, scores: Any, **more: Any) -> Any:
            return torch.tensor([ids.shape[1] >= 16])

    seen = [Seen(), Seen()]
    texts = []
    for model, streamer in zip((plain, attached), seen, strict=True):
        stop = t.StoppingCriteriaList([Ends()])
        texts.append(model.generate(torch.tensor(PROMPT), max_new_tokens=40, streamer=streamer, stopping_criteria=stop))
    assert torch.equal(*texts)
    assert texts[1].shape[1] == 16
    assert seen[0].put_ == seen[1].put_
    assert seen[1].ended == 1
    word = tiny_tokenizer.decode(texts[0][0, 11:13].tolist())
    given = {"max_new_tokens": 40, "stop_strings": word, "tokenizer": tiny_tokenizer}
    assert torch.equal(*both(plain, attached, **given))


def test_sampling_repeats_by_torchs_seed(attached: Any) -> None:
    given: Any = {"do_sample": True, "temperature": 0.9, "top_k": 20, "max_new_tokens": 12, "num_return_sequences": 2}
    torch.manual_seed(4)
    first = attached.generate(torch.tensor(PROMPT), **given)
    torch.manual_seed(4)
    assert torch.equal(first, attached.generate(torch.tensor(PROMPT), **given))
    assert not torch.equal(first, attached.generate(torch.tensor(PROMPT), **given))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_beams": 3}, "num_beams=3"),
        ({"assistant_model": object()}, "assistant_model"),
        ({"output_scores": True}, "output_scores=True"),
        ({"do_sample": True, "typical_p": 0.5}, "typical_p=0.5"),
        ({"inputs_embeds": torch.zeros(1)}, "inputs_embeds"),
        ({"max_length": 3}, "max_length is 3"),
        ({"stop_strings": "x"}, "tokenizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_meant_is_refused(attached: Any, given: Any, said: str) -> None:
    with pytest.raises((UsageError, adi.errors.ModelError), match=said):
        attached.generate(torch.tensor(PROMPT), **given)


def test_a_pipeline_uses_it(attached: Any, plain: Any, tiny_tokenizer: Any) -> None:
    said = [
        t.pipeline("text-generation", model=model, tokenizer=tiny_tokenizer)("the dog", max_new_tokens=9, do_sample=False)
        for model in (plain, attached)
    ]
    assert said[0] == said[1]


@pytest.fixture(scope="module")
def with_code(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder with ``custom_generate`` in it."""
    folder = tmp_path_factory.mktemp("custom") / "tiny"
    shutil.copytree(tiny_folder, folder)
    shutil.copytree(Path(__file__).parent.parent / "examples" / "custom_generate", folder / "custom_generate")
    return folder


def test_a_folder_with_custom_generate_does_it(with_code: Path, plain: Any) -> None:
    ids, model, options = torch.tensor(PROMPT), copy.deepcopy(plain), {"max_new_tokens": 9}
    for _ in range(2):
        ours = model.generate(ids, custom_generate=str(with_code), trust_remote_code=True, **options)
        assert torch.equal(ours, plain.generate(ids, **options))
    assert "generate" not in vars(model), "the model is left as it is"


def test_a_model_of_such_a_folder_has_it(with_code: Path, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = t.AutoModelForCausalLM.from_pretrained(with_code, trust_remote_code=True), torch.tensor(PROMPT)
    monkeypatch.setattr(t.GenerationMixin, "generate", None)
    ours = [model.generate(ids, max_new_tokens=9), model.generate(input_ids=ids, max_new_tokens=9)]
    monkeypatch.undo()
    assert torch.equal(ours[0], ours[1])
    assert torch.equal(ours[0], plain.generate(ids, max_new_tokens=9))


def test_transformers_serve_uses_it(with_code: Path, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = pytest.importorskip("transformers.cli.serving.model_manager")
    from transformers.cli.serving.utils import GenerateManager

    model, tokenizer = (
        serving.ModelManager(device="cpu", trust_remote_code=True, force_model=str(with_code))
        .loaded_models[f"{with_code}@main"]
        .model,
        t.AutoTokenizer.from_pretrained(with_code),
    )
    inputs, config = tokenizer("the dog", return_tensors="pt"), t.GenerationConfig(max_new_tokens=9, do_sample=False)
    monkeypatch.setattr(t.GenerationMixin, "generate", None)
    said = asyncio.run(GenerateManager().generate_non_streaming(model, tokenizer, inputs, config, "one"))
    monkeypatch.undo()
    assert said[2].tolist() == plain.generate(**inputs, generation_config=config)[0, said[1] :].tolist()


def test_a_copy_of_an_attached_model_has_its_own_weights(attached: Any, plain: Any) -> None:
    theirs, ours, ids = copy.deepcopy(plain), copy.deepcopy(attached), torch.tensor(PROMPT)
    before = attached.generate(ids, max_new_tokens=9)
    for model in (theirs, ours):
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
    assert torch.equal(ours.generate(ids, max_new_tokens=9), theirs.generate(ids, max_new_tokens=9))
    assert torch.equal(attached.generate(ids, max_new_tokens=9), before)


def test_a_trainer_may_call_it(attached: Any, plain: Any) -> None:
    """In training mode, with a forward of the trainer's around the model's, and with other weights after each step."""
    model, ids = copy.deepcopy(attached), torch.tensor(PROMPT)
    original = model.forward

    def forward(self: Any, *given: Any, **options: Any) -> Any:
        return original(*given, **options)

    model.forward = MethodType(forward, model)
    model.train()
    for _ in range(2):
        assert torch.equal(model.generate(ids, max_new_tokens=9), plain.generate(ids, max_new_tokens=9))
        assert model.training
        assert model.model.layers[0].training
    theirs = copy.deepcopy(plain)
    for one in (model, theirs):
        with torch.no_grad():
            one.model.layers[1].mlp.down_proj.weight.mul_(-2)
    assert torch.equal(model.generate(ids, max_new_tokens=9), theirs.generate(ids, max_new_tokens=9))


@pytest.mark.parametrize("way", ["attach", "folder"])
def test_trl_trains_with_it(
    tiny_folder: Path, with_code: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    folder = with_code if way == "folder" else tiny_folder
    model = t.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=way == "folder")
    if way == "attach":
        adi.attach(model)
    tokenizer = t.AutoTokenizer.from_pretrained(folder, pad_token="<|end|>")
    monkeypatch.setattr(t.GenerationMixin, "generate", None)
    options: Any = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "max_steps": 2}
    quiet: Any = {"report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False, "learning_rate": 1e-2}
    trainer = trl.GRPOTrainer(
        model=model, processing_class=tokenizer, args=trl.GRPOConfig(output_dir=str(tmp_path), **options, **quiet),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        train_dataset=datasets.Dataset.from_dict({"prompt": ["the quick", "12 plus 30"] * 4}),
    )  # fmt: skip
    assert trainer.train().global_step == 2
    monkeypatch.undo()
    model.eval()
    ours = model.generate(torch.tensor(PROMPT), max_new_tokens=9, do_sample=False)
    vars(model).pop("generate")
    assert torch.equal(ours, model.generate(torch.tensor(PROMPT), max_new_tokens=9, do_sample=False))
