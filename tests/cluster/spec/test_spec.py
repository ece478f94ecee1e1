"""The spec: the article's block is valid as printed, everything else that is wrong is named with its remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.cli.runs import RunRequest, open_run
from cluster.records import RunFolder
from cluster.spec.errors import leaf_paths, parse_yaml
from cluster.spec.sections import MONITORS
from cluster.spec.spec import WorkflowSpec, load_spec, override, parse_spec, spec_to_yaml
from cluster.workflows import PATH_VARIABLE, known_workflows
from rl_actors.contracts.errors import BadInputError, nearest
from serving.contracts.gates import ARTICLE_GATES
from serving.gates import registry as gates

ARTICLE = """\
workflow:
  target: "one high-volume, multi-step support or ops task"
  baseline: "sft_checkpoint_v1"
  reward_model: "rm_v1"
  policy_training: "ppo_kl"
release:
  canary_traffic_percent: 5
  gates:
    - no_safety_regression
    - latency_delta_lt_15_percent
    - cost_per_success_not_worse
    - rollback_under_5_minutes
monitoring:
  - human_override_rate
  - tool_error_rate
  - policy_kl_drift
  - task_completion_quality
"""


def refusal(text: str) -> BadInputError:
    with pytest.raises(BadInputError) as caught:
        parse_spec(text)
    return caught.value


def changed(old: str, new: str) -> str:
    assert old in ARTICLE
    return ARTICLE.replace(old, new, 1)


def with_section(section: str) -> str:
    return ARTICLE + section + "\n"


def test_the_articles_block_is_valid_verbatim_and_gets_every_default():
    spec = parse_spec(ARTICLE)
    assert spec.workflow.name == "support_desk"
    assert spec.workflow.baseline == "sft_checkpoint_v1"
    assert spec.release.canary_traffic_percent == 5
    assert spec.release.gates == ARTICLE_GATES
    assert spec.release.ramp == (5, 25, 50)
    assert spec.monitoring == MONITORS
    assert spec.data.num_held_out == 400
    assert spec.charter.constraints
    assert spec.charter.rollback_path
    assert spec.ppo.attestation_tolerance == 0.01
    assert spec.model.path == ""


def test_every_value_of_a_spec_is_a_knob_once():
    knobs = leaf_paths(WorkflowSpec)
    assert len(knobs) == len(set(knobs)) > 17
    named = {"workflow.baseline", "release.ramp", "ppo.kl_coef", "seed", "monitoring"}
    assert named | {"reward.epochs", "reward.learning_rate"} <= set(knobs)


def test_the_reward_models_training_is_set_by_knobs_whose_defaults_are_what_they_were_as_constants():
    for spec in (parse_spec(ARTICLE), load_spec("support_desk")):
        assert (spec.reward.epochs, spec.reward.learning_rate) == (2, 1e-3)
    changed = override(load_spec("support_desk"), ["reward.epochs=3", "reward.learning_rate=2e-3"])
    assert (changed.reward.epochs, changed.reward.learning_rate) == (3, 2e-3)


@pytest.mark.parametrize("reward", [{"epochs": 2, "learning_rate": 1e-3}, {"epochs": 5, "learning_rate": 1e-4}, {}])
def test_a_run_recorded_while_they_were_knobs_or_constants_resumes(tmp_path: Path, reward: dict[str, float]):
    tree = load_spec("support_desk").model_dump(mode="json")
    kept = {key: value for key, value in tree["reward"].items() if key not in {"epochs", "learning_rate"}}
    folder = RunFolder.of(tmp_path, "support_desk-1")
    folder.spec.parent.mkdir(parents=True)
    folder.spec.write_text(json.dumps(tree | {"reward": kept | reward}))
    spec, found = open_run(RunRequest(resume="support_desk-1"), tmp_path)
    assert found == folder
    assert (spec.reward.epochs, spec.reward.learning_rate) == (
        reward.get("epochs", 2),
        reward.get("learning_rate", 1e-3),
    )


def test_more_gates_than_the_articles_are_allowed_and_fewer_are_not():
    more = [*ARTICLE_GATES, "task_success_not_worse"]
    assert override(parse_spec(ARTICLE), [f"release.gates={more}"]).release.gates == tuple(more)
    for gate in ARTICLE_GATES:
        with pytest.raises(BadInputError, match=f"needs the article's four gates; add {gate}"):
            override(parse_spec(ARTICLE), [f"release.gates={[name for name in more if name != gate]}"])


def test_a_registered_gate_may_be_named_and_the_packaged_spec_stays_valid(monkeypatch: pytest.MonkeyPatch):
    """README's recipe "add a gate": a function and its registration; no second list has to know the name."""
    own = parse_yaml(with_section(""), "x").tree["release"]["gates"] + ["replies_not_longer"]
    packaged = load_spec("support_desk")
    with pytest.raises(BadInputError, match="unknown name") as caught:
        override(packaged, [f"release.gates={own}"])
    assert (caught.value.field, caught.value.value, caught.value.exit_code) == (
        "release.gates.4", "replies_not_longer", 2
    )  # fmt: skip
    monkeypatch.setitem(gates.GATES, "replies_not_longer", gates.GATES["task_success_not_worse"])
    assert load_spec("support_desk") == packaged
    assert override(packaged, [f"release.gates={own}"]).release.gates == (*ARTICLE_GATES, "replies_not_longer")
    assert "did you mean 'replies_not_longer'?" in refusal(changed("no_safety_regression", "reply_not_longer")).remedy


