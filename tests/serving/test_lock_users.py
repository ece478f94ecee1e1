"""Whoever waits for a lock that another process holds says which file is held, and changes nothing."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from rl_actors.contracts.errors import InfrastructureError
from rl_actors.durable.files import file_lock
from serving.contracts.release import SplitRecord
from serving.release import controller
from serving.split import record as split
from serving.split.record import SplitStore
from serving.store import ledger
from serving.store.ledger import RequestLedger
from tests.rl_actors.durable.test_file_lock import held_here
from tests.serving.fakes import START, harness


class TestUsers:
    """Whoever locks says which file is held; nothing was changed."""

    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let nobody wait a minute."""
        for module in (split, ledger, controller):
            monkeypatch.setattr(module, "file_lock", functools.partial(file_lock, timeout_s=0.05))

    def test_the_split(self, tmp_path: Path):
        store = SplitStore(tmp_path)
        record = SplitRecord(epoch=1, stable="sft-a", candidate="", share=0.0, salt="s", updated_at=START)
        with held_here(tmp_path / "split.lock"), pytest.raises(InfrastructureError, match=r"split\.lock: in use"):
            store.compare_and_set(record)
        assert store.read() is None
        store.compare_and_set(record)

    def test_the_ledger(self, tmp_path: Path):
        refused = pytest.raises(InfrastructureError, match=r"ledger\.sqlite\.lock: in use")
        with held_here(tmp_path / "ledger.sqlite.lock"), refused:
            RequestLedger(tmp_path / "ledger.sqlite", owner="a")
        RequestLedger(tmp_path / "ledger.sqlite", owner="a").close()

    @pytest.mark.parametrize("act", ["tick", "roll_back"])
    def test_the_controller(self, tmp_path: Path, act: str):
        rig = harness(tmp_path)
        asked: dict[str, Any] = {"actor": "ann", "reason": "r"} if act == "roll_back" else {}
        refused = pytest.raises(InfrastructureError, match=r"controller\.lock: in use")
        with held_here(tmp_path / "release" / "controller.lock"), refused:
            getattr(rig.controller(), act)(**asked)
        assert rig.platform.splits == []
        getattr(rig.controller(), act)(**asked)
