"""What a knob means and what it does: every knob has its sentence, and effects are those of planning again."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console, RenderableType
from typer.testing import CliRunner, Result

from cluster.cli.app import app
from cluster.cli.plan import (
    amount,
    compare_request,
    factor_text,
    label_of,
    render_changes,
    render_explanations,
    render_plan,
    value_text,
)
from cluster.cli.runs import RunRequest
from cluster.plan.estimate import Change, Shift, change_alone, compare, explain, plan_run, quantities, shifts
from cluster.spec.errors import leaf_fields, leaf_paths
from cluster.spec.knobs import MEANINGS, knob_named, limits_of
from cluster.spec.spec import WorkflowSpec, load_spec, override
from rl_actors.contracts.errors import BadInputError

KNOBS = leaf_paths(WorkflowSpec)
REQUIRED = {f"workflow.{name}" for name in ("target", "baseline", "reward_model", "policy_training")} | {
    "release.gates"
}
NOTHING = "changes nothing in the plan's arithmetic"


def spec_with(*settings: str) -> WorkflowSpec:
    return override(load_spec("support_desk"), list(settings))


def effects(*settings: str, against: str = "it") -> dict[str, Change]:
    comparison = compare(spec_with(), spec_with(*settings), against)
    return {change.knob: change for change in comparison.changes}


def moved(change: Change) -> dict[str, tuple[float, float]]:
    return {shift.quantity: (shift.before, shift.after) for shift in change.shifts}


def printed(what: RenderableType, width: int = 80) -> str:
    screen = io.StringIO()
    Console(file=screen, width=width).print(what)
    return screen.getvalue()


def seatrial(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, list(words))


# --- sentences and limits ---------------------------------------------------------------------------------------------


def missing_and_unknown(knobs: list[str], meanings: dict[str, str]) -> tuple[set[str], set[str]]:
    """Knobs without a sentence, and sentences without a knob."""
    return set(knobs) - set(meanings), set(meanings) - set(knobs)


def is_one_sentence(text: str) -> bool:
    return text.endswith(".") and text[0].isupper() and ". " not in text and 30 <= len(text) <= 130


def test_every_knob_has_a_sentence_and_every_sentence_a_knob():
    assert missing_and_unknown(KNOBS, dict(MEANINGS)) == (set(), set())


def test_a_missing_and_a_superfluous_sentence_are_seen():
    meanings = {"ppo.clp": "x", **{knob: text for knob, text in MEANINGS.items() if knob != "ppo.clip"}}
    assert missing_and_unknown(KNOBS, meanings) == ({"ppo.clip"}, {"ppo.clp"})


@pytest.mark.parametrize("knob", sorted(MEANINGS))
def test_a_meaning_is_one_short_sentence(knob: str):
    assert is_one_sentence(MEANINGS[knob]), len(MEANINGS[knob])


@pytest.mark.parametrize(
    "text",
    [
        "Too short.",
        "no capital letter at the beginning of this one.",
        "No full stop at its very end, alas",
        "Two sentences stand here. One would do.",
        "A" * 140 + ".",
    ],
)
def test_what_is_no_short_sentence_is_seen(text: str):
    assert not is_one_sentence(text)


def test_meanings_differ_except_where_knobs_are_alike():
    texts = list(MEANINGS.values())
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("path", "limits"),
    [
        ("ppo.clip", "a number, above 0, below 1"),
        ("ppo.minibatches", "a whole number, at least 1"),
        ("model.hidden_size", "a whole number, at least 32, a multiple of 32"),
        ("release.ramp", "a list of numbers"),
        ("workflow.target", "text"),
        ("workflow.policy_training", "one of ppo_kl, grpo, dr_grpo, rloo, gspo, cispo, dapo"),
        ("seed", "a whole number, at least 0"),
        ("ppo.recipe", "keys and values"),
    ],
)
def test_limits_are_those_that_validation_holds(path: str, limits: str):
    assert limits_of(path, leaf_fields(WorkflowSpec)[path]) == limits


@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob_is_found_with_its_default(knob: str):
    found = knob_named(knob)
    assert found.path == knob
    assert found.limits
    assert found.is_required == (knob in REQUIRED)


def test_gates_are_a_closed_list():
    limits = knob_named("release.gates").limits
    assert limits.startswith("any of no_safety_regression, ")
    assert limits.endswith(", task_success_not_worse")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("ppo.clp", "unknown knob; did you mean 'ppo.clip'?"),
        ("clip", "give the whole path; did you mean 'ppo.clip'?"),
        ("epochs", "'sft.epochs' or 'reward.epochs' or 'ppo.epochs'?"),
        ("reward", "is a section; name one of its knobs: reward.epochs, reward.learning_rate, reward.num_pairs, "),
        ("zzzzzzzz", "lists them all"),
        ("", "lists them all"),
    ],
)
def test_an_unknown_knob_names_the_nearest(name: str, remedy: str):
    with pytest.raises(BadInputError) as caught:
        knob_named(name)
    assert (caught.value.field, caught.value.value) == ("--explain", name)
    assert remedy in caught.value.remedy


# --- effects, by hand -------------------------------------------------------------------------------------------------


def test_four_times_the_minibatches_are_four_times_the_steps_on_a_quarter_of_the_rollouts():
    assert moved(effects("ppo.minibatches=8")["ppo.minibatches"]) == {
        "rollouts_per_minibatch": (48, 12),
        "rollouts_per_learner": (48, 12),
        "optimizer_steps_per_step": (2, 8),
        "ppo.optimizer_steps": (50, 200),
    }


def test_two_epochs_train_twice_and_sample_once():
    found = moved(effects("ppo.epochs=2")["ppo.epochs"])
    assert found["ppo.optimizer_steps"] == (50, 100)
    assert found["trained_tokens_per_step"] == (96 * 410, 2 * 96 * 410)
    assert found["ppo.tokens"] == (25 * (96 * 154 + 96 * 410), 25 * (96 * 154 + 2 * 96 * 410))
    assert not {"rollouts_per_step", "sampled_tokens_per_step", "ppo.memory_bytes"} & set(found)
    before, after = found["ppo.minutes"]
    assert found["total_minutes"][1] - found["total_minutes"][0] == pytest.approx(after - before)


def test_twice_the_attempts_are_twice_the_rollouts_in_as_many_steps():
    found = moved(effects("ppo.rollouts_per_task=8")["ppo.rollouts_per_task"])
    doubled = ("rollouts_per_step", "rollouts_per_minibatch", "sampled_tokens_per_step", "trained_tokens_per_step")
    assert all(after == 2 * before for before, after in (found[name] for name in (*doubled, "ppo.tokens")))
    assert "ppo.optimizer_steps" not in found


def test_a_knob_of_one_stage_leaves_the_others_alone():
    found = moved(effects("sft.epochs=3")["sft.epochs"])
    assert set(found) == {"sft.tokens", "sft.optimizer_steps", "sft.minutes", "total_minutes"}


def test_each_change_is_measured_without_the_others():
    together = effects("ppo.minibatches=8", "ppo.epochs=2")
    assert together == effects("ppo.minibatches=8") | effects("ppo.epochs=2")
    comparison = compare(spec_with(), spec_with("ppo.minibatches=8", "ppo.epochs=2"), "it")
    steps = next(shift for shift in comparison.together if shift.quantity == "ppo.optimizer_steps")
    assert steps == Shift(quantity="ppo.optimizer_steps", before=50, after=400)


@pytest.mark.parametrize(
    "setting",
    [
        "ppo.kl_coef=0.1",
        "ppo.target_kl=0.02",
        "ppo.clip=0.1",
        "ppo.lam=0.95",
        "ppo.learning_rate=1e-5",
        "ppo.temperature=0.7",
        "ppo.outcome_weight=0.5",
        "release.alpha=0.01",
        "reward.max_ece=0.2",
        "sft.muon_learning_rate=0",
        "seed=3",
        "workflow.target=another",
    ],
)
def test_a_knob_that_moves_nothing_says_so_and_what_it_means(setting: str):
    knob = setting.partition("=")[0]
    comparison = compare(spec_with(), spec_with(setting), "it")
    assert [(change.knob, change.shifts) for change in comparison.changes] == [(knob, ())]
    assert comparison.together == ()
    text = printed(render_changes(comparison), 200)
    assert NOTHING in text
    assert MEANINGS[knob] in text


def test_a_knob_that_moves_something_does_not_say_that_it_does_not():
    assert NOTHING not in printed(render_changes(compare(spec_with(), spec_with("ppo.epochs=2"), "it")))


def test_equal_specs_have_no_change():
    assert effects() == {}
    assert effects("ppo.epochs=1") == {}, "set to what it was"
    assert shifts(plan_run(spec_with()), plan_run(spec_with())) == ()


def test_a_knob_that_follows_another_is_no_change_of_its_own():
    article = load_spec("support_desk")
    unset = override(article, []).model_dump(mode="json", exclude_unset=True)
    del unset["release"]["ramp"]
    before = WorkflowSpec.model_validate(unset)
    after = override(before, ["release.canary_traffic_percent=10"])
    assert before.release.ramp != after.release.ramp
    (change,) = compare(before, after, "it").changes
    assert change.knob == "release.canary_traffic_percent"
    assert moved(change) == {"tickets_needed": (1000 + 200 + 100, 500 + 200 + 100)}


def test_a_knob_that_cannot_stand_alone_says_why():
    found = effects("release.canary_traffic_percent=10", "release.ramp=[10, 50]")
    assert found["release.ramp"].refusal == "must start at canary_traffic_percent = 5"
    assert found["release.canary_traffic_percent"].refusal.startswith("release.ramp: must start at")
    comparison = compare(spec_with(), spec_with("release.canary_traffic_percent=10", "release.ramp=[10, 50]"), "it")
    assert {shift.quantity for shift in comparison.together} == {"tickets_needed"}
    assert "refused on its own: must start at" in printed(render_changes(comparison))


def test_a_model_changes_every_number():
    found = moved(effects("model.path=openai/gpt-oss-20b")["model.path"])
    assert found["params"][1] > 2e10
    assert {"sft.memory_bytes", "ppo.memory_bytes", "canary.memory_bytes", "peak_memory_bytes"} <= set(found)


def test_choices_of_the_recipe_are_one_knob():
    found = effects("ppo.recipe.lora_rank=8")["ppo.recipe"]
    assert (found.before, found.after) == ({}, {"lora_rank": 8})
    assert set(moved(found)) == {"ppo.memory_bytes"}


def test_every_number_of_the_plan_can_move():
    plan = plan_run(spec_with())
    names = quantities(plan)
    assert {f"{stage.stage}.minutes" for stage in plan.stages} <= set(names)
    assert names["total_minutes"] == plan.total_minutes
    assert names["ppo.optimizer_steps"] == plan.batch.optimizer_steps
    assert "optimizer_steps" not in names, "the same number is not told twice"


# --- a knob explained -------------------------------------------------------------------------------------------------


def test_half_and_double_are_planned_again():
    found = explain(spec_with(), "ppo.minibatches")
    assert (found.value, found.knob.default, set(found.trials)) == (2, 4, {"half", "double"})
    plan = plan_run(spec_with())
    for word, value in (("half", 1), ("double", 4)):
        assert found.trials[word] == change_alone(spec_with(), plan, "ppo.minibatches", value)
        assert found.trials[word].shifts == shifts(plan, plan_run(spec_with(f"ppo.minibatches={value}")))


def test_whole_numbers_stay_whole_and_one_has_no_half():
    assert set(explain(spec_with(), "ppo.epochs").trials) == {"double"}
    assert explain(spec_with("ppo.num_steps=25"), "ppo.num_steps").trials["half"].after == 13
    assert explain(spec_with(), "ppo.clip").trials["half"].after == 0.1


@pytest.mark.parametrize("name", ["release.gates", "release.ramp", "model.path", "seed", "ppo.recipe"])
def test_what_is_no_number_or_zero_has_no_half_nor_double(name: str):
    assert explain(spec_with(), name).trials == {}


@pytest.mark.parametrize(
    ("name", "setting", "word", "reason"),
    [
        ("ppo.clip", "ppo.clip=0.6", "double", "must be less than 1"),
        ("ppo.lam", "ppo.lam=0.9", "double", "must be less than or equal to 1"),
        ("model.hidden_size", "model.hidden_size=32", "half", "must be a multiple of 32"),
        ("ppo.minibatches", "ppo.minibatches=60", "double", "minibatches * num_learners = 120 cannot exceed"),
    ],
)
def test_what_lies_outside_the_limits_is_refused_and_said(name: str, setting: str, word: str, reason: str):
    explanation = explain(spec_with(setting), name)
    trial = explanation.trials[word]
    assert trial.shifts == ()
    assert reason in trial.refusal
    assert f"refused: {reason}" in printed(render_explanations([explanation]), 200)


@pytest.mark.parametrize("name", KNOBS)
def test_every_knob_can_be_explained(name: str):
    text = printed(render_explanations([explain(spec_with(), name)]), 200)
    assert MEANINGS[name] in text
    assert name in text


# --- how it reads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantity", "value", "text"),
    [
        ("ppo.memory_bytes", 900, "900 B"),
        ("ppo.memory_bytes", 1.5 * 1024**2, "1.50 MiB"),
        ("ppo.memory_bytes", 1000 * 1024**2, "0.98 GiB"),
        ("peak_memory_bytes", 14.5 * 1024**3, "14.5 GiB"),
        ("peak_memory_bytes", 145 * 1024**3, "145 GiB"),
        ("peak_memory_bytes", 5000 * 1024**4, "5000 TiB"),
        ("total_minutes", 14.24, "14.2 min"),
        ("total_minutes", 40364.3, "40,364 min"),
        ("ppo.tokens", 1353600, "1,353,600"),
        ("ppo.gpus", 0.5, "0.5"),
    ],
)
def test_amounts_carry_their_unit(quantity: str, value: float, text: str):
    assert amount(quantity, value) == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (50, 200, "x 4"),
        (48, 12, "/ 4"),
        (3, 4, "+33 %"),
        (100, 96, "-4.0 %"),
        (1, 17082, "x 17,082"),
        (0, 1, ""),
        (2, 0, ""),
    ],
)
def test_factors_say_how_far(before: float, after: float, text: str):
    assert factor_text(before, after) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.02, "0.02"),
        (5.0, "5"),
        ("", '""'),
        ((5.0, 25.0), "[5, 25]"),
        ({"lora_rank": 8}, "{lora_rank: 8}"),
        ("a" * 50, "a" * 41 + "..."),
    ],
)
def test_values_read_as_in_a_spec(value: object, text: str):
    assert value_text(value) == text


def test_labels_are_words():
    assert label_of("reward_model.memory_bytes") == "reward model memory"
    assert label_of("peak_memory_bytes") == "peak memory"
    assert label_of("ppo.gpus") == "ppo GPUs"
    assert label_of("rollouts_per_step") == "rollouts per step"


@pytest.mark.parametrize("width", [80, 120])
def test_everything_fits_the_terminal_and_no_number_is_cut(width: int):
    settings = ["model.path=openai/gpt-oss-20b", "cluster.gpus_per_learner=1", "ppo.num_learners=8", "ppo.epochs=2"]
    spec = spec_with(*settings)
    text = printed(render_plan(plan_run(spec), compare(spec_with(), spec, "support_desk")), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "20,914,757,184" in text


def test_a_trifle_gets_no_line():
    change = Change(knob="ppo.clip", before=1, after=2, shifts=(Shift(quantity="params", before=1e6, after=1e6 + 1),))
    comparison = compare(spec_with(), spec_with(), "it")
    text = printed(render_changes(type(comparison)(against="it", changes=(change,))))
    assert "moves nothing in the plan by 0.1% or more" in text
    assert "parameters" not in text


# --- the command ------------------------------------------------------------------------------------------------------


def test_plan_says_what_the_settings_do():
    text = seatrial("plan", "support_desk", "--set", "ppo.minibatches=8", "--set", "ppo.epochs=2").stdout
    assert "What your changes do, each alone, against support_desk as it is" in text
    assert "ppo.minibatches  2 -> 8" in text
    assert "all together" in text


def test_plan_without_changes_has_no_such_table():
    text = seatrial("plan", "support_desk").stdout
    assert "Memory of each part" in text
    assert "What your changes do" not in text


def test_a_spec_of_ones_own_is_compared_with_the_packaged_one(tmp_path):
    path = tmp_path / "own.yaml"
    packaged = load_spec("support_desk").model_dump(mode="json", exclude_unset=True)
    packaged["ppo"]["num_steps"] = 50
    path.write_text(json.dumps(packaged))
    text = seatrial("plan", str(path)).stdout
    assert "against the packaged support_desk" in text
    assert "ppo.num_steps  25 -> 50" in text
    comparison = compare_request(RunRequest(spec=str(path), settings=["seed=1"]), override(load_spec(path), ["seed=1"]))
    assert [change.knob for change in comparison.changes] == ["seed"], "settings are compared with the file itself"


def test_plan_explains_several_knobs_and_nothing_else():
    text = seatrial("plan", "support_desk", "--explain", "ppo.clip", "--explain", "ppo.kl_coef").stdout
    assert text.index("ppo.clip") < text.index("ppo.kl_coef")
    assert "double: 0.2 -> 0.4" in text
    assert "One PPO step" not in text


def test_plan_explains_how_long_and_how_fast_the_reward_model_trains():
    text = seatrial("plan", "support_desk", "--explain", "reward.epochs", "--explain", "reward.learning_rate").stdout
    joined = " ".join(text.replace("│", " ").split())
    assert "double: 2 -> 4" in joined
    assert "double: 0.001 -> 0.002" in joined
    for knob in ("reward.epochs", "reward.learning_rate"):
        assert MEANINGS[knob] in joined


def test_more_epochs_of_the_reward_model_take_more_steps_of_its_stage_alone():
    found = moved(effects("reward.epochs=4")["reward.epochs"])
    assert {name.partition(".")[0] for name in found} == {"reward_model", "total_minutes"}
    before, after = found["reward_model.optimizer_steps"]
    assert after == 2 * before


def test_an_explanation_starts_from_the_settings():
    text = seatrial("plan", "support_desk", "--set", "ppo.epochs=3", "--explain", "ppo.epochs").stdout
    assert "double: 3 -> 6" in text


def test_an_unknown_knob_ends_the_command_with_exit_code_2():
    result = seatrial("plan", "support_desk", "--explain", "ppo.clp")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: --explain = 'ppo.clp': unknown knob; did you mean 'ppo.clip'?\n"


def test_machines_get_the_same():
    words = ["plan", "support_desk", "--set", "ppo.minibatches=8", "--explain", "ppo.clip", "--json"]
    answer = json.loads(seatrial(*words).stdout)
    (change,) = answer["comparison"]["changes"]
    assert (change["knob"], change["before"], change["after"]) == ("ppo.minibatches", 2, 8)
    assert {"quantity": "ppo.optimizer_steps", "before": 50, "after": 200} in change["shifts"]
    assert change["meaning"] == MEANINGS["ppo.minibatches"]
    (explained,) = answer["explained"]
    assert (explained["path"], explained["value"], explained["default"]) == ("ppo.clip", 0.2, 0.2)
    assert explained["trials"]["double"]["after"] == 0.4
    assert answer["plan"]["stages"][3]["memory_bytes"]["reference"] > 0