@pytest.mark.parametrize("name", known_workflows({}))
def test_every_packaged_spec_parses(name: str):
    assert load_spec(name).workflow.name == name


def test_a_spec_is_found_by_file_folder_and_name(tmp_path: Path):
    (tmp_path / "spec.yaml").write_text(ARTICLE)
    assert load_spec(tmp_path) == load_spec(tmp_path / "spec.yaml") == parse_spec(ARTICLE)
    assert load_spec("support_desk").release == parse_spec(ARTICLE).release


def test_a_resolved_spec_reads_back_equal():
    spec = override(parse_spec(ARTICLE), ["ppo.learning_rate=1e-4"])
    assert parse_spec(spec_to_yaml(spec)) == spec
    assert WorkflowSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize("knob", ["baseline", "reward_model"])
def test_a_version_is_named_to_be_trained_or_with_its_hash(knob: str):
    longest = "a" * 80
    for name in ("v1", "v1-1a2b3c4d", longest, f"{longest}-1a2b3c4d"):
        assert getattr(override(load_spec("support_desk"), [f"workflow.{knob}={name}"]).workflow, knob) == name
    for name in (f"{longest}b", f"{longest}-1a2b3c4", f"{longest}-1A2B3C4D"):
        with pytest.raises(BadInputError, match="at most 80"):
            override(load_spec("support_desk"), [f"workflow.{knob}={name}"])


