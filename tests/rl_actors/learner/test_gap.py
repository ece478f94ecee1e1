"""The gap between engine and learner is measured alike whatever is done about it, by hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rl_actors.algorithms.batching import TrainingBatch
from rl_actors.contracts.recipe import CorrectionMode, Recipe
from rl_actors.learner.batch import Microbatch
from rl_actors.learner.objective import correct_mismatch, mismatch_metrics

MODES: list[CorrectionMode] = ["none", "token_tis", "sequence_tis", "sequence_mask", "token_icepop"]
MASK = torch.tensor([[True, True, False], [True, True, True]])
RHO = torch.tensor([[3.0, 0.6, math.nan], [0.1, 1.0, 1.5]], dtype=torch.float64)
SILENT = {"mismatch_abs_mean": 0.0, "mismatch_abs_max": 0.0, "mismatch_k3": 0.0, "mismatch_chi2": 0.0}


def gap(
    rho: Tensor = RHO, mask: Tensor = MASK, mode: CorrectionMode = "token_tis", **options: float
) -> dict[str, float]:
    """The gap's metrics of a batch whose learner / engine ratios are `rho`."""
    rollout, row = torch.full_like(rho, -2.0), torch.zeros(len(rho))
    inputs = TrainingBatch(
        token_ids_BT=torch.zeros_like(mask, dtype=torch.long), attention_mask_BT=torch.ones_like(mask),
        loss_mask_BT=mask, rollout_logprobs_BT=rollout, rewards_B=row, group_ids_B=row.long(), truncated_B=row.bool(),
        routes_LBTK=torch.empty(0, *mask.shape, 0, dtype=torch.int16),
    )  # fmt: skip
    batch = Microbatch(inputs, old_logprobs=rollout + rho.log(), ref_logprobs=rollout)
    correct_mismatch(batch, Recipe(correction=mode, **options))  # pyright: ignore[reportArgumentType]
    found = mismatch_metrics([batch], [torch.zeros_like(rho)])
    return {name: value for name, value in found.items() if name.startswith("mismatch_")}


def test_the_gap_by_hand():
    metrics = gap()
    ratios = [3.0, 0.6, 0.1, 1.0, 1.5]
    mean, square = sum(ratios) / 5, sum(r * r for r in ratios) / 5
    assert metrics["mismatch_abs_mean"] == pytest.approx(sum(abs(math.log(r)) for r in ratios) / 5)
    assert metrics["mismatch_abs_max"] == pytest.approx(math.log(10))
    assert metrics["mismatch_k3"] == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 5)
    assert metrics["mismatch_chi2"] == pytest.approx(square - 1)
    assert metrics["mismatch_ess_fraction"] == pytest.approx(mean**2 / square)


@pytest.mark.parametrize("mode", MODES)
def test_the_gap_is_logged_alike_in_every_mode(mode: CorrectionMode):
    plain, corrected = gap(mode="none"), gap(mode=mode)
    names = plain.keys() - {"mismatch_masked_fraction"}
    assert {name: plain[name] for name in names} == {name: corrected[name] for name in names}


def test_what_is_rejected_is_counted():
    assert gap(mode="sequence_mask", correction_floor=0.2)["mismatch_masked_fraction"] == pytest.approx(3 / 5)
    rho = torch.tensor([[1.2, 1.0, 1.0], [1e-5, 1.0, 1.0]])
    assert gap(rho, mode="none", veto=1e-4)["mismatch_masked_fraction"] == pytest.approx(3 / 5)


@pytest.mark.parametrize("mode", MODES)
def test_no_gap_and_no_token_are_silent(mode: CorrectionMode):
    wanted = SILENT | {"mismatch_masked_fraction": 0.0, "mismatch_ess_fraction": 1.0}
    assert gap(torch.ones(2, 3), mode=mode) == wanted
    assert gap(mask=torch.zeros_like(MASK), mode=mode) == wanted


def test_masked_values_never_leak():
    assert gap() == gap(torch.where(MASK, RHO, 7.0))


def test_a_nan_of_the_engine_is_reported_not_hidden():
    assert math.isnan(gap(torch.full_like(RHO, math.nan))["mismatch_abs_max"])
