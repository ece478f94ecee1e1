"""Replayed routes are a bitwise no-op at equal weights and hold at others; the router still learns; bounds hold."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from rl_actors.contracts.errors import BadInputError
from rl_actors.models.experts import (
    _GATES,
    NO_ROUTE,
    ROUTES_DTYPE,
    SORTED_EXPERTS,
    RecordedRoutes,
    engine_routes,
    freeze_router,
    record_routes,
    replay_routes,
    route_agreement,
    router_parameters,
    sorted_experts,
)
from rl_actors.models.loading import build_tiny_model, load_causal_lm, tiny_config

torch.set_num_threads(1)
VOCAB, LAYERS, EXPERTS, TOP_K = 64, 2, 8, 2
BATCH, LENGTH = 3, 20
IDS = torch.randint(1, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
ATTENTION = torch.ones_like(IDS)
PADDED = ATTENTION.clone()
PADDED[0, 12:] = 0
PADDED[2, 5:] = 0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("routed")
    config = tiny_config(
        vocab_size=VOCAB, hidden_size=64, num_layers=LAYERS, num_experts=EXPERTS, max_length=64, eos_token_id=7
    )
    build_tiny_model(config, seed=3).save_pretrained(path)
    return path


def stock(path: Path) -> Any:
    """Load with Transformers' own choice of expert path."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.fixture(params=[stock, load_causal_lm], ids=["stock_experts", "sorted_experts"])
def model(request: pytest.FixtureRequest, directory: Path) -> Any:
    return request.param(directory)


@pytest.fixture
def ours(directory: Path) -> Any:
    return load_causal_lm(directory)


def qwen3(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32,
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "num_experts": EXPERTS, "num_experts_per_tok": 3, "mlp_only_layers": [1], "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(4)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(fields | changes))).float()


def mixtral() -> Any:
    torch.manual_seed(5)
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=EXPERTS, num_experts_per_tok=2, initializer_range=0.2,
    )  # fmt: skip
    return MixtralForCausalLM(config).float()


OTHERS = pytest.mark.parametrize(
    "build",
    [lambda: qwen3(norm_topk_prob=True), lambda: qwen3(norm_topk_prob=False), mixtral],
    ids=["qwen3_normed", "qwen3", "mixtral"],
)


def forward(model: Any, ids: Tensor = IDS, attention: Tensor = ATTENTION) -> Tensor:
    return model(input_ids=ids, attention_mask=attention, use_cache=False).logits


def recorded(model: Any, ids: Tensor = IDS, attention: Tensor = ATTENTION) -> Tensor:
    with torch.no_grad(), record_routes(model) as routes:
        forward(model, ids, attention)
    return routes.joined()


def gradients(model: Any, attention: Tensor = ATTENTION) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradient of every parameter of one pass with a loss that weighs every logit differently."""
    model.zero_grad(set_to_none=True)
    logits = forward(model, attention=attention)
    logits.mul(torch.linspace(-1.0, 1.0, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def perturb(model: nn.Module, *, seed: int = 1, scale: float = 0.3) -> None:
    """Move the weights so far that many tokens change their experts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = float(parameter.std()) or 0.05
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale * spread)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- recording --------------------------------------------------------------------------------------------------


def test_both_expert_paths_are_under_test(directory: Path):
    assert load_causal_lm(directory).config._experts_implementation == SORTED_EXPERTS
    assert stock(directory).config._experts_implementation != SORTED_EXPERTS


def test_routes_are_the_top_logits_of_every_router(model: Any):
    seen: list[Tensor] = []
    handles = [
        layer.mlp.router.register_forward_hook(lambda _m, _a, output: seen.append(output[0].topk(TOP_K).indices))
        for layer in model.model.layers
    ]
    routes = recorded(model)
    for handle in handles:
        handle.remove()
    assert routes.dtype == ROUTES_DTYPE
    assert routes.shape == (LAYERS, BATCH, LENGTH, TOP_K)
    assert torch.equal(routes.long(), torch.stack(seen).view(LAYERS, BATCH, LENGTH, TOP_K))
    assert len(routes.unique()) > TOP_K


def test_recording_changes_nothing(model: Any):
    logits, plain = gradients(model)
    with record_routes(model):
        again, watched = gradients(model)
    assert torch.equal(logits, again)
    assert same(plain, watched)


