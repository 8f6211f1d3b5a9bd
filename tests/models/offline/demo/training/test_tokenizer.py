"""The tokenizer and the chat template."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from sluice.models.offline.demo.tasks.tasks import Item
from sluice.models.offline.demo.training.packing import Encoder
from sluice.models.offline.demo.training.tokenizer import CHARACTERS, UNKNOWN, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@given(text=st.text(alphabet=CHARACTERS, max_size=80))
def test_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_unknown_characters(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("aé日b") == ["a", UNKNOWN, UNKNOWN, "b"]


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": " copy ab\n"},
        {"role": "assistant", "content": "ab"},
        {"role": "user", "content": "add 10 11"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|system|>be brief<|user|>copy ab<|assistant|>ab<|end|><|user|>add 10 11<|assistant|>"
    )
    closed = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    assert text == closed + "<|assistant|>"


def test_chat_template_refuses_other_roles(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TemplateError, match="tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_training_encoder_agrees_with_the_chat_template(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    first, second = Item("copy", "copy ab", "ab"), Item("add", "add 10 11", "21")
    messages = [{"role": "system", "content": "be brief"}]
    for item in (first, second):
        messages.append({"role": "user", "content": item.prompt})
        messages.append({"role": "assistant", "content": item.answer})
    expected = tokenizer.apply_chat_template(messages, return_dict=False)
    segment = Encoder().encode([first, second], system="be brief")
    assert list(segment.ids) == expected
    answers = [i for i, answer in zip(segment.ids, segment.is_answer, strict=True) if answer]
    assert tokenizer.decode(answers) == "ab<|end|>21<|end|>"
