"""Whether a run's records are still what it wrote: journal, artifacts, decisions, split history, tripwires, bundle.

A chain shows that a line was changed, removed or moved, but not that its end was cut off or all of it written anew. So
the run's ending keeps where each chain stood (`summary.json`, and tags in MLflow), and the audit holds files to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from cluster.records.bundle import MEMBERS, load_bundle
from cluster.records.journal import Journal, verify_artifacts
from cluster.records.run_folder import RunFolder
from cluster.records.summary import ChainHead, RunSummary
from rl_actors.contracts import BadInputError, TamperedError
from rl_actors.durable import ChainedLog

Verdict = Literal["verified", "not anchored", "not chained", "changed", "cut off", "gone"]

# Verdicts that say nothing against a file. `not anchored`: its chain fits, and no ending has kept its length yet.
SOUND: Final[tuple[Verdict, ...]] = ("verified", "not anchored")


_GONE: Final = "was there when the run ended and is gone"
_RESTORE: Final = "restore it from a copy"
_TAG: Final = "seatrial.audit."


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One audited file. `rows` are its lines, artifacts or members; `head` is its last chain or its id, in hex.

    `num_unchained` of them were written before rows were chained. `detail` says of an unsound file what is wrong and
    what to do.
    """

    file: str
    verdict: Verdict
    rows: int = 0
    head: str = ""
    detail: str = ""
    num_unchained: int = 0

    @property
    def is_sound(self) -> bool:
        """Whether nothing speaks against the file."""
        return self.verdict in SOUND


def chained_files(folder: RunFolder) -> tuple[str, ...]:
    """Return the chained files a run has, by path relative to its folder."""
    root = folder.root
    singles = (folder.journal, folder.tripwires, folder.split_history)
    found = [path for path in singles if path.exists()] + sorted(root.glob("release*/**/decisions.jsonl"))
    return tuple(path.relative_to(root).as_posix() for path in found)


def chain_heads(folder: RunFolder) -> dict[str, ChainHead]:
    """Return where each chain stands now, for the ending to keep.

    Raises TamperedError when a file does not hold what an earlier ending of this run kept.
    """
    # Asked before the new heads are kept: a resumed run must not make a cut-off file good.
    for finding in audit_chains(folder, read_anchors(folder)):
        if finding.verdict in ("changed", "cut off", "gone"):
            raise TamperedError(finding.detail)
    return {name: _head(ChainedLog(folder.root / name).chains()) for name in chained_files(folder)}


def head_tags(heads: Mapping[str, ChainHead]) -> dict[str, str]:
    """Return the heads as tags for MLflow: a copy that is not in the run folder."""
    return {f"{_TAG}{name}": f"{head.rows} {head.chain}" for name, head in heads.items()}


def tagged_heads(tags: Mapping[str, str]) -> dict[str, ChainHead]:
    """Return the heads that `head_tags` gave, among other tags. Raises TamperedError for one that was not so given."""
    heads: dict[str, ChainHead] = {}
    for key, value in tags.items():
        rows, _, chain = value.partition(" ")
        # MLflow and people put tags of their own on a run.
        if not key.startswith(_TAG):
            continue
        if not rows.isdecimal():
            raise TamperedError(f"MLflow tag {key} = {value!r}: is no head of a chain; look who changed it")
        heads[key.removeprefix(_TAG)] = ChainHead(rows=int(rows), chain=chain)
    return heads


def read_anchors(folder: RunFolder) -> dict[str, ChainHead]:
    """Return the heads that the run's ending kept; none for a run without an ending. Raises TamperedError."""
    summary = _summary(folder)
    return dict(summary.heads) if summary else {}


def audit_run(folder: RunFolder, tagged: Mapping[str, ChainHead] | None = None) -> tuple[Finding, ...]:
    """Check everything a run wrote down. Reads only; nothing but an unreadable disk raises.

    `tagged` are heads from MLflow.
    """
    summary, unreadable = None, ()
    try:
        summary = _summary(folder)
    except TamperedError as error:
        unreadable = (Finding(file="summary.json", verdict="changed", detail=str(error)),)
    # MLflow's heads count more than those of summary.json, which lies beside what it vouches for.
    anchors = {**(summary.heads if summary else {}), **(tagged or {})}
    bundle_id = summary.bundle_id if summary else ""
    return (
        *unreadable,
        *audit_chains(folder, anchors),
        *_audit_artifacts(folder),
        *_audit_bundle(folder, bundle_id),
    )


