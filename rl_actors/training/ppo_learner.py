"""One PPO update: old pass, reference KL, advantages, clipped epochs through DeepSpeed. No Ray here."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rl_actors.algorithms.advantages import gae_advantages, masked_moments, token_rewards, whiten
from rl_actors.algorithms.correction import rollout_correction
from rl_actors.algorithms.kl import kl_estimate
from rl_actors.algorithms.losses import merge_metrics, policy_loss, token_share, value_loss
from rl_actors.algorithms.stability import (
    Continue,
    SkipUpdate,
    StabilityDecision,
    StabilityLimits,
    StopUpdate,
    check_stability,
    escalate,
)
from rl_actors.contracts import LearnerUpdate, TrainingSample
from rl_actors.errors import InstabilityError
from rl_actors.models.experts import load_causal_lm
from rl_actors.models.value_head import PolicyWithValue, token_logprobs_and_entropy
from rl_actors.training import ranks
from rl_actors.training.deepspeed_engine import OptimizerSettings, accumulate, build_engine, discard
from rl_actors.training.ppo_batch import Microbatch, Minibatch, against_group, minibatches, num_loss_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoSettings:
    """What decides an update. KL is in the reward (`kl_coef`, nats to reward units); `limits` bounds every step."""

    learning_rate: float
    kl_coef: float
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
    limits: StabilityLimits = field(default_factory=StabilityLimits)
    value_coef: float = 0.5
    value_clip: float = 0.5
    critic_learning_rate_factor: float = 10.0
    zero_stage: int = 0


class PpoLearner:
    """Policy, critic and frozen reference of one rank."""

    def __init__(self, policy_path: str, reference_path: str, settings: PpoSettings) -> None:
        """Load the policy and the frozen reference and build the DeepSpeed engine."""
        torch.manual_seed(settings.seed)
        policy = load_causal_lm(policy_path)
        self._reference = load_causal_lm(reference_path).eval()
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
        self._num_skipped = 0  # optimizer steps in a row, across updates
        self.weights_version = 0

    def update(self, samples: Sequence[TrainingSample]) -> LearnerUpdate:
        """Take one PPO update on this rank's share of the rollouts; metrics are those of the whole batch.

        Raises:
            InstabilityError: A tripwire asks for the end of the run; its message begins with the reason code.
        """
        s = self._settings
        parts = minibatches(
            against_group(samples),
            count=s.num_minibatches,
            token_budget=s.microbatch_tokens,
            rng=self._rng,
            device=self._engine.device,
        )
        batches = [microbatch for part in parts for microbatch in part]
        metrics = self._old_pass(batches)
        metrics |= self._fill_advantages(batches)
        metrics |= self._epochs(parts, {name: metrics[name] for name in ("mismatch_abs_mean", "mismatch_abs_max")})
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

    @torch.no_grad()
    def _old_pass(self, batches: Sequence[Microbatch]) -> dict[str, float]:
        """Fill old and reference log-probabilities and values; report the engine-learner gap and the KL."""
        num_tokens, parts = num_loss_tokens(batches), []
        for batch in batches:
            ids, attention = batch.inputs.token_ids_BT, batch.inputs.attention_mask_BT.long()
            outputs = self._engine(ids, attention, self._settings.temperature)
            batch.old_logprobs, batch.values = outputs.logprobs_BT, outputs.values_BT
            logits = self._reference(input_ids=ids, attention_mask=attention).logits
            batch.ref_logprobs, _ = token_logprobs_and_entropy(logits, ids, self._settings.temperature)
            parts.append(_old_metrics(batch, outputs.entropy_BT, num_tokens))
        return ranks.merge_ranks(merge_metrics(parts))

    @torch.no_grad()
    def _fill_advantages(self, batches: Sequence[Microbatch]) -> dict[str, float]:
        """KL in the reward, GAE carried across tool tokens, whitening over the whole batch."""
        s = self._settings
        for batch in batches:
            mask = batch.inputs.loss_mask_BT
            kl = kl_estimate(batch.old_logprobs, batch.ref_logprobs, kind="k1")
            rewards = token_rewards(batch.inputs.rewards_B, kl, mask, kl_coef=s.kl_coef)
            batch.advantages, batch.returns = gae_advantages(rewards, batch.values, mask, gamma=s.gamma, lam=s.lam)
        moments = {name: _global_moments(batches, name) for name in ("advantages", "returns", "residuals")}
        for batch in batches:
            batch.advantages = whiten(batch.advantages, batch.inputs.loss_mask_BT, moments=moments["advantages"])
        explained = 1.0 - _variance(moments["residuals"]) / max(_variance(moments["returns"]), 1e-12)
        return {"explained_variance": explained, "advantage_std": _variance(moments["advantages"]) ** 0.5}

    def _epochs(self, parts: Sequence[Minibatch], gap: Mapping[str, float]) -> dict[str, float]:
        """Run the optimizer steps; a tripwire skips one, ends the update, or ends the run."""
        order, history = list(parts), []
        for _ in range(self._settings.epochs):
            self._rng.shuffle(order)
            for part in order:
                history.append(self._gradients(part))
                if not self._act(check_stability({**history[-1], **gap}, self._settings.limits)):
                    return _summary(history, stopped_early=True)
        return _summary(history, stopped_early=False)

    def _gradients(self, part: Minibatch) -> dict[str, float]:
        """Accumulate one minibatch's gradients, to be judged before they are applied; returns the metrics of it all."""
        num_tokens, shares = num_loss_tokens(part), []

        def loss_of(batch: Microbatch) -> torch.Tensor:
            loss, metrics = self._loss(batch, num_tokens)
            shares.append(metrics)
            return loss * ranks.num_ranks()

        norm = accumulate(self._engine, part, loss_of)
        return ranks.merge_ranks(merge_metrics(shares)) | {"grad_norm": norm}

    def _act(self, decision: StabilityDecision) -> bool:
        """Step or discard; returns False when this update is over. Raises InstabilityError when the run is."""
        self._num_skipped = self._num_skipped + 1 if isinstance(decision, SkipUpdate) else 0
        decision = escalate(decision, self._settings.limits, consecutive_skips=self._num_skipped, restores=0)
        if isinstance(decision, Continue):
            self._engine.step()
            return True
        discard(self._engine)
        if isinstance(decision, SkipUpdate | StopUpdate):
            return isinstance(decision, SkipUpdate)
        raise InstabilityError(f"{decision}; the newest checkpoint holds the last good state")

    def _loss(self, batch: Microbatch, num_tokens: float) -> tuple[torch.Tensor, dict[str, float]]:
        s, mask = self._settings, batch.inputs.loss_mask_BT
        outputs = self._engine(batch.inputs.token_ids_BT, batch.inputs.attention_mask_BT.long(), s.temperature)
        correction = rollout_correction(
            batch.old_logprobs, batch.inputs.rollout_logprobs_BT, mask, mode="token_tis", cap=2.0
        )
        policy = policy_loss(
            outputs.logprobs_BT,
            batch.old_logprobs,
            batch.advantages,
            mask,
            clip_low=s.clip_low,
            clip_high=s.clip_high,
            correction_BT=correction.weights_BT,
            num_loss_tokens=num_tokens,
        )
        value = value_loss(
            outputs.values_BT, batch.values, batch.returns, mask, clip=s.value_clip, num_loss_tokens=num_tokens
        )
        metrics = {
            "policy_loss": float(policy.loss.detach()),
            "value_loss": float(value.loss.detach()),
            "entropy": float(token_share(outputs.entropy_BT.detach(), mask, num_tokens)),
        }
        return policy.loss + s.value_coef * value.loss, {**policy.metrics, **metrics}


