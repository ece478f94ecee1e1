"""`ppo.recipe`: every field of a recipe can be changed, and a change that cannot be is named with its remedy."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from cluster.cli.app import app
from cluster.spec.sections import ALGORITHMS
from cluster.spec.spec import WorkflowSpec, chosen_recipe, override, parse_spec, spec_to_yaml
from rl_actors.contracts.errors import BadInputError
from rl_actors.contracts.recipe import RECIPES, Recipe
from tests.cluster.spec.test_spec import ARTICLE

TO_GRPO = "workflow.policy_training=grpo"


def spec_with(**changes: Any) -> WorkflowSpec:
    """The article's spec with a recipe in its YAML file."""
    return parse_spec(ARTICLE + yaml.safe_dump({"ppo": {"recipe": changes}}))


def refused(*settings: str) -> BadInputError:
    with pytest.raises(BadInputError) as caught:
        override(parse_spec(ARTICLE), settings)
    assert caught.value.exit_code == 2
    return caught.value


# --- changes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_without_changes_a_recipe_is_what_its_name_says(name: str):
    assert chosen_recipe(name, {}) == RECIPES[name]
    assert override(parse_spec(ARTICLE), [f"workflow.policy_training={name}"]).recipe == RECIPES[name]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_named_recipe_is_a_change_of_any_other(name: str):
    assert chosen_recipe("ppo_kl", asdict(RECIPES[name])) == RECIPES[name]


CHANGES: dict[str, Any] = {
    "advantages": "gae", "group_baseline": False, "loss": "cispo", "aggregation": "sequence_sum", "dual_clip": 3.0,
    "clip_high": 0.28,
    "kl_in": "loss", "kl_kind": "k2", "kl_target": 0.05, "kl_horizon": 500.0, "correction": "sequence_mask",
    "correction_cap": 5.0, "correction_floor": 0.5, "veto": 1e-4, "value_clip": None, "critic_warmup_updates": 3,
    "bootstrap_truncated": True, "overlong_buffer": 0, "overlong_max": 64, "mask_truncated": True,
    "drop_flat_groups": True, "skip_old_pass": False, "routing": "replay", "lora_rank": 16,
}  # fmt: skip


def test_there_is_a_change_of_every_field():
    assert list(CHANGES) == [field.name for field in fields(Recipe)]


@pytest.mark.parametrize("field", CHANGES)
def test_a_change_moves_its_field_and_no_other(field: str):
    needed = {"kl_in": "loss"} if field == "kl_kind" else {}  # k2 is no reward
    spec = spec_with(**needed, **{field: CHANGES[field]})
    assert spec.recipe == replace(RECIPES["ppo_kl"], **needed, **{field: CHANGES[field]})
    assert parse_spec(spec_to_yaml(spec)) == spec == WorkflowSpec.model_validate_json(spec.model_dump_json())


def test_changes_come_on_top_of_the_recipe_that_is_named():
    text = ARTICLE.replace("ppo_kl", "gspo") + "ppo: {recipe: {correction: none, lora_rank: 8}, num_steps: 3}\n"
    spec = parse_spec(text)
    assert spec.recipe == replace(RECIPES["gspo"], correction="none", lora_rank=8)
    assert spec.ppo.num_steps == 3


def test_a_change_can_be_set_on_the_command_line():
    spec = override(parse_spec(ARTICLE), ["ppo.recipe.correction=none"])
    assert spec.ppo.recipe == {"correction": "none"}
    assert spec.recipe == replace(RECIPES["ppo_kl"], correction="none")
    assert parse_spec(spec_to_yaml(spec)) == spec
    assert parse_spec(spec_to_yaml(spec)).recipe == spec.recipe


def test_a_setting_joins_what_the_file_changes():
    spec = override(spec_with(correction="none", veto=0.01), ["ppo.recipe.veto=0.02", "ppo.recipe.lora_rank=4"])
    assert spec.ppo.recipe == {"correction": "none", "veto": 0.02, "lora_rank": 4}
    whole = override(spec, ["ppo.recipe={dual_clip: 3.0}"])
    assert whole.ppo.recipe == {"dual_clip": 3.0}, "a whole mapping replaces the one before"


def test_null_turns_off_what_can_be_off():
    assert override(parse_spec(ARTICLE), ["ppo.recipe.value_clip=null"]).recipe.value_clip is None
    assert RECIPES["ppo_kl"].value_clip is not None, "negative control"


