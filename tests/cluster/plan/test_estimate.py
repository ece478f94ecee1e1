"""The plan: batch algebra that can be checked by hand, sizes of real models, estimates that move the right way."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from cluster.cli.plan import render_plan
from cluster.plan.estimate import RunPlan, StagePlan, plan_run
from cluster.plan.memory import (
    GIB,
    PARTS,
    MemoryModel,
    ModelShape,
    adapter_params,
    shape_of,
    tiny_shape,
    value_head_params,
    zero_stage,
)
from cluster.plan.placement import place
from cluster.spec.sections import ModelSection
from cluster.spec.spec import WorkflowSpec, load_spec, override

ROOT = Path(__file__).resolve().parents[3]

GPT_OSS_20B = "model.path=openai/gpt-oss-20b"
ON_GPU = ["cluster.gpus_per_learner=1", "cluster.gpus_per_rollout_worker=1"]


def spec_with(*settings: str) -> WorkflowSpec:
    return override(load_spec("support_desk"), list(settings))


def stage(plan: RunPlan, name: str) -> StagePlan:
    return next(item for item in plan.stages if item.stage == name)


def test_batch_algebra():
    settings = [
        "ppo.tasks_per_step=6",
        "ppo.rollouts_per_task=4",
        "ppo.minibatches=3",
        "ppo.epochs=2",
        "ppo.num_steps=10",
    ]
    batch = plan_run(spec_with(*settings, "ppo.num_learners=2")).batch
    assert batch.rollouts_per_step == 24
    assert batch.rollouts_per_minibatch == 8
    assert batch.rollouts_per_learner == 4
    assert batch.optimizer_steps_per_step == 6
    assert batch.optimizer_steps == 60
    assert batch.trained_tokens_per_step % 24 == 0
    assert batch.sampled_tokens_per_step < batch.trained_tokens_per_step


def test_minibatches_that_do_not_divide_are_rounded_up():
    batch = plan_run(spec_with("ppo.tasks_per_step=5", "ppo.rollouts_per_task=1", "ppo.minibatches=3")).batch
    assert (batch.rollouts_per_step, batch.rollouts_per_minibatch) == (5, 2)


def test_gpt_oss_20b_has_its_published_size():
    # The model card says 20.9 B parameters in all and 3.6 B active; it does not count the input embedding (0.58 B).
    shape = shape_of(ModelSection(path="openai/gpt-oss-20b"))
    assert shape.params == pytest.approx(20.9e9, rel=0.01)
    assert shape.active_params - shape.vocab_size * shape.hidden_size == pytest.approx(3.6e9, rel=0.01)


@pytest.mark.parametrize(
    ("hidden", "layers", "experts", "vocab"), [(128, 4, 4, 2048), (64, 2, 8, 512), (32, 1, 2, 300)]
)
def test_the_tiny_shape_counts_what_transformers_builds(hidden: int, layers: int, experts: int, vocab: int):
    import torch
    from transformers import GptOssForCausalLM

    from rl_actors.models.loading import tiny_config

    model = ModelSection(hidden_size=hidden, num_layers=layers, num_experts=experts, vocab_size=vocab)
    config = tiny_config(
        vocab_size=vocab, hidden_size=hidden, num_layers=layers, num_experts=experts, max_length=128, eos_token_id=1
    )
    with torch.device("meta"):
        built = GptOssForCausalLM(config)
    assert tiny_shape(model).params == built.num_parameters()


def test_a_directory_is_read(tmp_path):
    config = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 1000,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = shape_of(ModelSection(path=str(tmp_path)))
    assert (shape.num_kv_heads, shape.head_dim, shape.num_experts) == (4, 16, 1)
    assert shape.params == shape.active_params
    assert shape.kv_bytes_per_token(2) == 2 * 2 * 4 * 16 * 2


def test_a_dense_model_is_all_active_and_a_sparse_one_is_not():
    shape = tiny_shape(ModelSection())
    assert shape.active_params < shape.params
    dense = ModelShape(**{name: getattr(shape, name) for name in ModelShape.__slots__} | {"num_experts": 1})
    assert dense.active_params == dense.params


def test_the_default_run_fits_the_promise():
    plan = plan_run(spec_with())
    assert plan.device == "cpu"
    assert 1e6 < plan.params < 2e6
    assert plan.peak_memory_bytes <= 12 * GIB
    assert [item.stage for item in plan.stages] == ["snapshot", "sft", "reward_model", "ppo", "offline_eval", "canary"]
    assert plan.total_minutes == pytest.approx(sum(item.minutes for item in plan.stages))


def test_memory_of_a_large_model_names_its_parts():
    memory = stage(plan_run(spec_with(GPT_OSS_20B, *ON_GPU)), "ppo").memory_bytes
    params = shape_of(ModelSection(path="openai/gpt-oss-20b")).params
    assert memory["weights"] == memory["reference"] == memory["engine_weights"] == memory["gradients"] == 2 * params
    assert memory["optimizer"] == 12 * params, "two moments and a master copy in float32"
    assert memory["reward_model"] == 4 * (params - 201088 * 2880), "float32, without its language head"
    assert memory["critic"] == 16 * value_head_params(2880), "a head on the policy, not a second model"
    assert all(memory[part] > 0 for part in PARTS)


def test_every_part_of_every_stage_has_a_row():
    for item in plan_run(spec_with()).stages:
        assert set(item.memory_bytes) <= set(PARTS), item.stage
        assert item.total_memory_bytes == sum(item.memory_bytes[part] for part in PARTS if part in item.memory_bytes)


@pytest.mark.parametrize(
    ("setting", "name", "part"),
    [
        ("ppo.num_learners=4", "ppo", "reference"),
        ("ppo.num_rollout_workers=2", "ppo", "engine_weights"),
        ("model.max_length=4096", "ppo", "attention"),
        ("model.max_length=8192", "ppo", "kv_cache"),
        ("model.vocab_size=4000", "ppo", "logits"),
        ("sft.batch_tokens=100000", "sft", "experts"),
        ("sft.batch_tokens=100000", "sft", "logits"),
        ("model.num_layers=8", "sft", "optimizer"),
    ],
)
def test_more_needs_more_memory(setting: str, name: str, part: str):
    small, large = plan_run(spec_with()), plan_run(spec_with(setting))
    assert stage(large, name).memory_bytes[part] > stage(small, name).memory_bytes[part]


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("ppo.num_steps=80", "ppo"),
        ("sft.epochs=9", "sft"),
        ("data.num_held_out=4000", "offline_eval"),
        ("reward.num_pairs=9000", "reward_model"),
        ("data.num_live=6000", "canary"),
        ("data.num_train=90000", "snapshot"),
    ],
)
def test_more_work_takes_longer(setting: str, name: str):
    small, large = plan_run(spec_with()), plan_run(spec_with(setting))
    assert stage(large, name).minutes > stage(small, name).minutes
    assert stage(large, name).tokens > stage(small, name).tokens


def test_a_release_is_bounded_by_its_own_limit():
    plan = plan_run(spec_with("data.num_live=1000000", "release.max_minutes=3"))
    assert stage(plan, "canary").minutes <= 3.5


def test_a_plan_is_json_and_a_table():
    plan = plan_run(spec_with())
    data = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert data["peak_memory_bytes"] == plan.peak_memory_bytes
    assert data["batch"]["rollouts_per_step"] == plan.batch.rollouts_per_step
    assert {item["stage"] for item in data["stages"]} == {item.stage for item in plan.stages}
    screen = io.StringIO()
    Console(file=screen, width=120).print(render_plan(plan))
    assert "rollouts per step" in screen.getvalue()
    assert "offline eval" in screen.getvalue()
    for part in ("weights", "gradients", "optimizer", "activations", "KV cache", "reference", "critic", "reward model"):
        assert part in screen.getvalue()
    assert f"{plan.params:,}" in screen.getvalue()


def test_sizes_by_hand():
    shape = ModelShape(
        hidden_size=4,
        intermediate_size=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=3,
        num_experts=2,
        active_experts=1,
        vocab_size=10,
    )
    attention = 4 * 6 + 6 + 2 * (4 * 3 + 3) + 6 * 4 + 4 + 2  # query, key and value, output, sinks
    expert = 4 * 16 + 16 + 8 * 4 + 4  # gate and up with bias, down with bias
    router = 4 * 2 + 2
    assert shape.params == 2 * 10 * 4 + 2 * (attention + router + 2 * expert + 8) + 4
    assert shape.params - shape.active_params == 2 * expert
    assert shape.kv_bytes_per_token(4) == 2 * 2 * 3 * 4


def test_every_rank_of_a_small_model_holds_all_of_it():
    one, four = (stage(plan_run(spec_with(f"ppo.num_learners={n}")), "sft").memory_bytes for n in (1, 4))
    assert {name: four[name] / one[name] for name in one} == dict.fromkeys(one, 4.0)


@pytest.mark.parametrize(
    ("layers", "stage_of_zero", "weights", "optimizer"), [(1, 0, 2, 2), (30, 2, 2, 1), (400, 3, 1, 1)]
)
def test_ranks_of_a_larger_model_share_what_zero_shards(layers: int, stage_of_zero: int, weights: int, optimizer: int):
    """Times one rank's bytes, over two ranks: ZeRO 2 shards gradients and optimizer, ZeRO 3 the weights too."""
    settings = ["model.hidden_size=2048", "model.num_experts=2", f"model.num_layers={layers}", "ppo.minibatches=1"]
    one, two = (plan_run(spec_with(*settings, f"ppo.num_learners={n}")) for n in (1, 2))
    assert zero_stage(two.params, 2) == stage_of_zero
    before, after = stage(one, "ppo").memory_bytes, stage(two, "ppo").memory_bytes
    assert after["weights"] == weights * before["weights"]
    assert after["optimizer"] == optimizer * before["optimizer"]
    assert after["gradients"] == optimizer * before["gradients"]
    assert after["reference"] == 2 * before["reference"], "whole on every rank"


