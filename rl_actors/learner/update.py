"""One update: look (old and reference pass), aim (advantages), clipped epochs through DeepSpeed. No Ray here."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rl_actors.algorithms import (
    Continue,
    RestoreLastGood,
    SkipUpdate,
    StabilityDecision,
    StabilityLimits,
    StopUpdate,
    merge_metrics,
    require_strictly_on_policy,
)
from rl_actors.contracts import InstabilityError, LearnerUpdate, Recipe, TrainingSample
from rl_actors.learner import ranks
from rl_actors.learner.batch import Microbatch, Minibatch, minibatches
from rl_actors.learner.engine import (
    OptimizerSettings,
    accumulate,
    build_engine,
    discard,
    gradient_norm,
    scale_learning_rate,
)
from rl_actors.learner.first_step_check import Fingerprint, fingerprints, require_moved, require_unchanged
from rl_actors.learner.loss import (
    GlobalCounts,
    LossTerms,
    correct,
    finish_look,
    global_counts,
    look_shares,
    microbatch_loss,
    update_summary,
)
from rl_actors.learner.models import LearnerModels
from rl_actors.learner.ranks import captured, put_back
from rl_actors.learner.targets import KLCoefficient, fill_advantages, kept_fraction, shaped
from rl_actors.learner.tripwires import Tripwires


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoSettings:
    """Numbers of an update; `recipe` holds its choices, `limits` bounds every step. `kl_coef` turns nats to reward."""

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
    recipe: Recipe = field(default_factory=Recipe)
    limits: StabilityLimits = field(default_factory=StabilityLimits)
    value_coef: float = 0.5
    critic_learning_rate_factor: float = 10.0
    zero_stage: int = 0
    is_bf16: bool = field(default_factory=torch.cuda.is_available)


class PpoLearner:
    """Policy, critic (where the recipe has one) and frozen reference of one rank."""

    def __init__(self, policy_path: str, reference_path: str, settings: PpoSettings) -> None:
        """Load the policy and the frozen reference and build the DeepSpeed engine."""
        torch.manual_seed(settings.seed)
        self._settings = settings
        self._models = LearnerModels(policy_path, reference_path, settings.recipe)
        self._engine = _build_engine(self._models, settings)
        self._models.place_reference(self._engine.device, torch.bfloat16 if settings.is_bf16 else torch.float32)
        self._frozen = self._models.frozen_fingerprints()
        self._rng = random.Random(settings.seed)
        self._kl = KLCoefficient(settings.kl_coef, settings.recipe)
        self._tripwires = Tripwires(settings.limits)
        self._learning_rate_factor = 1.0
        self._before: dict[str, Fingerprint] = {}  # of the weights before the first step with gradient
        self._num_checked = 0  # steps with gradient since then, up to the one that is judged
        self.weights_version = 0

    def update(self, samples: Sequence[TrainingSample]) -> LearnerUpdate:
        """Take one update on this rank's share of the rollouts; metrics are those of the whole batch.

        A limit that is on but was not judged (no such metric, or a critic that warms up) is named:
        `unchecked_<reason code>`.

        Raises:
            InstabilityError: A tripwire asks for the end of the run; its message begins with the reason code.
            BadInputError: The recipe skips the old pass, and the samples are not this version's own.
        """
        s = self._settings
        self._tripwires.begin_update()
        if s.recipe.skip_old_pass:
            self._require_on_policy(samples)
        kept = shaped(samples, s.recipe)
        parts = minibatches(
            kept,
            count=s.num_minibatches,
            token_budget=s.microbatch_tokens,
            rng=self._rng,
            device=self._engine.device,
        )
        batches = [microbatch for part in parts for microbatch in part]
        metrics = {"kl_coef": self._kl.value, "kept_fraction": kept_fraction(kept, samples)} | self._look(batches)
        metrics |= fill_advantages(batches, s.recipe, kl_coef=self._kl.value, gamma=s.gamma, lam=s.lam)
        restore, steps = self._epochs(parts, metrics)
        metrics |= steps | self._tripwires.unchecked
        if steps["num_optimizer_steps"] and not self._is_critic_warmup:
            self._kl.observe(metrics["kl_to_reference"], int(ranks.summed(torch.tensor([float(len(samples))]))))
        self.weights_version += 1
        factor = restore.learning_rate_factor if restore else 0.0
        return LearnerUpdate(
            weights_version=self.weights_version,
            metrics=metrics,
            trips=tuple(self._tripwires.trips),
            restore_factor=factor,
        )

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
        """Return a copy of the policy's parameters on the CPU, by Hugging Face name (critic excluded).

        All ranks must call it: under ZeRO-3 each holds a shard of every parameter.
        """
        return self._models.weights(is_sharded=self._settings.zero_stage == 3)

    def save_policy(self, directory: str) -> None:
        """Write the policy as a Hugging Face model directory; all ranks must call it, the first one writes.

        Raises:
            TamperedError: The reference in memory is not the one that was loaded.
        """
        require_unchanged(self._frozen, self._models.frozen_fingerprints())
        weights = self.weights()
        if ranks.rank() == 0:
            self._models.policy.save_pretrained(directory, state_dict=weights)

    def save_checkpoint(self, directory: str) -> None:
        """Write everything `load_checkpoint` needs to continue, random state of every rank included.

        Raises:
            TamperedError: The reference in memory is not the one that was loaded: nothing after it can be trusted.
        """
        require_unchanged(self._frozen, self._models.frozen_fingerprints())
        state = {
            "weights_version": self.weights_version,
            "kl_coef": self._kl.value,
            "learning_rate_factor": self._learning_rate_factor,
            "num_restores": self._tripwires.num_restores,
            "num_skipped": self._tripwires.num_skipped,
            "random": ranks.gathered(captured(self._rng)),
        }
        self._engine.save_checkpoint(directory, tag=_TAG, client_state=state)

    def load_checkpoint(self, directory: str) -> tuple[str, ...]:
        """Restore weights, optimizer, critic, KL coefficient and random state; returns what could not be restored."""
        state = self._load_weights(directory)
        self.weights_version = state["weights_version"]
        self._tripwires.num_restores, self._tripwires.num_skipped = state["num_restores"], state["num_skipped"]
        self._set_learning_rate(state["learning_rate_factor"])
        own = state["random"]
        if len(own) != ranks.num_ranks():
            return (f"random state of {ranks.num_ranks()} ranks (the checkpoint has {len(own)})",)
        return put_back(own[ranks.rank()], self._rng)

    def restore(self, directory: str, learning_rate_factor: float) -> None:
        """Go back to a checkpoint's weights, optimizer and KL coefficient with a lower learning rate.

        The weights version, the random state and the counts go on: engines must see a new version, and going over the
        same minibatches again would lead to the same place.
        """
        self._load_weights(directory)
        self._set_learning_rate(self._learning_rate_factor * learning_rate_factor)

    def _load_weights(self, directory: str) -> dict[str, Any]:
        """Load weights, optimizer, critic and KL coefficient; returns the rest of the state."""
        _, state = self._engine.load_checkpoint(directory, tag=_TAG)
        self._kl.value = state["kl_coef"]
        return state

    def _set_learning_rate(self, factor: float) -> None:
        self._learning_rate_factor = factor
        scale_learning_rate(self._engine, factor)

    @property
    def _is_critic_warmup(self) -> bool:
        return self.weights_version < self._settings.recipe.critic_warmup_updates

    def _require_on_policy(self, samples: Sequence[TrainingSample]) -> None:
        """Judge the samples of all ranks, so that all refuse together and none waits for the others."""
        own = {version for sample in samples for version in sample.weights_versions}
        require_strictly_on_policy(
            sampled_versions=tuple(sorted(set[int]().union(*ranks.gathered(own)))),
            weights_version=self.weights_version,
            num_epochs=self._settings.epochs,
            num_minibatches=self._settings.num_minibatches,
        )

    @torch.no_grad()
    def _look(self, batches: Sequence[Microbatch]) -> dict[str, float]:
        """Fill old and reference log-probabilities and values; report the engine-learner gap, entropy and KL.

        Without an old pass the first forward pass of the update fills them, and `_gradients` reports.
        """
        s, entropies = self._settings, []
        for batch in batches:
            batch.ref_logprobs = self._models.reference_logprobs(batch, s.temperature)
            if s.recipe.skip_old_pass:
                continue
            outputs = self._models.old_pass(self._engine, batch, s.temperature)
            batch.old_logprobs, batch.values = outputs.logprobs_BT, outputs.values_BT
            batch.final_values = outputs.final_values_B
            correct(batch, s.recipe)
            entropies.append(outputs.entropy_BT)
        return self._seen(batches, entropies) if entropies else {}

    def _seen(self, batches: Sequence[Microbatch], entropies: Sequence[torch.Tensor]) -> dict[str, float]:
        counts = global_counts(batches)
        shares = [look_shares(batch, entropy, counts) for batch, entropy in zip(batches, entropies, strict=True)]
        return finish_look(ranks.merge_ranks(merge_metrics(shares)))

    def _epochs(
        self, parts: Sequence[Minibatch], seen: Mapping[str, float]
    ) -> tuple[RestoreLastGood | None, dict[str, float]]:
        """Run the optimizer steps; a tripwire skips one, ends the update, asks for a restore, or ends the run."""
        order, history, num_steps = list(parts), [], 0
        for epoch in range(self._settings.epochs):
            # The same on all ranks, whatever they drew before: each step must take one part of every rank.
            random.Random(f"{self._settings.seed}/{self.weights_version}/{epoch}").shuffle(order)
            for part in order:
                counts = global_counts(part)
                if not counts.num_loss_tokens:
                    continue  # nothing of it trains, on any rank: there is no step, and no metric to judge
                history.append(self._gradients(part, counts))
                decision = self._tripwires.judge({**seen, **history[-1]}, is_critic_warmup=self._is_critic_warmup)
                num_steps += isinstance(decision, Continue)
                if not self._act(decision, history[-1]["grad_norm"]):
                    restore = decision if isinstance(decision, RestoreLastGood) else None
                    return restore, update_summary(history, seen, num_steps=num_steps, stopped_early=True)
        return None, update_summary(history, seen, num_steps=num_steps, stopped_early=False)

    def _gradients(self, part: Minibatch, counts: GlobalCounts) -> dict[str, float]:
        """Accumulate one minibatch's gradients, to be judged before they are applied; returns the metrics of it all."""
        s, shares, entropies = self._settings, [], []
        terms = LossTerms(
            clip_low=s.clip_low,
            clip_high=s.clip_high,
            kl_coef=self._kl.value,
            value_coef=s.value_coef,
            is_critic_warmup=self._is_critic_warmup,
        )

        def loss_of(batch: Microbatch) -> torch.Tensor:
            outputs = self._models.update_pass(self._engine, batch, s.temperature)
            if s.recipe.skip_old_pass:
                batch.old_logprobs = outputs.logprobs_BT.detach()
                correct(batch, s.recipe)
                entropies.append(outputs.entropy_BT.detach())
            loss, metrics = microbatch_loss(outputs, batch, s.recipe, terms, counts)
            shares.append(metrics)
            return loss * ranks.num_ranks()

        norm = accumulate(self._engine, part, loss_of)
        metrics = ranks.merge_ranks(merge_metrics(shares)) | {"grad_norm": norm}
        return self._seen(part, entropies) | metrics if entropies else metrics

    def _act(self, decision: StabilityDecision, grad_norm: float) -> bool:
        """Step or discard; returns False when this update is over. Raises InstabilityError when the run is."""
        if isinstance(decision, Continue):
            self._step(grad_norm)
            return True
        discard(self._engine)
        if isinstance(decision, SkipUpdate | StopUpdate | RestoreLastGood):
            return isinstance(decision, SkipUpdate)
        raise InstabilityError(f"{decision}; the newest checkpoint holds the last good state")

    def _step(self, grad_norm: float) -> None:
        """Apply the gradients; the first time the policy has any, prove that they reach what they should."""
        is_due = self._num_checked < self._settings.recipe.steps_to_move_all
        is_counted = is_due and grad_norm > 0 and self._policy_gradient_norm() > 0
        if is_counted and not self._before:
            self._before = fingerprints(self._models.policy)
        self._engine.step()
        if is_counted:
            self._num_checked += 1
            self._check_first_step()

    def _policy_gradient_norm(self) -> float:
        """Return the norm without the critic's part: 0 with a warming critic, or equal rewards."""
        return gradient_norm(self._engine, self._models.policy)

    def _check_first_step(self) -> None:
        if self._num_checked < self._settings.recipe.steps_to_move_all:
            return
        trainable = [name for name, p in self._models.policy.named_parameters() if p.requires_grad]
        require_moved(self._before, fingerprints(self._models.policy), trainable=trainable)


_TAG = "state"  # DeepSpeed itself writes a file called "latest" beside it


def _build_engine(models: LearnerModels, settings: PpoSettings) -> Any:
    """Return a DeepSpeed engine with learning rates of their own for policy and critic."""
    optimizer = OptimizerSettings(
        learning_rate=settings.learning_rate,
        max_grad_norm=settings.max_grad_norm,
        zero_stage=settings.zero_stage,
        is_bf16=settings.is_bf16,
    )
    groups = [{"params": models.trainable(), "lr": settings.learning_rate}]
    if models.module.has_critic:
        critic_rate = settings.learning_rate * settings.critic_learning_rate_factor
        groups.append({"params": list(models.module.value_head.parameters()), "lr": critic_rate})
    return build_engine(models.module, optimizer, groups)
