"""Sticky routing as arithmetic, and the durable split record under kills, torn lines and two writers."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from rl_actors.contracts.errors import BadInputError, InfrastructureError, StageRefusedError, TamperedError
from rl_actors.durable.files import ChainedLog, append_row, file_lock, read_rows, write_atomic
from serving.contracts.release import SplitRecord
from serving.split.record import BLOCK, SplitStore, route, slot_position
from tests.serving.fakes import START, Killed

GOLDEN_POSITIONS = (0.46941168734396105, 0.8181328270115866)
CANARY = SplitRecord(epoch=3, stable="sft-a", candidate="ppo-b", share=0.05, salt="r1", updated_at=START)


def routed(record: SplitRecord, position: float = 0.0, age_s: float = 0.0):
    return route(record, position, record.updated_at + age_s, stale_after_s=30.0)


def canaries(share: float, slots: range, salt: str = "r1") -> int:
    record = replace(CANARY, share=share)
    return sum(routed(record, slot_position(slot, salt)).release_channel == "canary" for slot in slots)


class TestRouting:
    def test_five_percent_of_a_hundred_thousand_sessions(self):
        assert canaries(0.05, range(100_000)) == 5_000

    @pytest.mark.parametrize(
        ("share", "size"), [(0.05, 20), (0.25, 20), (0.5, 20), (0.01, 100), (0.33, 100), (0.99, 100)]
    )
    def test_every_block_has_its_share(self, share: float, size: int):
        assert {canaries(share, range(start, start + size)) for start in range(0, 5_000, size)} == {round(share * size)}

    @pytest.mark.parametrize("share", [0.004, 0.033, 0.125])
    def test_a_share_between_two_hundredths_is_met_on_average(self, share: float):
        assert canaries(share, range(200_000)) / 200_000 == pytest.approx(share, abs=0.0005)

    def test_fifty_canary_sessions_come_at_the_share_and_by_coins_they_would_not(self):
        """What blocks are for: the share seen when the 50th canary session ends, over 300 releases."""

        def observed(position: Callable[[int, str], float], salt: str) -> float:
            hits = (slot for slot in itertools.count() if position(slot, salt) < 0.05)
            return 50 / (next(itertools.islice(hits, 49, None)) + 1)

        salts = [f"release-{number}" for number in range(300)]
        blocks = [observed(slot_position, salt) for salt in salts]
        coins = [observed(lambda slot, salt: random.Random(f"{salt}/{slot}").random(), salt) for salt in salts]
        assert max(abs(share - 0.05) for share in blocks) < 0.002
        assert sum(abs(share - 0.05) > 0.01 for share in coins) > 15

    def test_the_order_inside_a_block_shows_no_pattern(self):
        """Over many blocks, every place is the canary's equally often, next to another or not."""
        record = replace(CANARY, share=0.05)
        hits = np.array(
            [[routed(record, slot_position(b * BLOCK + i, "r1")).release_channel == "canary" for i in range(BLOCK)]
             for b in range(10_000)]
        )  # fmt: skip
        expected = 10_000 * 0.05
        assert chisquare(hits.sum(axis=0), [expected] * BLOCK).pvalue > 1e-3
        in_a_row = hits.reshape(-1)
        follows = (in_a_row[1:] & in_a_row[:-1]).sum() / in_a_row.sum()
        assert follows == pytest.approx(1 / (BLOCK * BLOCK), abs=0.004)

    def test_golden_positions(self):
        """The same in every process, release and Python version: a change would move users between arms."""
        assert [slot_position(slot, "r1") for slot in (0, 250)] == pytest.approx(GOLDEN_POSITIONS, abs=1e-15)

    @given(st.integers(0, 10**12), st.text())
    def test_positions_lie_in_zero_to_one_and_repeat(self, slot: int, salt: str):
        position = slot_position(slot, salt)
        assert 0.0 <= position < 1.0
        assert position == slot_position(slot, salt)

    @given(st.integers(0, 10**6), st.floats(0.01, 1.0), st.floats(0.01, 1.0))
    def test_a_raised_share_keeps_its_sessions(self, slot: int, one: float, other: float):
        low, high = (replace(CANARY, share=share) for share in sorted((one, other)))
        position = slot_position(slot, "r1")
        if routed(low, position).release_channel == "canary":
            assert routed(high, position).release_channel == "canary"

    def test_another_salt_is_another_draw(self):
        slots = range(20_000)
        both = [slot for slot in slots if slot_position(slot, "r1") < 0.5 and slot_position(slot, "r2") < 0.5]
        assert len(both) / len(slots) == pytest.approx(0.25, abs=0.015)

    def test_salt_and_slot_cannot_run_into_each_other(self):
        assert slot_position(23, "r1") != slot_position(3, "r12")

    def test_what_a_route_says(self):
        record = replace(CANARY, share=1.0)
        found = routed(record)
        assert (found.policy_version, found.release_channel, found.split_epoch) == ("ppo-b", "canary", 3)
        found = routed(replace(CANARY, share=0.0))
        assert (found.policy_version, found.release_channel, found.split_epoch) == ("sft-a", "general", 3)

    def test_a_stale_record_gives_the_candidate_nothing(self):
        record = replace(CANARY, share=1.0)
        assert routed(record, age_s=30.0).release_channel == "canary"
        stale = routed(record, age_s=30.1)
        assert (stale.policy_version, stale.release_channel, stale.split_epoch) == ("sft-a", "general", 0)

    def test_share_zero_has_no_canary(self):
        record = replace(CANARY, share=0.0)
        assert {routed(record, i / 5_000).release_channel for i in range(5_000)} == {"general"}


