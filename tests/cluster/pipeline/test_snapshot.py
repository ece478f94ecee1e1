"""Snapshots: equal data has an equal hash, and bad data is refused with field, value and remedy before SFT sees it."""

from __future__ import annotations

import dataclasses
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.pipeline.snapshot import (
    SCHEMAS,
    SPLITS,
    check_demonstrations,
    check_rubric_labels,
    check_tasks,
    demonstration_rows,
    demonstrations_from_rows,
    normalised_prompt,
    read_table,
    task_rows,
    tasks_from_rows,
    verify_snapshot,
    write_snapshot,
)
from rl_actors.contracts import Demonstration, DemonstrationTurn, Split, Task
from rl_actors.contracts.errors import BadDataError, TamperedError
from rl_actors.environment.workflow import RubricCriterion, WorkflowRef

RUBRIC = (RubricCriterion(name="tone", question="Polite?", low=1, high=5, weight=1.0),)


def make_task(index: int, split: Split, prompt: str = "") -> Task:
    return Task(
        task_id=f"desk/{split}/{index}",
        workflow="desk",
        split=split,
        intent="refund",
        prompt=prompt or f"refund order {index} of {split}",
        world={"orders": [{"id": index, "total": 1.5}], "ä": None},
        goal={"facts": ["refunded"]},
        seed=index,
    )


def make_demonstration(task: Task) -> Demonstration:
    turn = DemonstrationTurn(kind="tool", tool="refund", arguments={"order": 1}, text="", observation="ok")
    return Demonstration(
        task_id=task.task_id, prompt=task.prompt, turns=(turn, dataclasses.replace(turn, kind="final"))
    )


TASKS = [make_task(index, split) for index, split in enumerate(SPLITS)]
DEMONSTRATIONS = [make_demonstration(TASKS[0])]


def tables() -> dict[str, list[dict]]:
    return {"tasks": task_rows(TASKS), "demonstrations": demonstration_rows(DEMONSTRATIONS)}


def test_tasks_and_demonstrations_come_back_as_they_were(tmp_path: Path):
    snapshot = write_snapshot(tmp_path, tables())
    assert tasks_from_rows(read_table(snapshot.path, "tasks")) == TASKS
    assert demonstrations_from_rows(read_table(snapshot.path, "demonstrations")) == DEMONSTRATIONS
    assert snapshot.num_rows == {"demonstrations": 1, "tasks": 6}
    assert snapshot.num_tasks == dict.fromkeys(sorted(SPLITS), 1)


def test_equal_data_has_an_equal_hash_in_any_folder_and_order_of_tables(tmp_path: Path):
    first = write_snapshot(tmp_path / "a", tables())
    second = write_snapshot(tmp_path / "b", dict(reversed(tables().items())))
    assert first.sha256 == second.sha256
    assert Path(first.path).name == first.sha256[:16]
    rows = task_rows([dataclasses.replace(TASKS[0], seed=99), *TASKS[1:]])
    assert write_snapshot(tmp_path / "c", tables() | {"tasks": rows}).sha256 != first.sha256


def test_writing_again_gives_the_same_folder_and_leaves_nothing_behind(tmp_path: Path):
    first = write_snapshot(tmp_path, tables())
    assert write_snapshot(tmp_path, tables()) == first
    assert [path.name for path in tmp_path.iterdir()] == [first.sha256[:16]]


def test_files_are_read_only(tmp_path: Path):
    snapshot = write_snapshot(tmp_path, tables())
    for path in Path(snapshot.path).iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o444


