"""Pinned names: told apart from names to train, looked up, and refused with what could have been meant."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from cluster.registry.entries import ModelVersion
from cluster.registry.versions import NO_PINS, resolve_pins
from cluster.spec.sections import WorkflowSection, is_pinned
from cluster.spec.spec import load_spec, override
from rl_actors.contracts.errors import BadInputError, TamperedError
from rl_actors.contracts.versions import PolicyKind, PolicyVersion
from tests.cluster.pipeline.fakes import FakeVersions, make_reward_model


def policy(name: str, kind: PolicyKind) -> PolicyVersion:
    return PolicyVersion(name=name, kind=kind, path="/models", sha256=name[-8:].ljust(64, "0"), parent_sha256="")


SFT, OLDER = policy("sft_v1-1a2b3c4d", "sft"), policy("sft_v1-5e6f7a8b", "sft")
PPO = policy("ppo_v1-bbe40699", "ppo")
RM = replace(make_reward_model("/rm", "rm_v1-77ab01cd"), sha256="77ab01cd".ljust(64, "0"))
UNNAMED = replace(RM, name="rm_v1", sha256="3" * 64)
"""Of a time when a reward model's name did not carry its hash."""


def versions(*policies: ModelVersion) -> FakeVersions:
    return FakeVersions(known={"desk-policy": policies, "desk-reward-model": (UNNAMED, RM)})


def workflow(*settings: str) -> WorkflowSection:
    return override(load_spec("support_desk"), [f"workflow.{setting}" for setting in settings]).workflow


def refusal(known: FakeVersions, *settings: str) -> BadInputError:
    with pytest.raises(BadInputError) as caught:
        resolve_pins(workflow(*settings), known)  # type: ignore[arg-type]
    return caught.value


@pytest.mark.parametrize(
    ("name", "is_it"),
    [
        ("rm_v1-77ab01cd", True),
        ("a-b-00000000", True),
        ("rm_v1", False),
        ("rm_v1-77ab01c", False),
        ("rm_v1-77AB01CD", False),
        ("rm_v1_77ab01cd", False),
        ("rm_v1-77ab01cd-", False),
        ("-77ab01cd", False),
    ],
)
def test_a_pinned_name_ends_in_eight_digits_of_a_hash(name: str, is_it: bool):
    assert is_pinned(name) is is_it


@dataclass
class Silent:
    """A registry that must not be asked: connecting takes seconds."""

    policy_model: str = "p"
    reward_model: str = "r"

    def entries(self, model: str) -> tuple[ModelVersion, ...]:
        raise AssertionError(f"{model} was asked for")


def test_plain_names_are_trained_and_ask_no_registry():
    assert resolve_pins(load_spec("support_desk").workflow, Silent()) == NO_PINS  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="p was asked"):
        resolve_pins(workflow(f"baseline={SFT.name}"), Silent())  # type: ignore[arg-type]


def test_pinned_names_become_the_registered_versions():
    pins = resolve_pins(workflow(f"baseline={OLDER.name}", f"reward_model={RM.name}"), versions(PPO, SFT, OLDER))  # type: ignore[arg-type]
    assert (pins.baseline, pins.reward_model) == (OLDER, RM)
    assert (pins.of_baseline, pins.of_reward_model) == ({"pinned": OLDER.sha256}, {"pinned": RM.sha256})
    assert not pins.need_rollouts
    assert replace(pins, baseline=None).need_rollouts
    assert replace(pins, reward_model=None).need_rollouts
    assert (NO_PINS.of_baseline, NO_PINS.of_reward_model, NO_PINS.need_rollouts) == ({}, {}, True)


def test_an_unknown_name_is_refused_with_the_nearest_and_the_known_ones():
    error = refusal(versions(PPO, SFT, OLDER), "baseline=sft_v1-1a2b3c40")
    assert (error.field, error.value, error.exit_code) == ("workflow.baseline", "sft_v1-1a2b3c40", 2)
    assert "not registered as a version of desk-policy; did you mean 'sft_v1-1a2b3c4d'?" in error.remedy
    assert "newest of kind 'sft': sft_v1-1a2b3c4d, sft_v1-5e6f7a8b;" in error.remedy
    assert PPO.name not in error.remedy


def test_a_date_that_looks_like_a_hash_is_refused_with_the_way_out():
    error = refusal(versions(), "baseline=mine-20261126")
    assert "none of kind 'sft' is there; a name that does not end in '-' and 8 hex digits is trained" in error.remedy


def test_names_without_a_hash_are_not_offered():
    error = refusal(versions(), "reward_model=rm_v1-00000000")
    assert error.field == "workflow.reward_model"
    assert "newest of kind 'reward_model': rm_v1-77ab01cd;" in error.remedy


def test_a_trained_policy_is_no_baseline():
    error = refusal(versions(PPO, SFT), f"baseline={PPO.name}")
    assert "is a version of kind 'policy'; pin one of kind 'sft'" in error.remedy
    assert SFT.name in error.remedy


def test_a_registry_that_contradicts_the_name_is_not_believed():
    changed = replace(SFT, sha256="f" * 64)
    with pytest.raises(TamperedError, match=r"sft_v1-1a2b3c4d has sha256 ffffffffffffffff; its tag was changed"):
        resolve_pins(workflow(f"baseline={SFT.name}"), versions(changed))  # type: ignore[arg-type]
