"""The optimizer step: microbatches add up to one batch, and the norm reported is the one before clipping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rl_actors.contracts.errors import BadInputError
from rl_actors.learner.engine import (
    OptimizerSettings,
    accumulate,
    accumulate_and_step,
    build_engine,
    deepspeed_config,
    discard,
    is_muon_matrix,
    scale_learning_rate,
    whole_parameters,
)

SETTINGS = OptimizerSettings(learning_rate=0.1, max_grad_norm=1e9)
ROWS = torch.arange(12.0).reshape(4, 3) / 12
SHARDED = {"zero_stage": 2, "muon_learning_rate": 0.1}
real = pytest.mark.slow


def engine_over(settings: OptimizerSettings = SETTINGS) -> tuple[torch.nn.Linear, Any]:
    module = torch.nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(0.5)
    return module, build_engine(module, settings)


def step(settings: OptimizerSettings, *parts: torch.Tensor) -> tuple[float, list[float]]:
    """One step on the mean of squares over all rows, given in parts; returns (norm, weights)."""
    module, engine = engine_over(settings)
    norm = accumulate_and_step(engine, parts, lambda rows: engine(rows).square().sum() / len(ROWS))
    return norm, module.weight.detach().flatten().tolist()


def expected_norm() -> float:
    weight = torch.full((1, 3), 0.5, requires_grad=True)
    ((ROWS @ weight.T).square().sum() / len(ROWS)).backward()
    assert weight.grad is not None
    return float(weight.grad.norm())


@real
@pytest.mark.parametrize("cuts", [[4], [2, 2], [1, 3], [1, 1, 1, 1]], ids=str)
def test_microbatches_add_up_to_one_batch(process_group: None, cuts: list[int]):
    whole = step(SETTINGS, ROWS)
    norm, weights = step(SETTINGS, *ROWS.split(cuts))
    assert norm == pytest.approx(whole[0])
    assert weights == pytest.approx(whole[1])
    assert weights != pytest.approx([0.5] * 3), "and it did step"


@real
def test_a_forgotten_microbatch_would_be_seen(process_group: None):
    """Negative control of the one above."""
    assert step(SETTINGS, ROWS[:2])[0] != pytest.approx(step(SETTINGS, ROWS)[0])


@real
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_many_small_shares_add_up_in_bfloat16_too(process_group: None, zero_stage: int):
    """One gradient of 1, then 256 of a 512th: in bfloat16 the number after 1 is 1 + 1 / 128, so a sum stays at 1."""
    settings = OptimizerSettings(learning_rate=0.1, max_grad_norm=1e9, zero_stage=zero_stage, is_bf16=True)
    module = torch.nn.Linear(1, 1, bias=False)
    engine = build_engine(module, settings)
    shares = [1.0] + [1 / 512] * 256
    ones = torch.ones(1, 1, dtype=torch.bfloat16)
    norm = accumulate(engine, shares, lambda share: engine(ones).float().sum() * share)
    assert norm == pytest.approx(1.5, rel=1e-2)
    naive = torch.tensor(1.0, dtype=torch.bfloat16)
    for _ in range(256):
        naive += torch.tensor(1 / 512, dtype=torch.bfloat16)
    assert float(naive) == 1.0, "negative control"


@real
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_the_norm_is_the_one_before_clipping(process_group: None, zero_stage: int):
    """Clipping must not hide an explosion from the tripwires."""
    clipped = OptimizerSettings(learning_rate=0.1, max_grad_norm=1e-3, zero_stage=zero_stage)
    assert step(clipped, ROWS)[0] == pytest.approx(expected_norm(), rel=1e-5)


@real
def test_a_non_finite_gradient_is_reported_as_such(process_group: None):
    _, engine = engine_over()
    norm = accumulate_and_step(engine, [ROWS], lambda rows: (engine(rows) * math.nan).sum())
    assert not math.isfinite(norm)


@real
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_discarded_gradient_leaves_nothing_behind(process_group: None, zero_stage: int):
    settings = OptimizerSettings(learning_rate=0.1, max_grad_norm=1e9, zero_stage=zero_stage)
    fresh = engine_over(settings)
    module, engine = engine_over(settings)
    norm = accumulate(engine, ROWS.split(2), lambda rows: (engine(rows) * math.nan).sum())
    assert not math.isfinite(norm)
    discard(engine)
    assert weight_of(module) == pytest.approx([0.5] * 3)
    for _ in range(2):
        norms = [
            accumulate_and_step(e, ROWS.split(2), lambda rows, e=e: e(rows).square().sum()) for e in (engine, fresh[1])
        ]
        assert norms[0] == pytest.approx(norms[1])
        assert weight_of(module) == pytest.approx(weight_of(fresh[0]))


def weight_of(module: torch.nn.Module) -> list[float]:
    """The whole weight, whether or not ZeRO-3 has cut it up."""
    whole = whole_parameters(module, is_sharded=hasattr(next(module.parameters()), "ds_id"))
    return whole["weight"].flatten().tolist()


@real
def test_the_learning_rate_can_be_set(process_group: None):
    module, engine = engine_over()
    scale_learning_rate(engine, 0.0)
    accumulate_and_step(engine, [ROWS], lambda rows: engine(rows).sum())
    assert module.weight.detach().flatten().tolist() == [0.5] * 3
    scale_learning_rate(engine, 1.0)
    accumulate_and_step(engine, [ROWS], lambda rows: engine(rows).sum())
    assert module.weight.detach().flatten().tolist() != [0.5] * 3


@real
def test_muon_turns_matrices_and_leaves_the_rest_to_adamw(process_group: None):
    """A Muon step of a matrix is orthogonal up to the iteration's slack: its singular values are near 1, whatever the
    gradient's; AdamW moves a bias by its own learning rate."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 8))
    before = [parameter.detach().clone() for parameter in module.parameters()]
    engine = build_engine(module, OptimizerSettings(learning_rate=0.01, max_grad_norm=1e9, muon_learning_rate=0.1))
    rows = torch.randn(32, 8)
    accumulate_and_step(engine, [rows], lambda x: (engine(x) ** 2 * torch.arange(1.0, 9.0)).sum())
    matrix, bias = (now.detach() - then for now, then in zip(module.parameters(), before, strict=True))
    singular = torch.linalg.svdvals(matrix / 0.1)
    assert 0.5 < float(singular.min()) <= float(singular.max()) < 1.5
    assert bias.abs().tolist() == pytest.approx([0.01] * 8, rel=1e-3)


