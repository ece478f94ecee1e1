"""Stamps of served versions on disk."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from rl_actors.contracts.errors import BadInputError, EngineError, TamperedError
from serving.store.served import ReleaseFiles, ServedPolicies, application_of
from tests.serving.gateway.live_fakes import make_config, make_policy


def test_files_lie_under_one_root() -> None:
    files = ReleaseFiles(root=Path("/home/serving"))
    places = {files.ledger, files.split, files.acks, files.served}
    assert len(places) == 4
    assert all(place.parent == files.root for place in places)


def test_config_crosses_processes(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.files.root == tmp_path


class TestPolicy:
    def test_application_carries_the_version(self) -> None:
        assert application_of(make_policy("ppo-b.7").version) == "policy-ppo-b.7"

    @pytest.mark.parametrize("version", ["", "a/b", "../a", "a b", "-a", ".a", "a#1", "x" * 101, "ä"])
    def test_bad_names(self, version: str) -> None:
        with pytest.raises(BadInputError, match=r"policy\.version"):
            make_policy(version)

    @pytest.mark.parametrize("stamp", ["path", "model_version", "reward_model_version", "bundle_id"])
    def test_every_stamp_is_needed(self, stamp: str) -> None:
        with pytest.raises(BadInputError, match=f"policy.{stamp}"):
            make_policy(**{stamp: ""})


class TestStore:
    def test_finds_what_was_added(self, tmp_path: Path) -> None:
        ServedPolicies(tmp_path / "served").add(make_policy())
        assert ServedPolicies(tmp_path / "served").find("sft-a") == make_policy()

    def test_adding_again_changes_nothing(self, tmp_path: Path) -> None:
        store = ServedPolicies(tmp_path)
        store.add(make_policy())
        before = (tmp_path / "sft-a.json").stat().st_mtime_ns
        store.add(make_policy())
        assert (tmp_path / "sft-a.json").stat().st_mtime_ns == before

    @pytest.mark.parametrize("stamp", ["path", "model_version", "reward_model_version", "bundle_id"])
    def test_a_name_is_never_reused(self, tmp_path: Path, stamp: str) -> None:
        store = ServedPolicies(tmp_path)
        store.add(make_policy())
        with pytest.raises(BadInputError, match="give a new name"):
            store.add(make_policy(**{stamp: "other"}))
        assert store.find("sft-a") == make_policy()

    def test_never_deployed(self, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match="never deployed"):
            ServedPolicies(tmp_path).find("ppo-b")

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"version": "sft-a"}', '{"other": 1}'])
    def test_broken_file(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "sft-a.json").write_text(text)
        with pytest.raises(TamperedError, match=r"sft-a\.json"):
            ServedPolicies(tmp_path).find("sft-a")
