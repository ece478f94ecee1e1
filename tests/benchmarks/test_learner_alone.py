"""`benchmarks/learner_alone.py`: both loops do the same work, both heads the same arithmetic, and the script runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from head_memory import results
from learner_alone import (
    QUICK_WORKS,
    bare_batches,
    bare_loss,
    in_turn,
    largest_differences,
    make_samples,
    require_stepped,
    weight_gap,
)
from resident import resident_mib

from rl_actors.algorithms.kl import kl_loss
from rl_actors.algorithms.losses import policy_loss

ROOT = Path(__file__).resolve().parents[2]
WORK = QUICK_WORKS[0]


def test_samples_are_whole_groups():
    samples = make_samples(WORK, 200)
    assert [sample.group_id for sample in samples] == [0] * 8 + [1] * 8
    assert all(sum(sample.loss_mask) == len(sample.token_ids) - WORK.prompt for sample in samples)


def test_the_bare_loss_is_the_learners():
    """Value and gradient, with a reference that differs and with padding."""
    (batch, *_), generator = bare_batches(make_samples(WORK, 200)), torch.Generator().manual_seed(0)
    mask_BT = batch.loss_mask_BT
    logprobs_BT, reference_BT = -torch.rand(2, *mask_BT.shape, generator=generator)
    logprobs_BT.requires_grad_()
    counts: Any = {"aggregation": "sequence_mean", "num_loss_tokens": float(mask_BT.sum())}
    counts["num_sequences"] = 1.0  # a sum over sequences, as the bare loop has before it divides
    advantages_BT = batch.rewards_B[:, None].expand_as(logprobs_BT)
    old_BT = logprobs_BT.detach()
    ours = policy_loss(logprobs_BT, old_BT, advantages_BT, mask_BT, clip_low=0.2, clip_high=0.2, **counts).loss
    ours = ours + 0.02 * kl_loss(logprobs_BT, reference_BT, mask_BT, kind="k2", old_logprobs_BT=old_BT, **counts).loss
    bare = bare_loss(logprobs_BT[:, 1:], reference_BT[:, 1:], batch)
    gradients = [torch.autograd.grad(loss, logprobs_BT)[0] for loss in (ours, bare)]
    torch.testing.assert_close(bare, ours)
    torch.testing.assert_close(*gradients)


def test_paths_take_turns_and_what_comes_before_is_not_timed():
    turns: list[str] = []
    paths: dict[str, Callable[[], None]] = {name: lambda name=name: turns.append(name) for name in ("a", "b")}
    seconds = in_turn(paths, lambda: turns.append("-"), repeats=2, warm_ups=1)
    assert "".join(turns) == "-ab-ba-ab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_a_skipped_update_is_refused():
    require_stepped(())
    with pytest.raises(SystemExit, match="trained nothing"):
        require_stepped(("grad_norm: 200",))


def test_the_weight_gap_is_seen():
    start, moved = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
    assert weight_gap(moved, moved, start) == {"mean_moved": 1.0, "mean_apart": 0.0}
    assert weight_gap(start, moved, start)["mean_apart"] == 1.0


def test_both_heads_say_the_same():
    chunked, naive = (results(path, 40, 16, 300)() for path in ("chunked", "naive"))
    assert max(largest_differences(chunked, naive).values()) < 1e-5


def test_a_wrong_gradient_is_seen():
    naive = results("naive", 40, 16, 300)()
    wrong = {**naive, "weight_gradient": naive["weight_gradient"] * 1.01}
    assert largest_differences(wrong, naive)["weight_gradient"] > 0.005


def test_resident_memory_grows_with_what_is_held():
    before = resident_mib("VmRSS")
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert resident_mib("VmHWM") >= resident_mib("VmRSS") > before + 32
    assert held[0] == 1


@pytest.mark.slow
def test_a_quick_run_writes_every_figure(tmp_path: Path):
    out = tmp_path / "quick.json"
    words = [sys.executable, "benchmarks/learner_alone.py", "--quick", "--threads", "1", "--out", str(out)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf8"))
    assert {row["model"] for row in found["updates"]} == {"gpt_oss", "qwen3"}
    assert all(row["mean_apart"] < 0.02 * row["mean_moved"] for row in found["updates"])
    assert all(_is_lean(row) for row in found["heads"])
    assert "goal 0.85" in done.stdout


def _is_lean(row: Mapping[str, Any]) -> bool:
    return max(row["largest_difference"].values()) < 1e-4 and row["peak_mib"]["chunked"] > 0
