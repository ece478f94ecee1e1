"""Content hashes of files, directories and JSON values. Names, sizes and bytes count; times and owners do not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def sha256_bytes(data: bytes) -> str:
    """Return the hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a JSON value: keys sorted, no spaces. Raises ValueError for NaN and infinity."""
    # Bundles and journals were hashed with these very options: another separator would make every one look tampered.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_json(value: Any) -> str:
    """Return the hex sha256 of a JSON value's canonical text."""
    return sha256_bytes(canonical_json(value).encode())


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(directory: Path) -> dict[str, str]:
    """Return the sha256 of every file below a directory, by sorted POSIX path relative to it."""
    files = sorted((path.relative_to(directory).as_posix(), path) for path in directory.rglob("*") if path.is_file())
    return {name: sha256_file(path) for name, path in files}


def sha256_of_hashes(hashes: Mapping[str, str]) -> str:
    """Return the hash of a directory from the hashes of its files."""
    return sha256_json(dict(hashes))


def sha256_directory(directory: Path) -> str:
    """Return the hash over the sorted (relative path, file hash) pairs of a directory."""
    return sha256_of_hashes(file_hashes(directory))