class TestRecord:
    @pytest.mark.parametrize(
        "change", [{"share": -0.1}, {"share": 1.1}, {"candidate": ""}, {"epoch": 0}, {"stable": ""}]
    )
    def test_a_record_that_routes_nowhere_is_refused(self, change: dict[str, object]):
        with pytest.raises(BadInputError):
            replace(CANARY, **change)


def first_record(**changes: object) -> SplitRecord:
    return replace(CANARY, epoch=1, share=0.0, **changes)


class TestStore:
    @pytest.fixture
    def store(self, tmp_path: Path) -> SplitStore:
        return SplitStore(tmp_path / "deep" / "split")

    def test_empty_before_the_first_write(self, store: SplitStore):
        assert store.read() is None
        assert store.history() == {}
        assert not store.path.parent.exists()

    def test_refresh_before_the_first_write_does_nothing(self, store: SplitStore):
        store.refresh(START)
        assert store.read() is None

    def test_write_and_read_back(self, store: SplitStore):
        store.compare_and_set(first_record())
        assert store.read() == first_record()
        assert SplitStore(store.path.parent).read() == first_record()

    @pytest.mark.parametrize("epoch", [1, 3, 7])
    def test_only_the_next_epoch_is_taken(self, store: SplitStore, epoch: int):
        store.compare_and_set(first_record())
        with pytest.raises(StageRefusedError, match="2 is next"):
            store.compare_and_set(replace(CANARY, epoch=epoch))
        assert store.read() == first_record()

    def test_the_first_epoch_is_one(self, store: SplitStore):
        with pytest.raises(StageRefusedError, match="1 is next"):
            store.compare_and_set(CANARY)

    def test_repeating_the_record_in_force_changes_nothing(self, store: SplitStore):
        store.compare_and_set(first_record())
        store.compare_and_set(first_record(updated_at=START + 99))
        assert store.read() == first_record()
        assert len(store.history()) == 1

    def test_refresh_moves_only_the_time(self, store: SplitStore):
        store.compare_and_set(first_record())
        store.refresh(START + 10.0)
        assert store.read() == first_record(updated_at=START + 10.0)

    def test_history_keeps_every_epoch(self, store: SplitStore):
        for epoch, share in enumerate((0.0, 0.05, 0.25, 0.0), start=1):
            store.compare_and_set(replace(CANARY, epoch=epoch, share=share))
        assert {epoch: record.share for epoch, record in store.history().items()} == {1: 0.0, 2: 0.05, 3: 0.25, 4: 0.0}

    def test_a_kill_before_the_switch_leaves_the_old_record(self, store: SplitStore):
        store.compare_and_set(first_record())
        with mock.patch.object(Path, "replace", side_effect=Killed), pytest.raises(Killed):
            store.compare_and_set(replace(CANARY, epoch=2))
        assert store.read() == first_record()
        store.compare_and_set(replace(CANARY, epoch=2))
        assert store.read() == replace(CANARY, epoch=2)

    def test_a_kill_after_the_switch_loses_no_history(self, store: SplitStore):
        store.compare_and_set(first_record())
        with mock.patch.object(ChainedLog, "append", side_effect=Killed), pytest.raises(Killed):
            store.compare_and_set(replace(CANARY, epoch=2))
        assert set(store.history()) == {1, 2}
        store.compare_and_set(replace(CANARY, epoch=3, share=0.25))
        assert {epoch: record.share for epoch, record in store.history().items()} == {1: 0.0, 2: 0.05, 3: 0.25}

    @pytest.mark.parametrize("text", ["{", "[]", '{"epoch": 1}', '{"epoch": 0, "stable": "a"}', "null"])
    def test_a_damaged_record_is_named_not_guessed(self, store: SplitStore, text: str):
        store.compare_and_set(first_record())
        store.path.write_text(text, encoding="utf-8")
        with pytest.raises(TamperedError, match=r"split\.json"):
            store.read()

    def test_a_full_disk_names_the_file_and_the_remedy(self, store: SplitStore):
        full = OSError(28, "No space left on device")
        with (
            mock.patch.object(os, "fsync", side_effect=full),
            pytest.raises(InfrastructureError, match="free disk space"),
        ):
            store.compare_and_set(first_record())
        assert store.read() is None

    def test_two_processes_never_both_win_an_epoch(self, store: SplitStore):
        store.compare_and_set(first_record())
        context = multiprocessing.get_context("fork")
        with context.Pool(4) as pool:
            wins = pool.starmap(try_epochs, [(str(store.path.parent), f"writer-{i}") for i in range(4)])
        final = store.read()
        assert final is not None
        assert sum(wins) == final.epoch - 1
        assert set(store.history()) == set(range(1, final.epoch + 1))


