"""Hashes of files, folders and JSON: what counts and what does not."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from rl_actors.durable.hashing import canonical_json, file_hashes, sha256_bytes, sha256_directory, sha256_file


def test_hashes_depend_on_names_and_bytes_alone(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name / "below").mkdir(parents=True)
        (tmp_path / name / "below" / "a").write_bytes(b"1")
        (tmp_path / name / "b").write_bytes(b"2")
    one, two = tmp_path / "one", tmp_path / "two"
    os.utime(two / "b", (1, 1))
    assert sha256_directory(one) == sha256_directory(two)
    assert list(file_hashes(one)) == ["b", "below/a"]
    assert sha256_file(one / "b") == sha256_bytes(b"2")
    (two / "b").rename(two / "c")
    assert sha256_directory(one) != sha256_directory(two)


def test_canonical_json_refuses_what_is_not_json():
    assert canonical_json({"b": 1, "a": [1.5, None, "ü"]}) == '{"a":[1.5,null,"ü"],"b":1}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(math.nan)