def test_microbatches_are_joined_in_order(model: Any):
    with torch.no_grad(), record_routes(model) as routes:
        forward(model, IDS[:1], ATTENTION[:1])
        forward(model, IDS[1:], ATTENTION[1:])
    assert [tuple(part.shape[:3]) for part in routes.passes] == [(LAYERS, 1, LENGTH), (LAYERS, 2, LENGTH)]
    assert torch.equal(routes.joined()[:, :1], routes.passes[0])
    assert torch.equal(routes.joined()[:, 1:], routes.passes[1])


def test_microbatches_of_different_lengths_are_kept_apart(ours: Any):
    with torch.no_grad(), record_routes(ours) as routes:
        forward(ours)
        forward(ours, IDS[:, :7], ATTENTION[:, :7])
    assert [part.shape[2] for part in routes.passes] == [LENGTH, 7]
    with pytest.raises(BadInputError, match="different lengths"):
        routes.joined()


def test_a_pass_that_broke_off_is_not_taken_for_routes(ours: Any):
    handle = ours.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with record_routes(ours) as routes:
        with pytest.raises(ZeroDivisionError):
            forward(ours)
        handle.remove()
    with pytest.raises(BadInputError, match="broke off"):
        _ = routes.passes


def test_nothing_recorded_is_empty(ours: Any):
    with record_routes(ours) as routes:
        pass
    assert routes.passes == []
    assert routes.joined().shape == (LAYERS, 0, 0, 0)


def test_a_model_without_routers_has_zero_layers_and_replay_leaves_it_alone():
    dense = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with record_routes(dense) as routes:
        expected = dense(x)
    assert routes.joined().shape[0] == 0
    with replay_routes(dense, routes.joined()):
        assert torch.equal(dense(x), expected)
    assert router_parameters(dense) == {}
    assert freeze_router(dense) == 0


# --- replay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [ATTENTION, PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_at_equal_weights_replay_is_a_bitwise_no_op(model: Any, attention: Tensor, train: bool):
    model.train(train)
    routes = recorded(model, attention=attention)
    logits, plain = gradients(model, attention)
    with replay_routes(model, routes) as live:
        replayed, forced = gradients(model, attention)
    assert torch.equal(replayed, logits)
    assert same(forced, plain)
    assert torch.equal(live.joined(), routes)


def test_other_routes_give_other_logits(model: Any):
    """Negative control of the one above: replay does reach the experts."""
    routes = recorded(model)
    with torch.no_grad(), replay_routes(model, (routes + 1) % EXPERTS):
        assert not torch.allclose(forward(model), gradients_free(model), atol=1e-3)


def gradients_free(model: Any) -> Tensor:
    """Logits of a copy, which carries no replay."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    with torch.no_grad():
        return forward(twin)


def test_recorded_routes_hold_where_new_weights_would_leave_them(model: Any):
    routes = recorded(model)
    perturb(model)
    moved = recorded(model)
    assert not torch.equal(moved, routes)  # without replay they differ
    with replay_routes(model, routes) as live:
        assert torch.equal(recorded(model), routes)
    assert torch.equal(live.joined()[0], moved[0])  # the first router sees the same input, replayed or not
    assert 0.3 < route_agreement(routes, live.joined(), ATTENTION) < 1.0


def test_a_record_sees_what_is_used_on_either_side_of_a_replay(ours: Any):
    routes = recorded(ours)
    perturb(ours)
    with torch.no_grad(), record_routes(ours) as outer, replay_routes(ours, routes), record_routes(ours) as inner:
        forward(ours)
    assert torch.equal(outer.joined(), routes)
    assert torch.equal(inner.joined(), routes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_replays(ours: Any, dtype: torch.dtype):
    routes = recorded(ours)
    perturb(ours)
    with replay_routes(ours, routes.to(dtype)):
        assert torch.equal(recorded(ours), routes)


def test_each_microbatch_replays_its_own_rows(model: Any):
    routes = recorded(model)
    perturb(model)
    with torch.no_grad(), replay_routes(model, routes):
        whole = forward(model)
    for row in range(BATCH):
        rows = slice(row, row + 1)
        with torch.no_grad(), replay_routes(model, routes[:, rows]):
            assert torch.allclose(forward(model, IDS[rows], ATTENTION[rows]), whole[rows], atol=1e-5)


def test_one_context_may_hold_several_passes(ours: Any):
    routes = recorded(ours)
    perturb(ours)
    with torch.no_grad(), replay_routes(ours, routes) as live:
        assert torch.equal(forward(ours), forward(ours))
    assert len(live.passes) == 2


def test_tokens_without_a_route_are_left_to_the_router(model: Any):
    """An engine reports no routes for padding and for the last token: real tokens must not feel it."""
    routes = recorded(model, attention=PADDED)
    perturb(model)
    moved = recorded(model, attention=PADDED)
    partial = torch.where(PADDED[None, :, :, None].bool(), routes, NO_ROUTE)
    with torch.no_grad(), replay_routes(model, routes):
        whole = forward(model, attention=PADDED)
    with torch.no_grad(), replay_routes(model, partial), record_routes(model) as used:
        logits = forward(model, attention=PADDED)
    real = PADDED.bool()
    assert torch.allclose(logits[real], whole[real], atol=1e-5)
    assert torch.equal(used.joined()[:, real], routes[:, real])
    assert torch.equal(used.joined()[0, ~real], moved[0, ~real])
    with torch.no_grad(), replay_routes(model, torch.full_like(routes, NO_ROUTE)):
        free = forward(model)
    assert torch.equal(free, gradients_free(model))


@OTHERS
def test_other_families_replay_too(build: Callable[[], Any]):
    """Sparse layers only: Qwen3's dense layer in the middle has no routes."""
    model = build()
    routes = recorded(model)
    assert routes.shape[0] == 2
    logits, plain = gradients(model)
    with replay_routes(model, routes):
        replayed, forced = gradients(model)
    assert torch.equal(replayed, logits)
    assert same(forced, plain)
    perturb(model)
    assert not torch.equal(recorded(model), routes)
    with replay_routes(model, routes):
        assert torch.equal(recorded(model), routes)
    assert freeze_router(model) == 2


