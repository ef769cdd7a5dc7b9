"""A transformers model with adi's ``generate``: called as before, the same tokens."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
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


def test_a_folder_with_custom_generate_does_it(tiny_folder: Path, tmp_path: Path, plain: Any) -> None:
    source = Path(__file__).parent.parent / "examples" / "custom_generate"
    (tmp_path / "custom_generate").symlink_to(source)
    ids = torch.tensor(PROMPT)
    before = set(sys.modules)
    ours = copy.deepcopy(plain).generate(ids, custom_generate=str(tmp_path), trust_remote_code=True, max_new_tokens=9)
    assert torch.equal(ours, plain.generate(ids, max_new_tokens=9))
    assert before <= set(sys.modules)
