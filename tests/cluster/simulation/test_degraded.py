"""The bad checkpoint: far from the good one, still able to sample, and the same for the same seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.records.frozen import require_untouched
from cluster.simulation.degraded import DEGRADE_SCALE, degrade_policy
from rl_actors.agent.renderers.harmony import HarmonyRenderer
from rl_actors.contracts.versions import PolicyVersion
from tests.cluster.pipeline.fakes import build_model, freeze_data, make_run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PolicyVersion:
    """A tiny policy with its tokenizer."""
    run = make_run(tmp_path_factory.mktemp("good"))
    return build_model(run, freeze_data(run))


@pytest.fixture(scope="module")
def degraded(tmp_path_factory: pytest.TempPathFactory, base: PolicyVersion) -> PolicyVersion:
    return degrade_policy(base, tmp_path_factory.mktemp("degrade") / "models", 7)


def weights(policy: PolicyVersion) -> Mapping[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(policy.path).state_dict()


def test_every_matrix_of_the_bad_checkpoint_is_far_from_the_good_one(base: PolicyVersion, degraded: PolicyVersion):
    before, after = weights(base), weights(degraded)
    assert before.keys() == after.keys()
    matrices = [name for name in before if before[name].dim() > 1 and before[name].std() > 0]
    assert len(matrices) > 4
    for name in matrices:
        moved = (after[name] - before[name]).std() / before[name].std()
        assert moved == pytest.approx(DEGRADE_SCALE, rel=0.1), name


def test_norms_and_sinks_stay_so_that_it_still_samples(base: PolicyVersion, degraded: PolicyVersion):
    before, after = weights(base), weights(degraded)
    vectors = [name for name in before if before[name].dim() <= 1]
    assert vectors
    assert all(torch.equal(before[name], after[name]) for name in vectors)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.values())


def test_the_bad_checkpoint_is_a_version_of_its_own(base: PolicyVersion, degraded: PolicyVersion):
    assert (degraded.kind, degraded.parent_sha256) == ("degraded", base.sha256)
    assert degraded.name == f"degraded_v1-{degraded.sha256[:8]}"
    assert degraded.sha256 != base.sha256
    assert HarmonyRenderer.from_directory(degraded.path).stop_token_ids


def test_degrading_depends_on_the_seed_alone(tmp_path: Path, base: PolicyVersion, degraded: PolicyVersion):
    torch.manual_seed(99)
    assert degrade_policy(base, tmp_path / "again", 7).sha256 == degraded.sha256
    assert degrade_policy(base, tmp_path / "other", 8).sha256 != degraded.sha256


def test_the_good_policy_is_left_alone(base: PolicyVersion, degraded: PolicyVersion):
    require_untouched(base)
