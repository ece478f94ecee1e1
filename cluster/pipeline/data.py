"""Stage 1: freeze the workflow's data, and build the base model and its tokenizer."""

from __future__ import annotations

import random
from typing import Any

from cluster.pipeline.run import Run
from cluster.pipeline.snapshot import (
    check_demonstrations,
    check_tasks,
    demonstration_rows,
    demonstrations_from_rows,
    read_table,
    task_rows,
    tasks_from_rows,
    verify_snapshot,
    write_snapshot,
)
from cluster.spec import NUM_RELEASES
from rl_actors.agent import demonstration_texts
from rl_actors.contracts import DataSnapshot, Demonstration, PolicyVersion, Split, Task


def freeze_snapshot(run: Run) -> DataSnapshot:
    """Build tasks of every split and demonstrations of train tasks, check them, freeze them."""
    counts = dict(run.spec.num_tasks)
    counts["live"] *= NUM_RELEASES
    tasks = [task for split, count in counts.items() for task in run.workflow.build_tasks(split, count, run.spec.seed)]
    check_tasks(tasks)
    rng = random.Random(run.spec.seed)
    demonstrations = [run.workflow.demonstrate(task, rng) for task in tasks if task.split == "train"]
    check_demonstrations(demonstrations, tasks)
    tables = {"tasks": task_rows(tasks), "demonstrations": demonstration_rows(demonstrations)}
    return write_snapshot(run.folder.snapshots, tables)


def read_tasks(snapshot: DataSnapshot, split: Split) -> list[Task]:
    """Return the tasks of a split from a verified snapshot."""
    verify_snapshot(snapshot)
    return [task for task in tasks_from_rows(read_table(snapshot.path, "tasks")) if task.split == split]


def read_demonstrations(snapshot: DataSnapshot) -> list[Demonstration]:
    """Return the demonstrations of a verified snapshot."""
    verify_snapshot(snapshot)
    return demonstrations_from_rows(read_table(snapshot.path, "demonstrations"))


def build_base(run: Run, snapshot: DataSnapshot) -> PolicyVersion:
    """Return the base model with a Harmony tokenizer: the tiny GPT-OSS, or the model the spec names."""
    directory = run.fresh("models/base")
    if run.spec.model.path:
        _adopt_model(run.spec.model.path, str(directory), run.spec.seed)
    else:
        _build_tiny(run, snapshot, str(directory))
    return run.policy("base", "base", directory, "")


def _build_tiny(run: Run, snapshot: DataSnapshot, directory: str) -> None:
    from rl_actors.agent import train_tokenizer
    from rl_actors.models import build_tiny_model, tiny_config

    shape = run.spec.model
    system = run.workflow.system_prompt
    texts = [text for item in read_demonstrations(snapshot) for text in demonstration_texts(system, item)]
    tokenizer = train_tokenizer(texts, vocab_size=shape.vocab_size)
    config = tiny_config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_experts=shape.num_experts,
        max_length=shape.max_length,
        eos_token_id=int(tokenizer.eos_token_id),  # pyright: ignore[reportArgumentType]
    )
    build_tiny_model(config, seed=run.spec.seed).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _adopt_model(path: str, directory: str, seed: int) -> None:
    """Copy a Hugging Face causal LM, adding the Harmony tokens its tokenizer lacks with embeddings drawn by `seed`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rl_actors.agent import HARMONY_TOKENS

    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    missing = [token for token in HARMONY_TOKENS if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
