"""Replicas: a gateway's policies on a fake Serve, a policy on a fake engine, the critic on a real, untrained model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException

from rl_actors.actors.rollouts import RewardScorer
from rl_actors.agent.rollout import rollout_token_ids
from rl_actors.algorithms.rewards import RewardMix
from rl_actors.contracts.errors import EngineError
from rl_actors.contracts.rollouts import Completion, SamplingParams
from rl_actors.models.reward_model import RewardModel
from serving.platform import replicas
from serving.platform.replicas import CriticServer, PolicyServer, ServePolicies
from serving.store.served import ServedPolicies
from tests.rl_actors.fakes import make_rollout, make_turn
from tests.serving.gateway.live_fakes import STABLE, make_config, make_policy, renderer


@dataclass
class FakeEngine:
    """Answers every request with one token, or not at all, or with an error."""

    error: Exception | None = None
    hangs: bool = False
    asked: list[tuple[tuple[int, ...], SamplingParams]] = field(default_factory=list)

    async def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        self.asked.append((tuple(prompt_token_ids), sampling))
        if self.error is not None:
            raise self.error
        if self.hangs:
            await asyncio.Event().wait()
        return Completion(token_ids=(5,), logprobs=(-0.1,), weights_version=0, finished=True, cached_tokens=0)


def server(engine: FakeEngine) -> PolicyServer:
    return PolicyServer(
        make_policy(), max_model_len=512, max_num_seqs=4, build_engine=lambda path, length, seqs: engine.generate
    )


class TestPolicyServer:
    def test_builds_the_engine_of_its_directory(self) -> None:
        seen: list[tuple[str, int, int]] = []

        def build(path: str, max_model_len: int, max_num_seqs: int) -> Any:
            seen.append((path, max_model_len, max_num_seqs))
            return FakeEngine().generate

        PolicyServer(make_policy(), max_model_len=512, max_num_seqs=4, build_engine=build)
        assert seen == [("/models/sft-a", 512, 4)]

    def test_passes_exact_tokens(self) -> None:
        engine = FakeEngine()
        sampling = SamplingParams(max_tokens=3, temperature=0.5, seed=9)
        completion = asyncio.run(server(engine).generate((1, 2, 3), sampling))
        assert engine.asked == [((1, 2, 3), sampling)]
        assert completion.token_ids == (5,)

    def test_first_health_check_warms_up(self) -> None:
        engine = FakeEngine()
        replica = server(engine)
        asyncio.run(replica.check_health())
        assert [params.max_tokens for _, params in engine.asked] == [16, 1]
        asyncio.run(replica.check_health())
        assert [params.max_tokens for _, params in engine.asked] == [16, 1, 1]

    def test_dead_engine_fails_the_health_check(self) -> None:
        with pytest.raises(EngineError, match="dead"):
            asyncio.run(server(FakeEngine(error=EngineError("dead"))).check_health())

    def test_failed_warm_up_is_tried_again(self) -> None:
        engine = FakeEngine(error=EngineError("not yet"))
        replica = server(engine)
        with pytest.raises(EngineError):
            asyncio.run(replica.check_health())
        engine.error = None
        asyncio.run(replica.check_health())
        assert [params.max_tokens for _, params in engine.asked] == [16, 16, 1]

    def test_silent_engine_is_told_apart_from_a_slow_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(replicas, "_PROBE_TIMEOUT_S", 0.02)
        with pytest.raises(EngineError, match="no token within"):
            asyncio.run(server(FakeEngine(hangs=True)).probe())

    def test_healthy_probe(self) -> None:
        assert asyncio.run(server(FakeEngine()).probe())


@pytest.fixture(scope="module")
def reward_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny reward model with random heads and temperature 2."""
    from transformers import GptOssConfig, GptOssModel

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0,
        layer_types=["full_attention"],
    )  # fmt: skip
    model = RewardModel(GptOssModel(config), ("polite",))
    torch.nn.init.normal_(model.score_head.weight)
    model.temperature = 2.0
    directory = tmp_path_factory.mktemp("reward")
    model.save(directory)
    return str(directory)


class TestCriticServer:
    def test_batch_equals_one_by_one(self, reward_directory: str) -> None:
        critic = CriticServer(reward_directory)
        runs = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10]]
        together = asyncio.run(critic.score(runs))
        alone = [asyncio.run(critic.score([run]))[0] for run in runs]
        assert together == pytest.approx(alone, abs=1e-4)
        assert len({round(score, 4) for score in together}) == 3

    def test_scores_are_calibrated_chances_as_in_training(self, reward_directory: str) -> None:
        model = RewardModel.load(reward_directory)
        with torch.inference_mode():
            raw, _ = model(torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.long))
        (score,) = asyncio.run(CriticServer(reward_directory).score([[1, 2, 3]]))
        assert score == pytest.approx(float(torch.sigmoid(raw[0] / 2.0)), abs=1e-5)

    def test_live_and_training_scores_are_one_number(self, reward_directory: str) -> None:
        rollouts = [make_rollout(f"r{n}", turns=(make_turn((1, 2), range(3, 5 + n)),)) for n in range(3)]
        training = RewardScorer(reward_directory, "rm", RewardMix(outcome_weight=0.5)).score(rollouts)
        live = asyncio.run(CriticServer(reward_directory).score([rollout_token_ids(one) for one in rollouts]))
        assert live == [score.critic_score for score in training]
        assert len(set(live)) == 3

    def test_another_temperature_is_another_live_score(self, reward_directory: str, tmp_path: Path) -> None:
        """Negative control of the one above: the calibration of the directory is what makes them agree."""
        model = RewardModel.load(reward_directory)
        model.temperature = 1.0
        model.save(tmp_path)
        found = [asyncio.run(CriticServer(str(path)).score([[1, 2, 3]])) for path in (reward_directory, tmp_path)]
        assert found[0] != found[1]

    def test_missing_directory(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="reward_model"):
            CriticServer(str(tmp_path))


