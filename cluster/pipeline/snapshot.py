"""Stage 1: data frozen to Parquet under a content hash, schema-checked, or refused with field, value and remedy."""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from cluster.spec import NUM_RELEASES
from rl_actors.contracts import BadDataError, DataSnapshot, Demonstration, DemonstrationTurn, Split, TamperedError, Task
from rl_actors.durable import sha256_directory, sync_directory
from rl_actors.environment import RubricCriterion, Workflow

Row = Mapping[str, Any]

SPLITS: tuple[Split, ...] = get_args(Split)


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


_STRING, _INT = pa.string(), pa.int64()

SCHEMAS: Mapping[str, pa.Schema] = {
    "tasks": _schema(
        task_id=_STRING,
        workflow=_STRING,
        split=_STRING,
        intent=_STRING,
        prompt=_STRING,
        world=_STRING,
        goal=_STRING,
        seed=_INT,
    ),
    "demonstrations": _schema(task_id=_STRING, prompt=_STRING, turns=_STRING),
    "rollouts": _schema(rollout_id=_STRING, task_id=_STRING, split=_STRING, success=_INT, token_ids=pa.list_(_INT)),
    "preferences": _schema(
        task_id=_STRING, first_rollout_id=_STRING, second_rollout_id=_STRING, annotator=_INT, prefers_first=_INT
    ),
    "rubric_labels": _schema(task_id=_STRING, rollout_id=_STRING, criterion=_STRING, annotator=_INT, label=_INT),
}


def freeze_snapshot(workflow: Workflow, num_tasks: Mapping[Split, int], seed: int, directory: Path) -> DataSnapshot:
    """Build tasks of every split and demonstrations of train tasks, check them, freeze them below `directory`."""
    # A live ticket is good for one serving, so each release gets its own.
    counts = dict(num_tasks)
    counts["live"] *= NUM_RELEASES
    tasks = [task for split, count in counts.items() for task in workflow.build_tasks(split, count, seed)]
    check_tasks(tasks)
    rng = random.Random(seed)
    demonstrations = [workflow.demonstrate(task, rng) for task in tasks if task.split == "train"]
    check_demonstrations(demonstrations, tasks)
    return write_snapshot(directory, {"tasks": task_rows(tasks), "demonstrations": demonstration_rows(demonstrations)})


def task_rows(tasks: Iterable[Task]) -> list[dict[str, Any]]:
    """Return rows of the `tasks` table; world and goal become JSON text."""
    return [{**asdict(task), "world": _to_json(task.world), "goal": _to_json(task.goal)} for task in tasks]


def demonstration_rows(demonstrations: Iterable[Demonstration]) -> list[dict[str, Any]]:
    """Return rows of the `demonstrations` table; the turns become JSON text."""
    return [{**(row := asdict(item)), "turns": _to_json(row["turns"])} for item in demonstrations]


def tasks_from_rows(rows: Iterable[Row]) -> list[Task]:
    """Return the tasks that `task_rows` wrote."""
    return [Task(**{**row, "world": json.loads(row["world"]), "goal": json.loads(row["goal"])}) for row in rows]


def demonstrations_from_rows(rows: Iterable[Row]) -> list[Demonstration]:
    """Return the demonstrations that `demonstration_rows` wrote."""
    turns = TypeAdapter(tuple[DemonstrationTurn, ...])
    return [Demonstration(**{**row, "turns": turns.validate_json(row["turns"])}) for row in rows]


