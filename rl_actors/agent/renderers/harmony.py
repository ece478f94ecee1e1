"""Harmony, the message format of GPT-OSS: render to token ids, parse token ids, never tokenise twice.

A tool call goes out on the commentary channel and ends with <|call|>, an answer on the final channel and ends with
<|return|>. Before either the policy may think on the analysis channel, or announce what it does on the commentary
channel: such messages end with <|end|> and are shown to nobody.
Source of the format: openai/harmony (format reference).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rl_actors.agent.renderers.renderer import ParsedTurn
from rl_actors.contracts import BadDataError, Demonstration, DemonstrationTurn, ToolCall
from rl_actors.environment import PLAN_TOOL

START, END, MESSAGE, CHANNEL = "<|start|>", "<|end|>", "<|message|>", "<|channel|>"
CONSTRAIN, CALL, RETURN, PAD = "<|constrain|>", "<|call|>", "<|return|>", "<|endoftext|>"
HARMONY_TOKENS = (PAD, START, END, MESSAGE, CHANNEL, CONSTRAIN, CALL, RETURN)
_TOOL_PREFIX = "commentary to=functions."
# Thoughts stay in the context between tool turns: sampled ids are never rendered again.
_UNSEEN = ("analysis", "commentary")
_ENDS = (END, CALL, RETURN)


class _Message(NamedTuple):
    """One message of a completion: its header without the constraint, its body, and the token that ended it."""

    channel: str
    body: str
    end: str


class HarmonyRenderer:
    """Renders and parses with one tokenizer. Raises BadDataError for one that lacks a Harmony token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in HARMONY_TOKENS if token not in vocabulary]
        # Missing ones would be cut into plain tokens: the policy would learn a format that nothing parses.
        if missing:
            raise BadDataError("model.path", missing, "the tokenizer lacks these Harmony tokens; add them before SFT")
        self._id = {token: vocabulary[token] for token in HARMONY_TOKENS}
        self._special = {index: token for token, index in self._id.items()}
        self._tokenizer = tokenizer
        self.stop_token_ids = (self._id[CALL], self._id[RETURN])

    @classmethod
    def from_directory(cls, path: str) -> HarmonyRenderer:
        """Load the tokenizer of a model directory."""
        return cls(AutoTokenizer.from_pretrained(path))

    @property
    def vocabulary(self) -> dict[str, int]:
        """Return token text -> id, as the tokenizer stores them."""
        return dict(self._tokenizer.get_vocab())

    def prompt(self, system: str, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Return the ids of system text and (role, text) messages, open for the assistant's next turn."""
        ids = self._message("system", system) if system else []
        for role, text in messages:
            ids += self._message(role, text)
        return [*ids, self._id[START], *self._encode("assistant")]

    def completion(self, turn: DemonstrationTurn) -> list[int]:
        """Return the ids a policy would have sampled to say this turn."""
        if turn.kind == "final":
            return self.final(turn.text)
        return self.call(PLAN_TOOL if turn.kind == "plan" else turn.tool, turn.arguments)

    def call(self, tool: str, arguments: Mapping[str, Any]) -> list[int]:
        """Return the ids of one tool call."""
        header = [self._id[CHANNEL], *self._encode(f"{_TOOL_PREFIX}{tool} "), self._id[CONSTRAIN]]
        body = json.dumps(arguments, separators=(",", ":"))  # no spaces: each would be a token to sample
        return [*header, *self._encode("json"), self._id[MESSAGE], *self._encode(body), self._id[CALL]]

    def final(self, text: str) -> list[int]:
        """Return the ids of a final answer."""
        return [self._id[CHANNEL], *self._encode("final"), self._id[MESSAGE], *self._encode(text), self._id[RETURN]]

    def observation(self, tool: str, content: str) -> list[int]:
        """Return the ids of a tool's reply, open for the assistant's next turn."""
        header = [self._id[START], *self._encode(f"functions.{tool} to=assistant"), self._id[CHANNEL]]
        body = [*self._encode("commentary"), self._id[MESSAGE], *self._encode(content), self._id[END]]
        return [*header, *body, self._id[START], *self._encode("assistant")]

    def parse(self, token_ids: Sequence[int]) -> ParsedTurn:
        """Read one completion: thoughts, then one call or answer; anything else is `malformed`."""
        messages = self._messages(list(token_ids))
        if messages is None or any(message.channel not in _UNSEEN for message in messages[:-1]):
            return self._malformed(token_ids)
        reasoning, (channel, body, end) = "\n".join(message.body for message in messages[:-1]), messages[-1]
        if end == RETURN and channel == "final":
            return ParsedTurn(kind="final", tool_call=None, text=body, reasoning=reasoning)
        if end == CALL and channel.startswith(_TOOL_PREFIX):
            call = ToolCall(name=channel.removeprefix(_TOOL_PREFIX).strip(), arguments=_json_object(body), raw=body)
            kind = "plan" if call.name == PLAN_TOOL else "tool"
            return ParsedTurn(kind=kind, tool_call=call, text=body, reasoning=reasoning)
        return self._malformed(token_ids)

    def _malformed(self, token_ids: Sequence[int]) -> ParsedTurn:
        return ParsedTurn(kind="malformed", tool_call=None, text=self.decode(token_ids))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text, special tokens shown."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def _messages(self, ids: list[int]) -> list[_Message] | None:
        """Cut a completion into its messages; None unless all but the last end with <|end|> and open the next."""
        reopened = [self._id[START], *self._encode("assistant")]
        messages: list[_Message] = []
        while ids:
            end = next((at for at, token in enumerate(ids) if self._special.get(token) in _ENDS), None)
            message = None if end is None else self._read_message(ids[: end + 1])
            if end is None or message is None:
                return None
            messages.append(message)
            ids = ids[end + 1 :]
            if message.end != END:
                return None if ids else messages
            if ids[: len(reopened)] != reopened:
                return None
            ids = ids[len(reopened) :]
        return None

    def _read_message(self, ids: list[int]) -> _Message | None:
        """Read one message with its end token; None when its special tokens are out of order."""
        marks = [(at, self._special[token]) for at, token in enumerate(ids) if token in self._special]
        names = [name for _, name in marks]
        is_call = names == [CHANNEL, CONSTRAIN, MESSAGE, CALL]
        if not (is_call or names[:-1] == [CHANNEL, MESSAGE]) or marks[0][0] != 0:
            return None
        return _Message(self.decode(ids[1 : marks[1][0]]), self.decode(ids[marks[-2][0] + 1 : -1]), names[-1])

    def _message(self, role: str, text: str) -> list[int]:
        body = [*self._encode(role), self._id[MESSAGE], *self._encode(text)]
        return [self._id[START], *body, self._id[END]]

    def _encode(self, text: str) -> list[int]:
        # With special tokens off nobody can forge a message. Said on every call: transformers resets the tokenizer's
        # own switch, and a ticket's `<|end|>` would be a token.
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def demonstration_texts(system: str, demonstration: Demonstration) -> list[str]:
    """Return the plain texts of a demonstration, for training a tokenizer on."""
    texts = [system, demonstration.prompt]  # plain: special tokens get their ids by name, not by training
    for turn in demonstration.turns:
        header = f"{_TOOL_PREFIX}{turn.tool or PLAN_TOOL} "
        texts += [turn.text] if turn.kind == "final" else [header, json.dumps(turn.arguments, separators=(",", ":"))]
        texts += [f"functions.{turn.tool or PLAN_TOOL} to=assistant", turn.observation, "final", "json", "assistant"]
    return texts


def _json_object(text: str) -> Mapping[str, Any] | None:
    """Return the JSON object in `text`, or None."""
    try:
        value = json.loads(text)
        # NaN, lone surrogates, integers too long to print: what cannot be passed on to a tool is no argument.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on `texts`; ids 0..7 are the Harmony tokens in the order of `HARMONY_TOKENS`."""
    tokenizer = Tokenizer(models.BPE())
    # Digits in pairs: a small model copies an order number of a few tokens far more exactly than one of many digits.
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