def test_a_later_stage_can_freeze_tables_of_its_own(tmp_path: Path):
    row = {"rollout_id": "r1", "task_id": "t", "split": "train", "success": 1, "token_ids": [1, 2]}
    snapshot = write_snapshot(tmp_path, {"rollouts": [row]})
    assert read_table(snapshot.path, "rollouts") == [row]
    assert snapshot.num_tasks == {}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": "seven"}, "tasks[1].seed"),
        ({"seed": 2**80}, "tasks[1].seed"),
        ({"prompt": None}, "tasks[1].prompt"),
        ({"prompt": 3}, "tasks[1].prompt"),
        ({"color": "red"}, "tasks[1]"),
    ],
)
def test_a_row_that_does_not_fit_is_named_and_nothing_is_written(tmp_path: Path, change: dict, field: str):
    rows = task_rows(TASKS)
    rows[1] |= change
    with pytest.raises(BadDataError) as caught:
        write_snapshot(tmp_path, {"tasks": rows})
    assert caught.value.field == field
    assert caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_a_missing_column_and_an_unknown_table_are_refused(tmp_path: Path):
    rows = task_rows(TASKS)
    del rows[0]["goal"]
    with pytest.raises(BadDataError, match=r"tasks\[0\].*goal"):
        write_snapshot(tmp_path, {"tasks": rows})
    with pytest.raises(BadDataError, match="known tables: tasks"):
        write_snapshot(tmp_path, {"task": []})


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.chmod(0o644)
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[: len(data) // 2],
        lambda _: b"",
        lambda _: b"PAR1 not parquet PAR1",
        lambda data: data[:-4] + b"XXXX",
    ],
)
def test_corrupt_parquet_is_refused_by_file(tmp_path: Path, change: Callable[[bytes], bytes]):
    path = Path(write_snapshot(tmp_path, tables()).path) / "tasks.parquet"
    rewrite(path, change)
    with pytest.raises(BadDataError) as caught:
        read_table(path.parent, "tasks")
    assert caught.value.field == str(path)
    assert caught.value.value == "corrupt Parquet"


def test_a_missing_file_and_another_schema_are_refused(tmp_path: Path):
    with pytest.raises(BadDataError, match=r"tasks\.parquet.*no such table"):
        read_table(tmp_path, "tasks")
    pq.write_table(pa.table({"task_id": [1]}), tmp_path / "tasks.parquet")
    with pytest.raises(BadDataError, match="schema must be"):
        read_table(tmp_path, "tasks")


def test_a_changed_snapshot_is_refused(tmp_path: Path):
    snapshot = write_snapshot(tmp_path, tables())
    verify_snapshot(snapshot)
    rewrite(Path(snapshot.path) / "tasks.parquet", lambda data: data + b" ")
    with pytest.raises(TamperedError, match=snapshot.sha256[:16]):
        verify_snapshot(snapshot)
    with pytest.raises(TamperedError, match="exists with other content"):
        write_snapshot(tmp_path, tables())
    assert len(list(tmp_path.iterdir())) == 1


def test_good_tasks_and_demonstrations_pass():
    check_tasks(TASKS)
    check_demonstrations(DEMONSTRATIONS, TASKS)


@pytest.mark.parametrize(
    ("tasks", "field", "value", "remedy"),
    [
        ([*TASKS, TASKS[2]], "tasks.task_id", TASKS[2].task_id, "given twice"),
        (TASKS[1:], "tasks.split", "train", "data.num_train"),
        ([], "tasks.split", "train", "is empty"),
        (
            [*TASKS, make_task(9, "frozen", "REFUND  order 0, of train!")],
            "tasks[desk/frozen/9].prompt",
            "REFUND  order 0, of train!",
            "desk/train/0 in 'train'",
        ),
        ([*TASKS, dataclasses.replace(TASKS[0], task_id="x", split="test")], "tasks[x].split", "test", "one of train"),
    ],
)
def test_bad_tasks_are_refused(tasks: list[Task], field: str, value: str, remedy: str):
    with pytest.raises(BadDataError) as caught:
        check_tasks(tasks)
    assert (caught.value.field, caught.value.value) == (field, value)
    assert remedy in caught.value.remedy


def test_one_split_may_repeat_a_prompt_and_splits_may_be_few():
    check_tasks([*TASKS, make_task(9, "train", TASKS[0].prompt)])
    check_tasks(TASKS[:1], splits=["train"])


@pytest.mark.parametrize("split", [split for split in SPLITS if split != "train"])
def test_a_demonstration_of_a_test_task_is_refused(split: Split):
    task = next(task for task in TASKS if task.split == split)
    with pytest.raises(BadDataError, match=f"belongs to {split} split"):
        check_demonstrations([make_demonstration(task)], TASKS)


