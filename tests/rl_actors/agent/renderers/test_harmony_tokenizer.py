"""The tiny tokenizer: fixed special ids, lossless, digits in pairs."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rl_actors.agent.renderers.harmony import HARMONY_TOKENS, PAD, RETURN, train_tokenizer

CORPUS = ["order 48213 is paid", "order 11 and order 12", '{"order":"48213","amount":"19.99"}'] * 3


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(CORPUS, vocab_size=320)


def test_special_tokens_have_the_first_ids_in_their_order():
    assert tokenizer().convert_tokens_to_ids(list(HARMONY_TOKENS)) == list(range(8))
    assert (tokenizer().pad_token, tokenizer().pad_token_id) == (PAD, 0)
    assert (tokenizer().eos_token, tokenizer().eos_token_id) == (RETURN, 7)


def test_every_byte_has_a_token_whatever_the_corpus_was():
    assert len(train_tokenizer([""], vocab_size=8 + 256)) == 8 + 256
    assert 8 + 256 < len(tokenizer()) <= 320


@settings(deadline=None, max_examples=80)
@given(text=st.text(max_size=40))
@example(text=" two  spaces , don't \t\r\n")
@example(text="\x00\u200b\U0001f600")
def test_text_comes_back_exactly(text: str):
    ids = tokenizer().encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer().decode(ids) == text


@pytest.mark.parametrize(("digits", "tokens"), [("4", 1), ("48", 1), ("482", 2), ("48213", 3), ("482137", 3)])
def test_a_number_is_a_token_per_two_digits(digits: str, tokens: int):
    """Three tokens instead of five are what a small model copies without error."""
    every_pair = [f"{number:02d}" for number in range(100)] * 2
    learned = train_tokenizer(every_pair, vocab_size=8 + 256 + 100)
    assert len(learned.encode(digits, add_special_tokens=False)) == tokens


def test_no_learned_token_spans_a_digit_and_something_else():
    learned = [text for text, index in tokenizer().get_vocab().items() if index >= 8]
    mixed = [text for text in learned if any(c in "0123456789" for c in text) and not text.isdigit()]
    assert not mixed
    assert all(len(text) <= 2 for text in learned if text.isdigit())


def test_training_twice_gives_the_same_tokenizer():
    assert train_tokenizer(CORPUS, vocab_size=320).get_vocab() == tokenizer().get_vocab()
    assert train_tokenizer(["quite another text, quite"], vocab_size=320).get_vocab() != tokenizer().get_vocab()


def test_it_survives_a_directory(tmp_path: Path):
    tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer().get_vocab()
    text = "it 's paid , 48213 \u20ac"
    assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 7)
