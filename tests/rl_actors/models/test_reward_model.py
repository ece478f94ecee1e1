"""The reward model: what it reads, what it saves, and that a torn file is never a score of zero."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rl_actors.contracts.errors import BadDataError
from rl_actors.models.loading import load_backbone
from rl_actors.models.reward_model import RewardModel

torch.set_num_threads(1)
CRITERIA = ("correct", "polite")
IDS = torch.tensor([[1, 20, 30, 40, 50], [1, 21, 31, 0, 0]])
ATTENTION = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def fresh(tiny_dir: Path) -> RewardModel:
    backbone: Any = load_backbone(tiny_dir)
    return RewardModel(backbone, CRITERIA).eval()


@pytest.fixture
def model(tiny_dir: Path) -> RewardModel:
    """A reward model that says something."""
    one = fresh(tiny_dir)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (one.score_head.weight, one.rubric_head.weight, one.rubric_head.bias):
            parameter.normal_(generator=generator)
    one.temperature = 1.7
    return one


@torch.no_grad()
def scores(model: RewardModel, ids: torch.Tensor = IDS, attention: torch.Tensor = ATTENTION):
    return model(ids, attention)


def test_shapes_are_one_score_and_a_value_per_criterion(model: RewardModel):
    score, rubric = scores(model)
    assert score.shape == (2,)
    assert rubric.shape == (2, 2)


def test_before_training_every_run_scores_zero(tiny_dir: Path):
    score, rubric = scores(fresh(tiny_dir))
    assert score.tolist() == [0.0, 0.0]
    assert rubric.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_it_reads_the_last_attended_token(model: RewardModel):
    score, _ = scores(model)
    hidden = model.backbone(input_ids=IDS, attention_mask=ATTENTION).last_hidden_state
    torch.testing.assert_close(score[0], model.score_head(hidden[0, 4]).squeeze())
    torch.testing.assert_close(score[1], model.score_head(hidden[1, 2]).squeeze())
    assert not torch.allclose(score[1], model.score_head(hidden[1, 4]).squeeze()), "padding is not read"


def test_padding_changes_no_score(model: RewardModel):
    alone, _ = scores(model, IDS[1:, :3], ATTENTION[1:, :3])
    torch.testing.assert_close(scores(model)[0][1:], alone, rtol=1e-4, atol=1e-5)


def test_another_last_token_is_another_score(model: RewardModel):
    changed = IDS.clone()
    changed[0, 4] = 9
    assert scores(model)[0][0] != scores(model, changed)[0][0]


def test_a_saved_model_scores_the_same(model: RewardModel, tmp_path: Path):
    model.save(tmp_path)
    loaded = RewardModel.load(tmp_path)
    for before, after in zip(scores(model), scores(loaded), strict=True):
        assert torch.equal(before, after)
    assert (loaded.criteria, loaded.temperature) == (CRITERIA, 1.7)
    assert not loaded.training


def test_saving_again_overwrites(model: RewardModel, tmp_path: Path):
    model.save(tmp_path)
    with torch.no_grad():
        model.score_head.weight.mul_(2.0)
    model.temperature = 0.5
    model.save(tmp_path)
    assert torch.equal(scores(RewardModel.load(tmp_path))[0], scores(model)[0])
    assert RewardModel.load(tmp_path).temperature == 0.5


@pytest.mark.parametrize("lost", ["score_head.weight", "rubric_head.bias"])
def test_a_head_that_is_missing_is_an_error_and_not_a_score_of_zero(model: RewardModel, tmp_path: Path, lost: str):
    model.save(tmp_path)
    heads = load_file(tmp_path / "heads.safetensors")
    del heads[lost]
    save_file(heads, tmp_path / "heads.safetensors")
    with pytest.raises(BadDataError, match=lost):
        RewardModel.load(tmp_path)


def test_criteria_that_do_not_fit_the_heads_are_an_error(model: RewardModel, tmp_path: Path):
    model.save(tmp_path)
    config = json.loads((tmp_path / "reward_model.json").read_text())
    (tmp_path / "reward_model.json").write_text(json.dumps(config | {"criteria": ["correct"]}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        RewardModel.load(tmp_path)


def test_a_model_directory_without_heads_is_no_reward_model(tiny_dir: Path):
    with pytest.raises(FileNotFoundError, match=r"reward_model\.json"):
        RewardModel.load(tiny_dir)