def _to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def write_snapshot(directory: Path, tables: Mapping[str, Sequence[Row]]) -> DataSnapshot:
    """Write the tables to `directory/<first 16 digits of their hash>/`, all or nothing, read-only afterwards.

    Equal tables give an equal hash and the same folder.

    Raises:
        BadDataError: a row does not fit its schema.
        TamperedError: the folder exists already with other content.
    """
    arrays = {name: _to_arrow(name, rows) for name, rows in sorted(tables.items())}
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        for name, array in arrays.items():
            _write_frozen(array, temporary / f"{name}.parquet")
        digest = sha256_directory(temporary)
        target = _move_into_place(temporary, directory / digest[:16], digest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return DataSnapshot(
        path=str(target),
        sha256=digest,
        num_rows={name: len(rows) for name, rows in sorted(tables.items())},
        num_tasks=dict(sorted(Counter(str(row["split"]) for row in tables.get("tasks", ())).items())),
    )


def _write_frozen(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd", store_schema=True)
    # On disk before the folder gets its name: after a power cut a name must not stand for half a file.
    with path.open("rb") as file:
        os.fsync(file.fileno())
    path.chmod(0o444)


def _move_into_place(temporary: Path, target: Path, digest: str) -> Path:
    if target.exists():
        # A run killed between this rename and its journal line comes back here with equal data.
        if sha256_directory(target) != digest:
            raise TamperedError(f"{target}: exists with other content than its name says; remove it and resume")
        return target
    temporary.replace(target)
    sync_directory(target.parent)
    return target


def _to_arrow(name: str, rows: Sequence[Row]) -> pa.Table:
    if name not in SCHEMAS:
        raise BadDataError(name, "table", f"has no schema; known tables: {', '.join(SCHEMAS)}")
    schema = SCHEMAS[name]
    columns = set(schema.names)
    for position, row in enumerate(rows):
        if set(row) != columns:
            wrong = sorted(set(row) ^ columns)
            raise BadDataError(f"{name}[{position}]", wrong, f"columns must be exactly {', '.join(schema.names)}")
    return pa.table({field.name: _column(name, rows, field) for field in schema}, schema=schema)


def _column(name: str, rows: Sequence[Row], field: pa.Field) -> pa.Array:
    values = [row[field.name] for row in rows]
    try:
        # Column by column, not row by row: Arrow checks a whole column in one call.
        array = pa.array(values, type=field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        position = _first_misfit(values, field.type)
        remedy = f"must be a {field.type}: {str(error).splitlines()[0]}"
        raise BadDataError(f"{name}[{position}].{field.name}", values[position], remedy) from error
    if array.null_count:
        position = values.index(None)
        raise BadDataError(f"{name}[{position}].{field.name}", None, f"must be a {field.type}; fill it or drop the row")
    return array


def _first_misfit(values: Sequence[object], kind: pa.DataType) -> int:
    # Arrow does not say which value it could not convert.
    for position, value in enumerate(values):
        try:
            pa.array([value], type=kind)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            return position
    return 0


def read_table(directory: Path | str, name: str) -> list[dict[str, Any]]:
    """Return the rows of one table. Raises BadDataError for a missing or corrupt file, or another schema."""
    path, expected = Path(directory) / f"{name}.parquet", SCHEMAS[name]
    if not path.is_file():
        raise BadDataError(str(path), "missing", "no such table in this snapshot; build the snapshot again")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadDataError(str(path), "corrupt Parquet", f"{reason}; restore the file or build it again") from error
    if not table.schema.equals(expected):
        found = {field.name: str(field.type) for field in table.schema}
        raise BadDataError(
            str(path), found, f"schema must be {dict(zip(expected.names, map(str, expected.types), strict=True))}"
        )
    return table.to_pylist()


def verify_snapshot(snapshot: DataSnapshot) -> None:
    """Check that a snapshot is still what was frozen. Raises TamperedError."""
    found = sha256_directory(Path(snapshot.path))
    if found != snapshot.sha256:
        raise TamperedError(f"{snapshot.path}: sha256 {found[:16]} differs from the frozen {snapshot.sha256[:16]}")


def read_tasks(snapshot: DataSnapshot, split: Split) -> list[Task]:
    """Return the tasks of a split from a verified snapshot."""
    verify_snapshot(snapshot)
    return [task for task in tasks_from_rows(read_table(snapshot.path, "tasks")) if task.split == split]


def read_demonstrations(snapshot: DataSnapshot) -> list[Demonstration]:
    """Return the demonstrations of a verified snapshot."""
    verify_snapshot(snapshot)
    return demonstrations_from_rows(read_table(snapshot.path, "demonstrations"))


def normalised_prompt(prompt: str) -> str:
    """Return a prompt's letters and digits only, case folded: what two tickets share when they are the same."""
    return " ".join(re.findall(r"\w+", prompt.casefold()))


def check_tasks(tasks: Sequence[Task], splits: Sequence[Split] = SPLITS) -> None:
    """Refuse duplicate ids, unknown or empty splits, and a prompt that appears in two splits. Raises BadDataError."""
    seen_ids: set[str] = set()
    split_of_prompt: dict[str, Task] = {}
    for task in tasks:
        if task.task_id in seen_ids:
            raise BadDataError("tasks.task_id", task.task_id, "is given twice; ids must be unique over all splits")
        seen_ids.add(task.task_id)
        if task.split not in SPLITS:
            raise BadDataError(f"tasks[{task.task_id}].split", task.split, f"must be one of {', '.join(SPLITS)}")
        # Not by id: two tickets with the same words are the same ticket to a model, whatever they are called.
        first = split_of_prompt.setdefault(normalised_prompt(task.prompt), task)
        if first.split != task.split:
            remedy = f"leaks: {first.task_id} in {first.split!r} has the same prompt; keep it in one split"
            raise BadDataError(f"tasks[{task.task_id}].prompt", task.prompt, remedy)
    found = {task.split for task in tasks}
    for split in splits:
        if split not in found:
            raise BadDataError("tasks.split", split, f"is empty; set data.num_{split} or add tasks to this split")


def check_demonstrations(demonstrations: Sequence[Demonstration], tasks: Sequence[Task]) -> None:
    """Refuse a demonstration for an unknown task or one outside the train split. Raises BadDataError."""
    split_by_id = {task.task_id: task.split for task in tasks}
    for item in demonstrations:
        split = split_by_id.get(item.task_id, "no")
        if split != "train":
            remedy = f"belongs to {split} split; demonstrations must be of train tasks only"
            raise BadDataError("demonstrations.task_id", item.task_id, remedy)
    if not demonstrations:
        raise BadDataError("demonstrations", "no rows", "SFT needs at least one demonstration")


def check_rubric_labels(rows: Sequence[Row], rubric: Sequence[RubricCriterion], num_annotators: int) -> None:
    """Refuse a label outside its criterion's scale, an unknown criterion or annotator. Raises BadDataError."""
    criteria = {criterion.name: criterion for criterion in rubric}
    for position, row in enumerate(rows):
        where = f"rubric_labels[{position}]"
        criterion = criteria.get(row["criterion"])
        if criterion is None:
            raise BadDataError(f"{where}.criterion", row["criterion"], f"not in the rubric: {', '.join(criteria)}")
        if not criterion.low <= row["label"] <= criterion.high:
            scale = f"{criterion.low}..{criterion.high}"
            raise BadDataError(f"{where}.label", row["label"], f"{criterion.name} is rated {scale}; correct the label")
        if not 0 <= row["annotator"] < num_annotators:
            raise BadDataError(f"{where}.annotator", row["annotator"], f"annotators are 0..{num_annotators - 1}")
