"""A token that lies ready is offered; a mode that somebody chose is theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.ray_cluster.token import offer_token


def offered(home: Path, **environ: str) -> str:
    offer_token(environ, home)
    return environ.get("RAY_AUTH_MODE", "")


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("secret")
    return file


def test_without_a_token_nothing_is_chosen(tmp_path: Path):
    assert offered(tmp_path) == ""
    assert offered(tmp_path, RAY_AUTH_TOKEN_PATH=str(tmp_path / "none")) == ""


def test_a_token_in_rays_own_place_is_offered(tmp_path: Path, token: Path):
    assert offered(tmp_path) == "token"


def test_a_token_in_a_variable_or_a_named_file_is_offered(tmp_path: Path, token: Path):
    assert offered(tmp_path / "elsewhere", RAY_AUTH_TOKEN="secret") == "token"
    assert offered(tmp_path / "elsewhere", RAY_AUTH_TOKEN_PATH=str(token)) == "token"


def test_a_chosen_mode_is_left_alone(tmp_path: Path, token: Path):
    assert offered(tmp_path, RAY_AUTH_MODE="disabled") == "disabled"
