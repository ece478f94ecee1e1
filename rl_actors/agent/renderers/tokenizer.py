"""A Harmony tokenizer for the tiny model: byte-level BPE trained on the corpus, digits in pairs.

A small model copies an order number of a few tokens far more exactly than one of many digits. The special tokens are
those of the Harmony format of GPT-OSS.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

START, END, MESSAGE, CHANNEL = "<|start|>", "<|end|>", "<|message|>", "<|channel|>"


CONSTRAIN, CALL, RETURN, PAD = "<|constrain|>", "<|call|>", "<|return|>", "<|endoftext|>"


HARMONY_TOKENS = (PAD, START, END, MESSAGE, CHANNEL, CONSTRAIN, CALL, RETURN)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on `texts`; ids 0..7 are the Harmony tokens in the order of `HARMONY_TOKENS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,2}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(HARMONY_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=RETURN, clean_up_tokenization_spaces=False
    )
