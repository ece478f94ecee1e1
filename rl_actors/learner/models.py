"""The models of one learner rank: policy with critic, and the frozen reference it is held near."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl_actors.contracts import BadInputError, Recipe
from rl_actors.learner.batch import Microbatch
from rl_actors.learner.engine import whole_parameters
from rl_actors.learner.first_step_check import Fingerprint, fingerprints
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


class LearnerModels:
    """What the recipe trains: all weights or adapters, routers included or frozen, with or without a critic.

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
            _require_same(policy_path, reference_path, recipe.lora_rank)
            add_adapters(policy, recipe.lora_rank)
        self.module = PolicyWithValue(policy, int(policy.config.hidden_size), has_critic=recipe.has_critic)
        self._reference = None if recipe.lora_rank else load_causal_lm(reference_path).eval().requires_grad_(False)

    @property
    def policy(self) -> Any:
        """The causal LM without the critic."""
        return self.module.policy

    def trainable(self) -> list[torch.nn.Parameter]:
        """Return the policy's parameters that train."""
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def place_reference(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Put a reference of its own beside the policy, and its weights into the policy's precision.

        Buffers keep theirs, as the policy's do: rotary frequencies in bfloat16 would be other positions.
        """
        if self._reference is None:
            return
        self._reference.to(device)
        for parameter in self._reference.parameters():
            parameter.data = parameter.data.to(dtype)

    def reference_logprobs(self, batch: Microbatch, temperature: float) -> Tensor:
        """Return log p of each loss token under the frozen reference, [B, T] in nats; call it without gradients."""
        model = self.policy if self._reference is None else self._reference
        with adapters_off(model) if self._reference is None else nullcontext():
            ids, attention, _, mask = inputs(batch, temperature)
            scores = score_tokens(model, ids, attention, temperature=temperature, mask_BT=mask, with_entropy=False)
            return scores.logprobs_BT

    def old_pass(self, engine: Any, batch: Microbatch, temperature: float) -> TokenOutputs:
        """Score a microbatch before the update; where routes are replayed, the batch keeps the experts it visited.

        Those are the engine's where it recorded them (R3, arXiv 2510.11370), else the router's own choice now.
        """
        if self._recipe.routing != "replay":
            return engine(*inputs(batch, temperature))
        recorded = engine_routes(self.policy, batch.inputs.routes_LBTK)
        replayed = nullcontext() if recorded is None else replay_routes(self.policy, recorded)
        with record_routes(self.policy) as routes, replayed:
            outputs = engine(*inputs(batch, temperature))
        batch.routes = routes.joined()
        return outputs

    def update_pass(self, engine: Any, batch: Microbatch, temperature: float) -> TokenOutputs:
        """Score a microbatch within the update, with gradients; on the old pass's experts where they are replayed.

        The batch then keeps the share of its choices that the router would make again.
        """
        if self._recipe.routing != "replay":
            return engine(*inputs(batch, temperature))
        with replay_routes(self.policy, batch.routes) as live:
            outputs = engine(*inputs(batch, temperature))
        batch.route_agreement = route_agreement(batch.routes, live.joined(), batch.inputs.loss_mask_BT)
        return outputs

    def frozen_fingerprints(self) -> dict[str, Fingerprint]:
        """Return marks of the weights that the policy is held near, in memory; all ranks must call it."""
        if self._reference is not None:
            return fingerprints(self._reference)
        trainable = {name for name, parameter in self.policy.named_parameters() if parameter.requires_grad}
        return {name: mark for name, mark in fingerprints(self.policy).items() if name not in trainable}

    def weights(self, *, is_sharded: bool) -> dict[str, Tensor]:
        """Return a CPU copy of the policy by Hugging Face name, adapters merged; all ranks must call it."""
        state = whole_parameters(self.policy, is_sharded=is_sharded)
        return merged(self.policy, state) if self._recipe.lora_rank else state


def inputs(batch: Microbatch, temperature: float) -> tuple[Tensor, Tensor, float, Tensor]:
    """Return what `PolicyWithValue` is called with."""
    found = batch.inputs
    return found.token_ids_BT, found.attention_mask_BT.long(), temperature, found.loss_mask_BT


def _require_same(policy_path: str, reference_path: str, lora_rank: int) -> None:
    if Path(policy_path).resolve() != Path(reference_path).resolve():
        raise BadInputError(
            "recipe.lora_rank", lora_rank, "with adapters the reference is the policy without them; give one directory"
        )