def test_a_whole_number_is_a_number():
    spec = override(parse_spec(ARTICLE), ["ppo.recipe.kl_horizon=500"])
    assert isinstance(spec.recipe.kl_horizon, float)
    assert parse_spec(spec_to_yaml(spec)) == spec


def test_a_spec_without_changes_is_as_it_was():
    spec = parse_spec(ARTICLE)
    assert spec.ppo.recipe == {}
    assert spec == parse_spec(ARTICLE + "ppo: {recipe: {}}\n")


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "best"),
    [("corection", "none", "correction"), ("lora", 8, "lora_rank"), ("KL_target", 0.1, "kl_target")],
)
def test_an_unknown_field_names_the_nearest(field: str, value: object, best: str):
    error = refused(f"ppo.recipe.{field}={value}")
    assert (error.field, error.value) == (f"ppo.recipe.{field}", value)
    assert f"did you mean {best!r}?" in error.remedy


def test_an_unknown_field_with_nothing_near_lists_them_all():
    error = refused("ppo.recipe.zebra=1")
    assert "did you mean" not in error.remedy
    assert error.remedy.endswith(f"valid: {', '.join(field.name for field in fields(Recipe))}")


@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        ("lora_rank=yes", True, "must be a valid integer"),
        ("lora_rank=1.5", 1.5, "must be a valid integer"),
        ('lora_rank="8"', "8", "must be a valid integer"),
        ("lora_rank=", None, "must be a valid integer"),
        ("group_baseline=1", 1, "must be a valid boolean"),
        ("kl_horizon=long", "long", "must be a valid number"),
        ("kl_horizon=yes", True, "must be a valid number"),
        ("kl_horizon=", None, "must be a valid number"),
        ("kl_horizon=.inf", math.inf, "must be a finite number"),
        ("kl_target=soft", "soft", "must be a valid number, or null to turn it off"),
        ("kl_target=.inf", math.inf, "must be a finite number, or null to turn it off"),
        ("correction=3", 3, "valid: none, token_tis, sequence_tis, sequence_mask, token_icepop"),
        ("correction=[none]", ["none"], "valid: none, token_tis"),
        ("correction=no", False, "valid: none, token_tis"),
        ("correction=tokn_tis", "tokn_tis", "did you mean 'token_tis'? valid: none"),
        ("advantages=gpo", "gpo", "did you mean 'grpo'? valid: gae, grpo, dr_grpo, rloo"),
    ],
)
def test_a_value_of_another_type_is_named_with_what_the_field_takes(setting: str, value: object, remedy: str):
    error = refused(f"ppo.recipe.{setting}")
    assert (error.field, error.value) == (f"ppo.recipe.{setting.partition('=')[0]}", value)
    assert remedy in error.remedy


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("dual_clip", 1.01, 1.0),
        ("value_clip", 0.001, 0.0),
        ("correction_cap", 1.0, 0.99),
        ("correction_floor", 0.0, -0.01),
        ("correction_floor", 1.0, 1.01),
        ("veto", 0.001, 0.0),
        ("veto", 0.999, 1.0),
    ],
)
def test_a_number_that_training_would_refuse_is_refused_before_it(field: str, good: float, bad: float):
    assert getattr(spec_with(**{field: good}).recipe, field) == good
    error = refused(f"ppo.recipe.{field}={bad}")
    assert (error.field, error.value) == (f"ppo.recipe.{field}", bad)
    assert "must be" in error.remedy


@pytest.mark.parametrize(
    ("settings", "field", "value", "reason"),
    [
        # The field in the message is what must change; nobody gave it, so its own value is shown and not None.
        (["ppo.recipe.advantages=grpo"], "recipe.kl_in", "reward", "put the KL in the loss"),
        (["ppo.recipe.loss=gspo"], "recipe.correction", "token_tis", "one ratio per sequence"),
        ([TO_GRPO, "ppo.recipe.kl_in=reward"], "recipe.kl_in", "reward", "put the KL in the loss"),
        ([TO_GRPO, "ppo.recipe.value_clip=0.1"], "recipe.value_clip", 0.1, "no critic"),
        (["ppo.recipe.skip_old_pass=true"], "recipe.skip_old_pass", True, "group kinds only"),
        (["ppo.recipe.overlong_buffer=9"], "recipe.overlong_buffer", 9, "between 0 and overlong_max"),
        (["ppo.recipe.lora_rank=4", "ppo.recipe.routing=frozen"], "recipe.routing", "frozen", "use free"),
        # With the batch's own shape.
        ([TO_GRPO, "ppo.recipe.skip_old_pass=true"], "recipe.skip_old_pass", True, "1 epochs of 4 minibatches"),
        ([TO_GRPO, "ppo.rollouts_per_task=1"], "rollouts_per_task", 1, "take 2 or more"),
    ],
)
def test_choices_that_contradict_each_other_are_named(settings: list[str], field: str, value: object, reason: str):
    error = refused(*settings)
    assert (error.field, error.value) == (f"ppo.{field}", value)
    assert reason in error.remedy