_TAG = "state"  # DeepSpeed itself writes a file called "latest" beside it


def _old_metrics(batch: Microbatch, entropy_BT: torch.Tensor, num_tokens: float) -> dict[str, float]:
    """Return this microbatch's share of the metrics that the old pass alone can tell."""
    mask = batch.inputs.loss_mask_BT
    gap = (batch.old_logprobs - batch.inputs.rollout_logprobs_BT).abs()
    k1 = kl_estimate(batch.old_logprobs, batch.ref_logprobs, kind="k1")
    k3 = kl_estimate(batch.old_logprobs, batch.ref_logprobs, kind="k3")
    means = {"mismatch_abs_mean": gap, "entropy": entropy_BT, "kl_to_reference": k1, "kl_to_reference_k3": k3}
    metrics = {name: float(token_share(x, mask, num_tokens)) for name, x in means.items()}
    return metrics | {"mismatch_abs_max": float(torch.where(mask, gap, gap.new_zeros(())).max())}


def _global_moments(batches: Sequence[Microbatch], name: str) -> torch.Tensor:
    """Return [count, sum, sum of squares] over the loss tokens of all ranks."""
    arrays = [b.returns - b.values if name == "residuals" else getattr(b, name) for b in batches]
    masks = [batch.inputs.loss_mask_BT for batch in batches]
    return ranks.summed(sum((masked_moments(x, m) for x, m in zip(arrays, masks, strict=True)), torch.zeros(3)))


def _variance(moments: torch.Tensor) -> float:
    count, total, squares = moments.tolist()
    return max(squares - total * total / max(count, 1.0), 0.0) / max(count - 1.0, 1.0)


def _summary(history: Sequence[dict[str, float]], *, stopped_early: bool) -> dict[str, float]:
    """Average the optimizer steps of one update; maxima and the last KL are kept as such."""
    names = [name for name in history[0] if name != "entropy"]  # the old pass reports it for the whole batch
    summary = {name: sum(step[name] for step in history) / len(history) for name in names}
    summary["ratio_max"] = max(step["ratio_max"] for step in history)
    summary["grad_norm_max"] = max(step["grad_norm"] for step in history)
    return summary | {"num_optimizer_steps": float(len(history)), "stopped_early": float(stopped_early)}


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


def checkpoint_exists(directory: str) -> bool:
    """Return True when a complete checkpoint lies there."""
    return (Path(directory) / _TAG).is_dir()
