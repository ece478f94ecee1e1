"""The coefficient of the KL to the reference: fixed, or held near a target."""

from __future__ import annotations

import math

from rl_actors.algorithms.kl import AdaptiveKLController
from rl_actors.training.recipe import Recipe


class KLCoefficient:
    """`value` is the whole state: to resume, set it."""

    def __init__(self, init: float, recipe: Recipe) -> None:
        """Start at `init`; with `recipe.kl_target` the coefficient adapts (arXiv 1909.08593 section 2.2)."""
        self.value = init
        self._controller = (
            AdaptiveKLController(init=init, target=recipe.kl_target, horizon=recipe.kl_horizon)
            if recipe.kl_target
            else None
        )

    def observe(self, kl: float, num_rollouts: int) -> None:
        """Move towards the target; a KL that is no number was judged by the tripwires and teaches nothing."""
        if self._controller is None or not math.isfinite(kl):
            return
        self._controller.value = self.value
        self.value = self._controller.update(kl, num_rollouts)