# --- gradient checkpointing -------------------------------------------------------------------------------------


def checkpointed(model: Any, **settings: Any) -> Any:
    twin = copy.deepcopy(model).train()
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings or None)
    return twin


def test_recomputation_replays_and_is_not_recorded(model: Any):
    routes = recorded(model)
    perturb(model)
    twin = checkpointed(model)
    with replay_routes(model.train(), routes):
        logits, plain = gradients(model)
    with replay_routes(twin, routes) as live, record_routes(twin) as used:
        again, forced = gradients(twin)
    assert torch.equal(again, logits)
    assert same(forced, plain)
    assert len(live.passes) == len(used.passes) == 1


def test_a_backward_left_for_later_is_refused(ours: Any):
    """It would recompute with the router's own choice: gradients of another function, and nothing would tell."""
    routes = recorded(ours)
    twin = checkpointed(ours)
    with pytest.raises(BadInputError, match="backward inside"), replay_routes(twin, routes):
        forward(twin)
    with torch.no_grad(), replay_routes(twin, routes):
        forward(twin)
    with replay_routes(twin.eval(), routes):
        forward(twin)
    with replay_routes(ours, routes):
        late = forward(ours)
    late.sum().backward()


def test_reentrant_checkpointing_is_refused(ours: Any):
    routes = recorded(ours)
    with (
        pytest.raises(BadInputError, match="use_reentrant"),
        replay_routes(checkpointed(ours, use_reentrant=True), routes),
    ):
        pass


# --- what the gates and the router learn ------------------------------------------------------------------------


def block_and_input(ours: Any, dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor, Tensor]:
    """One mixture-of-experts block, its input, and routes that it would not choose itself."""
    block = copy.deepcopy(ours.model.layers[0].mlp).to(dtype)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2), dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    choices = [torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(10)]
    return block, x, torch.stack(choices).view(1, 2, 5, TOP_K)