def test_what_does_go_together_is_taken():
    """Negative control: the same changes with what the refusals asked for."""
    together = "{advantages: grpo, kl_in: loss, group_baseline: false, value_clip: null, skip_old_pass: true}"
    spec = override(parse_spec(ARTICLE), [f"ppo.recipe={together}", "ppo.minibatches=1"])
    assert (spec.recipe.advantages, spec.recipe.skip_old_pass) == ("grpo", True)


@pytest.mark.parametrize(
    ("recipe", "field", "value", "remedy"),
    [
        ("none", "ppo.recipe", "none", "mapping of keys to values"),
        ("[correction, none]", "ppo.recipe", ["correction", "none"], "mapping of keys to values"),
        ("", "ppo.recipe", None, "give a value or remove the key"),
        ("{1: 2}", "ppo.recipe.1", 2, "unknown name; valid: advantages"),
        ("{~: 2}", "ppo.recipe.None", 2, "unknown name; "),
        ("{correction: none, correction: token_tis}", "ppo.recipe.correction", "given twice", "keep one of lines"),
    ],
)
def test_what_is_no_mapping_of_fields_is_refused(recipe: str, field: str, value: object, remedy: str):
    with pytest.raises(BadInputError) as caught:
        parse_spec(f"{ARTICLE}ppo:\n  recipe: {recipe}\n")
    assert (caught.value.field, caught.value.value) == (field, value)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("lines", "line"),
    [("    veto: 0.1\n    corection: none\n", 21), ("    veto: 0.1\n    loss: gspo\n", 19)],
)
def test_the_line_is_the_fields_or_that_of_the_recipe_where_nobody_gave_it(lines: str, line: int):
    with pytest.raises(BadInputError) as caught:
        parse_spec(f"{ARTICLE}ppo:\n  recipe:\n{lines}")
    assert caught.value.remedy.endswith(f"(line {line} of spec.yaml)")


# --- through the command line -------------------------------------------------------------------------------------


@pytest.fixture
def article(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEATRIAL_HOME", str(tmp_path / "home"))
    path = tmp_path / "article.yaml"
    path.write_text(ARTICLE)
    return path


def validate(*words: str) -> Result:
    return CliRunner().invoke(app, ["validate", *words])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("corection=none", "corection = 'none': unknown name; did you mean 'correction'?"),
        ("lora_rank=yes", "lora_rank = True: must be a valid integer"),
        ("dual_clip=x", "dual_clip = 'x': must be a valid number, or null to turn it off"),
        ("advantages=grpo", "kl_in = 'reward': group advantages have no reward per token; put the KL in the loss"),
    ],
)
def test_a_bad_change_is_one_sentence_and_exit_code_2(article: Path, setting: str, message: str):
    result = validate(str(article), "--set", f"ppo.recipe.{setting}")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: ppo.recipe.{message}")
    assert result.stderr.count("\n") == 1


def test_a_bad_change_in_a_file_has_its_line(article: Path):
    article.write_text(ARTICLE + "ppo:\n  recipe:\n    corection: none\n")
    result = validate(str(article), "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["field"], found["value"]) == (2, "ppo.recipe.corection", "none")
    assert "(line 20 of article.yaml)" in found["remedy"]


def test_a_good_change_is_valid_and_shown_to_machines(article: Path):
    article.write_text(ARTICLE + "ppo: {recipe: {correction: none}}\n")
    result = validate(str(article), "--set", "ppo.recipe.lora_rank=8", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["spec"]["ppo"]["recipe"] == {"correction": "none", "lora_rank": 8}
