"""The guard around MLflow: what it turns into InfrastructureError and what it lets through."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import pytest

from cluster.registry.connection import Store, reported, without_credentials
from rl_actors.contracts.errors import BadInputError, InfrastructureError, TamperedError


@dataclass
class Port:
    """Something with a store whose calls fail as told."""

    failure: BaseException | None = None
    store: Store | None = None

    @reported
    def read_version(self, name: str, *, default: str = "") -> str:
        """Return the name."""
        if self.failure:
            raise self.failure
        return name or default


EMBEDDED = Store(uri="sqlite:////home/mlflow.db", artifacts=None)
SERVER = Store(uri="http://mlflow:5000", artifacts=None)


def test_a_call_that_works_is_left_alone():
    assert Port().read_version("ppo-1") == "ppo-1"
    assert Port().read_version("", default="none") == "none"
    assert Port.read_version.__name__ == "read_version"
    assert Port.read_version.__doc__ == "Return the name."


@pytest.mark.parametrize(
    ("store", "remedy"),
    [
        (EMBEDDED, r"sqlite:////home/mlflow\.db can be written"),
        (SERVER, "unset MLFLOW_TRACKING_URI"),
        (None, "check the"),
    ],
)
def test_a_failure_says_what_was_tried_what_it_said_and_what_to_do(store: Store | None, remedy: str):
    with pytest.raises(InfrastructureError, match=rf"MLflow, read_version: no disk space; .*{remedy}") as caught:
        Port(failure=OSError("no disk space\n(a long tail)"), store=store).read_version("x")
    assert isinstance(caught.value.__cause__, OSError)
    assert "long tail" not in str(caught.value), "one line is enough; the cause keeps the rest"


def test_no_failure_tells_a_password():
    store = Store(uri="postgresql://ann:s3cret@db/mlflow", artifacts=None)
    with pytest.raises(InfrastructureError, match="db/mlflow") as caught:
        Port(failure=OSError("cannot open postgresql://ann:s3cret@db/mlflow"), store=store).read_version("x")
    assert "s3cret" not in str(caught.value)
    assert "ann:" not in str(caught.value)
    assert str(caught.value).count("postgresql://db/mlflow") == 2


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("postgresql://ann:s3cr@t@db:5432/m?sslmode=require", "postgresql://db:5432/m?sslmode=require"),
        ("postgresql://ann:s3/cr?et#1@db/m", "postgresql://db/m"),
        ("http://token@host:5000", "http://host:5000"),
        ("mysql://db/m?user=ann&password=s3cret&x=1", "mysql://db/m?user=ann&password=***&x=1"),
        ("no store at http://ann:s3cret@host/ , really?", "no store at http://host/ , really?"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("http://mlflow:5000/x?y=1", "http://mlflow:5000/x?y=1"),
    ],
)
def test_a_public_uri_has_no_credentials_and_all_the_rest(text: str, public: str):
    assert without_credentials(text) == Store(uri=text, artifacts=None).public_uri == public


def test_a_failure_without_words_gives_its_kind():
    with pytest.raises(InfrastructureError, match="read_version: TimeoutError; "):
        Port(failure=TimeoutError(), store=EMBEDDED).read_version("x")


@pytest.mark.parametrize("error", [BadInputError("f", 1, "r"), TamperedError("changed"), InfrastructureError("mine")])
def test_our_own_errors_pass_unchanged(error: Exception):
    with pytest.raises(type(error)) as caught:
        Port(failure=error, store=EMBEDDED).read_version("x")
    assert caught.value is error


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), SystemExit(1)])
def test_an_interruption_is_not_an_infrastructure_failure(interruption: BaseException):
    with pytest.raises(type(interruption)):
        Port(failure=interruption).read_version("x")


def test_the_error_survives_the_way_between_processes():
    with pytest.raises(InfrastructureError) as caught:
        Port(failure=OSError("gone"), store=EMBEDDED).read_version("x")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