def test_microbatches_bound_activations_whatever_the_batch():
    few, many = (stage(plan_run(spec_with(f"ppo.tasks_per_step={n}")), "ppo").memory_bytes for n in (24, 240))
    assert few["attention"] == many["attention"]
    tiny = plan_run(spec_with("ppo.tasks_per_step=1", "ppo.minibatches=4"))
    assert stage(tiny, "ppo").memory_bytes["attention"] < few["attention"], "one rollout fills no microbatch"


def test_activations_and_logits_by_hand():
    spec = spec_with("model.hidden_size=64", "model.num_layers=3", "sft.batch_tokens=1000")
    memory = MemoryModel(spec=spec, shape=tiny_shape(spec.model)).sft()
    attention = 4 * 64 + 2 * 64 + 2 * 32  # norms and projections; two query heads of 32, one of keys and values
    experts = 2 * 64 + 4 + 2 * (3 * 64 + 64)  # norm and output, router, two experts visited
    assert memory["attention"] == 1000 * 3 * attention * 4
    assert memory["experts"] == 1000 * 3 * experts * 4
    assert memory["logits"] == 1000 * 900 * (4 + 4 + 4)


def test_eager_attention_on_gpu_keeps_its_scores():
    cpu, gpu = (plan_run(spec_with(*settings)) for settings in ([], ON_GPU))
    without = stage(cpu, "sft").memory_bytes["attention"] // 2  # bfloat16
    scores = 2 * 4 * 1024 * 2048 * 4 * 2  # scores and probabilities, 4 heads, row of 1024, tokens, layers, bytes
    assert stage(gpu, "sft").memory_bytes["attention"] == without + scores


