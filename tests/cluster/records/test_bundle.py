"""The bundle: complete, immutable, named by its content."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from cluster.records.bundle import (
    MEMBERS,
    Bundle,
    Component,
    build_bundle,
    code_component,
    component_of,
    diff_bundles,
    load_bundle,
)
from rl_actors.contracts.errors import BadInputError, TamperedError


def members() -> dict[str, Component]:
    return {name: component_of(f"{name}-1", name) for name in MEMBERS}


@pytest.fixture
def bundle() -> Bundle:
    return build_bundle(members())


def test_the_id_is_the_hash_of_the_content(bundle: Bundle):
    assert bundle.id == build_bundle(members()).id
    assert len(bundle.id) == 64


@pytest.mark.parametrize("member", MEMBERS)
def test_changing_any_member_changes_the_id(bundle: Bundle, member: str):
    changed = replace(bundle, **{member: component_of(f"{member}-1", "other content")})
    assert changed.id != bundle.id
    (change,) = diff_bundles(bundle, changed)
    assert (change.member, change.before, change.after) == (member, bundle.members[member], changed.members[member])


@pytest.mark.parametrize("member", MEMBERS)
def test_a_partial_bundle_is_refused(member: str):
    partial = {name: component for name, component in members().items() if name != member}
    with pytest.raises(BadInputError, match=rf"missing \['{member}'\]"):
        build_bundle(partial)


def test_an_unknown_member_is_refused():
    with pytest.raises(BadInputError, match=r"unknown \['critic'\]"):
        build_bundle(members() | {"critic": component_of("c", 1)})


@pytest.mark.parametrize("sha256", ["", "abc", "G" * 64, "A" * 64, "0" * 65])
def test_a_member_without_a_hash_is_refused(sha256: str):
    with pytest.raises(BadInputError, match=r"bundle\.policy"):
        build_bundle(members() | {"policy": Component(version="ppo-1", sha256=sha256)})


def test_a_member_without_a_name_is_refused():
    with pytest.raises(BadInputError, match=r"bundle\.seed"):
        build_bundle(members() | {"seed": Component(version="", sha256="0" * 64)})


def test_a_bundle_cannot_be_changed_in_place(bundle: Bundle):
    with pytest.raises(FrozenInstanceError):
        bundle.policy = bundle.sft  # type: ignore[misc]


def test_the_baseline_differs_in_the_policy_alone(bundle: Bundle):
    assert [change.member for change in diff_bundles(bundle.baseline, bundle)] == ["policy"]
    assert bundle.baseline.policy == bundle.sft
    assert bundle.baseline.baseline.id == bundle.baseline.id


def test_equal_bundles_have_no_difference(bundle: Bundle):
    renamed = replace(bundle, policy=replace(bundle.policy, version="same weights, other name"))
    assert diff_bundles(bundle, bundle) == ()
    assert diff_bundles(bundle, renamed) == ()


def test_a_manifest_comes_back_as_it_was_written(bundle: Bundle, tmp_path: Path):
    path = tmp_path / "run" / "bundle.json"
    bundle.write(path)
    bundle.write(path)
    assert load_bundle(path) == bundle
    assert json.loads(path.read_text())["bundle_id"] == bundle.id


def test_another_bundle_never_replaces_a_written_one(bundle: Bundle, tmp_path: Path):
    path = tmp_path / "bundle.json"
    bundle.write(path)
    changed = f"policy was {bundle.policy.version}, is {bundle.sft.version}"
    with pytest.raises(TamperedError, match=rf"another bundle, .* \({re.escape(changed)}\); start a new run"):
        bundle.baseline.write(path)
    assert load_bundle(path) == bundle


def test_a_changed_manifest_is_refused(bundle: Bundle, tmp_path: Path):
    path = tmp_path / "bundle.json"
    bundle.write(path)
    manifest = json.loads(path.read_text())
    manifest["seed"]["version"] = "42"
    path.write_text(json.dumps(manifest))
    with pytest.raises(TamperedError, match=bundle.id[:12]):
        load_bundle(path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"bundle_id": "x"}', '{"bundle_id": "x", "seed": 3}', '{"bundle_id": "x", "seed": {}}']
)
def test_a_file_that_is_no_manifest_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "bundle.json"
    path.write_text(text)
    with pytest.raises(BadInputError, match=r"bundle\.json|missing"):
        load_bundle(path)
    with pytest.raises(BadInputError, match="absent"):
        load_bundle(tmp_path / "absent.json")


def test_the_code_revision_follows_every_source_file(tmp_path: Path):
    for package in ("rl_actors", "serving", "cluster"):
        (tmp_path / package / "__pycache__").mkdir(parents=True)
        (tmp_path / package / "a.py").write_text("x = 1\n")
    before = code_component(tmp_path)
    (tmp_path / "cluster" / "__pycache__" / "a.py").write_text("cache")
    (tmp_path / "cluster" / "notes.txt").write_text("not code")
    assert code_component(tmp_path) == before
    (tmp_path / "serving" / "schema.sql").write_text("CREATE TABLE runs (run_id TEXT)")
    after = code_component(tmp_path)
    assert after.sha256 != before.sha256
    assert after.version.endswith(f"+{after.sha256[:12]}")


def test_this_trees_code_has_a_revision():
    assert len(code_component().sha256) == 64
