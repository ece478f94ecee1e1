"""A real vLLM engine: a complete weight sync, attestation that catches one that is not, seeds, refusals, the end."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rl_actors.actors.publish import attestation_gap, require_attested
from rl_actors.actors.vllm_engine import VllmEngine, _routes
from rl_actors.agent.renderers.harmony import HarmonyRenderer
from rl_actors.algorithms.batching import collate
from rl_actors.contracts.errors import AttestationError, EngineError
from rl_actors.contracts.rollouts import Completion, Routes, SamplingParams, TrainingSample
from rl_actors.models.experts import engine_routes, record_routes, route_agreement
from rl_actors.models.loading import build_tiny_model, tiny_config
from rl_actors.models.scoring_head import token_logprobs_and_entropy
from tests.rl_actors.fakes import PROMPT, save_tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(300)]

MAX_LEN = 256
NUM_THREADS = 1  # not the default of this machine, nor of any with two cores
TOLERANCE = 1e-3
PROBES = [[random.Random(number).randrange(8, 300) for _ in range(30 + number)] for number in range(4)]
STOCK = "seatrial_test_stock"
ENGINES: list[VllmEngine] = []  # kept until the process ends: a vLLM that is collected takes torch.distributed with it


class Learner:
    """The model in transformers, float32: what every engine must compute."""

    def __init__(self, directory: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def change(self, seed: int) -> None:
        """Move every tensor, sinks, experts and biases included, by a tenth of its spread (or of one)."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                spread = float(parameter.std()) or 1.0
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=max(0.1 * spread, 0.05))

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    @torch.no_grad()
    def logprobs(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[list[float]]:
        rows = []
        for sequence in sequences:
            ids = torch.tensor([list(sequence)])
            found, _ = token_logprobs_and_entropy(self.model(input_ids=ids).logits, ids, temperature)
            rows.append(found[0, 1:].tolist())
        return rows


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("engine"), seed=5)


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Iterator[VllmEngine]:
    """The engine as rollout workers start it."""
    torch.set_num_threads(NUM_THREADS)
    one = VllmEngine(str(model_dir), max_model_len=MAX_LEN, max_num_seqs=32)
    ENGINES.append(one)
    yield one
    one.close()


@pytest.fixture(scope="module")
def stock_engine(model_dir: Path) -> Iterator[VllmEngine]:
    """The same engine with the sync that vLLM's own transfer engines do: nothing after the layerwise reload."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    from rl_actors.actors.weight_sync import ObjectStoreTransferEngine

    class StockTransferEngine(ObjectStoreTransferEngine):
        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)

    if STOCK not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(STOCK, StockTransferEngine)
    one = VllmEngine(str(model_dir), max_model_len=MAX_LEN, max_num_seqs=32, transfer_backend=STOCK)
    ENGINES.append(one)
    yield one
    one.close()


def gap(engine: VllmEngine, learner: Learner) -> float:
    return attestation_gap(engine.probe_logprobs(PROBES), learner.logprobs(PROBES))


def ask(engine: VllmEngine, *requests: tuple[Sequence[int], SamplingParams]) -> list[Any]:
    """Ask for all at once; completions and exceptions in order."""

    async def all_of_them() -> list[Any]:
        asked = [engine.generate(prompt, sampling) for prompt, sampling in requests]
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 120)

    return asyncio.run(all_of_them())


def test_the_engine_uses_the_threads_its_maker_was_given(engine: VllmEngine):
    """Else two engines beside each other take twice the cores there are."""
    assert engine.call(torch.get_num_threads) == torch.get_num_threads()  # NUM_THREADS, unless vLLM was loaded before


# --- weight sync ----------------------------------------------------------------------------------


def test_a_loaded_engine_computes_what_the_learner_does(engine: VllmEngine, model_dir: Path):
    learner = Learner(model_dir)
    assert gap(engine, learner) < TOLERANCE
    learner.change(9)
    assert gap(engine, learner) > 0.05, "negative control: other weights are seen"


@pytest.mark.parametrize("seed", [1, 2])
def test_after_a_publish_the_engine_equals_the_learner(engine: VllmEngine, model_dir: Path, seed: int):
    learner = Learner(model_dir)
    learner.change(seed)
    before = gap(engine, learner)
    engine.publish(learner.weights(), 10 + seed)
    after = gap(engine, learner)
    require_attested(after, tolerance=TOLERANCE, worker="worker", weights_version=10 + seed)
    assert after < TOLERANCE < 0.05 < before
    assert engine.weights_version == 10 + seed


def test_the_stock_path_is_caught(stock_engine: VllmEngine, model_dir: Path):
    """vLLM's layerwise reload leaves GPT-OSS experts and sinks at their old values and raises nothing."""
    learner = Learner(model_dir)
    assert gap(stock_engine, learner) < TOLERANCE
    learner.change(1)
    stock_engine.publish(learner.weights(), 1)
    found = gap(stock_engine, learner)
    with pytest.raises(AttestationError, match="does not serve weights version 1"):
        require_attested(found, tolerance=TOLERANCE, worker="worker", weights_version=1)


