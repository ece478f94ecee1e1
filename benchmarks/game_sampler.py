"""The engine of the relay game: a tiny GPT-OSS that plays it, and the frozen reference it begins as."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from token_game import (
    BLANK,
    END,
    LOOK,
    MAX_LENGTH,
    NUM_TURNS,
    PAD,
    SAY,
    TOKENS_PER_TURN,
    VOCAB_SIZE,
    Luck,
    World,
    demonstrations,
    draw_luck,
    is_solved,
    prompt,
    tool_answer,
    world_of,
)
from torch import Tensor

from rl_actors.contracts import Completion, Outcome, Rollout, RolloutRequest, ToolCall, ToolResult, Turn
from rl_actors.models import build_tiny_model, load_causal_lm, tiny_config


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSpec:
    """A tiny GPT-OSS that is taught the demonstrator's games. `sink` is what its sink logits begin at."""

    skill: float = 0.3
    sink: float = 2.0
    hidden_size: int = 64
    num_layers: int = 2
    num_experts: int = 2
    num_steps: int = 400
    batch_size: int = 32
    learning_rate: float = 3e-3


def make_reference(directory: Path, *, seed: int, spec: ReferenceSpec) -> str:
    """Teach a new model the demonstrator's games, write it, and return its directory."""
    config = tiny_config(
        vocab_size=VOCAB_SIZE,
        hidden_size=spec.hidden_size,
        num_layers=spec.num_layers,
        num_experts=spec.num_experts,
        max_length=MAX_LENGTH,
        eos_token_id=END,
    )
    model: Any = build_tiny_model(config, seed=seed)
    fill_sinks(model, spec.sink)
    model.save_pretrained(directory)
    model = load_causal_lm(directory)
    games = demonstrations(random.Random(seed), spec.skill)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=0.0)
    for step in range(spec.num_steps):
        optimizer.param_groups[0]["lr"] = spec.learning_rate * (1 - step / spec.num_steps)
        batch = [next(games) for _ in range(spec.batch_size)]
        mask_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(game.is_chosen) for game in batch], batch_first=True)
        logprobs_BT = _token_logprobs(model, [game.token_ids for game in batch])
        optimizer.zero_grad()
        (-(logprobs_BT * mask_BT).sum() / mask_BT.sum()).backward()
        optimizer.step()
    model.save_pretrained(directory)
    return str(directory)


@torch.no_grad()
def fill_sinks(model: Any, value: float) -> None:
    """Set every attention sink logit; far below 0 the sink takes no weight, which is attention without sinks."""
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.fill_(value)


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask [B, T], padded on the right; a sampled PAD is a token like any other."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [torch.tensor(row) for row in rows]
    return pad(ids, batch_first=True, padding_value=PAD), pad([torch.ones_like(row) for row in ids], batch_first=True)


