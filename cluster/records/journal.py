"""Append-only stage records: the memory of a run, and what makes `--resume` skip finished work.

One JSON line per finished stage, flushed to disk before the stage counts as finished, each chained to the line before
it by hash. A torn last line (kill -9 while writing) is cut off; any other change to a finished line is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rl_actors.contracts import InfrastructureError, TamperedError
from rl_actors.durable import (
    ChainedLog,
    decode,
    encode,
    file_hashes,
    file_lock,
    sha256_file,
    sha256_json,
    sha256_of_hashes,
)

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """One finished stage. `artifacts` maps paths relative to the run folder to sha256; a directory's path ends in `/`.

    `chain` is the hash of this record and of the chain before it. Times are seconds since the epoch.
    """

    stage: str
    input_digest: str
    output: Any
    output_digest: str
    artifacts: Mapping[str, str]
    started_at: float
    finished_at: float
    seconds: float
    chain: str


class Journal:
    """The journal of one run folder. Hold `lock_run` while using it: appends assume one writer."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Read the journal; reading never writes. Raises TamperedError when a finished line was changed."""
        self.path = path
        self._clock = clock
        self._log = ChainedLog(path)
        # From 1: people count lines of a file that way, and errors name the line.
        rows = enumerate(self._log.read(), start=1)
        self.records = [_read_record(row, chain, number, path) for number, (row, chain) in rows]

    def find(self, stage: str, inputs: object) -> StageRecord | None:
        """Return the finished record of a stage for these inputs, if any."""
        wanted = (stage, _digest(stage, inputs))
        return next((record for record in self.records if (record.stage, record.input_digest) == wanted), None)

    def run_stage(
        self,
        name: str,
        inputs: object,
        compute: Callable[[], Value],
        output_type: type[Value],
        artifacts: Callable[[Value], Iterable[Path | str]] = lambda _: (),
    ) -> Value:
        """Return the stage's recorded output when it is finished for equal inputs, else compute and record it.

        Args:
            name: stage name.
            inputs: everything that decides the output; any value `encode` accepts. Its digest is the key.
            compute: makes the output; nothing is recorded when it raises.
            output_type: type of the output, to decode a recorded one.
            artifacts: files or directories the output stands on, inside the run folder (absolute or relative to it).

        Raises:
            TamperedError: an artifact of a finished stage changed, vanished, or a directory got another file.
        """
        record = self.find(name, inputs)
        # Outputs are small and lie in the journal; what they stand on lies beside it, and is proved before it is used.
        if record is not None:
            verify_artifacts(self.path.parent, record)
            return decode(output_type, record.output)
        started_at = self._clock()
        value = compute()
        output, hashes, finished_at = encode(value), _hash_artifacts(self.path.parent, artifacts(value)), self._clock()
        body = {
            "stage": name,
            "input_digest": _digest(name, inputs),
            "output": output,
            "output_digest": sha256_json(output),
            "artifacts": hashes,
            "started_at": started_at,
            "finished_at": finished_at,
            "seconds": finished_at - started_at,
        }
        self.records.append(StageRecord(**body, chain=self._log.append(body)))
        # Decoded here too, so that the first process goes on with the very value a resumed one will read.
        return decode(output_type, output)


def _digest(stage: str, inputs: object) -> str:
    return sha256_json({"stage": stage, "inputs": encode(inputs)})


def verify_artifacts(run_folder: Path, record: StageRecord) -> None:
    """Check that everything a finished stage left is still as it was. Raises TamperedError naming the file."""
    # Files first: "weights.bin changed" helps more than "the directory changed".
    for name, expected in sorted(record.artifacts.items(), key=lambda item: (item[0].endswith("/"), item[0])):
        path = run_folder / name
        if not path.exists():
            raise TamperedError(
                f"{path}: left by finished stage {record.stage!r}, is gone; restore it or start a new run"
            )
        if _hash_path(path) != expected:
            found = "has other files than" if path.is_dir() else "changed after"
            raise TamperedError(f"{path}: {found} finished stage {record.stage!r} left; restore it or start a new run")


def _hash_path(path: Path) -> str:
    return sha256_of_hashes(file_hashes(path)) if path.is_dir() else sha256_file(path)


def _hash_artifacts(run_folder: Path, paths: Iterable[Path | str]) -> dict[str, str]:
    """Return the hashes of files; a directory gives its own hash and one per file in it."""
    hashes: dict[str, str] = {}
    root = run_folder.resolve()
    for given in paths:
        path = (root / given).resolve()
        # Only what lies in the folder is copied and audited with the run.
        if not path.is_relative_to(root) or not path.exists():
            raise InfrastructureError(f"artifact {path}: must exist inside the run folder {root}")
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            # The directory's own hash sees a file too many, those of its files let an error name the one that changed.
            below = file_hashes(path)
            hashes[f"{name}/"] = sha256_of_hashes(below)
            hashes |= {f"{name}/{file}": digest for file, digest in below.items()}
        else:
            hashes[name] = sha256_file(path)
    return hashes


def _read_record(row: Mapping[str, Any], chain: str, number: int, path: Path) -> StageRecord:
    try:
        if not chain:
            raise ValueError("it has no chain")
        return StageRecord(**row, chain=chain)
    except (ValueError, TypeError) as error:
        raise TamperedError(
            f"{path}, line {number}: a finished record was changed ({error}); start a new run"
        ) from error


def lock_run(run_folder: Path) -> AbstractContextManager[None]:
    """Hold a run folder for this process. Raises InfrastructureError naming the process that holds it."""
    return file_lock(run_folder / "run.lock", timeout_s=0.0, remedy="wait for it or stop it")
