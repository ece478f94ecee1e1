"""One thread, no network, and model directories that are built once per session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-OSS directory with its tokenizer."""
    from tests.rl_actors.fakes import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny"), seed=1)


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """A gloo group of this one process, joined as a learner joins its own."""
    import torch

    from rl_actors.actors.learners import LearnerRank, join_process_group
    from rl_actors.ports import free_port

    before = dict(os.environ)
    place = LearnerRank(rank=0, num_ranks=1, master_address="127.0.0.1", master_port=free_port(), num_threads=1)
    join_process_group(place)
    yield
    torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)
