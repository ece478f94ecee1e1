"""Chained rows: they come back as they were given, and whatever is done to a line in between is seen."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_actors.contracts.errors import InfrastructureError, TamperedError
from rl_actors.durable import files
from rl_actors.durable.files import ChainedLog, append_row, open_rows, read_rows
from tests.serving.fakes import Killed

ROWS = [{"n": 1, "text": "é\n"}, {"n": 2, "deep": {"b": [1.5, None], "a": True}}, {"n": 3}, {"n": 4}]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Four chained rows."""
    found = tmp_path / "log.jsonl"
    for row in ROWS:
        ChainedLog(found).append(row)
    return found


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def rewrite(path: Path, found: list[bytes]) -> None:
    path.write_bytes(b"".join(found))


class TestChain:
    def test_rows_come_back_as_they_were_given(self, path: Path):
        assert ChainedLog(path).rows() == ROWS
        assert [row["n"] for row in read_rows(path)] == [1, 2, 3, 4], "a plain reader sees them too"

    def test_each_chain_is_the_hash_of_the_row_and_of_the_chain_before(self, path: Path):
        """The rule in a few lines of its own, as an auditor would write it."""
        before = ""
        for chain, row in zip(ChainedLog(path).chains(), ROWS, strict=True):
            text = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            before = hashlib.sha256((before + text).encode()).hexdigest()
            assert chain == before

    def test_a_line_reads_as_it_was_written_with_the_chain_at_its_end(self, path: Path):
        assert list(json.loads(lines(path)[1])) == ["n", "deep", "chain"]

    def test_no_file_is_no_row(self, tmp_path: Path):
        assert ChainedLog(tmp_path / "none.jsonl").rows() == []
        assert ChainedLog(tmp_path / "none.jsonl").chains() == []
        assert list(tmp_path.iterdir()) == []

    @settings(max_examples=60, deadline=None)
    @given(rows=st.lists(st.dictionaries(st.text().filter(lambda name: name != "chain"), JSON, max_size=4), max_size=4))
    def test_any_rows_come_back(self, tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]):
        found = tmp_path_factory.mktemp("rows") / "log.jsonl"
        with mock.patch.object(os, "fsync"):
            for row in rows:
                ChainedLog(found).append(row)
        assert ChainedLog(found).rows() == rows

    def test_a_key_that_json_spells_otherwise_still_fits(self, tmp_path: Path):
        """Numbers sort otherwise than the texts they become: the hash is over what is read back."""
        ChainedLog(tmp_path / "log.jsonl").append({"counts": {10: 1, 9: 2}, "pair": (1, 2)})
        assert ChainedLog(tmp_path / "log.jsonl").rows() == [{"counts": {"10": 1, "9": 2}, "pair": [1, 2]}]

    def test_half_a_character_is_kept(self, tmp_path: Path):
        ChainedLog(tmp_path / "log.jsonl").append({"text": "\ud800"})
        assert ChainedLog(tmp_path / "log.jsonl").rows() == [{"text": "\ud800"}]

    def test_a_row_with_a_chain_of_its_own_is_refused(self, tmp_path: Path):
        with pytest.raises(ValueError, match="must not be called 'chain'"):
            ChainedLog(tmp_path / "log.jsonl").append({"chain": "x"})
        assert not (tmp_path / "log.jsonl").exists()

    def test_no_number_outside_json_gets_in(self, tmp_path: Path):
        with pytest.raises(ValueError, match="JSON"):
            ChainedLog(tmp_path / "log.jsonl").append({"n": float("nan")})
        assert not (tmp_path / "log.jsonl").exists()


Change = Callable[[list[bytes]], list[bytes]]
TAMPERINGS: dict[str, tuple[Change, int]] = {
    "a changed value": (lambda f: [f[0], f[1].replace(b'"n": 2', b'"n": 7'), *f[2:]], 2),
    "a changed first line": (lambda f: [f[0].replace(b'"n": 1', b'"n": 0'), *f[1:]], 1),
    "a changed last line": (lambda f: [*f[:3], f[3].replace(b'"n": 4', b'"n": 5')], 4),
    "a value that is no number": (lambda f: [f[0], f[1].replace(b"1.5", b"NaN"), *f[2:]], 2),
    "an added field": (lambda f: [*f[:2], f[2].replace(b'"n": 3', b'"n": 3, "m": 1'), f[3]], 3),
    "a removed first line": (lambda f: f[1:], 1),
    "a removed middle line": (lambda f: [f[0], *f[2:]], 2),
    "swapped lines": (lambda f: [f[0], f[2], f[1], f[3]], 2),
    "a repeated line": (lambda f: [*f, f[3]], 5),
    "a line without a chain behind chained ones": (lambda f: [*f, b'{"n": 5}\n'], 5),
    "a line without a chain between chained ones": (lambda f: [*f[:2], b'{"n": 5}\n', *f[2:]], 3),
    "a chain taken off": (lambda f: [f[0], b'{"n": 2}\n', *f[2:]], 2),
    "an empty chain": (lambda f: [f[0], b'{"n": 2, "chain": ""}\n', *f[2:]], 2),
    "a chain that is no text": (lambda f: [b'{"n": 1, "chain": null}\n', *f[1:]], 1),
    "a line that is not JSON": (lambda f: [f[0], b"rubbish\n", *f[2:]], 2),
    "a line that is no object": (lambda f: [f[0], b"[1]\n", *f[2:]], 2),
    "an empty line": (lambda f: [f[0], b"\n", *f[1:]], 2),
    "bytes that are no text": (lambda f: [f[0], b'{"n": "\xff"}\n', *f[2:]], 2),
}