def audit_chains(folder: RunFolder, anchors: Mapping[str, ChainHead]) -> Iterator[Finding]:
    """Judge each chained file the run has, and each that its ending names."""
    # Also those that only the ending names: a file that is gone would not be missed by looking at the folder.
    for name in dict.fromkeys((*chained_files(folder), *anchors)):
        yield _audit_chain(folder.root / name, name, anchors.get(name))


def _audit_chain(path: Path, name: str, anchor: ChainHead | None) -> Finding:
    if not path.exists():
        return Finding(
            file=name, verdict="gone", detail=f"{path}: was there when the run ended and is gone; {_RESTORE}"
        )
    try:
        chains = ChainedLog(path).chains()
    except TamperedError as error:
        return Finding(file=name, verdict="changed", detail=str(error))
    verdict, detail = _judge(path, chains, anchor)
    return Finding(
        file=name,
        rows=len(chains),
        head=_head(chains).chain,
        verdict=verdict,
        detail=detail,
        num_unchained=chains.count(""),
    )


def _judge(path: Path, chains: list[str], anchor: ChainHead | None) -> tuple[Verdict, str]:
    """Hold a chain that fits in itself to what the ending kept of it."""
    if anchor and len(chains) < anchor.rows:
        return "cut off", f"{path}: holds {len(chains)} rows, {anchor.rows} when the run ended; {_RESTORE}"
    if anchor and _head(chains[: anchor.rows]) != anchor:
        found = _head(chains[: anchor.rows]).chain[:12] or "none"
        said = f"row {anchor.rows} has chain {found}, {anchor.chain[:12] or 'none'} when the run ended"
        return "changed", f"{path}: {said}: the file was written anew; {_RESTORE}"
    # Asked last: a file of an older seatrial may still have been cut off, or written anew, since its ending.
    if num_unchained := chains.count(""):
        said = f"{num_unchained} rows without a chain, which an older seatrial wrote"
        return "not chained", f"{path}: {said}: whether they were changed cannot be told; a new run chains them"
    return ("verified" if anchor else "not anchored"), ""


def _head(chains: list[str]) -> ChainHead:
    return ChainHead(rows=len(chains), chain=chains[-1] if chains else "")


def _audit_artifacts(folder: RunFolder) -> Iterator[Finding]:
    """Judge what each finished stage left."""
    try:
        # By stage: one that was done again for other inputs replaced what its earlier record vouches for.
        records = {record.stage: record for record in Journal(folder.journal).records}
    except TamperedError as error:
        yield Finding(file="artifacts", verdict="changed", detail=f"artifacts were not checked: {error}")
        return
    for record in records.values():
        if not record.artifacts:
            continue
        verdict, detail = "verified", ""
        try:
            verify_artifacts(folder.root, record)
        except TamperedError as error:
            verdict, detail = "changed", str(error)
        # A directory's row has its hash, and the rows of its files follow.
        num_files = sum(not name.endswith("/") for name in record.artifacts)
        head = next((digest for name, digest in record.artifacts.items() if name.endswith("/")), "")
        yield Finding(file=f"artifacts of {record.stage}", rows=num_files, head=head, verdict=verdict, detail=detail)


def _audit_bundle(folder: RunFolder, bundle_id: str) -> Iterator[Finding]:
    """Judge the bundle by its own id and, after the end, by the one the ending names."""
    path = folder.bundle
    if not path.exists():
        if bundle_id:
            yield Finding(
                file=path.name, verdict="gone", detail=f"{path}: was there when the run ended and is gone; {_RESTORE}"
            )
        return
    try:
        found = load_bundle(path).id
    except (TamperedError, BadInputError) as error:
        yield Finding(file=path.name, verdict="changed", detail=str(error))
        return
    if bundle_id and found != bundle_id:
        detail = f"{path}: has id {found[:12]}, {bundle_id[:12]} when the run ended; {_RESTORE}"
        yield Finding(file=path.name, rows=len(MEMBERS), head=found, verdict="changed", detail=detail)
        return
    verdict = "verified" if bundle_id else "not anchored"
    yield Finding(file=path.name, rows=len(MEMBERS), head=found, verdict=verdict)


def _summary(folder: RunFolder) -> RunSummary | None:
    if not folder.summary.exists():
        return None
    try:
        data: dict[str, Any] = json.loads(folder.summary.read_text(encoding="utf-8"))
        return RunSummary.from_json(data)
    except (ValueError, TypeError) as error:
        said = str(error).partition("\n")[0]
        raise TamperedError(f"{folder.summary}: is not a run summary ({said}); {_RESTORE}") from error