def dense_reference(block: Any, x_BTH: Tensor, routes_BTK: Tensor) -> Tensor:
    """Every expert on every token, written out; weights are the softmax over the forced experts' logits."""
    experts, router = block.experts, block.router
    logits = x_BTH @ router.weight.T + router.bias
    gates = torch.zeros_like(logits).scatter(-1, routes_BTK, logits.gather(-1, routes_BTK).softmax(-1))
    mixed = torch.zeros_like(x_BTH)
    for index in range(EXPERTS):
        both = x_BTH @ experts.gate_up_proj[index] + experts.gate_up_proj_bias[index]
        gate, up = both[..., ::2].clamp(max=experts.limit), both[..., 1::2].clamp(-experts.limit, experts.limit)
        inner = (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
        mixed = mixed + gates[..., index, None] * (inner @ experts.down_proj[index] + experts.down_proj_bias[index])
    return mixed


def test_forced_gates_and_their_gradients_are_those_of_a_dense_reference(ours: Any):
    block, x, routes = block_and_input(ours)
    with replay_routes(block, routes):
        found, _ = block(x)
    wanted = dense_reference(block, x, routes[0])
    torch.testing.assert_close(found, wanted)
    weigh = torch.linspace(-1.0, 1.0, found.numel(), dtype=found.dtype).view_as(found)
    parameters = list(block.parameters())
    ours_grad = torch.autograd.grad((found * weigh).sum(), parameters)
    wanted_grad = torch.autograd.grad((wanted * weigh).sum(), parameters)
    for (name, _), one, two in zip(block.named_parameters(), ours_grad, wanted_grad, strict=True):
        torch.testing.assert_close(one, two, msg=name)
    assert float(ours_grad[0].abs().sum()) > 0.0


def test_the_reference_tells_forced_from_free_routes(ours: Any):
    """Negative control of the one above."""
    block, x, routes = block_and_input(ours)
    assert not torch.allclose(block(x)[0], dense_reference(block, x, routes[0]))


def test_the_routers_gradient_is_that_of_finite_differences(ours: Any):
    block, x, routes = block_and_input(ours)

    def mixed(weight: Tensor, bias: Tensor) -> Tensor:
        return functional_call(block, {"router.weight": weight, "router.bias": bias}, (x,))[0]

    inputs = [block.router.weight.detach().requires_grad_(), block.router.bias.detach().requires_grad_()]
    with replay_routes(block, routes):
        assert torch.autograd.gradcheck(mixed, inputs, fast_mode=True)


def test_only_visited_experts_move_the_router(ours: Any):
    block, x, routes = block_and_input(ours)
    with replay_routes(block, torch.tensor([1, 4]).expand_as(routes)):
        block(x)[0].square().sum().backward()
    moved = block.router.bias.grad != 0
    assert moved.nonzero().flatten().tolist() == [1, 4]


def test_gradient_reaches_every_router_under_replay_until_it_is_frozen(model: Any):
    routes = recorded(model)
    perturb(model)
    with replay_routes(model, routes):
        _, plain = gradients(model)
    names = router_parameters(model).keys()
    assert len(names) == 2 * LAYERS
    assert all(float(plain[name].abs().sum()) > 0.0 for name in names)
    assert freeze_router(model) == 2 * LAYERS
    with replay_routes(model, routes):
        _, frozen = gradients(model)
    assert frozen.keys() == plain.keys() - names
    assert all(torch.equal(gradient, plain[name]) for name, gradient in frozen.items())


def test_a_frozen_router_stays_where_it_was(ours: Any):
    freeze_router(ours)
    before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-2)
    gradients(ours)
    optimizer.step()
    moved = {name for name, parameter in ours.named_parameters() if not torch.equal(parameter, before[name])}
    assert not moved & router_parameters(ours).keys()
    assert any("experts" in name for name in moved)


# --- refusals ---------------------------------------------------------------------------------------------------


def doubled(routes: Tensor) -> Tensor:
    routes = routes.clone()
    routes[1, 0, 3] = 2
    return routes


def half_free(routes: Tensor) -> Tensor:
    routes = routes.clone()
    routes[0, 0, 3, 0] = NO_ROUTE
    return routes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[:1], "with 2 layers"),
        (lambda r: r[:0], "with 2 layers"),
        (lambda r: torch.cat([r, r]), "with 2 layers"),
        (lambda r: r[0], "want .layers, B, T, K."),
        (lambda r: r[..., :1], "visits 2 experts"),
        (lambda r: torch.empty(LAYERS, 0, 0, 0, dtype=torch.int16), "visits 2 experts"),
        (lambda r: r.float(), "expert numbers are integers"),
        (lambda r: r + EXPERTS, "distinct experts of 0..7"),
        (lambda r: r - EXPERTS, "distinct experts"),
        (lambda r: r.long() + 2**16, "distinct experts"),
        (doubled, "routes.1.*distinct experts"),
        (half_free, "routes.0.*distinct experts"),
    ],
)
def test_routes_that_do_not_fit_the_model_are_refused(ours: Any, change: Callable[[Tensor], Tensor], message: str):
    routes, hooks = recorded(ours), num_hooks(ours)
    with pytest.raises(BadInputError, match=message), replay_routes(ours, change(routes)):
        pytest.fail("was let in")
    assert num_hooks(ours) == hooks


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r[:, :2],
        lambda r: r[:, :, :-1],
        lambda r: r.transpose(1, 2),
        lambda r: r.reshape(LAYERS, 1, -1, TOP_K),
    ],
    ids=["rows", "tokens", "transposed", "flattened"],
)
def test_routes_of_another_batch_are_refused_by_the_pass(ours: Any, change: Callable[[Tensor], Tensor]):
    routes, hooks = recorded(ours), num_hooks(ours)
    with pytest.raises(BadInputError, match=r"this pass has \(3, 20\)"), replay_routes(ours, change(routes)):
        forward(ours)
    assert num_hooks(ours) == hooks


