"""Stage 1: what is frozen is whole, apart and equal for equal seeds, and a model of any origin speaks Harmony."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from cluster.pipeline.snapshot import read_demonstrations, read_tasks
from cluster.spec import NUM_RELEASES
from rl_actors.agent.renderers.harmony import HARMONY_TOKENS, HarmonyRenderer
from rl_actors.contracts import Demonstration, Split, Task
from rl_actors.contracts.errors import BadDataError, TamperedError
from rl_actors.contracts.versions import DataSnapshot, PolicyVersion
from rl_actors.durable.hashing import sha256_directory
from tests.cluster.pipeline.fakes import NUM_TASKS, DeskRun, FaultyDesk, build_model, freeze_data, make_run

# --- the snapshot -----------------------------------------------------------------------------------------------------


def test_every_split_has_the_tasks_the_spec_asks_for(snapshot: DataSnapshot):
    assert snapshot.num_tasks == dict(sorted(NUM_TASKS.items()))
    assert snapshot.num_rows == {"demonstrations": NUM_TASKS["train"], "tasks": sum(NUM_TASKS.values())}
    for split, count in NUM_TASKS.items():
        tasks = read_tasks(snapshot, split)
        assert len(tasks) == count
        assert {task.split for task in tasks} == {split}


def test_live_tickets_are_there_for_every_release(frozen_run: DeskRun, snapshot: DataSnapshot):
    assert snapshot.num_tasks["live"] == frozen_run.spec.data.num_live * NUM_RELEASES


def test_only_train_tasks_have_demonstrations(snapshot: DataSnapshot):
    train = [task.task_id for task in read_tasks(snapshot, "train")]
    assert [item.task_id for item in read_demonstrations(snapshot)] == train


def test_what_was_frozen_comes_back_equal(frozen_run: DeskRun, snapshot: DataSnapshot):
    built = frozen_run.workflow.build_tasks("train", NUM_TASKS["train"], frozen_run.spec.seed)
    assert read_tasks(snapshot, "train") == built


def test_equal_specs_freeze_equal_data(home: Path, snapshot: DataSnapshot):
    again = freeze_data(make_run(home))
    assert again.sha256 == snapshot.sha256
    assert again.path != snapshot.path


def test_another_seed_freezes_other_data(home: Path, snapshot: DataSnapshot):
    assert freeze_data(make_run(home, "seed=8")).sha256 != snapshot.sha256


def test_freezing_twice_in_one_run_gives_the_same_folder(run: DeskRun):
    assert freeze_data(run) == freeze_data(run)


def change_first(split: Split, change: Callable[[Task], Task]) -> Callable[[list[Task]], list[Task]]:
    """Change the first task of one split."""
    return lambda tasks: [change(tasks[0]), *tasks[1:]] if tasks[0].split == split else tasks


@pytest.fixture(scope="session")
def train_task(snapshot: DataSnapshot) -> Task:
    return read_tasks(snapshot, "train")[0]


def refused(run: DeskRun, workflow: FaultyDesk) -> BadDataError:
    """Freeze with a faulty workflow; nothing may be left behind."""
    run.workflow = workflow
    with pytest.raises(BadDataError) as caught:
        freeze_data(run)
    assert not run.folder.snapshots.exists()
    return caught.value


@pytest.mark.parametrize("split", ["held_out", "frozen", "adversarial", "calibration", "live"])
def test_a_train_prompt_in_another_split_is_refused(run: DeskRun, train_task: Task, split: Split):
    leak = change_first(split, lambda task: replace(task, prompt=f"  {train_task.prompt.upper()}!"))
    error = refused(run, FaultyDesk(leak))
    assert error.field.endswith(".prompt")
    assert f"leaks: {train_task.task_id} in 'train'" in error.remedy


def test_a_duplicate_id_is_refused(run: DeskRun, train_task: Task):
    double = change_first("held_out", lambda task: replace(task, task_id=train_task.task_id))
    error = refused(run, FaultyDesk(double))
    assert (error.field, error.value) == ("tasks.task_id", train_task.task_id)


@pytest.mark.parametrize("split", ["train", "held_out", "live"])
def test_an_empty_split_is_refused(run: DeskRun, split: Split):
    error = refused(run, FaultyDesk(lambda tasks: [] if tasks[0].split == split else tasks))
    assert (error.field, error.value) == ("tasks.split", split)
    assert f"data.num_{split}" in error.remedy


def test_an_unknown_split_is_refused(run: DeskRun):
    error = refused(run, FaultyDesk(change_first("frozen", lambda task: replace(task, split="test"))))  # type: ignore[arg-type]
    assert error.value == "test"


def test_a_demonstration_of_a_held_out_task_is_refused(run: DeskRun, snapshot: DataSnapshot):
    secret = read_tasks(snapshot, "held_out")[0]

    def cheat(item: Demonstration) -> Demonstration:
        return replace(item, task_id=secret.task_id)

    error = refused(run, FaultyDesk(demonstration=cheat))
    assert error.value == secret.task_id
    assert "train tasks only" in error.remedy


def test_a_workflow_without_faults_passes_the_same_checks(run: DeskRun, snapshot: DataSnapshot):
    run.workflow = FaultyDesk()
    assert freeze_data(run).sha256 == snapshot.sha256


@pytest.mark.parametrize("read", [lambda s: read_tasks(s, "train"), read_demonstrations])
def test_a_changed_snapshot_is_never_read(run: DeskRun, read: Callable[[DataSnapshot], Any]):
    snapshot = freeze_data(run)
    assert read(snapshot)
    (Path(snapshot.path) / "more.parquet").write_text("one file more")
    with pytest.raises(TamperedError, match="differs from the frozen"):
        read(snapshot)


# --- the tiny base model ----------------------------------------------------------------------------------------------


def test_the_base_model_speaks_harmony(base: PolicyVersion):
    renderer = HarmonyRenderer.from_directory(base.path)
    said = renderer.call("get_order", {"order_id": "48213"})
    parsed = renderer.parse(said)
    assert (parsed.kind, parsed.tool_call and parsed.tool_call.arguments) == ("tool", {"order_id": "48213"})
    assert (base.kind, base.parent_sha256) == ("base", "")
    assert base.name == f"base-{base.sha256[:8]}"
    assert base.sha256 == sha256_directory(Path(base.path))


def test_the_base_model_has_the_shape_of_the_spec(frozen_run: DeskRun, base: PolicyVersion):
    config = json.loads((Path(base.path) / "config.json").read_text())
    shape = frozen_run.spec.model
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    assert config["architectures"] == ["GptOssForCausalLM"]
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_local_experts"]) == (
        shape.hidden_size,
        shape.num_layers,
        shape.num_experts,
    )
    assert config["vocab_size"] == len(tokenizer) <= shape.vocab_size
    assert config["eos_token_id"] == tokenizer.eos_token_id


def test_building_the_base_model_again_gives_the_same_bytes(run: DeskRun, snapshot: DataSnapshot, base: PolicyVersion):
    again = build_model(run, snapshot)
    assert (again.sha256, again.name) == (base.sha256, base.name)


def test_another_seed_gives_another_model(home: Path, snapshot: DataSnapshot, base: PolicyVersion):
    assert build_model(make_run(home, "seed=8"), snapshot).sha256 != base.sha256


def test_a_half_written_model_is_not_built_upon(run: DeskRun, snapshot: DataSnapshot, base: PolicyVersion):
    (run.fresh("models/base") / "model-00002.safetensors").write_text("left by a kill")
    assert build_model(run, snapshot).sha256 == base.sha256


# --- a model of other people ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Hugging Face causal LM whose tokenizer knows two of the eight Harmony tokens and one of its own."""
    known = ("<|endoftext|>", "<|start|>", "<|mine|>")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: index for index, token in enumerate([*known, *alphabet])}
    raw = Tokenizer(models.BPE(vocab=words, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|endoftext|>", additional_special_tokens=["<|start|>", "<|mine|>"]
    )
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("stranger")
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def adopt(home: Path, path: Path | str, snapshot: DataSnapshot, run_id: str = "run-1") -> PolicyVersion:
    return build_model(make_run(home, f"model.path={path}", run_id=run_id), snapshot)


def test_the_stranger_really_lacks_tokens(stranger: Path):
    with pytest.raises(BadDataError, match="lacks these Harmony tokens"):
        HarmonyRenderer.from_directory(str(stranger))


def test_an_adopted_model_gets_the_harmony_tokens_it_lacks(home: Path, stranger: Path, snapshot: DataSnapshot):
    before, adopted = AutoTokenizer.from_pretrained(stranger), adopt(home, stranger, snapshot)
    after = AutoTokenizer.from_pretrained(adopted.path)
    assert set(HARMONY_TOKENS) <= set(after.get_vocab())
    assert len(after) == len(before) + len(HARMONY_TOKENS) - 2
    renderer = HarmonyRenderer.from_directory(adopted.path)
    assert renderer.parse(renderer.final("It is paid.")).text == "It is paid."
    for token in HARMONY_TOKENS:
        assert after.encode(token, add_special_tokens=False) == [after.get_vocab()[token]]


def test_an_adopted_model_keeps_what_it_knew(home: Path, stranger: Path, snapshot: DataSnapshot):
    adopted = adopt(home, stranger, snapshot)
    old, new = (AutoModelForCausalLM.from_pretrained(path) for path in (stranger, adopted.path))
    size = old.config.vocab_size
    assert new.config.vocab_size == len(AutoTokenizer.from_pretrained(adopted.path)) == size + 6
    assert new.get_output_embeddings().weight.shape[0] == size + 6
    assert torch.equal(old.get_input_embeddings().weight, new.get_input_embeddings().weight[:size])
    vocabularies = [AutoTokenizer.from_pretrained(path).get_vocab() for path in (stranger, adopted.path)]
    assert vocabularies[0].items() <= vocabularies[1].items()
    assert "<|mine|>" in AutoTokenizer.from_pretrained(adopted.path).all_special_tokens


def test_the_strangers_own_files_stay_as_they_were(home: Path, stranger: Path, snapshot: DataSnapshot):
    before = sha256_directory(stranger)
    adopt(home, stranger, snapshot)
    assert sha256_directory(stranger) == before


def test_a_model_that_has_all_tokens_is_copied_as_it_is(home: Path, base: PolicyVersion, snapshot: DataSnapshot):
    adopted = adopt(home, base.path, snapshot)
    old, new = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (base.path, adopted.path))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    vocabularies = [AutoTokenizer.from_pretrained(path).get_vocab() for path in (base.path, adopted.path)]
    assert vocabularies[0] == vocabularies[1]


def test_adopting_twice_gives_the_same_model_and_leaves_chance_alone(
    home: Path, stranger: Path, snapshot: DataSnapshot
):
    """New embeddings are drawn at random: by the spec's seed, not by whatever ran before."""
    torch.manual_seed(1)
    first = adopt(home, stranger, snapshot, run_id="run-1")
    torch.manual_seed(2)
    expected_next = torch.Generator().manual_seed(2)
    second = adopt(home, stranger, snapshot, run_id="run-2")
    assert first.sha256 == second.sha256
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected_next))


def test_the_prompts_of_the_splits_are_all_different(snapshot: DataSnapshot):
    splits: tuple[Split, ...] = ("train", "calibration", "held_out", "frozen", "adversarial", "live")
    prompts = Counter(task.prompt for split in splits for task in read_tasks(snapshot, split))
    assert max(prompts.values()) == 1
