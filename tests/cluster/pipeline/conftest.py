"""One thread, no network, and one small frozen world per session that the tests of the stages share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rl_actors.contracts.versions import DataSnapshot, PolicyVersion
from tests.cluster.pipeline.fakes import DeskRun, build_model, freeze_data, make_run


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SEATRIAL_HOME of its own: nothing of the person who runs the tests is read or written."""
    monkeypatch.setenv("SEATRIAL_HOME", str(tmp_path / "home"))
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "SEATRIAL_WORKFLOWS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.fixture
def run(home: Path) -> DeskRun:
    """A fresh run of the small spec."""
    return make_run(home)


@pytest.fixture(scope="session")
def frozen_run(tmp_path_factory: pytest.TempPathFactory) -> DeskRun:
    """The run that owns the shared snapshot and base model; tests only read it."""
    return make_run(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session")
def snapshot(frozen_run: DeskRun) -> DataSnapshot:
    """The small support_desk data, frozen once."""
    return freeze_data(frozen_run)


@pytest.fixture(scope="session")
def base(frozen_run: DeskRun, snapshot: DataSnapshot) -> PolicyVersion:
    """A tiny GPT-OSS policy with its Harmony tokenizer, built once."""
    return build_model(frozen_run, snapshot)