def test_a_replay_inside_a_replay_is_refused(ours: Any):
    routes = recorded(ours)
    with replay_routes(ours, routes):
        with pytest.raises(BadInputError, match="already replaying"), replay_routes(ours, routes):
            pytest.fail("was let in")
        assert torch.equal(recorded(ours), routes)


class Boom(Exception):
    """What goes wrong inside a context."""


def fail_after(check: Callable[[], bool]) -> None:
    assert check()
    raise Boom


def test_hooks_are_gone_after_an_exception(ours: Any):
    routes, hooks = recorded(ours), num_hooks(ours)
    perturb(ours)
    free = recorded(ours)
    with pytest.raises(Boom), record_routes(ours), replay_routes(ours, routes):
        fail_after(lambda: num_hooks(ours) > hooks)
    assert num_hooks(ours) == hooks
    assert torch.equal(recorded(ours), free)


def test_an_exception_is_not_hidden_by_a_missing_backward(ours: Any):
    routes, twin = recorded(ours), checkpointed(ours)
    with pytest.raises(Boom), replay_routes(twin, routes):
        fail_after(lambda: forward(twin).requires_grad)


def test_a_block_that_goes_round_its_router_is_refused(ours: Any, monkeypatch: pytest.MonkeyPatch):
    routes = recorded(ours)
    monkeypatch.setattr(ours.model.layers[1].mlp, "forward", lambda hidden: (hidden, None))
    with pytest.raises(BadInputError, match="without calling its router"), record_routes(ours):
        forward(ours)
    with pytest.raises(BadInputError, match="without calling its router"), replay_routes(ours, routes):
        forward(ours)