MATRICES = {"layers.0.self_attn.q_proj.weight", "layers.0.mlp.experts.gate_up_proj"}
OTHERS = {
    "model.embed_tokens.weight",
    "lm_head.weight",
    "layers.0.mlp.router.weight",
    "layers.0.mlp.experts.down_proj_bias",
}


def test_muon_takes_no_embedding_head_router_or_bias():
    matrix, vector = torch.nn.Parameter(torch.zeros(4, 4)), torch.nn.Parameter(torch.zeros(4))
    assert {name for name in MATRICES | OTHERS if is_muon_matrix(name, matrix)} == MATRICES
    assert not is_muon_matrix("layers.0.self_attn.sinks", vector)


def test_muon_and_sharded_matrices_are_refused():
    with pytest.raises(BadInputError, match="Muon needs whole matrices"):
        build_engine(torch.nn.Linear(2, 2), OptimizerSettings(learning_rate=0.1, max_grad_norm=1.0, **SHARDED))


@real
def test_frozen_parameters_stay(process_group: None):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(2, 1, bias=False))
    module[0].requires_grad_(False)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    engine = build_engine(module, SETTINGS)
    accumulate_and_step(engine, [ROWS], lambda rows: engine(rows).sum())
    after = [parameter.detach() for parameter in module.parameters()]
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, False]


def test_settings_reach_deepspeed():
    settings = OptimizerSettings(learning_rate=0.5, max_grad_norm=2.0, weight_decay=0.1, zero_stage=2, beta2=0.9)
    config = deepspeed_config(settings)
    assert config["gradient_clipping"] == 2.0
    assert config["zero_optimization"]["stage"] == 2
    parameters = config["optimizer"]["params"]
    assert (parameters["lr"], parameters["weight_decay"], parameters["betas"]) == (0.5, 0.1, [0.9, 0.9])
    assert config["bf16"]["enabled"] == torch.cuda.is_available()