@pytest.mark.parametrize("part", ["self_attn.sinks", "mlp.experts.gate_up_proj", "mlp.experts.down_proj_bias"])
def test_each_part_that_could_vanish_arrives(engine: VllmEngine, model_dir: Path, part: str):
    """Only this tensor changes: an average over all weights could not hide its loss."""
    learner = Learner(model_dir)
    engine.publish(learner.weights(), 20)
    with torch.no_grad():
        for name, parameter in learner.model.named_parameters():
            if name.endswith(part):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    assert gap(engine, learner) > 2 * TOLERANCE, "the change can be seen"
    engine.publish(learner.weights(), 21)
    assert gap(engine, learner) < TOLERANCE


def test_no_answer_comes_from_a_cache_of_older_weights(engine: VllmEngine, model_dir: Path):
    learner = Learner(model_dir)
    engine.publish(learner.weights(), 40)
    prompt, greedy = PROBES[3], SamplingParams(max_tokens=8, temperature=0.0)
    ask(engine, (prompt, greedy))
    learner.change(6)
    engine.publish(learner.weights(), 41)
    (after,) = ask(engine, (prompt, greedy))
    expected = learner.logprobs([[*prompt, *after.token_ids]])[0][len(prompt) - 1 :]
    assert after.logprobs == pytest.approx(expected, abs=5e-3)


# --- sampling -------------------------------------------------------------------------------------


def sampled(seed: int, temperature: float = 1.0) -> SamplingParams:
    return SamplingParams(max_tokens=24, temperature=temperature, seed=seed)


def test_sampled_logprobs_are_the_learners(engine: VllmEngine, model_dir: Path):
    learner = Learner(model_dir)
    engine.publish(learner.weights(), 50)
    for prompt, done in zip(PROBES, ask(engine, *((probe, sampled(3)) for probe in PROBES)), strict=True):
        assert isinstance(done, Completion)
        expected = learner.logprobs([[*prompt, *done.token_ids]])[0][len(prompt) - 1 :]
        assert done.logprobs == pytest.approx(expected, abs=5e-3)


def test_sampled_logprobs_are_of_the_distribution_that_was_sampled_from(engine: VllmEngine, model_dir: Path):
    """The learner scores at the rollout's temperature; raw logprobs would differ from it on every token."""
    learner = Learner(model_dir)
    engine.publish(learner.weights(), 51)
    (done,) = ask(engine, (PROBES[0], sampled(3, 2.0)))
    expected = learner.logprobs([[*PROBES[0], *done.token_ids]], 2.0)[0][len(PROBES[0]) - 1 :]
    assert done.logprobs == pytest.approx(expected, abs=5e-3)


def test_a_seed_gives_the_same_tokens_alone_and_among_others(engine: VllmEngine):
    prompt = PROBES[0]
    (alone,) = ask(engine, (prompt, sampled(7)))
    crowd = ask(
        engine, *((prompt if number == 5 else PROBES[number % 4], sampled(7 + number - 5)) for number in range(16))
    )
    assert crowd[5].token_ids == alone.token_ids
    assert crowd[5].logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    (other,) = ask(engine, (prompt, sampled(8)))
    assert other.token_ids != alone.token_ids


def test_a_stop_token_finishes_and_is_part_of_the_answer(engine: VllmEngine, model_dir: Path):
    renderer = HarmonyRenderer.from_directory(str(model_dir))
    prompt = renderer.prompt("Be brief.", [("user", PROMPT)])
    (free,) = ask(engine, (prompt, sampled(11)))
    assert (len(free.token_ids), free.finished) == (24, False)
    stop = free.token_ids[4]
    (stopped,) = ask(engine, (prompt, SamplingParams(max_tokens=24, seed=11, stop_token_ids=(stop,))))
    first = free.token_ids.index(stop)
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.finished


def test_a_shared_beginning_is_read_from_the_cache(engine: VllmEngine):
    prompt = [token for probe in (*PROBES, *PROBES) for token in probe][:200]  # more than a block of 128
    (first,) = ask(engine, (prompt, sampled(1)))
    (again,) = ask(engine, ([*prompt, 20], sampled(1)))
    assert first.cached_tokens == 0 < again.cached_tokens < len(prompt)


# --- refusals and the end -------------------------------------------------------------------------


def test_a_request_that_is_too_long_is_refused_and_the_engine_lives_on(engine: VllmEngine):
    too_long = [20] * (MAX_LEN + 1)
    refused, well = ask(engine, (too_long, sampled(1)), (PROBES[0], sampled(1)))
    assert isinstance(refused, EngineError)
    assert "request refused" in str(refused)
    assert len(well.token_ids) == 24
    assert ask(engine, (PROBES[0], sampled(1)))[0].token_ids == well.token_ids


def test_a_publish_that_lacks_a_tensor_is_refused_and_the_engine_lives_on(engine: VllmEngine, model_dir: Path):
    learner = Learner(model_dir)
    torn = {name: tensor for name, tensor in learner.weights().items() if "layers.1.self_attn.sinks" not in name}
    before = engine.weights_version
    with pytest.raises(AttestationError, match=r"layers\.1\.self_attn\.sinks"):
        engine.publish(torn, 60)
    assert engine.weights_version == before
    engine.publish(learner.weights(), 61)
    assert attestation_gap(engine.probe_logprobs(PROBES), learner.logprobs(PROBES)) < TOLERANCE