class TestTampering:
    @pytest.mark.parametrize("name", TAMPERINGS)
    def test_it_is_seen_with_file_and_line(self, path: Path, name: str):
        change, number = TAMPERINGS[name]
        rewrite(path, change(lines(path)))
        for read in (ChainedLog.rows, ChainedLog.chains):
            with pytest.raises(TamperedError, match=rf"log\.jsonl, line {number}: .*restore the file from a copy"):
                read(ChainedLog(path))

    def test_a_cut_off_end_is_not_seen_by_the_chain_alone(self, path: Path):
        """Why the audit holds a file to a head that is kept elsewhere."""
        rewrite(path, lines(path)[:2])
        assert ChainedLog(path).rows() == ROWS[:2]

    def test_a_row_appended_to_a_changed_file_does_not_make_it_good(self, path: Path):
        rewrite(path, [line.replace(b'"n": 2', b'"n": 7') for line in lines(path)])
        ChainedLog(path).append({"n": 5})
        with pytest.raises(TamperedError, match="line 2"):
            ChainedLog(path).rows()

    def test_nothing_is_appended_behind_a_last_line_that_cannot_be_read(self, path: Path):
        path.write_bytes(path.read_bytes() + b"rubbish\n")
        before = path.read_bytes()
        with pytest.raises(TamperedError, match="the last line: is not JSON"):
            ChainedLog(path).append({"n": 5})
        assert path.read_bytes() == before


class TestOlderFiles:
    @pytest.fixture
    def older(self, tmp_path: Path) -> Path:
        found = tmp_path / "older.jsonl"
        for row in ROWS[:2]:
            append_row(found, row)
        return found

    def test_rows_without_a_chain_are_read_and_told_apart(self, older: Path):
        assert ChainedLog(older).rows() == ROWS[:2]
        assert ChainedLog(older).chains() == ["", ""]

    def test_new_rows_are_chained_from_where_they_begin(self, older: Path):
        for row in ROWS[2:]:
            ChainedLog(older).append(row)
        assert ChainedLog(older).rows() == ROWS
        assert [bool(chain) for chain in ChainedLog(older).chains()] == [False, False, True, True]
        found = lines(older)
        rewrite(older, [*found[:2], found[3]])
        with pytest.raises(TamperedError, match="line 3"):
            ChainedLog(older).rows()


class TestTornLines:
    @pytest.mark.parametrize("cut", [1, 2, 10, 60, 70])
    def test_a_torn_last_line_is_no_tampering(self, path: Path, cut: int):
        path.write_bytes(path.read_bytes()[:-cut])
        assert ChainedLog(path).rows() == ROWS[:3]
        ChainedLog(path).append({"n": 5})
        assert ChainedLog(path).rows() == [*ROWS[:3], {"n": 5}]

    def test_a_file_that_is_one_torn_line_starts_anew(self, tmp_path: Path):
        found = tmp_path / "log.jsonl"
        found.write_bytes(b'{"n": 1, "ch')
        assert ChainedLog(found).rows() == []
        ChainedLog(found).append({"n": 2})
        assert ChainedLog(found).rows() == [{"n": 2}]

    def test_a_kill_before_the_sync_leaves_a_file_that_goes_on(self, path: Path):
        with mock.patch.object(os, "fsync", side_effect=Killed), pytest.raises(Killed):
            ChainedLog(path).append({"n": 5})
        ChainedLog(path).append({"n": 6})
        assert ChainedLog(path).rows()[-1] == {"n": 6}

    def test_a_row_is_synced_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        found, seen = tmp_path / "deep" / "log.jsonl", []
        monkeypatch.setattr(os, "fsync", lambda _: seen.append(len(ChainedLog(found).rows())))
        ChainedLog(found).append({"n": 1})
        ChainedLog(found).append({"n": 2})
        assert seen == [1, 1, 2], "the new file is in its directory too"

    def test_a_full_disk_names_the_file_and_the_remedy(self, path: Path):
        full = OSError(28, "No space left on device")
        with mock.patch.object(os, "fsync", side_effect=full), pytest.raises(InfrastructureError, match=r"log\.jsonl"):
            ChainedLog(path).append({"n": 5})


class TestLastLine:
    @pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 10_000])
    @pytest.mark.parametrize(
        ("data", "end", "line"),
        [
            (b"", 0, b""),
            (b"torn", 0, b""),
            (b"one\n", 4, b"one\n"),
            (b"one\ntwo\n", 8, b"two\n"),
            (b"one\ntwo\nto", 8, b"two\n"),
            (b"one\n\n", 5, b"\n"),
            (b"\n", 1, b"\n"),
            (b"a" * 50 + b"\n" + b"b" * 50, 51, b"a" * 50 + b"\n"),
        ],
    )
    def test_it_is_found_whatever_the_block(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, end: int, line: bytes, block: int
    ):
        monkeypatch.setattr(files, "_BLOCK", block)
        (tmp_path / "log.jsonl").write_bytes(data)
        with (tmp_path / "log.jsonl").open("rb") as file:
            assert files.last_line(file) == (end, line)

    def test_an_append_reads_the_end_of_a_long_file_only(self, tmp_path: Path):
        """A thousand decisions must not cost the thousandth a thousand reads."""
        found = tmp_path / "log.jsonl"
        found.write_bytes(b'{"text": "' + b"x" * 1000 + b'"}\n')
        with found.open("ab") as file:
            file.write((b'{"text": "' + b"y" * 1000 + b'"}\n') * 5000)
        with open_rows(found) as file:
            reads: list[int] = []
            spy = mock.Mock(wraps=file)
            spy.read.side_effect = lambda size: reads.append(size) or file.read(size)
            files.last_line(spy)
        assert sum(reads) <= 16384