class Homemade(nn.Module):
    """Experts with a gate nobody here knows."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList([nn.Linear(4, 4)])


def deepseek() -> nn.Module:
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8, num_experts_per_tok=2, n_group=2,
            topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
            v_head_dim=16, qk_nope_head_dim=8,
        )
    )  # fmt: skip


@pytest.mark.parametrize("build", [Homemade, lambda: nn.Sequential(Homemade()), deepseek])
def test_routing_unknown_here_is_refused_rather_than_ignored(build: Callable[[], nn.Module]):
    model = build()
    for use in (record_routes, lambda m: replay_routes(m, torch.zeros(0, 0, 0, 0).int())):
        with pytest.raises(BadInputError, match="supported are GptOssTopKRouter"), use(model):
            pytest.fail("was let in")
    for act in (freeze_router, router_parameters):
        with pytest.raises(BadInputError, match="supported are GptOssTopKRouter"):
            act(model)


# --- formulas ---------------------------------------------------------------------------------------------------


class Sizes:
    """A configuration that all three routers read."""

    def __init__(self, num_experts: int, top_k: int, *, norm: bool) -> None:
        self.num_experts = self.num_local_experts = num_experts
        self.num_experts_per_tok, self.norm_topk_prob, self.hidden_size = top_k, norm, 8


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from([GptOssTopKRouter, MixtralTopKRouter, Qwen3MoeTopKRouter]))
def test_gates_on_a_routers_own_choice_are_its_gates_bit_for_bit(data: st.DataObject, kind: Any):
    num_experts = data.draw(st.integers(1, 9))
    top_k = data.draw(st.integers(1, num_experts))
    router = kind(Sizes(num_experts, top_k, norm=data.draw(st.booleans())))
    router = router.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    with torch.no_grad():
        router.weight.copy_(
            torch.randn(router.weight.shape, generator=generator) * data.draw(st.sampled_from([0, 1, 9]))
        )
        x = torch.randn(data.draw(st.integers(0, 6)), 8, generator=generator).to(router.weight.dtype)
        logits, gates, experts = router(x)
        found = _GATES[kind.__name__](router, logits, experts)
    assert found.dtype == gates.dtype
    assert torch.equal(found, gates)


def random_routes(seed: int, shape: tuple[int, int, int], top_k: int, num_experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(*shape, num_experts, generator=generator)
    return scores.topk(top_k).indices.to(ROUTES_DTYPE)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_agreement_counts_shared_pairs(seed: int, layers: int, length: int, top_k: int, extra: int):
    num_experts = top_k + extra
    first = random_routes(seed, (layers, 2, length), top_k, num_experts)
    second = random_routes(seed + 1, (layers, 2, length), top_k, num_experts)
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.7
    second[0, 0, 0] = NO_ROUTE
    shared = total = 0
    for layer, row, token in itertools.product(range(layers), range(2), range(length)):
        if mask[row, token] and (layer, row, token) != (0, 0, 0):
            one, two = set(first[layer, row, token].tolist()), set(second[layer, row, token].tolist())
            shared, total = shared + len(one & two), total + top_k
    found = route_agreement(first, second, mask)
    assert found == pytest.approx(shared / total if total else 0.0)
    assert found == route_agreement(second, first, mask)
    assert route_agreement(first, first.flip(-1).long(), mask) == (1.0 if mask.any() else 0.0)


def test_agreement_needs_equal_shapes():
    routes = random_routes(0, (2, 3, 4), 2, 8)
    for other, mask in (
        (routes[:1], torch.ones(3, 4)),
        (routes, torch.ones(4, 3)),
        (routes[..., :1], torch.ones(3, 4)),
    ):
        with pytest.raises(BadInputError, match="want"):
            route_agreement(routes, other, mask)


def test_routes_of_no_layers_are_no_passes():
    assert RecordedRoutes(0).passes == []


# --- what the expert path holds ---------------------------------------------------------------------------------


def tiny_block(hidden: int, intermediate: int, num_experts: int) -> Any:
    """The block of a model loaded to train: router and sorted experts."""
    config = tiny_config(
        vocab_size=8, hidden_size=hidden, num_layers=1, num_experts=num_experts, max_length=64, eos_token_id=7
    )
    config.intermediate_size = intermediate
    model: Any = build_tiny_model(config, seed=0)
    ALL_EXPERTS_FUNCTIONS.register(SORTED_EXPERTS, sorted_experts)
    model.set_experts_implementation(SORTED_EXPERTS)
    return model.model.layers[0].mlp.train()


def storages(tensors: Iterator[Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def saved_bytes(block: Any, x: Tensor) -> int:
    """Bytes of the distinct storages that one pass keeps for backward, without parameters and the input."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out, _ = block(x)
    assert out.requires_grad
    not_ours = storages(iter([*block.parameters(), x]))
    return sum(size for pointer, size in storages(iter(kept)).items() if pointer not in not_ours)


