"""One rank's learner: the models it trains, and the update: look (old and reference pass), aim, clipped epochs."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl_actors.algorithms import (
    Continue,
    RestoreLastGood,
    SkipUpdate,
    StabilityDecision,
    StopUpdate,
    merge_metrics,
    require_strictly_on_policy,
)
from rl_actors.contracts import BadInputError, InstabilityError, LearnerUpdate, Recipe, TrainingSample
from rl_actors.learner import ranks
from rl_actors.learner.batch import Microbatch, Minibatch, minibatches
from rl_actors.learner.engine import (
    OptimizerSettings,
    accumulate,
    build_engine,
    discard,
    gradient_norm,
    scale_learning_rate,
    whole_parameters,
)
from rl_actors.learner.objective import (
    GlobalCounts,
    KLCoefficient,
    PpoSettings,
    correct_mismatch,
    fill_advantages,
    global_counts,
    kept_fraction,
    microbatch_loss,
    mismatch_metrics,
    shape_rewards,
    update_summary,
)
from rl_actors.learner.tripwires import Fingerprint, Tripwires, fingerprints, require_moved, require_unchanged
from rl_actors.models import (
    PolicyWithValue,
    TokenOutputs,
    adapters_off,
    add_adapters,
    engine_routes,
    freeze_router,
    load_causal_lm,
    merged,
    record_routes,
    replay_routes,
    route_agreement,
    router_parameters,
    score_tokens,
)

_TAG = "state"  # DeepSpeed itself writes a file called "latest" beside it


class LearnerModels:
    """The policy that the recipe trains (all weights or adapters, with or without a critic), and its reference.

    With adapters the reference is the policy with its adapters off; otherwise it is a model of its own.
    """

    def __init__(self, policy_path: str, reference_path: str, recipe: Recipe) -> None:
        """Load them in float32 on the CPU.

        Raises:
            BadInputError: Adapters on another model than the reference, or a choice about experts without experts.
        """
        self._recipe = recipe
        policy = load_causal_lm(policy_path)
        if recipe.routing != "free" and not router_parameters(policy):
            raise BadInputError("recipe.routing", recipe.routing, "the model has no experts to choose from; use free")
        if recipe.routing == "frozen":
            freeze_router(policy)
        if recipe.lora_rank:
            if Path(policy_path).resolve() != Path(reference_path).resolve():
                remedy = "with adapters the reference is the policy without them; give one directory"
                raise BadInputError("recipe.lora_rank", recipe.lora_rank, remedy)
            add_adapters(policy, recipe.lora_rank)
        self.module = PolicyWithValue(policy, int(policy.config.hidden_size), has_critic=recipe.has_critic)
        self.policy: Any = self.module.policy  # the causal LM without the critic
        self._reference = None if recipe.lora_rank else load_causal_lm(reference_path).eval().requires_grad_(False)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Return the policy's parameters that train, by name."""
        return {name: parameter for name, parameter in self.policy.named_parameters() if parameter.requires_grad}

    def place_reference(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Put a reference of its own beside the policy, and its weights into the policy's precision."""
        if self._reference is not None:
            # Buffers keep theirs, as the policy's do: rotary frequencies in bfloat16 would be other positions.
            for parameter in self._reference.to(device).parameters():
                parameter.data = parameter.data.to(dtype)

    def reference_logprobs(self, batch: Microbatch, temperature: float) -> Tensor:
        """Return log p of each loss token under the frozen reference, [B, T] in nats; call it without gradients."""
        model = self.policy if self._reference is None else self._reference
        with adapters_off(model) if self._reference is None else nullcontext():
            ids, attention, _, mask = _inputs(batch, temperature)
            scores = score_tokens(model, ids, attention, temperature=temperature, mask_BT=mask, with_entropy=False)
            return scores.logprobs_BT

    def old_pass(self, engine: Any, batch: Microbatch, temperature: float) -> TokenOutputs:
        """Score a microbatch before the update; where routes are replayed, the batch keeps the experts it visited.

        Those are the engine's where it recorded them (R3, arXiv 2510.11370), else the router's own choice now.
        """
        if self._recipe.routing != "replay":
            return engine(*_inputs(batch, temperature))
        recorded = engine_routes(self.policy, batch.inputs.routes_LBTK)
        replayed = nullcontext() if recorded is None else replay_routes(self.policy, recorded)
        with record_routes(self.policy) as routes, replayed:
            outputs = engine(*_inputs(batch, temperature))
        batch.routes = routes.joined()
        return outputs

    def update_pass(self, engine: Any, batch: Microbatch, temperature: float) -> TokenOutputs:
        """Score a microbatch within the update, with gradients; on the old pass's experts where they are replayed.

        The batch then keeps the share of its choices that the router would make again.
        """
        if self._recipe.routing != "replay":
            return engine(*_inputs(batch, temperature))
        with replay_routes(self.policy, batch.routes) as live:
            outputs = engine(*_inputs(batch, temperature))
        batch.route_agreement = route_agreement(batch.routes, live.joined(), batch.inputs.loss_mask_BT)
        return outputs

    def frozen_fingerprints(self) -> dict[str, Fingerprint]:
        """Return marks of the weights that the policy is held near, in memory; all ranks must call it."""
        if self._reference is not None:
            return fingerprints(self._reference)
        trainable = self.trainable()
        return {name: mark for name, mark in fingerprints(self.policy).items() if name not in trainable}

    def weights(self, *, is_sharded: bool) -> dict[str, Tensor]:
        """Return a CPU copy of the policy by Hugging Face name, adapters merged; all ranks must call it."""
        state = whole_parameters(self.policy, is_sharded=is_sharded)
        return merged(self.policy, state) if self._recipe.lora_rank else state


def _inputs(batch: Microbatch, temperature: float) -> tuple[Tensor, Tensor, float, Tensor]:
    """Return the arguments of `PolicyWithValue`."""
    found = batch.inputs
    return found.token_ids_BT, found.attention_mask_BT.long(), temperature, found.loss_mask_BT


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
        kept = shape_rewards(samples, s.recipe)
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
        return LearnerUpdate(
            weights_version=self.weights_version,
            metrics=metrics,
            trips=tuple(self._tripwires.trips),
            restore_factor=restore.learning_rate_factor if restore else 0.0,
        )

    @torch.no_grad()
    def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return log p(token t | before), t = 1.., of each sequence at temperature 1, for attestation."""
        rows = []
        # One by one: a padded batch may round otherwise, and attestation compares these numbers.
        for sequence in sequences:
            ids = torch.tensor([list(sequence)], device=self._engine.device)
            outputs = self._engine(ids, torch.ones_like(ids), 1.0)
            rows.append(outputs.logprobs_BT[0, 1:].tolist())
        return rows

    def weights(self) -> dict[str, Tensor]:
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
            "random": ranks.gathered(ranks.capture_random_state(self._rng)),
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
        return ranks.restore_random_state(own[ranks.rank()], self._rng)

    def restore(self, directory: str, learning_rate_factor: float) -> None:
        """Go back to a checkpoint's weights, optimizer and KL coefficient with a lower learning rate."""
        # The weights version, the random state and the counts go on: engines must see a new version, and going over
        # the same minibatches again would lead to the same place.
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
            correct_mismatch(batch, s.recipe)
            entropies.append(outputs.entropy_BT)
        return mismatch_metrics(batches, entropies)

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

        def loss_of(batch: Microbatch) -> Tensor:
            outputs = self._models.update_pass(self._engine, batch, s.temperature)
            if s.recipe.skip_old_pass:
                batch.old_logprobs = outputs.logprobs_BT.detach()
                correct_mismatch(batch, s.recipe)
                entropies.append(outputs.entropy_BT.detach())
            loss, metrics = microbatch_loss(
                outputs, batch, counts, s, kl_coef=self._kl.value, is_critic_warmup=self._is_critic_warmup
            )
            shares.append(metrics)
            return loss * ranks.num_ranks()  # DeepSpeed averages gradients over ranks; the shares must add up

        norm = accumulate(self._engine, part, loss_of)
        metrics = ranks.merge_ranks(merge_metrics(shares))
        return mismatch_metrics(part, entropies) | metrics | {"grad_norm": norm}

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
        policy, num_due = self._models.policy, self._settings.recipe.steps_to_move_all
        # A warming critic, or equal rewards, leave the policy's own part at 0: such a step proves nothing.
        has_gradient = self._num_checked < num_due and grad_norm > 0 and gradient_norm(self._engine, policy) > 0
        if has_gradient and not self._before:
            self._before = fingerprints(policy)
        self._engine.step()
        self._num_checked += has_gradient
        if has_gradient and self._num_checked == num_due:
            require_moved(self._before, fingerprints(policy), trainable=list(self._models.trainable()))


def _build_engine(models: LearnerModels, settings: PpoSettings) -> Any:
    """Return a DeepSpeed engine with learning rates of their own for policy and critic."""
    optimizer = OptimizerSettings(
        learning_rate=settings.learning_rate,
        max_grad_norm=settings.max_grad_norm,
        zero_stage=settings.zero_stage,
        is_bf16=settings.is_bf16,
    )
    groups = [{"params": list(models.trainable().values()), "lr": settings.learning_rate}]
    if models.module.has_critic:
        critic_rate = settings.learning_rate * settings.critic_learning_rate_factor
        groups.append({"params": list(models.module.value_head.parameters()), "lr": critic_rate})
    return build_engine(models.module, optimizer, groups)