@dataclass
class FakeHandle:
    """A policy's handle whose answer, error or delay a test chooses."""

    answer: Any

    @property
    def generate(self) -> Any:
        return SimpleNamespace(remote=self.answer)


class TestServePolicies:
    def policies(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Any, timeout_s: float = 1.0) -> Any:
        config = replace(make_config(tmp_path), engine_timeout_s=timeout_s)
        ServedPolicies(config.files.served).add(make_policy())
        monkeypatch.setattr(replicas.serve, "get_app_handle", lambda name: FakeHandle(answer))
        monkeypatch.setattr(replicas, "renderer_of", lambda path: renderer())
        return ServePolicies(config)

    def test_loads_a_version_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        policies = self.policies(tmp_path, monkeypatch, None)
        first = asyncio.run(policies.find(STABLE))
        assert asyncio.run(policies.find(STABLE)) is first
        assert first.stamps == make_policy()

    def test_version_never_deployed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(EngineError, match="never deployed"):
            asyncio.run(self.policies(tmp_path, monkeypatch, None).find("other"))

    def test_engine_is_looked_up_when_it_samples_and_again_until_it_is_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Finding a version asks only the disk; a missing application fails an attempt, and heals by itself."""
        asked: list[str] = []

        def look_up(name: str) -> FakeHandle:
            asked.append(name)
            if len(asked) < 3:
                raise RayServeException(f"Application '{name}' does not exist.")
            return FakeHandle(answer)

        async def answer(prompt: Any, sampling: Any) -> Any:
            return prompt

        async def run() -> Any:
            policies = self.policies(tmp_path, monkeypatch, None)
            monkeypatch.setattr(replicas.serve, "get_app_handle", look_up)
            policy = await policies.find(STABLE)
            assert asked == []
            for _ in range(2):
                with pytest.raises(EngineError, match=r"policy sft-a: .*does not exist"):
                    await policy.generate([1, 2], None)
            return [await policy.generate([1, 2], None) for _ in range(2)]

        assert asyncio.run(run()) == [(1, 2), (1, 2)]
        assert asked == ["policy-sft-a"] * 3, "once found, it is kept"

    def test_a_look_up_that_hangs_is_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        release = threading.Event()

        async def run() -> None:
            policies = self.policies(tmp_path, monkeypatch, None, timeout_s=0.02)
            monkeypatch.setattr(replicas.serve, "get_app_handle", lambda name: release.wait(10.0))
            policy = await policies.find(STABLE)
            try:
                await policy.generate([1], None)
            finally:
                release.set()

        with pytest.raises(EngineError, match="no answer in time"):
            asyncio.run(run())

    @pytest.mark.parametrize("error", [RayActorError(), RayServeException("full"), EngineError("dead"), RayError("x")])
    def test_whatever_ray_says_is_an_engine_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        async def answer(*args: Any) -> Any:
            raise error

        async def generate() -> Any:
            policy = await self.policies(tmp_path, monkeypatch, answer).find(STABLE)
            return await policy.generate((1, 2), None)

        with pytest.raises(EngineError):
            asyncio.run(generate())

    def test_silent_engine_is_an_engine_error_not_a_timeout_of_the_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def answer(*args: Any) -> Any:
            await asyncio.sleep(60)

        async def generate() -> Any:
            policy = await self.policies(tmp_path, monkeypatch, answer, timeout_s=0.02).find(STABLE)
            async with asyncio.timeout(5):
                return await policy.generate((1, 2), None)

        with pytest.raises(EngineError, match="no answer in time"):
            asyncio.run(generate())

    def test_critic_behind_serve(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def score(sequences: list[list[int]]) -> list[float]:
            return [float(len(sequence)) for sequence in sequences]

        handle = SimpleNamespace(score=SimpleNamespace(remote=score))
        monkeypatch.setattr(replicas.serve, "get_app_handle", lambda name: handle)
        critic = replicas._serve_critic("critic")
        assert critic is not None
        assert asyncio.run(critic([(1, 2), (3,)])) == [2.0, 1.0]  # type: ignore[arg-type]
        assert replicas._serve_critic("") is None