def test_logits_of_a_large_vocabulary_exist_a_chunk_at_a_time():
    memory = stage(plan_run(spec_with(GPT_OSS_20B, *ON_GPU)), "ppo").memory_bytes
    assert memory["logits"] == 12 * (1 << 27)
    assert memory["logits"] < 2048 * 201088 * 12


def test_adapters_train_few_parameters_and_need_no_reference():
    settings = [GPT_OSS_20B, *ON_GPU]
    full, lora = (stage(plan_run(spec_with(*settings, *more)), "ppo") for more in ([], ["ppo.recipe.lora_rank=8"]))
    shape = shape_of(ModelSection(path="openai/gpt-oss-20b"))
    adapters = 8 * 24 * (2 * (2880 + 4096) + 2 * (2880 + 512))  # rank, layers, q and o, k and v; no experts
    assert adapter_params(shape, 8) == adapters
    assert lora.memory_bytes["reference"] == 0
    assert lora.memory_bytes["gradients"] == 2 * adapters
    assert lora.memory_bytes["optimizer"] == 12 * adapters
    assert lora.memory_bytes["weights"] == full.memory_bytes["weights"] + 2 * adapters


def test_adapters_of_a_dense_model_are_on_its_mlp_too():
    shape = tiny_shape(ModelSection())
    dense = ModelShape(**{name: getattr(shape, name) for name in ModelShape.__slots__} | {"num_experts": 1})
    assert adapter_params(dense, 2) - adapter_params(shape, 2) == 2 * 4 * 3 * (128 + 128)


def test_a_recipe_without_a_critic_has_no_memory_for_one():
    assert "critic" in stage(plan_run(spec_with()), "ppo").memory_bytes
    assert "critic" not in stage(plan_run(spec_with("workflow.policy_training=rloo")), "ppo").memory_bytes


def test_the_value_head_is_counted_as_it_is_built():
    import torch

    from rl_actors.models.attachments import PolicyWithValue

    head = PolicyWithValue(torch.nn.Identity(), 64).value_head
    assert value_head_params(64) == sum(parameter.numel() for parameter in head.parameters())