def test_closing_fails_whoever_waits(stock_engine: VllmEngine):
    """Last: the engine is gone afterwards."""
    outcomes: list[Any] = []
    long_ones = [(PROBES[number % 4], SamplingParams(max_tokens=200, seed=number)) for number in range(32)]
    waiting = threading.Thread(target=lambda: outcomes.extend(ask(stock_engine, *long_ones)))
    waiting.start()
    while stock_engine._num_requests < len(long_ones):
        time.sleep(0.001)
    stock_engine.close()
    waiting.join(60)
    assert len(outcomes) == 32
    failed = [outcome for outcome in outcomes if isinstance(outcome, EngineError)]
    assert failed, "all had finished before the end: the test proves nothing"
    assert all(isinstance(outcome, EngineError | Completion) for outcome in outcomes)
    with pytest.raises(EngineError, match="dead"):
        stock_engine.probe_logprobs(PROBES)


# --- routes ---------------------------------------------------------------------------------------


class Capturer:
    """In place of vLLM's own, which needs a GPU: keeps what the routers report, through vLLM's own binding."""

    def __init__(self, num_layers: int) -> None:
        self.rows: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]

    def capture(self, layer_id: int, topk_ids: torch.Tensor) -> None:
        self.rows[layer_id].append(topk_ids.clone())

    def array(self) -> Any:
        return torch.stack([torch.cat(rows) for rows in self.rows], dim=1).to(torch.uint8).numpy()


def output(prompt: Sequence[int], sampled: Sequence[int], routed_experts: Any) -> Any:
    """What vLLM returns of a finished request, as far as routes go."""
    completion = SimpleNamespace(token_ids=list(sampled), routed_experts=routed_experts)
    return SimpleNamespace(prompt_token_ids=list(prompt), outputs=[completion])


@pytest.fixture(scope="module")
def routed_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose routers choose: two of eight experts, by the token and not by a bias that none outweighs."""
    directory = save_tiny_model(tmp_path_factory.mktemp("routed"), seed=5)
    vocab = AutoModelForCausalLM.from_pretrained(directory).config.vocab_size
    config = tiny_config(vocab_size=vocab, hidden_size=64, num_layers=2, num_experts=8, max_length=512, eos_token_id=2)
    model: Any = build_tiny_model(config, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(generator=generator)
        for layer in model.model.layers:
            layer.mlp.router.bias.zero_()
            layer.mlp.router.weight.normal_(generator=generator)
    model.save_pretrained(directory)
    return directory


def test_the_engines_routes_are_those_of_the_learner_token_by_token(routed_dir: Path):
    """Layer order, expert numbers and alignment are the same in vLLM and Transformers, prompt and sampled alike."""
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import bind_routed_experts_capturer

    engine, capturer = VllmEngine(str(routed_dir), max_model_len=MAX_LEN, max_num_seqs=8), Capturer(num_layers=2)
    ENGINES.append(engine)
    engine.call(lambda: engine._llm.apply_model(lambda model: bind_routed_experts_capturer(model, capturer)))
    prompt = PROBES[0]
    (found,) = ask(engine, (prompt, SamplingParams(max_tokens=40, seed=4)))
    engine.close()
    routes = _routes(output(prompt, found.token_ids, capturer.array()))
    ids = torch.tensor([[*prompt, *found.token_ids]])
    learner = AutoModelForCausalLM.from_pretrained(routed_dir, dtype=torch.float32).eval()
    with torch.no_grad(), record_routes(learner) as own:
        learner(input_ids=ids, attention_mask=torch.ones_like(ids))
    row = TrainingSample(
        rollout_id="r", group_id=0, weights_versions=(0,), token_ids=tuple(ids[0].tolist()), reward=0.0,
        loss_mask=(False,) * len(prompt) + (True,) * len(found.token_ids), rollout_logprobs=(0.0,) * ids.shape[1],
        truncated=False, routes=routes,
    )  # fmt: skip
    theirs = engine_routes(learner, collate([row]).routes_LBTK)
    assert theirs is not None
    read = torch.ones_like(ids, dtype=torch.bool)
    assert route_agreement(theirs, own.joined(), read) == 1.0
    assert route_agreement(theirs.flip(0), own.joined(), read) < 0.9, "negative control: layers the wrong way round"
    assert route_agreement(theirs.roll(1, dims=2), own.joined(), read) < 0.9, "negative control: shifted by a token"


def test_an_engine_that_records_nothing_gives_no_routes(engine: VllmEngine):
    (found,) = ask(engine, (PROBES[0], SamplingParams(max_tokens=4, seed=1)))
    assert found.routes == Routes()


def test_routes_of_another_number_of_tokens_are_refused():
    with pytest.raises(EngineError, match="routes of 4 tokens and read 5"):
        _routes(output([1, 2, 3], [4, 5, 6], torch.zeros(4, 2, 1, dtype=torch.uint8).numpy()))
