"""Model directories: emptied, frozen, named by their hash; what changed or cannot be believed is refused."""

from __future__ import annotations

import json
import math
import stat
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cluster.records.frozen import freeze_policy, fresh, read_calibration, require_calibrated, require_untouched
from rl_actors.contracts.errors import StageRefusedError, TamperedError
from rl_actors.contracts.versions import PolicyVersion
from rl_actors.durable.hashing import sha256_directory
from tests.cluster.pipeline.fakes import CALIBRATION


@pytest.fixture
def baseline(tmp_path: Path) -> PolicyVersion:
    """A frozen policy that a test may break."""
    directory = fresh(tmp_path / "sft")
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_text("weights")
    return freeze_policy("sft", "sft", directory, "")


# --- directories ------------------------------------------------------------------------------------------------------


def test_a_policy_is_hashed_named_by_its_hash_and_read_only(tmp_path: Path):
    directory = fresh(tmp_path / "sft")
    (directory / "nested").mkdir()
    for name in ("model.bin", "nested/config.json"):
        (directory / name).write_text(name)
    version = freeze_policy("sft_v1", "sft", directory, "parent")
    assert version.sha256 == sha256_directory(directory)
    assert version.name == f"sft_v1-{version.sha256[:8]}"
    assert (version.kind, version.path, version.parent_sha256) == ("sft", str(directory), "parent")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in directory.rglob("*") if path.is_file()}
    assert modes == {0o444}


def test_two_contents_never_share_a_name(tmp_path: Path):
    versions = []
    for text in ("one", "two"):
        directory = fresh(tmp_path / "ppo")
        (directory / "model.bin").write_text(text)
        versions.append(freeze_policy("ppo_v1", "ppo", directory, ""))
    assert versions[0].name != versions[1].name


def test_fresh_empties_what_a_killed_attempt_left_even_when_it_was_frozen(tmp_path: Path):
    directory = fresh(tmp_path / "ppo")
    (directory / "half.bin").write_text("half")
    (directory / "half.bin").chmod(0o444)
    (directory / "nested").mkdir()
    assert fresh(tmp_path / "ppo") == directory
    assert list(directory.iterdir()) == []
    assert directory == tmp_path / "ppo"


def test_fresh_leaves_its_neighbours_alone(tmp_path: Path):
    (fresh(tmp_path / "sft") / "model.bin").write_text("keep")
    fresh(tmp_path / "ppo")
    assert (tmp_path / "sft" / "model.bin").read_text() == "keep"


# --- frozen -----------------------------------------------------------------------------------------------------------


def test_an_untouched_policy_passes(baseline: PolicyVersion):
    require_untouched(baseline)


@pytest.mark.parametrize("change", ["edit", "add", "remove", "rename"])
def test_every_change_of_a_frozen_policy_is_found(baseline: PolicyVersion, change: str):
    file = Path(baseline.path) / "config.json"
    file.chmod(0o644)
    match change:
        case "edit":
            file.write_text(file.read_text() + " ")
        case "add":
            (Path(baseline.path) / "extra.json").write_text("{}")
        case "remove":
            file.unlink()
        case _:
            file.rename(file.with_name("configuration.json"))
    with pytest.raises(TamperedError) as caught:
        require_untouched(baseline)
    assert baseline.path in str(caught.value)
    assert baseline.sha256[:16] in str(caught.value)
    assert caught.value.exit_code == 3


# --- calibration ------------------------------------------------------------------------------------------------------


def test_a_good_calibration_passes_and_its_bounds_are_inclusive():
    require_calibrated(CALIBRATION, max_ece=0.1, min_pair_accuracy=0.6)
    require_calibrated(CALIBRATION, max_ece=CALIBRATION.ece, min_pair_accuracy=CALIBRATION.pair_accuracy)


@pytest.mark.parametrize("ece", [0.1001, 0.5, math.nan, math.inf])
def test_a_bad_calibration_error_is_refused_with_its_numbers(ece: float):
    with pytest.raises(StageRefusedError) as caught:
        require_calibrated(replace(CALIBRATION, ece=ece), max_ece=0.1, min_pair_accuracy=0.6)
    text = str(caught.value)
    assert "miscalibrated" in text
    assert f"{ece:.3f} on 40 held-out pairs, reward.max_ece is 0.1" in text
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("accuracy", [0.599, 0.0, math.nan])
def test_a_useless_ranking_is_refused_with_its_numbers(accuracy: float):
    with pytest.raises(StageRefusedError) as caught:
        require_calibrated(replace(CALIBRATION, pair_accuracy=accuracy), max_ece=0.1, min_pair_accuracy=0.6)
    text = str(caught.value)
    assert "useless" in text
    assert f"{accuracy:.1%} of held-out pairs" in text
    assert "reward.min_pair_accuracy is 0.6" in text


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path):
    (tmp_path / "calibration.json").write_text(json.dumps(asdict(CALIBRATION)))
    assert read_calibration(tmp_path) == CALIBRATION
