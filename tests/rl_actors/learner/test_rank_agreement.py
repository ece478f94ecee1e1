"""ZeRO 0, 2 and 3 on one and two ranks take the same updates: real DeepSpeed, real gloo, processes of their own."""

from __future__ import annotations

import multiprocessing
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_actors.actors.learners import LearnerRank, join_process_group, share_by_group
from rl_actors.algorithms.stability import StabilityLimits
from rl_actors.contracts.recipe import RECIPES
from rl_actors.contracts.rollouts import TrainingSample
from rl_actors.learner.objective import PpoSettings
from rl_actors.learner.update import PpoLearner
from rl_actors.ports import free_port

pytestmark = pytest.mark.slow
NUM_UPDATES = 2
TIMEOUT_S = 180.0
SETTINGS = PpoSettings(  # the learning rate is the packaged workflow's
    learning_rate=5e-4, kl_coef=0.05, clip_low=0.2, clip_high=0.2, gamma=1.0, lam=0.95, epochs=2,
    num_minibatches=1, max_grad_norm=1.0, temperature=1.0, microbatch_tokens=64, seed=0,
    limits=StabilityLimits(max_mismatch_mean=None, max_kl=None, max_ratio=None, max_clip_fraction=None),
)  # fmt: skip


def samples(tiny_dir: Path) -> list[TrainingSample]:
    """Six groups of two attempts of different lengths; the engine is a little off, as engines are."""
    made = []
    for number in range(12):
        rng = random.Random(number)
        length = 10 + number
        ids = tuple(rng.randrange(8, 300) for _ in range(length))
        mask = tuple(index >= 4 and index % 5 != 0 for index in range(length))
        logprobs = tuple(-5.0 + rng.random() for _ in range(length))
        made.append(
            TrainingSample(
                rollout_id=f"r{number}", group_id=number // 2, weights_versions=(0,), token_ids=ids, loss_mask=mask,
                rollout_logprobs=logprobs, reward=float(rng.random()), truncated=False,
            )
        )  # fmt: skip
    return made


def train(place: LearnerRank, stage: int, name: str, tiny_dir: str, target: str, minibatches: int) -> None:
    """One rank, in a process of its own: the same updates, then its weights and metrics to a file."""
    join_process_group(place)
    settings = replace(SETTINGS, zero_stage=stage, recipe=RECIPES[name], num_minibatches=minibatches)
    learner = PpoLearner(tiny_dir, tiny_dir, settings)
    share = share_by_group(samples(Path(tiny_dir)), place.num_ranks)[place.rank]
    metrics = [learner.update(share).metrics for _ in range(NUM_UPDATES)]
    probe = learner.probe_logprobs([[1, 20, 30, 40, 50]])
    weights = learner.weights()
    if place.rank == 0:
        torch.save({"weights": weights, "metrics": metrics, "probe": probe}, target)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run(
    num_ranks: int, stage: int, name: str, tiny_dir: Path, file: Path, minibatches: int = 1, target: Any = train
) -> dict[str, Any]:
    context, port = multiprocessing.get_context("spawn"), free_port()
    processes = []
    for rank in range(num_ranks):
        place = LearnerRank(rank=rank, num_ranks=num_ranks, master_address="127.0.0.1", master_port=port, num_threads=1)
        processes.append(
            context.Process(target=target, args=(place, stage, name, str(tiny_dir), str(file), minibatches))
        )
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_S)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * num_ranks
    return torch.load(file, weights_only=False)


@pytest.fixture(scope="module")
def expected(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank without ZeRO, by recipe."""
    folder = tmp_path_factory.mktemp("ranks")
    return {name: run(1, 0, name, tiny_dir, folder / f"{name}.pt") for name in ("ppo_kl", "grpo")}


ALL = [("ppo_kl", num_ranks, stage) for num_ranks, stage in ((2, 0), (1, 2), (2, 2), (1, 3), (2, 3))]


@pytest.mark.parametrize(("name", "num_ranks", "stage"), [*ALL, ("grpo", 2, 0), ("grpo", 2, 3)])
def test_stages_and_ranks_agree(
    expected: dict[str, Any], name: str, num_ranks: int, stage: int, tiny_dir: Path, tmp_path: Path
):
    one = expected[name]
    found = run(num_ranks, stage, name, tiny_dir, tmp_path / "found.pt")
    assert [metrics["stopped_early"] for metrics in one["metrics"]] == [0.0] * NUM_UPDATES
    assert one["metrics"][0]["grad_norm"] != pytest.approx(one["metrics"][1]["grad_norm"], rel=1e-2), "steps were taken"
    for one_metrics, metrics in zip(one["metrics"], found["metrics"], strict=True):
        assert metrics == pytest.approx(one_metrics, rel=1e-3, abs=1e-5)
    assert found["weights"].keys() == one["weights"].keys()
    for parameter, tensor in one["weights"].items():
        assert torch.allclose(found["weights"][parameter], tensor, atol=1e-5), parameter
    assert found["probe"][0] == pytest.approx(one["probe"][0], abs=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_unequal_ranks_meet_in_every_step(tiny_dir: Path, tmp_path: Path, stage: int):
    """Shares of different size, cut into steps of different numbers of microbatches: ranks out of step would hang."""
    shares = share_by_group(samples(tiny_dir), 2)
    assert len({sum(len(one.token_ids) for one in share) for share in shares}) == 2
    found = run(2, stage, "ppo_kl", tiny_dir, tmp_path / "found.pt", minibatches=3)
    assert [metrics["num_optimizer_steps"] for metrics in found["metrics"]] == [6.0] * NUM_UPDATES


def resume(place: LearnerRank, stage: int, name: str, tiny_dir: str, target: str, minibatches: int) -> None:
    """One rank: two updates, and one update resumed from the checkpoint after the first; all weights to a file."""
    join_process_group(place)
    settings = replace(SETTINGS, zero_stage=stage, recipe=RECIPES[name], num_minibatches=minibatches)
    share, found = share_by_group(samples(Path(tiny_dir)), place.num_ranks)[place.rank], {}
    for case in ("through", "resumed", "without moments"):
        learner = PpoLearner(tiny_dir, tiny_dir, settings)
        if case == "through":
            learner.update(share)
            learner.save_checkpoint(f"{target}.checkpoint")
        else:
            assert learner.load_checkpoint(f"{target}.checkpoint") == ()
        if case == "without moments":
            forget_moments(learner)
        learner.update(share)
        found[case] = learner.weights()
    if place.rank == 0:
        torch.save(found, target)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def forget_moments(learner: PpoLearner) -> None:
    for state in learner._engine.optimizer.state.values():
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment].zero_()


@pytest.mark.parametrize("stage", [0, 2])
def test_two_ranks_resume_bit_for_bit(tiny_dir: Path, tmp_path: Path, stage: int):
    """With the negative control: a resume that forgot Adam's moments ends elsewhere."""
    found = run(2, stage, "ppo_kl", tiny_dir, tmp_path / "found.pt", minibatches=3, target=resume)
    for name, tensor in found["through"].items():
        assert torch.equal(found["resumed"][name], tensor), name
    assert any(not torch.equal(found["without moments"][name], tensor) for name, tensor in found["through"].items())