def _logits(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    ids_BT, attention_BT = _padded(rows)
    return model(input_ids=ids_BT, attention_mask=attention_BT).logits


def _token_logprobs(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return log p(token | before) [B, T] at temperature 1; column 0 has nothing before it and holds 0."""
    ids_BT, _ = _padded(rows)
    logprobs_BTV = torch.log_softmax(_logits(model, rows)[:, :-1], dim=-1)
    return torch.nn.functional.pad(logprobs_BTV.gather(-1, ids_BT[:, 1:, None]).squeeze(-1), (1, 0))


@dataclass(slots=True)
class Attempt:
    """A rollout on its way: every token so far, and the turns that made them."""

    request: RolloutRequest
    world: World
    luck: Luck
    rng: random.Random
    token_ids: list[int]
    turns: list[Turn] = field(default_factory=list)


class GameSampler:
    """The engine: a copy of the policy, served at a weights version of its own."""

    def __init__(self, path: str, *, keeps_sinks: bool = False) -> None:
        """Load version 0. With `keeps_sinks` a publish changes everything but the attention sinks."""
        self._model = load_causal_lm(path).eval()
        self._model.requires_grad_(False)
        self._keeps_sinks = keeps_sinks
        self.weights_version = 0

    def load(self, weights: Mapping[str, Tensor], weights_version: int) -> None:
        """Take over published weights."""
        taken = {name: x for name, x in weights.items() if not (self._keeps_sinks and name.endswith("sinks"))}
        found = self._model.load_state_dict(taken, strict=not self._keeps_sinks)
        if found.unexpected_keys:
            raise KeyError(f"published weights that the sampler does not have: {found.unexpected_keys}")
        self.weights_version = weights_version

    def rollouts(self, requests: Sequence[RolloutRequest], temperature: float) -> list[Rollout]:
        """Play all games side by side, each with chance of its own seed; temperature 0 is greedy."""
        attempts = [_begin(request) for request in requests]
        for turn in range(NUM_TURNS):
            sampled = [self._sample(attempts, temperature) for _ in range(TOKENS_PER_TURN)]
            for attempt, *tokens in zip(attempts, *sampled, strict=True):
                _end_turn(attempt, turn, tokens, self.weights_version)
        return [_finish(attempt) for attempt in attempts]

    @torch.no_grad()
    def _sample(self, attempts: Sequence[Attempt], temperature: float) -> list[tuple[int, float]]:
        """Append one token to every attempt; returns tokens with their log-probabilities at this temperature."""
        last_B = torch.tensor([len(attempt.token_ids) - 1 for attempt in attempts])
        logits_BTV = _logits(self._model, [attempt.token_ids for attempt in attempts])
        logits_BV = logits_BTV[torch.arange(len(attempts)), last_B]
        logprobs_BV = torch.log_softmax(logits_BV / (temperature or 1.0), dim=-1)
        if temperature:
            draws_B1 = torch.tensor([[attempt.rng.random()] for attempt in attempts], dtype=torch.float64)
            mass_BV = logprobs_BV.double().exp().cumsum(-1)
            chosen_B = torch.searchsorted(mass_BV, draws_B1 * mass_BV[:, -1:], right=True)[:, 0]
        else:
            chosen_B = logprobs_BV.argmax(-1)
        found = logprobs_BV.gather(-1, chosen_B[:, None])[:, 0].tolist()
        for attempt, token in zip(attempts, chosen_B.tolist(), strict=True):
            attempt.token_ids.append(token)
        return list(zip(chosen_B.tolist(), found, strict=True))

    @torch.no_grad()
    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return log p(token t | before), t = 1.., of each sequence at temperature 1, for attestation."""
        found_BT = _token_logprobs(self._model, sequences)
        return [row[1 : len(ids)].tolist() for row, ids in zip(found_BT, sequences, strict=True)]

    @torch.no_grad()
    def distributions(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Return log p(. | before t + 1) [B, T, V] of each sequence, padded on the right."""
        return torch.log_softmax(_logits(self._model, sequences), dim=-1)


def _begin(request: RolloutRequest) -> Attempt:
    world, rng = world_of(request.task.world), random.Random(request.seed)
    return Attempt(request, world, draw_luck(rng), rng, list(prompt(world)))


def _end_turn(attempt: Attempt, turn: int, sampled: Sequence[tuple[int, float]], weights_version: int) -> None:
    """Write down the turn whose tokens were just sampled, and append the tool's answer to it."""
    move = tuple(token for token, _ in sampled)
    before = tuple(attempt.token_ids[: -len(move)])
    done = Completion(
        token_ids=move,
        logprobs=tuple(logprob for _, logprob in sampled),
        weights_version=weights_version,
        finished=True,
        cached_tokens=0,
    )
    if turn == NUM_TURNS - 1:
        kind = "final" if move[0] == SAY else "malformed"
        attempt.turns.append(
            Turn(kind=kind, prompt_token_ids=before, completion=done, tool_call=None, tool_result=None)
        )
        return
    answer = tool_answer(attempt.world, attempt.luck, turn, move)
    attempt.turns.append(
        Turn(
            kind="tool" if move[0] == LOOK else "malformed",
            prompt_token_ids=before,
            completion=done,
            tool_call=ToolCall(name="look", arguments={"drawer": move[1]}, raw=str(move)),
            tool_result=ToolResult(content=str(answer), error="blank" if BLANK in answer else "", duration_ms=0.0),
        )
    )
    attempt.token_ids += answer


def _finish(attempt: Attempt) -> Rollout:
    is_success = is_solved(attempt.world, attempt.turns[-1].completion.token_ids)
    results = [turn.tool_result for turn in attempt.turns if turn.tool_result]
    malformed = tuple(turn.kind for turn in attempt.turns if turn.kind == "malformed")
    return Rollout(
        rollout_id=attempt.request.rollout_id,
        task_id=attempt.request.task.task_id,
        group_id=attempt.request.group_id,
        intent=attempt.request.task.intent,
        turns=tuple(attempt.turns),
        status="ok",
        reply=str(attempt.turns[-1].completion.token_ids),
        outcome=Outcome(success=is_success, violations=malformed, reasons=()),
        tool_calls_count=len(results),
        tool_error_count=sum(bool(result.error) for result in results),
        duration_ms=0.0,
    )
