"""The plan: batch algebra that can be checked by hand, sizes of real models, estimates that move the right way."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from cluster.model_shape import ModelShape, shape_of, tiny_shape
from cluster.placement import place
from cluster.planning import GIB, Plan, plan_run, render_plan
from cluster.spec import ModelSection, WorkflowSpec, load_spec, override

GPT_OSS_20B = "model.path=openai/gpt-oss-20b"
ON_GPU = ["cluster.gpus_per_learner=1", "cluster.gpus_per_rollout_worker=1"]


def spec_with(*settings: str) -> WorkflowSpec:
    return override(load_spec("support_desk"), list(settings))


def stage(plan: Plan, name: str):
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

    from rl_actors.models.tiny_gpt_oss import count_parameters, tiny_config

    model = ModelSection(hidden_size=hidden, num_layers=layers, num_experts=experts, vocab_size=vocab)
    config = tiny_config(
        vocab_size=vocab, hidden_size=hidden, num_layers=layers, num_experts=experts, max_length=128, eos_token_id=1
    )
    with torch.device("meta"):
        built = GptOssForCausalLM(config)
    assert tiny_shape(model).params == count_parameters(built)


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
    assert memory["params"] == memory["reference"] == memory["grads"] == 2 * params
    assert memory["optimizer"] == 12 * params, "two moments and a master copy in float32"
    assert memory["kv_cache"] > 0


@pytest.mark.parametrize(
    ("setting", "name", "part"),
    [
        ("ppo.num_learners=4", "ppo", "reference"),
        ("ppo.num_rollout_workers=2", "ppo", "engine_params"),
        ("ppo.tasks_per_step=48", "ppo", "activations"),
        ("sft.batch_tokens=100000", "sft", "activations"),
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
        ("data.num_live=3000", "canary"),
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
    assert "offline_eval" in screen.getvalue()
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


def test_ranks_share_gradients_and_optimizer_but_not_weights():
    one, four = (stage(plan_run(spec_with(f"ppo.num_learners={n}")), "sft").memory_bytes for n in (1, 4))
    assert four["params"] == 4 * one["params"]
    assert (four["grads"], four["optimizer"]) == (one["grads"], one["optimizer"])
    assert four["processes"] == pytest.approx(4 * one["processes"], abs=4)
    assert four["activations"] == pytest.approx(one["activations"], rel=0.01)


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
