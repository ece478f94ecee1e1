"""A serving home with damaged files: what is broken is named, costs only itself, and heals when it is put right."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rl_actors.contracts.errors import EngineError, InfrastructureError, TamperedError
from serving.gateway.ports import LivePolicy
from serving.platform import replicas as gateway_module
from serving.platform.replicas import ServePolicies, end_orphans
from serving.store.ledger import RequestLedger
from serving.store.served import ServedPolicies
from serving.store.trace_log import TraceLog, read_traces
from tests.serving.fakes import START, FakeClock, make_record
from tests.serving.gateway.live_fakes import (
    CANDIDATE,
    HELLO,
    STABLE,
    body,
    make_config,
    make_policy,
    make_rig,
    renderer,
    session_in,
)
from tests.serving.split.test_split_watch import ack, dead_pid, write
from tests.serving.store.test_trace_log import make_trace


class TestStampFiles:
    @pytest.mark.parametrize(
        "change", [{"bundle_id": ""}, {"bundle_id": "a\nb"}, {"version": "../x"}, {"colour": "red"}]
    )
    def test_stamps_of_impossible_values_are_damaged(self, tmp_path: Path, change: dict[str, str]):
        """Whoever reads them did not give them: it is the file that is wrong, not the request."""
        (tmp_path / "sft-a.json").write_text(json.dumps({**asdict(make_policy()), **change}))
        with pytest.raises(TamperedError, match=r"sft-a\.json"):
            ServedPolicies(tmp_path).find(STABLE)

    def test_damaged_stamps_are_not_overwritten_by_the_next_deployment(self, tmp_path: Path):
        """A version means the same bytes for ever: what stood there must be looked at by a human."""
        (tmp_path / "sft-a.json").write_text("{")
        with pytest.raises(TamperedError):
            ServedPolicies(tmp_path).add(make_policy())
        assert (tmp_path / "sft-a.json").read_text() == "{"


class TestPolicyThatCannotBeLoaded:
    def policies(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any]) -> ServePolicies:
        config = make_config(tmp_path)
        ServedPolicies(config.files.served).add(make_policy())
        handle = SimpleNamespace(generate=SimpleNamespace(remote=None))
        monkeypatch.setattr(gateway_module.serve, "get_app_handle", lambda name: handle)
        monkeypatch.setattr(gateway_module, "renderer_of", load)
        return ServePolicies(config)

    @pytest.mark.parametrize("error", [OSError("no such directory"), ValueError("no tokenizer in it")])
    def test_a_model_directory_without_a_tokenizer_is_an_engine_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ):
        """Only an EngineError sends a session on to stable; anything else is an internal error for its user."""

        def fail(path: str) -> None:
            raise error

        with pytest.raises(EngineError, match=f"policy sft-a: {error}"):
            asyncio.run(self.policies(tmp_path, monkeypatch, fail).find(STABLE))

    def test_damaged_stamps_are_an_engine_error_until_they_are_put_right(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        policies = self.policies(tmp_path, monkeypatch, lambda path: renderer())
        path = make_config(tmp_path).files.served / "sft-a.json"
        good = path.read_text()
        path.write_text(good[:-9])
        with pytest.raises(EngineError, match=r"sft-a\.json does not hold"):
            asyncio.run(policies.find(STABLE))
        path.write_text(good)
        assert asyncio.run(policies.find(STABLE)).stamps == make_policy()

    def test_a_candidate_that_cannot_be_loaded_costs_no_user_an_answer(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        rig = make_rig(tmp_path, share=0.5, scripts={STABLE: HELLO})
        broken = self.policies(tmp_path, monkeypatch, lambda path: renderer())
        (make_config(tmp_path).files.served / f"{CANDIDATE}.json").write_text("{")
        healthy = rig.ports.find_policy

        async def find(version: str) -> LivePolicy:
            return await (broken.find(version) if version == CANDIDATE else healthy(version))

        object.__setattr__(rig.ports, "find_policy", find)
        object.__setattr__(rig.ports, "find_stamps", ServedPolicies(make_config(tmp_path).files.served).find)

        async def ask() -> Any:
            async with rig.client() as client:
                return await client.post("/v1/chat/completions", json=body(user=session_in(rig, canary=True)))

        answer = asyncio.run(ask())
        assert (answer.status_code, answer.headers["x-seatrial-policy-version"]) == (200, STABLE)
        first, second = rig.rows()
        assert (first.policy_version, first.status, first.split_epoch) == (CANDIDATE, "engine_error", 1)
        assert (second.status, second.split_epoch) == ("ok", 0), "it belongs to the other arm, and enters no comparison"


class TestTraces:
    def test_a_torn_line_costs_itself_and_what_was_glued_to_it_but_nothing_after(self, tmp_path: Path):
        path = tmp_path / "traces.jsonl"
        log = TraceLog(path, 1.0)
        log.write(make_trace(0))
        path.write_bytes(path.read_bytes()[:-30])
        for number in (1, 2, 3):
            log.write(make_trace(number))
        assert list(read_traces(path)) == [make_trace(2), make_trace(3)]

    def test_a_log_that_could_not_be_written_is_written_again_once_it_can(self, tmp_path: Path):
        path = tmp_path / "traces.jsonl"
        path.mkdir()
        log = TraceLog(path, 1.0)
        log.write(make_trace(0))
        path.rmdir()
        log.write(make_trace(1))
        assert (log.num_lost, [trace.run_id for trace in read_traces(path)]) == (1, ["run-1"])


class TestOrphans:
    def test_runs_are_ended_before_their_gateway_is_forgotten(self, tmp_path: Path):
        """The other way round, a kill in between would leave them open for ever: nobody would know whose they are."""
        config = make_config(tmp_path)
        ledger = RequestLedger(config.files.ledger, owner="new")
        dead = RequestLedger(config.files.ledger, owner="dead")
        dead.start(make_record(1))
        dead.close()
        directory = write(tmp_path, ack(gateway="dead", pid=dead_pid()))
        clock = FakeClock(START + 5)

        def fail(owner: str, *, at: float) -> int:
            raise InfrastructureError(f"{owner}: database is locked")

        abort, ledger.abort_orphans = ledger.abort_orphans, fail
        with pytest.raises(InfrastructureError, match="dead: database is locked"):
            end_orphans(ledger, config, clock)
        assert (directory / "dead.json").exists()
        ledger.abort_orphans = abort
        end_orphans(ledger, config, clock)
        assert not (directory / "dead.json").exists()
        (row,) = ledger.rows()
        assert (row.status, row.success) == ("aborted", "no")
        (event,) = ledger.events(["failure"], epochs=[2])
        assert event.at == START + 5
        ledger.close()