class Peak(TorchDispatchMode):
    """Follows the bytes of all storages made by operators while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in inputs:
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return out


def expert_path_bytes(
    num_tokens: int, hidden: int, intermediate: int, top_k: int, num_experts: int, bytes_per_value: int
) -> int:
    """Return an upper bound, in bytes, on what one layer's router and `sorted_experts` hold at once in a pass.

    Parameters and the layer's input do not count. With P = N * K (token, expert) pairs, H hidden, I intermediate:

    * kept for backward, values: gathered tokens P*H, gate and up before the clamp 2*P*I, clamped gate, its sigmoid,
      up + 1, their gated product's factor and the product 5*P*I, expert outputs P*H, gates 2*P: P * (2H + 7I + 2);
    * alive beside them at the worst moment: weighted and unsorted outputs 2*P*H, the sum N*H, and one
      intermediate of the expert at work N*I: no expert takes a token twice;
    * router: logits N*E and the selected K values per token;
    * int64: chosen experts, their order, the tokens gathered, the way back and a sort's scratch, 6*P, and counts 2*E.

    It grows with K; E enters through the logits alone. A path that runs all experts on all tokens has E in the place
    of K: its hidden states alone are E*N*H (GPT-OSS-20b at a million tokens in bfloat16: 180 GiB a layer).
    """
    pairs = num_tokens * top_k
    kept = pairs * (2 * hidden + 7 * intermediate + 2)
    passing = pairs * 2 * hidden + num_tokens * (hidden + intermediate)
    router = num_tokens * (num_experts + top_k)
    return bytes_per_value * (kept + passing + router) + 8 * (6 * pairs + 2 * num_experts)


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(1, 80),
    hidden=st.sampled_from([32, 64, 96]),
    intermediate=st.sampled_from([32, 64, 160]),
    num_experts=st.sampled_from([2, 4, 8]),
)
def test_a_layer_keeps_and_holds_no_more_than_the_bound(
    num_tokens: int, hidden: int, intermediate: int, num_experts: int
):
    block = tiny_block(hidden, intermediate, num_experts)
    x = torch.randn(1, num_tokens, hidden, generator=torch.Generator().manual_seed(0), requires_grad=True)
    bound = expert_path_bytes(num_tokens, hidden, intermediate, TOP_K, num_experts, 4)
    saved = saved_bytes(block, x)
    assert bound / 2 < saved <= bound  # an upper bound, and not an empty one
    with Peak() as training:
        kept = block(x)
    del kept
    with torch.no_grad(), Peak() as scoring:
        block(x)
    assert saved <= training.bytes <= bound
    assert scoring.bytes < training.bytes


@pytest.mark.parametrize(("hidden", "intermediate"), [(32, 320), (96, 32), (64, 64)])
def test_the_bound_is_close_when_every_token_goes_to_the_same_experts(hidden: int, intermediate: int):
    block = tiny_block(hidden, intermediate, 8)
    with torch.no_grad():
        block.router.bias.copy_(torch.tensor([90.0, 80.0, *[0.0] * 6]))
    x = torch.randn(1, 200, hidden, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with Peak() as peak:
        kept = block(x)
    del kept
    bound = expert_path_bytes(200, hidden, intermediate, TOP_K, 8, 4)
    assert 0.9 * bound < peak.bytes <= bound


def test_a_path_that_runs_every_expert_would_break_the_bound():
    """Negative control: the measurement sees memory that grows with the number of experts."""
    block = tiny_block(64, 64, 8)
    x = torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with Peak() as peak:
        kept = dense_reference(block, x, block.router(x.view(-1, 64))[2].view(1, 50, TOP_K))
    del kept
    assert peak.bytes > expert_path_bytes(50, 64, 64, TOP_K, 8, 4)


def test_the_bound_grows_with_the_experts_visited_and_hardly_with_those_there_are():
    million = 2**20
    sparse = expert_path_bytes(million, 2880, 2880, 4, 32, 2)
    assert sparse < expert_path_bytes(million, 2880, 2880, 4, 128, 2) < 1.01 * sparse
    assert expert_path_bytes(million, 2880, 2880, 32, 32, 2) > 7.5 * sparse
    assert 32 * million * 2880 * 2 == 180 * 2**30


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), num_tokens=st.integers(1, 64), num_experts=st.sampled_from([2, 4, 8]))
def test_the_expert_path_computes_the_same_bits_with_and_without_gradients(
    seed: int, num_tokens: int, num_experts: int
):
    """Two paths chosen by `.training` would make the ratio of the first step differ from one."""
    block = tiny_block(64, 64, num_experts)
    x = torch.randn(1, num_tokens, 64, generator=torch.Generator().manual_seed(seed))
    trained, _ = block.train()(x.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(block.train()(x)[0], trained)
        assert torch.equal(block.eval()(x)[0], trained)


def test_an_engines_routes_are_those_of_the_expert_layers_alone():
    model = mixed_depth_model()
    routes = torch.arange(4, dtype=torch.int16).view(4, 1, 1, 1).expand(4, BATCH, LENGTH, TOP_K)
    found = engine_routes(model, routes)
    assert found is not None
    assert found[:, 0, 0, 0].tolist() == [1, 3]


def test_no_routes_are_none_and_too_few_layers_are_refused():
    model = mixed_depth_model()
    assert engine_routes(model, torch.empty(0, BATCH, LENGTH, 0, dtype=torch.int16)) is None
    assert engine_routes(model, torch.full((4, BATCH, LENGTH, TOP_K), NO_ROUTE, dtype=torch.int16)) is None
    with pytest.raises(BadInputError, match="last expert layer is 3"):
        engine_routes(model, torch.zeros((3, BATCH, LENGTH, TOP_K), dtype=torch.int16))


def mixed_depth_model() -> nn.Module:
    """Four layers, of which the second and the last have experts."""
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        mlp_only_layers=[0, 2], decoder_sparse_step=1,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)
