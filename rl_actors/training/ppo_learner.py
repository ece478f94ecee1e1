"""One PPO update: old pass, reference KL, advantages, clipped epochs through DeepSpeed. No Ray here."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rl_actors.algorithms.advantages import gae_advantages, group_advantages, token_rewards, whiten
from rl_actors.algorithms.correction import rollout_correction
from rl_actors.algorithms.kl import kl_estimate
from rl_actors.algorithms.losses import explained_variance, merge_metrics, policy_loss, token_share, value_loss
from rl_actors.contracts import LearnerUpdate, TrainingSample
from rl_actors.models.value_head import PolicyWithValue, token_logprobs_and_entropy
from rl_actors.training.deepspeed_engine import OptimizerSettings, accumulate_and_step, build_engine


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoSettings:
    """What decides an update. KL is in the reward (`kl_coef`, nats to reward units) and bounded by `target_kl`."""

    learning_rate: float
    kl_coef: float
    target_kl: float
    clip_low: float
    clip_high: float
    gamma: float
    lam: float
    epochs: int
    num_minibatches: int
    max_grad_norm: float
    temperature: float
    microbatch_tokens: int
    seed: int
    value_coef: float = 0.5
    value_clip: float = 0.5
    critic_learning_rate_factor: float = 10.0
    zero_stage: int = 0


@dataclass(slots=True)
class Batch:
    """Tensors of one microbatch, [B, T] unless named otherwise; filled in by the old pass."""

    token_ids: torch.Tensor
    attention: torch.Tensor
    loss_mask: torch.Tensor
    rollout_logprobs: torch.Tensor
    scores: torch.Tensor
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


class PpoLearner:
    """Policy, critic and frozen reference of one rank."""

    def __init__(self, policy_path: str, reference_path: str, settings: PpoSettings) -> None:
        """Load the policy and the frozen reference and build the DeepSpeed engine."""
        torch.manual_seed(settings.seed)
        policy: Any = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32)
        self._reference: Any = AutoModelForCausalLM.from_pretrained(reference_path, dtype=torch.float32).eval()
        self._reference.requires_grad_(False)
        self._module = PolicyWithValue(policy, int(policy.config.hidden_size))
        self._settings = settings
        optimizer = OptimizerSettings(
            learning_rate=settings.learning_rate, max_grad_norm=settings.max_grad_norm, zero_stage=settings.zero_stage
        )
        critic_rate = settings.learning_rate * settings.critic_learning_rate_factor
        groups = [
            {"params": list(self._module.policy.parameters()), "lr": settings.learning_rate},
            {"params": list(self._module.value_head.parameters()), "lr": critic_rate},
        ]
        self._engine = build_engine(self._module, optimizer, groups)
        self._reference.to(self._engine.device)
        self._rng = random.Random(settings.seed)
        self.weights_version = 0

    def update(self, samples: Sequence[TrainingSample]) -> LearnerUpdate:
        """Take one PPO update on a batch of rollouts and return the new weights version with its metrics."""
        centred = against_group(samples)
        batches = [self._tensors(group) for group in microbatches(centred, self._settings.microbatch_tokens)]
        metrics = self._old_pass(batches)
        metrics |= self._fill_advantages(batches)
        metrics |= self._epochs(batches)
        self.weights_version += 1
        return LearnerUpdate(weights_version=self.weights_version, metrics=metrics)

    def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return log p(token t | before), t = 1.., of each sequence at temperature 1, for attestation."""
        rows = []
        with torch.no_grad():
            for sequence in sequences:
                ids = torch.tensor([list(sequence)], device=self._engine.device)
                outputs = self._engine(ids, torch.ones_like(ids), 1.0)
                rows.append(outputs.logprobs_BT[0, 1:].tolist())
        return rows

    def weights(self) -> dict[str, torch.Tensor]:
        """Return a copy of the policy's parameters on the CPU, by Hugging Face name (critic excluded)."""
        state = self._module.policy.state_dict()
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}

    def save_policy(self, directory: str) -> None:
        """Write the policy as a Hugging Face model directory."""
        policy: Any = self._module.policy
        policy.save_pretrained(directory)

    def save_checkpoint(self, directory: str) -> None:
        """Write everything `load_checkpoint` needs to continue."""
        state = {"weights_version": self.weights_version, "rng": self._rng.getstate(), "torch": torch.get_rng_state()}
        self._engine.save_checkpoint(directory, tag=_TAG, client_state=state)

    def load_checkpoint(self, directory: str) -> None:
        """Restore weights, optimizer, critic and random state."""
        _, state = self._engine.load_checkpoint(directory, tag=_TAG)
        self.weights_version = state["weights_version"]
        self._rng.setstate(_as_tuple(state["rng"]))
        torch.set_rng_state(state["torch"])

    def snapshot_state(self) -> dict[str, Any]:
        """Return a copy of the module's weights, to restore after an instability."""
        return copy.deepcopy(self._module.state_dict())

    def restore_state(self, state: dict[str, Any]) -> None:
        """Put back what `snapshot_state` returned."""
        self._module.load_state_dict(state)

    def _tensors(self, samples: Sequence[TrainingSample]) -> Batch:
        length = max(len(sample.token_ids) for sample in samples)
        shape = (len(samples), length)
        device = self._engine.device
        ids, attention = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        mask, rollout_logprobs = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
        for row, sample in enumerate(samples):
            size = len(sample.token_ids)
            ids[row, :size] = torch.tensor(sample.token_ids)
            attention[row, :size] = 1
            mask[row, :size] = torch.tensor(sample.loss_mask)
            rollout_logprobs[row, :size] = torch.tensor(sample.rollout_logprobs)
        scores = torch.tensor([sample.reward for sample in samples], device=device)
        ids, attention, mask, rollout_logprobs = (x.to(device) for x in (ids, attention, mask, rollout_logprobs))
        empty = torch.zeros(shape, device=device)
        return Batch(ids, attention, mask, rollout_logprobs, scores, empty, empty, empty, empty, empty)

    @torch.no_grad()
    def _old_pass(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Fill old and reference log-probabilities and values; report the engine-learner gap and the KL."""
        num_tokens = sum(int(batch.loss_mask.sum()) for batch in batches)
        parts = []
        for batch in batches:
            outputs = self._engine(batch.token_ids, batch.attention, self._settings.temperature)
            batch.old_logprobs, batch.values = outputs.logprobs_BT, outputs.values_BT
            logits = self._reference(input_ids=batch.token_ids, attention_mask=batch.attention).logits
            reference, _ = token_logprobs_and_entropy(logits, batch.token_ids, self._settings.temperature)
            batch.ref_logprobs = reference
            parts.append(self._old_metrics(batch, outputs.entropy_BT, num_tokens))
        return merge_metrics(parts)

    def _old_metrics(self, batch: Batch, entropy_BT: torch.Tensor, num_tokens: int) -> dict[str, float]:
        gap = (batch.old_logprobs - batch.rollout_logprobs).abs()
        k1 = kl_estimate(batch.old_logprobs, batch.ref_logprobs, kind="k1")
        k3 = kl_estimate(batch.old_logprobs, batch.ref_logprobs, kind="k3")
        means = {"mismatch_abs_mean": gap, "entropy": entropy_BT, "kl_to_reference": k1, "kl_to_reference_k3": k3}
        metrics = {name: float(token_share(x, batch.loss_mask, num_tokens)) for name, x in means.items()}
        return metrics | {"mismatch_abs_max": float(torch.where(batch.loss_mask, gap, gap.new_zeros(())).max())}

    @torch.no_grad()
    def _fill_advantages(self, batches: Sequence[Batch]) -> dict[str, float]:
        """KL in the reward, GAE carried across tool tokens, whitening over the whole batch."""
        s = self._settings
        for batch in batches:
            kl = kl_estimate(batch.old_logprobs, batch.ref_logprobs, kind="k1")
            rewards = token_rewards(batch.scores, kl, batch.loss_mask, kl_coef=s.kl_coef)
            batch.advantages, batch.returns = gae_advantages(
                rewards, batch.values, batch.loss_mask, gamma=s.gamma, lam=s.lam
            )
        flat = {name: torch.cat([getattr(b, name)[b.loss_mask] for b in batches]) for name in _FLAT}
        everything = torch.ones_like(flat["returns"], dtype=torch.bool)
        white = whiten(flat["advantages"][None], everything[None])[0]
        for batch, part in zip(batches, white.split([int(b.loss_mask.sum()) for b in batches]), strict=True):
            batch.advantages = batch.advantages.masked_scatter(batch.loss_mask, part)
        return {
            "explained_variance": explained_variance(flat["values"][None], flat["returns"][None], everything[None]),
            "advantage_std": float(flat["advantages"].std()),
        }

    def _epochs(self, batches: list[Batch]) -> dict[str, float]:
        """Run the optimizer steps; stop early when the update has moved the policy by `target_kl`."""
        history: list[dict[str, float]] = []
        for _ in range(self._settings.epochs):
            self._rng.shuffle(batches)
            for group in _split(batches, self._settings.num_minibatches):
                history.append(self._step(group))
                if history[-1]["approx_kl"] > self._settings.target_kl:
                    return _summary(history, stopped_early=True)
        return _summary(history, stopped_early=False)

    def _step(self, group: Sequence[Batch]) -> dict[str, float]:
        num_tokens = sum(int(batch.loss_mask.sum()) for batch in group)
        parts: list[dict[str, float]] = []

        def loss_of(batch: Batch) -> torch.Tensor:
            loss, metrics = self._loss(batch, num_tokens)
            parts.append(metrics)
            return loss

        norm = accumulate_and_step(self._engine, group, loss_of)
        return merge_metrics(parts) | {"grad_norm": norm}

    def _loss(self, batch: Batch, num_tokens: int) -> tuple[torch.Tensor, dict[str, float]]:
        s = self._settings
        outputs = self._engine(batch.token_ids, batch.attention, s.temperature)
        correction = rollout_correction(
            batch.old_logprobs, batch.rollout_logprobs, batch.loss_mask, mode="token_tis", cap=2.0
        )
        policy = policy_loss(
            outputs.logprobs_BT,
            batch.old_logprobs,
            batch.advantages,
            batch.loss_mask,
            clip_low=s.clip_low,
            clip_high=s.clip_high,
            correction_BT=correction.weights_BT,
            num_loss_tokens=num_tokens,
        )
        value = value_loss(
            outputs.values_BT,
            batch.values,
            batch.returns,
            batch.loss_mask,
            clip=s.value_clip,
            num_loss_tokens=num_tokens,
        )
        losses = {"policy_loss": float(policy.loss.detach()), "value_loss": float(value.loss.detach())}
        return policy.loss + s.value_coef * value.loss, {**policy.metrics, **losses}


_TAG = "state"  # DeepSpeed itself writes a file called "latest" beside it
_FLAT = ("advantages", "returns", "values")


def against_group(samples: Sequence[TrainingSample]) -> list[TrainingSample]:
    """Return the samples with each reward less the mean of the other attempts at its task (arXiv 2402.14740 eq. 8).

    A baseline that the sampled tokens do not enter leaves the gradient unbiased. Tasks differ far more than attempts at
    one task do, and the critic alone has not learned that after a few dozen steps. A single attempt keeps its reward.
    """
    rewards = torch.tensor([sample.reward for sample in samples])
    groups = torch.tensor([sample.group_id for sample in samples])
    centred = group_advantages(rewards, groups, kind="rloo")
    is_alone = [int((groups == sample.group_id).sum()) == 1 for sample in samples]
    return [
        sample if alone else replace(sample, reward=float(value))
        for sample, value, alone in zip(samples, centred, is_alone, strict=True)
    ]


def microbatches(samples: Sequence[TrainingSample], max_tokens: int) -> list[list[TrainingSample]]:
    """Group samples of similar length so that each padded group holds at most `max_tokens` tokens."""
    groups: list[list[TrainingSample]] = [[]]
    for sample in sorted(samples, key=lambda one: (len(one.token_ids), one.rollout_id)):
        if groups[-1] and (len(groups[-1]) + 1) * len(sample.token_ids) > max_tokens:
            groups.append([])
        groups[-1].append(sample)
    return groups


def _split(batches: Sequence[Batch], num_parts: int) -> list[Sequence[Batch]]:
    """Split into at most `num_parts` groups whose sizes differ by at most one."""
    count = min(num_parts, len(batches))
    return [batches[index::count] for index in range(count)]


def _summary(history: Sequence[dict[str, float]], *, stopped_early: bool) -> dict[str, float]:
    """Average the optimizer steps of one update; maxima and the last KL are kept as such."""
    names = list(history[0])
    summary = {name: sum(step[name] for step in history) / len(history) for name in names}
    summary["ratio_max"] = max(step["ratio_max"] for step in history)
    summary["grad_norm_max"] = max(step["grad_norm"] for step in history)
    return summary | {"num_optimizer_steps": float(len(history)), "stopped_early": float(stopped_early)}


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


def checkpoint_exists(directory: str) -> bool:
    """Return True when a complete checkpoint lies there."""
    return (Path(directory) / _TAG).is_dir()
