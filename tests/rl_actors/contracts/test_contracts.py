"""Contracts refuse what does not fit together, and cross process borders; errors keep their parts on the way."""

from __future__ import annotations

import inspect
import json
import pickle
from dataclasses import FrozenInstanceError, asdict, replace
from typing import Any

import pytest

from rl_actors.contracts import errors
from rl_actors.contracts.errors import BadDataError, BadInputError, SeatrialError
from rl_actors.contracts.rollouts import Completion, Routes, TrainingSample
from tests.rl_actors.fakes import make_rollout, make_task, make_turn

SAMPLE = TrainingSample(
    rollout_id="r", group_id=0, weights_versions=(0,), token_ids=(1, 2, 3), loss_mask=(False, True, True),
    rollout_logprobs=(0.0, -1.0, -2.0),
    reward=1.0, truncated=False,
)  # fmt: skip
TREE = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, SeatrialError)]


@pytest.mark.parametrize(
    "changes",
    [{"token_ids": (1, 2)}, {"loss_mask": (True,)}, {"rollout_logprobs": (0.0,) * 4}, {"loss_mask": ()}],
)
def test_a_sample_with_arrays_of_different_length_is_refused(changes: dict[str, Any]):
    with pytest.raises(ValueError, match="sample r: arrays of different length"):
        replace(SAMPLE, **changes)


def test_a_sample_with_equal_lengths_is_taken():
    assert replace(SAMPLE, reward=0.5).reward == 0.5


@pytest.mark.parametrize("logprobs", [(), (-1.0,), (-1.0,) * 3])
def test_a_completion_without_one_logprob_per_token_is_refused(logprobs: tuple[float, ...]):
    with pytest.raises(ValueError, match="2 tokens but"):
        Completion(token_ids=(1, 2), logprobs=logprobs, weights_version=0, finished=True, cached_tokens=0)


def test_values_are_frozen_and_have_no_room_for_more():
    with pytest.raises(FrozenInstanceError):
        SAMPLE.reward = 2.0  # type: ignore[misc]
    assert not hasattr(SAMPLE, "__dict__")


def test_a_rollout_counts_tokens_over_all_model_calls():
    rollout = make_rollout()
    assert (rollout.tokens_in, rollout.tokens_out) == (2 + 5, 2 + 3)


def test_a_rollout_names_every_weights_version_that_sampled_it():
    turns = (
        make_turn((1,), (2,), version=4),
        make_turn((1, 2), (3,), version=3),
        make_turn((1, 2, 3), (4,), version=4),
    )
    assert make_rollout(turns=turns).weights_versions == (3, 4)
    assert make_rollout(turns=()).weights_versions == ()


@pytest.mark.parametrize("value", [make_task(), make_rollout(), SAMPLE], ids=["task", "rollout", "sample"])
def test_values_pickle_and_turn_into_plain_json(value: Any):
    assert pickle.loads(pickle.dumps(value)) == value
    assert json.loads(json.dumps(asdict(value)))


def test_bad_input_survives_pickling_with_its_three_parts():
    error = pickle.loads(pickle.dumps(BadDataError("ppo.epochs", 0, "needs one or more")))
    assert type(error) is BadDataError
    assert (error.field, error.value, error.remedy) == ("ppo.epochs", 0, "needs one or more")
    assert str(error) == "ppo.epochs = 0: needs one or more"


@pytest.mark.parametrize("kind", [kind for kind in TREE if not issubclass(kind, BadInputError)])
def test_every_other_error_pickles(kind: type[SeatrialError]):
    assert str(pickle.loads(pickle.dumps(kind("why")))) == "why"


@pytest.mark.parametrize("kind", TREE)
def test_every_error_has_the_exit_code_its_docstring_promises(kind: type[SeatrialError]):
    """The tree in the module docstring is what the command line documents."""
    line = next((line for line in (errors.__doc__ or "").splitlines() if f" {kind.__name__} " in f" {line} "), "")
    assert line, kind
    if "exit code" in line:
        assert line.endswith(f"exit code {kind.exit_code}")
    else:
        assert kind.exit_code == 3


def test_routes_fill_whole_tokens():
    assert Routes(num_layers=2, top_k=2, experts=(0, 1) * 6).num_tokens == 3
    assert Routes().num_tokens == 0
    for broken in ({"num_layers": 2, "top_k": 2, "experts": (0, 1, 2)}, {"experts": (1,)}):
        with pytest.raises(ValueError, match="do not fill tokens"):
            Routes(**broken)  # type: ignore[arg-type]