def test_a_demonstration_of_nothing_and_no_demonstration_are_refused():
    with pytest.raises(BadDataError, match="belongs to no split"):
        check_demonstrations([make_demonstration(make_task(77, "train"))], TASKS)
    with pytest.raises(BadDataError, match="at least one"):
        check_demonstrations([], TASKS)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"label": 6}, "rubric_labels[1].label"),
        ({"label": 0}, "rubric_labels[1].label"),
        ({"criterion": "colour"}, "rubric_labels[1].criterion"),
        ({"annotator": 3}, "rubric_labels[1].annotator"),
        ({"annotator": -1}, "rubric_labels[1].annotator"),
    ],
)
def test_a_label_outside_the_rubric_is_refused(change: dict, field: str):
    good = {"task_id": "t", "rollout_id": "r", "criterion": "tone", "annotator": 0, "label": 5}
    check_rubric_labels([good], RUBRIC, num_annotators=3)
    with pytest.raises(BadDataError) as caught:
        check_rubric_labels([good, good | change], RUBRIC, num_annotators=3)
    assert caught.value.field == field
    assert caught.value.value == next(iter(change.values()))


def test_labels_and_preferences_have_a_schema(tmp_path: Path):
    label = {"task_id": "t", "rollout_id": "r", "criterion": "tone", "annotator": 0, "label": 5}
    pair = {"task_id": "t", "first_rollout_id": "a", "second_rollout_id": "b", "annotator": 0, "prefers_first": 1}
    snapshot = write_snapshot(tmp_path, {"rubric_labels": [label], "preferences": [pair]})
    assert read_table(snapshot.path, "preferences") == [pair]
    assert all(not field.nullable for schema in SCHEMAS.values() for field in schema)


def test_normalised_prompts_ignore_case_space_and_punctuation():
    assert normalised_prompt("  Where is\tORDER #12?") == normalised_prompt("where is order 12") == "where is order 12"
    assert normalised_prompt("order 12") != normalised_prompt("order 13")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.text(max_size=20),
            st.integers(-(2**63), 2**63 - 1),
            st.none() | st.floats(allow_nan=False, allow_infinity=False),
        ),
        max_size=8,
    )
)
def test_any_tasks_come_back_as_they_were(tmp_path: Path, values: list[tuple[str, int, float | None]]):
    tasks = [
        dataclasses.replace(make_task(index, "train"), prompt=prompt, seed=seed, world={"x": [number, {"y": prompt}]})
        for index, (prompt, seed, number) in enumerate(values)
    ]
    snapshot = write_snapshot(tmp_path, {"tasks": task_rows(tasks)})
    assert tasks_from_rows(read_table(snapshot.path, "tasks")) == tasks
    verify_snapshot(snapshot)


def test_no_flipped_byte_goes_unnoticed(tmp_path: Path):
    """Parquet pages carry no checksum here: a read may succeed, so the hash is what counts."""
    snapshot = write_snapshot(tmp_path, tables())
    path = Path(snapshot.path) / "tasks.parquet"
    good = path.read_bytes()
    path.chmod(0o644)
    for position in range(0, len(good), 211):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0xFF]) + good[position + 1 :])
        with pytest.raises(TamperedError):
            verify_snapshot(snapshot)
    path.write_bytes(good)
    verify_snapshot(snapshot)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_snapshot(tmp_path, tables())
    assert list(tmp_path.iterdir()) == []


def test_the_packaged_workflow_passes_its_own_checks(tmp_path: Path):
    """The real tasks and demonstrations, not the ones made up for this file."""
    workflow = WorkflowRef(module="cluster.workflows.support_desk").load()
    tasks = [task for split in SPLITS for task in workflow.build_tasks(split, 12, seed=3)]
    train = [task for task in tasks if task.split == "train"]
    demonstrations = [workflow.demonstrate(task, random.Random(task.seed)) for task in train]
    check_tasks(tasks)
    check_demonstrations(demonstrations, tasks)
    snapshot = write_snapshot(
        tmp_path, {"tasks": task_rows(tasks), "demonstrations": demonstration_rows(demonstrations)}
    )
    assert snapshot.num_tasks == dict.fromkeys(sorted(SPLITS), 12)
    assert tasks_from_rows(read_table(snapshot.path, "tasks")) == tasks
    assert demonstrations_from_rows(read_table(snapshot.path, "demonstrations")) == demonstrations