def test_a_spec_cannot_be_changed():
    spec = parse_spec(ARTICLE)
    with pytest.raises(ValidationError, match="frozen"):
        spec.ppo.num_steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("old", "new", "field", "remedy", "line"),
    [
        ("no_safety_regression", "no_safety_regresion", "release.gates.0", "'no_safety_regression'", 9),
        ("rollback_under_5_minutes", "rollback_under_5_min", "release.gates.3", "'rollback_under_5_minutes'", 12),
        ("policy_kl_drift", "kl_drift", "monitoring.2", "'policy_kl_drift'", 16),
        ("ppo_kl", "ppo_k", "workflow.policy_training", "'ppo_kl'", 5),
        (
            "canary_traffic_percent",
            "canary_trafic_percent",
            "release.canary_trafic_percent",
            "canary_traffic_percent",
            7,
        ),
        ("  baseline", "  base_line", "workflow.base_line", "'workflow.baseline'", 3),
        ("percent: 5", "percent: 101", "release.canary_traffic_percent", "less than or equal to 99", 7),
        ("percent: 5", "percent: 0", "release.canary_traffic_percent", "greater than 0", 7),
        ("percent: 5", 'percent: "5"', "release.canary_traffic_percent", "valid number", 7),
        ("percent: 5", "percent: .nan", "release.canary_traffic_percent", "finite", 7),
        ('"sft_checkpoint_v1"', '""', "workflow.baseline", "must not be empty", 3),
        ('"sft_checkpoint_v1"', "", "workflow.baseline", "must not be empty", 3),
        ('"sft_checkpoint_v1"', "[a]", "workflow.baseline", "valid string", 3),
        ('  baseline: "sft_checkpoint_v1"\n', "", "workflow.baseline", "required key is missing", 1),
        ("    - no_safety_regression\n", "", "release.gates", "add no_safety_regression", 8),
        ("- tool_error_rate", "- human_override_rate", "monitoring", "given twice", 13),
        ("workflow:\n", "workflow:\n  name: support_dsk\n", "workflow.name", "'support_desk'", 2),
        ("release:\n", "release:\n  ramp: [5, 50, 25]\n", "release.ramp", "increase", 7),
        ("release:\n", "release:\n  ramp: [5, 5]\n", "release.ramp", "increase", 7),
        ("release:\n", "release:\n  ramp: [10, 50]\n", "release.ramp", "start at canary_traffic_percent = 5", 7),
        ("release:\n", "release:\n  ramp: [5, 150]\n", "release.ramp", "at most 99", 7),
        ("release:\n", "release:\n  ramp: [5, 100]\n", "release.ramp", "the promotion itself is the step to 100", 7),
        ("release:\n", "release:\n  ramp: [5, 99.5]\n", "release.ramp", "at most 99", 7),
        ("release:\n", "release:\n  ramp: []\n", "release.ramp", "start at", 7),
    ],
)
def test_a_wrong_value_is_named_with_line_and_remedy(old: str, new: str, field: str, remedy: str, line: int):
    error = refusal(changed(old, new))
    assert error.field == field
    assert remedy in error.remedy
    assert f"(line {line} of spec.yaml)" in error.remedy
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("section", "field", "value", "remedy"),
    [
        ("ppo: {num_steps: yes}", "ppo.num_steps", True, "valid integer"),
        ("ppo: {num_steps: ten}", "ppo.num_steps", "ten", "valid integer"),
        ("ppo: {num_step: 2}", "ppo.num_step", 2, "'ppo.num_steps'"),
        ("ppo: {kl_coef: 0}", "ppo.kl_coef", 0, "greater than 0"),
        ("ppo: {tasks_per_step: 1, rollouts_per_task: 2}", "ppo.minibatches", 4, "cannot exceed"),
        ("ppo: 3", "ppo", 3, "mapping"),
        ("num_steps: 3", "num_steps", 3, "'ppo.num_steps'"),
        ("data: {num_held_out: 0}", "data.num_held_out", 0, "greater than or equal to 1"),
        ("model: {hidden_size: 100}", "model.hidden_size", 100, "multiple of 32"),
        ("cluster: {gpus_per_rollout_worker: 1.5}", "cluster.gpus_per_rollout_worker", 1.5, "whole"),
        ("cluster: {serve_port: 70000}", "cluster.serve_port", 70000, "65535"),
        ("zebra: 1", "zebra", 1, "valid in a spec: workflow, release"),
        ("reward: {epochs: 0}", "reward.epochs", 0, "greater than or equal to 1"),
        ("reward: {learning_rate: 0}", "reward.learning_rate", 0, "greater than 0"),
        ("reward: {learning_rate: 1.5}", "reward.learning_rate", 1.5, "less than or equal to 1"),
        ("reward: {max_length: 2}", "reward.max_length", 2, "did you mean 'model.max_length'?"),
    ],
)
def test_a_wrong_knob_shows_its_value(section: str, field: str, value: object, remedy: str):
    error = refusal(with_section(section))
    assert (error.field, error.value) == (field, value)
    assert remedy in error.remedy