def test_an_epoch_is_a_training_pass_and_the_looks_are_another():
    """Old policy, reference and reward model look at each rollout token once: three forwards, one training pass."""
    one, three = (stage(plan_run(spec_with(f"ppo.epochs={n}")), "ppo").minutes for n in (1, 3))
    plan = plan_run(spec_with())
    pass_minutes = plan.batch.trained_tokens_per_step * 25 * plan.active_params / 1.2e10 / 60
    assert three - one == pytest.approx(2 * pass_minutes)
    sampled = plan.batch.sampled_tokens_per_step * 25 / 8e3 / 60
    assert one == pytest.approx(2 * 13 / 60 + sampled + 2 * pass_minutes)


def test_steps_of_each_training_stage_by_hand():
    plan = plan_run(spec_with("data.num_train=1000", "sft.epochs=2", "sft.batch_tokens=4100", "reward.num_pairs=320"))
    assert stage(plan, "sft").optimizer_steps == 1000 * 410 * 2 // 4100
    assert stage(plan, "reward_model").optimizer_steps == 2 * (176 // 32), "55 % of the pairs, by 32, in two epochs"
    assert stage(plan, "ppo").optimizer_steps == plan.batch.optimizer_steps
    assert stage(plan, "canary").optimizer_steps == 0


def test_pinned_versions_cost_no_training():
    baseline, reward = "workflow.baseline=sft_v1-1a2b3c4d", "workflow.reward_model=rm_v1-77ab01cd"
    plain, both = plan_run(spec_with()), plan_run(spec_with(baseline, reward))
    for name in ("sft", "reward_model"):
        pinned = stage(both, name)
        assert (pinned.tokens, pinned.optimizer_steps, pinned.minutes, pinned.total_memory_bytes) == (0, 0, 0.0, 0)
        assert stage(plain, name).minutes > 0
    saved = stage(plain, "sft").minutes + stage(plain, "reward_model").minutes
    assert both.total_minutes == pytest.approx(plain.total_minutes - saved)
    sampled = stage(plan_run(spec_with(reward)), "reward_model")
    assert (sampled.optimizer_steps, stage(plan_run(spec_with(reward)), "sft")) == (0, stage(plain, "sft"))
    assert 0 < sampled.minutes < stage(plain, "reward_model").minutes
    assert stage(plan_run(spec_with(baseline)), "reward_model") == stage(plain, "reward_model")


def test_learners_take_sft_batches_of_their_own():
    one, two = (stage(plan_run(spec_with(f"ppo.num_learners={n}")), "sft").optimizer_steps for n in (1, 2))
    assert two == (one + 1) // 2


def test_the_ramp_needs_its_canary_runs_at_each_share():
    spec = spec_with("release.ramp=[5, 20, 99]", "release.min_canary_requests=30")
    assert plan_run(spec).tickets_needed == 600 + 150 + 31


@pytest.mark.parametrize(("num_live", "warns"), [(1299, True), (1300, False)])
def test_too_few_tickets_are_said(num_live: int, warns: bool):
    screen = io.StringIO()
    Console(file=screen, width=120).print(render_plan(plan_run(spec_with(f"data.num_live={num_live}"))))
    assert ("no candidate can be promoted" in screen.getvalue()) == warns


def test_more_learners_train_faster_and_more_cpu_engines_do_not_generate_faster():
    one, two = plan_run(spec_with()), plan_run(spec_with("ppo.num_learners=2"))
    assert stage(two, "sft").minutes < stage(one, "sft").minutes
    engines = plan_run(spec_with("ppo.num_rollout_workers=2"))
    assert stage(engines, "ppo").minutes == pytest.approx(stage(one, "ppo").minutes), "they share the cores"
    gpu = [plan_run(spec_with(GPT_OSS_20B, *ON_GPU, f"ppo.num_rollout_workers={n}")) for n in (1, 2)]
    assert stage(gpu[1], "ppo").minutes < stage(gpu[0], "ppo").minutes


@pytest.mark.parametrize("settings", [[], ON_GPU, [GPT_OSS_20B, *ON_GPU, "ppo.num_learners=8"]])
def test_a_plan_reserves_what_placement_does(settings: list[str]):
    spec = spec_with(*settings)
    placement = place(spec)
    for name in ("sft", "reward_model", "ppo", "offline_eval", "canary"):
        planned = stage(plan_run(spec), name)
        assert {"CPU": planned.cpus, "GPU": planned.gpus} == placement.demand(name)
