"""Stage 1: freeze the workflow's data, and build the base model and its tokenizer."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.pipeline.snapshot import (
    check_demonstrations,
    check_tasks,
    demonstration_rows,
    read_demonstrations,
    task_rows,
    write_snapshot,
)
from cluster.records import freeze_policy, fresh
from cluster.spec import NUM_RELEASES, ModelSection
from rl_actors.agent import HARMONY_TOKENS, demonstration_texts
from rl_actors.contracts import DataSnapshot, PolicyVersion, Split
from rl_actors.environment import Workflow


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


def build_base(
    model: ModelSection, seed: int, system_prompt: str, snapshot: DataSnapshot, directory: Path
) -> PolicyVersion:
    """Return the base model with a Harmony tokenizer: the tiny GPT-OSS, or the model the spec names."""
    fresh(directory)
    if model.path:
        _adopt_model(model.path, str(directory), seed)
    else:
        texts = [text for item in read_demonstrations(snapshot) for text in demonstration_texts(system_prompt, item)]
        _build_tiny(model, seed, texts, str(directory))
    return freeze_policy("base", "base", directory, "")


def _build_tiny(shape: ModelSection, seed: int, texts: list[str], directory: str) -> None:
    from rl_actors.agent import train_tokenizer
    from rl_actors.models import build_tiny_model, tiny_config

    tokenizer = train_tokenizer(texts, vocab_size=shape.vocab_size)
    config = tiny_config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_experts=shape.num_experts,
        max_length=shape.max_length,
        eos_token_id=int(tokenizer.eos_token_id),  # pyright: ignore[reportArgumentType]
    )
    build_tiny_model(config, seed=seed).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _adopt_model(path: str, directory: str, seed: int) -> None:
    """Copy a Hugging Face causal LM, adding the Harmony tokens its tokenizer lacks with embeddings drawn by `seed`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