def test_other_problems_are_named_too():
    error = refusal(with_section("ppo: {num_steps: 0}\nsft: {epochs: 0}"))
    assert error.field == "ppo.num_steps"
    assert "also wrong: sft.epochs" in error.remedy


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("", "must be a YAML mapping"),
        ("- a\n- b", "must be a YAML mapping"),
        (changed("release:", "release"), "line 7 of spec.yaml"),
        ("a: [1, 2", "not valid YAML at line 1"),
        ("a: !!python/object:os.system 1", "not valid YAML"),
        ("a: &x [*x]", "may not contain itself"),
        (ARTICLE + "release:\n  gates: []\n", "keep one of lines 6 and 18"),
        ("# " + "x" * 1_000_001, "a spec is a page"),
    ],
)
def test_bad_yaml_is_refused(text: str, remedy: str):
    assert remedy in str(refusal(text))


def test_a_duplicate_key_names_its_path():
    error = refusal(changed('  reward_model: "rm_v1"\n', '  reward_model: "rm_v1"\n  reward_model: "rm_v2"\n'))
    assert error.field == "workflow.reward_model"


def test_an_unknown_spec_is_refused_with_the_nearest_name():
    with pytest.raises(BadInputError, match="did you mean 'support_desk'"):
        load_spec("suport_desk")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path):
    path = tmp_path / "spec.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInputError, match="UTF-8"):
        load_spec(path)


def test_numbers_in_scientific_notation_are_numbers():
    tree = parse_yaml("a: 1e-4\nb: 3\nc: 1.5\nd: 1_000\ne: v1e4\nf: 2026-11-22x", "x").tree
    assert tree == {"a": 1e-4, "b": 3, "c": 1.5, "d": 1000, "e": "v1e4", "f": "2026-11-22x"}


def test_override_sets_and_checks_again():
    spec = override(parse_spec(ARTICLE), ["ppo.num_steps=2", "release.ramp=[5, 50]", "seed=7", "model.path=a/b"])
    assert (spec.ppo.num_steps, spec.release.ramp, spec.seed, spec.model.path) == (2, (5, 50), 7, "a/b")


def test_overriding_the_share_moves_a_ramp_nobody_set():
    assert override(parse_spec(ARTICLE), ["release.canary_traffic_percent=30"]).release.ramp == (30, 50)
    assert override(parse_spec(ARTICLE), ["release.canary_traffic_percent=99"]).release.ramp == (99,)
    with pytest.raises(BadInputError, match="start at"):
        override(load_spec("support_desk"), ["release.canary_traffic_percent=30"])


@pytest.mark.parametrize("algorithm", ["ppo_kl", "grpo", "dr_grpo", "rloo", "gspo", "cispo", "dapo"])
def test_an_algorithm_is_chosen_by_its_name(algorithm: str):
    spec = override(parse_spec(ARTICLE), [f"workflow.policy_training={algorithm}"])
    assert spec.workflow.policy_training == algorithm


def test_a_group_algorithm_needs_groups():
    single = ["ppo.rollouts_per_task=1", "workflow.policy_training=grpo"]
    with pytest.raises(BadInputError, match="take 2 or more") as caught:
        override(parse_spec(ARTICLE), single)
    assert caught.value.field == "ppo.rollouts_per_task"
    assert override(parse_spec(ARTICLE), single[:1]).ppo.rollouts_per_task == 1, "negative control: PPO has a critic"


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ("ppo.num_steps", "key=value"),
        ("=3", "key=value"),
        ("ppo.num_stepz=3", "'ppo.num_steps'"),
        ("seed.x=3", "seed is a value"),
        ("ppo.num_steps=[", "not valid YAML"),
        ("ppo=3", "mapping"),
        ("workflow.baseline=my checkpoint", "response headers"),
        ("workflow.reward_model=../rm", "response headers"),
        (f"workflow.reward_model={'r' * 81}", "at most 80"),
    ],
)
def test_a_bad_override_is_refused(setting: str, remedy: str):
    with pytest.raises(BadInputError, match=re.escape(remedy)):
        override(override(parse_spec(ARTICLE), ["seed=1"]), [setting])