def try_epochs(directory: str, candidate: str) -> int:
    """Take as many epochs as possible in 15 tries; returns how many were won."""
    store, wins = SplitStore(Path(directory)), 0
    for _ in range(15):
        current = store.read()
        assert current is not None
        try:
            store.compare_and_set(replace(CANARY, epoch=current.epoch + 1, candidate=candidate))
        except StageRefusedError:
            continue
        wins += 1
    return wins


class TestDurableFiles:
    def test_replace_leaves_no_temporary_file(self, tmp_path: Path):
        path = tmp_path / "a" / "file.json"
        write_atomic(path, "one")
        write_atomic(path, "two")
        assert path.read_text(encoding="utf-8") == "two"
        assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]

    def test_rows_come_back_in_order(self, tmp_path: Path):
        path = tmp_path / "log.jsonl"
        for number in range(3):
            append_row(path, {"number": number, "text": "é\n"})
        assert [row["number"] for row in read_rows(path)] == [0, 1, 2]

    def test_no_file_is_no_row(self, tmp_path: Path):
        assert read_rows(tmp_path / "nothing.jsonl") == []

    @pytest.mark.parametrize("cut", range(1, 12))
    def test_a_torn_line_is_cut_off_and_never_glued_to_the_next(self, tmp_path: Path, cut: int):
        path = tmp_path / "log.jsonl"
        append_row(path, {"n": 1})
        append_row(path, {"n": 2})
        path.write_bytes(path.read_bytes()[:-cut])
        survivors = [row["n"] for row in read_rows(path)]
        append_row(path, {"n": 3})
        assert [row["n"] for row in read_rows(path)] == [*survivors, 3]

    def test_a_broken_line_in_the_middle_is_tampering(self, tmp_path: Path):
        path = tmp_path / "log.jsonl"
        path.write_text('{"n": 1}\nrubbish\n{"n": 2}\n', encoding="utf-8")
        with pytest.raises(TamperedError, match="not JSON"):
            read_rows(path)

    def test_no_number_outside_json_gets_in(self, tmp_path: Path):
        with pytest.raises(ValueError, match="JSON"):
            append_row(tmp_path / "log.jsonl", {"n": float("nan")})

    def test_an_unwritable_place_is_named(self, tmp_path: Path):
        (tmp_path / "file").write_text("in the way", encoding="utf-8")
        with pytest.raises(InfrastructureError, match=r"file/log\.jsonl"):
            append_row(tmp_path / "file" / "log.jsonl", {})
        with pytest.raises(InfrastructureError, match="permissions"), file_lock(tmp_path / "file" / "lock"):
            pass

    def test_a_lock_ends_with_its_holder(self, tmp_path: Path):
        with pytest.raises(Killed), file_lock(tmp_path / "lock"):
            raise Killed
        with file_lock(tmp_path / "lock"):
            pass

    def test_the_record_is_plain_json(self, tmp_path: Path):
        store = SplitStore(tmp_path)
        store.compare_and_set(first_record())
        assert json.loads(store.path.read_text(encoding="utf-8")) == asdict(first_record())
