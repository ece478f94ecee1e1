"""Pinned versions against a real MLflow on SQLite: resolved, copied, proved; whatever is wrong is refused before."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.pipeline import pinned
from cluster.records.frozen import require_untouched
from cluster.registry.connection import store_of
from cluster.registry.entries import Lineage
from cluster.registry.registry import Registry
from cluster.registry.versions import NO_PINS, Pins
from rl_actors.contracts.errors import BadInputError, InfrastructureError, StageRefusedError, TamperedError
from rl_actors.contracts.versions import Calibration, PolicyKind, PolicyVersion, RewardModelVersion
from rl_actors.durable.hashing import sha256_directory
from tests.cluster.pipeline.fakes import CALIBRATION, DeskRun, make_reward_model, make_run, watch_of

LINEAGE = Lineage(bundle_id="b" * 64, snapshot_sha256="d" * 64)
PARENT = "9" * 64


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """One store for the module, for its migration takes seconds; every test registers content of its own."""
    return Registry("support_desk", "run-0", store=store_of(tmp_path_factory.mktemp("registry"), {}))


_number = itertools.count()


def directory_of(tmp_path: Path, **files: str) -> Path:
    """A finished model directory, different from all others."""
    directory = tmp_path / f"registered-{next(_number)}"
    directory.mkdir()
    for name, text in {"model.safetensors": directory.name, "tokenizer.json": "{}", **files}.items():
        (directory / name).write_text(text)
    return directory


def registered_policy(registry: Registry, directory: Path, kind: PolicyKind = "sft", **changes: Any) -> PolicyVersion:
    digest = sha256_directory(directory)
    name = f"{kind}_v1-{digest[:8]}"
    version = PolicyVersion(name=name, kind=kind, path=str(directory), sha256=digest, parent_sha256=PARENT)
    registry.versions.register(replace(version, **changes), LINEAGE)
    return version


def registered_reward(
    registry: Registry, tmp_path: Path, calibration: Calibration | None = CALIBRATION, **files: str
) -> RewardModelVersion:
    stored = {"calibration.json": json.dumps(asdict(calibration))} if calibration else {}
    directory = directory_of(tmp_path, **stored, **files)
    digest = sha256_directory(directory)
    version = RewardModelVersion(
        name=f"rm_v1-{digest[:8]}", path=str(directory), sha256=digest, calibration=calibration or CALIBRATION
    )
    registry.versions.register(version, LINEAGE)
    return version


def pinning(home: Path, baseline: str = "", reward_model: str = "", *settings: str) -> DeskRun:
    pins = {"baseline": baseline, "reward_model": reward_model}
    return make_run(home, *(f"workflow.{knob}={name}" for knob, name in pins.items() if name), *settings)


def base_with(tmp_path: Path, tokenizer: str = "{}") -> PolicyVersion:
    directory = directory_of(tmp_path, **{"tokenizer.json": tokenizer})
    return PolicyVersion(
        name="base-1", kind="base", path=str(directory), sha256=sha256_directory(directory), parent_sha256=""
    )


@pytest.fixture(autouse=True)
def trained() -> list[str]:
    """What was trained instead of adopted."""
    _trained.clear()
    return _trained


_trained: list[str] = []


def resolve(run: DeskRun, registry: Registry) -> Pins:
    return pinned.resolve(run.spec, {record.stage for record in run.journal.records}, registry.versions)


def baseline_of(run: DeskRun, pins: Pins, base: PolicyVersion) -> PolicyVersion:
    def train() -> PolicyVersion:
        _trained.append("sft")
        return base

    return pinned.baseline_of(pins, base, run.folder.models / "sft", run.watch.note, train)


def reward_model_of(run: DeskRun, pins: Pins, baseline: PolicyVersion) -> RewardModelVersion:
    def train() -> RewardModelVersion:
        _trained.append("reward_model")
        return make_reward_model("/models/rm")

    return pinned.reward_model_of(run.spec, pins.reward_model, baseline, run.folder.models / "reward", train)


# --- a baseline -------------------------------------------------------------------------------------------------------


def test_a_pinned_baseline_is_the_registered_one_in_a_read_only_copy(
    home: Path, tmp_path: Path, registry: Registry, trained: list[str]
):
    sft = registered_policy(registry, directory_of(tmp_path))
    run = pinning(home, sft.name)
    baseline = baseline_of(run, resolve(run, registry), base_with(tmp_path))
    assert baseline == replace(sft, path=str(run.folder.root / "models" / "sft"))
    assert sha256_directory(Path(baseline.path)) == sft.sha256
    assert not any(file.stat().st_mode & 0o222 for file in Path(baseline.path).iterdir())
    assert not Path(f"{baseline.path}.pinned").exists()
    assert trained == []
    require_untouched(baseline)


def test_plain_names_are_trained(run: DeskRun, tmp_path: Path, registry: Registry, trained: list[str]):
    pins = resolve(run, registry)
    base = baseline_of(run, pins, base_with(tmp_path))
    reward_model_of(run, pins, base)
    assert (pins, trained) == (NO_PINS, ["sft", "reward_model"])


def test_a_run_may_pin_what_it_made_itself(home: Path, registry: Registry):
    run = make_run(home)
    directory = run.fresh("models/sft")
    (directory / "model.safetensors").write_text("made here")
    sft = registered_policy(registry, directory)
    pins = Pins(baseline=sft)
    assert baseline_of(run, pins, sft) == sft
    assert (directory / "model.safetensors").read_text() == "made here"


@pytest.mark.parametrize("kind", ["ppo", "degraded"])
def test_a_policy_that_is_no_sft_model_is_no_baseline(home: Path, tmp_path: Path, registry: Registry, kind: PolicyKind):
    policy = registered_policy(registry, directory_of(tmp_path), kind)
    with pytest.raises(BadInputError, match=r"kind 'policy'; pin one of kind 'sft'"):
        resolve(pinning(home, policy.name), registry)


def test_an_unknown_baseline_is_named_with_what_is_registered(home: Path, tmp_path: Path, registry: Registry):
    sft = registered_policy(registry, directory_of(tmp_path))
    with pytest.raises(BadInputError, match=rf"not registered .* newest of kind 'sft': {sft.name}") as caught:
        resolve(pinning(home, "sft_v1-00000000"), registry)
    assert (caught.value.field, caught.value.value) == ("workflow.baseline", "sft_v1-00000000")


def test_a_registry_that_is_empty_knows_no_pin(home: Path, tmp_path: Path):
    empty = Registry("own_desk", "run-0", store=store_of(tmp_path, {}))
    with pytest.raises(BadInputError, match="none of kind 'reward_model' is there"):
        resolve(pinning(home, "", "rm_v1-00000000"), empty)


def test_a_registered_version_that_changed_is_refused_before_any_stage(home: Path, tmp_path: Path, registry: Registry):
    sft = registered_policy(registry, directory_of(tmp_path))
    (Path(sft.path) / "model.safetensors").write_text("somebody else's")
    with pytest.raises(TamperedError, match=rf"{sft.path}.* was registered with {sft.sha256[:16]}"):
        resolve(pinning(home, sft.name), registry)


def test_a_version_that_changed_since_the_run_began_leaves_nothing_behind(
    home: Path, tmp_path: Path, registry: Registry
):
    sft = registered_policy(registry, directory_of(tmp_path))
    run = pinning(home, sft.name)
    pins = resolve(run, registry)
    (Path(sft.path) / "extra.bin").write_text("more")
    with pytest.raises(TamperedError):
        baseline_of(run, pins, base_with(tmp_path))
    assert not (run.folder.root / "models" / "sft").exists()


def test_weights_that_are_gone_are_named_with_the_remedy(home: Path, tmp_path: Path, registry: Registry):
    sft = registered_policy(registry, directory_of(tmp_path))
    Path(sft.path).rename(tmp_path / "moved")
    with pytest.raises(BadInputError, match=rf"its weights are gone from {sft.path}; restore") as caught:
        resolve(pinning(home, sft.name), registry)
    assert caught.value.field == "workflow.baseline"


def test_a_disk_that_is_full_is_an_infrastructure_error(
    home: Path, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
):
    def copytree(*_given: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    sft = registered_policy(registry, directory_of(tmp_path))
    run = pinning(home, sft.name)
    pins = resolve(run, registry)
    monkeypatch.setattr(pinned.shutil, "copytree", copytree)
    with pytest.raises(InfrastructureError, match=rf"{sft.name}: .*No space left on device"):
        baseline_of(run, pins, base_with(tmp_path))


@pytest.mark.parametrize(("limit", "is_refused"), [(255, True), (256, False)])
def test_a_baseline_must_read_a_whole_rollout(
    home: Path, tmp_path: Path, registry: Registry, limit: int, is_refused: bool
):
    config = json.dumps({"max_position_embeddings": limit})
    sft = registered_policy(registry, directory_of(tmp_path, **{"config.json": config}))
    run = pinning(home, sft.name)
    if not is_refused:
        assert resolve(run, registry).baseline is not None
        return
    with pytest.raises(BadInputError, match=r"reads at most 255 tokens, model\.max_length is 256"):
        resolve(run, registry)


def test_a_baseline_without_a_known_parent_is_told(home: Path, tmp_path: Path, registry: Registry):
    notes: list[list[str]] = []
    for parent in ("", PARENT):
        sft = registered_policy(registry, directory_of(tmp_path), parent_sha256=parent)
        run = pinning(home, sft.name)
        version = baseline_of(run, resolve(run, registry), base_with(tmp_path))
        assert version.parent_sha256 == parent
        notes.append(watch_of(run).notes)
    assert [len(lines) for lines in notes] == [1, 0]
    assert "registered without its base model" in notes[0][0]


# --- a reward model ---------------------------------------------------------------------------------------------------


def test_a_pinned_reward_model_brings_the_calibration_it_was_accepted_on(
    home: Path, tmp_path: Path, registry: Registry, trained: list[str]
):
    reward = registered_reward(registry, tmp_path)
    run = pinning(home, "", reward.name)
    found = reward_model_of(run, resolve(run, registry), base_with(tmp_path))
    assert found == replace(reward, path=str(run.folder.root / "models" / "reward"))
    assert found.calibration == CALIBRATION
    assert trained == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["reward.max_ece=0.049"], "miscalibrated"),
        (["reward.min_pair_accuracy=0.81"], "useless"),
        (["reward.max_ece=0.05", "reward.min_pair_accuracy=0.8"], ""),
    ],
)
def test_a_pinned_reward_model_must_be_as_good_as_the_spec_asks(
    home: Path, tmp_path: Path, registry: Registry, settings: list[str], says: str
):
    run = pinning(home, "", registered_reward(registry, tmp_path).name, *settings)
    if not says:
        assert resolve(run, registry).reward_model is not None
        return
    with pytest.raises(StageRefusedError, match=says) as caught:
        resolve(run, registry)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("stored", [None, "", "{}", "[1]", '{"ece": 0.01}'])
def test_a_reward_model_without_a_calibration_is_refused(
    home: Path, tmp_path: Path, registry: Registry, stored: str | None
):
    files = {} if stored is None else {"calibration.json": stored}
    reward = registered_reward(registry, tmp_path, None, **files)
    with pytest.raises(StageRefusedError, match=rf"{reward.name} is uncalibrated: no calibration.json to believe"):
        resolve(pinning(home, "", reward.name), registry)


def test_a_reward_model_that_changed_is_refused(home: Path, tmp_path: Path, registry: Registry):
    reward = registered_reward(registry, tmp_path)
    better = asdict(replace(CALIBRATION, ece=0.001))
    (Path(reward.path) / "calibration.json").write_text(json.dumps(better))
    with pytest.raises(TamperedError, match=reward.name):
        resolve(pinning(home, "", reward.name), registry)


@pytest.mark.parametrize("tokenizer", ['{"model": "other"}', None])
def test_a_reward_model_of_another_tokenizer_is_refused(
    home: Path, tmp_path: Path, registry: Registry, tokenizer: str | None, trained: list[str]
):
    reward = registered_reward(registry, tmp_path, **({"tokenizer.json": tokenizer} if tokenizer else {}))
    if tokenizer is None:
        (Path(reward.path) / "tokenizer.json").unlink()
        reward = replace(reward, sha256=sha256_directory(Path(reward.path)))
        pins = Pins(reward_model=reward)
    else:
        pins = resolve(pinning(home, "", reward.name), registry)
    base = base_with(tmp_path)
    for refused in (
        lambda: baseline_of(make_run(home), pins, base),
        lambda: reward_model_of(make_run(home), pins, base),
    ):
        with pytest.raises(BadInputError, match=r"its tokenizer.json is not the baseline's") as caught:
            refused()
        assert caught.value.field == "workflow.reward_model"
    assert trained == [], "refused before minutes of SFT"


def test_two_pinned_versions_must_share_a_tokenizer_before_any_stage(home: Path, tmp_path: Path, registry: Registry):
    sft = registered_policy(registry, directory_of(tmp_path))
    other, same = (
        registered_reward(registry, tmp_path, **{"tokenizer.json": text}) for text in ('{"model": "other"}', "{}")
    )
    with pytest.raises(BadInputError, match="tokenizer"):
        resolve(pinning(home, sft.name, other.name), registry)
    assert not resolve(pinning(home, sft.name, same.name), registry).need_rollouts


# --- a resume ---------------------------------------------------------------------------------------------------------


def test_what_the_journal_vouches_for_needs_no_source(home: Path, tmp_path: Path, registry: Registry):
    sft, reward = registered_policy(registry, directory_of(tmp_path)), registered_reward(registry, tmp_path)
    run = pinning(home, sft.name, reward.name)
    pins = resolve(run, registry)
    run.journal.run_stage("sft", {}, lambda: "", str)
    Path(sft.path).rename(tmp_path / "moved-sft")
    assert resolve(run, registry) == pins
    Path(reward.path).rename(tmp_path / "moved-rm")
    with pytest.raises(BadInputError, match="gone"):
        resolve(run, registry)
    run.journal.run_stage("reward_model", {}, lambda: "", str)
    assert resolve(run, registry) == pins