def test_derived_values():
    spec = parse_spec(with_section("ppo: {clip: 0.3, outcome_weight: 0.75}\ncluster: {gpus_per_learner: 0.5}"))
    assert (spec.ppo.clip, spec.ppo.outcome_weight) == (0.3, 0.75)
    assert spec.ppo.rollouts_per_step == spec.ppo.tasks_per_step * spec.ppo.rollouts_per_task
    assert (spec.cluster.uses_gpu, spec.cluster.dtype) == (True, "bfloat16")
    assert parse_spec(ARTICLE).cluster.dtype == "float32"
    assert spec.agent.max_turns > spec.agent.tool_calls
    assert spec.num_tasks["held_out"] == spec.data.num_held_out
    assert set(spec.num_tasks) == {"train", "calibration", "held_out", "frozen", "adversarial", "live"}


def test_nearest_is_silent_when_nothing_is_near():
    assert nearest("Baseline", ["baseline", "target"]) == "baseline"
    assert nearest("xyzzy", ["baseline", "target"]) == ""


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 10_000),
    st.floats(1e-9, 1.0),
    st.lists(st.integers(6, 99), max_size=4, unique=True).map(sorted),
    st.permutations(MONITORS),
)
def test_every_accepted_spec_survives_yaml_and_json(steps: int, rate: float, shares: list[int], monitors: list[str]):
    settings_given = [
        f"ppo.num_steps={steps}",
        f"ppo.learning_rate={rate!r}",
        f"release.ramp={[5, *shares]}",
        f"monitoring=[{', '.join(monitors)}]",
    ]
    spec = override(parse_spec(ARTICLE), settings_given)
    assert (spec.ppo.num_steps, spec.ppo.learning_rate, spec.release.ramp) == (steps, rate, (5, *shares))
    assert spec.monitoring == tuple(monitors)
    assert parse_spec(spec_to_yaml(spec)) == spec == WorkflowSpec.model_validate_json(spec.model_dump_json())


def test_a_new_workflow_is_a_new_folder_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = changed("workflow:\n", "workflow:\n  name: ops_desk\n")
    assert refusal(text).field == "workflow.name"
    (tmp_path / "ops_desk").mkdir()
    for file in ("__init__.py", "tools.py"):
        (tmp_path / "ops_desk" / file).write_text("")
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path))
    assert parse_spec(text).workflow.name == "ops_desk"
    with pytest.raises(BadInputError, match=r"brings no spec; write .*ops_desk/spec\.yaml"):
        load_spec("ops_desk")
    (tmp_path / "ops_desk" / "spec.yaml").write_text(text)
    assert load_spec("ops_desk").workflow.name == "ops_desk"
    with pytest.raises(BadInputError, match=f"did you mean 'ops_desk'.*{PATH_VARIABLE}"):
        load_spec("opsdesk")


def test_a_folder_of_workflows_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path / "nowhere"))
    assert refusal(changed("workflow:\n", "workflow:\n  name: support_desk\n")).field == PATH_VARIABLE


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_a_spec_or_a_refusal(text: str):
    with pytest.raises(BadInputError):
        parse_spec(text)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(leaf_paths(WorkflowSpec)), st.one_of(st.booleans(), st.text("ab{}[]: ", max_size=6), st.integers())
)
def test_any_value_of_any_knob_is_taken_or_refused_by_name(path: str, value: object):
    refused: list[BadInputError] = []
    try:
        override(parse_spec(ARTICLE), [f"{path}={value}"])
    except BadInputError as error:
        refused.append(error)
    assert all(error.remedy for error in refused)
    assert all(error.field == "spec" or error.field.split(".")[0] == path.split(".")[0] for error in refused)
