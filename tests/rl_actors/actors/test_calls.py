"""Calls to actors: what a dead, slow or failing actor becomes."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from rl_actors.actors import calls
from rl_actors.actors.calls import one_line, wait_for
from rl_actors.contracts.errors import AttestationError, BadInputError, InfrastructureError
from tests.rl_actors.actors.fake_actors import Troubled

needs_ray = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


class RemoteError(RuntimeError):
    """What a page of a remote traceback ends in."""


PAGE = "\x1b[36mray::Worker.run()\x1b[39m (pid=7, ip=10.0.0.1)\n  File 'a.py', line 3\n    boom()\n"


def crossed(cause: Exception) -> RayTaskError:
    """An error as Ray hands it over: the cause inside, a page as its text."""
    return RayTaskError("run", f"{PAGE}{type(cause).__name__}: {cause}", cause, "worker", 7, "10.0.0.1")


def raising(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def get(_references: Any, timeout: float) -> None:
        raise error

    monkeypatch.setattr(calls.ray, "get", get)


@pytest.mark.parametrize("borders", [1, 2])
def test_a_failed_call_is_one_line_with_its_cause_and_where_to_look(monkeypatch: pytest.MonkeyPatch, borders: int):
    error: Exception = RemoteError("shapes differ: (3,) and (4,)\nand a page more")
    for _ in range(borders):
        error = crossed(error)
    assert "ray::Worker.run()" in str(error), "negative control: Ray's own text is the page"
    raising(monkeypatch, error)
    with pytest.raises(InfrastructureError) as caught:
        wait_for([], timeout_s=1, what="learners")
    said = str(caught.value)
    assert said.startswith("learners failed: RemoteError: shapes differ: (3,) and (4,) (pid 7 on 10.0.0.1); its log ")
    assert "\n" not in said
    assert "ray::" not in said


@pytest.mark.parametrize("borders", [1, 2])
def test_an_error_of_our_own_tree_passes_every_border(monkeypatch: pytest.MonkeyPatch, borders: int):
    own = BadInputError("ppo.epochs", 0, "raise it")
    error: Exception = own
    for _ in range(borders):
        error = crossed(error)
    raising(monkeypatch, error)
    with pytest.raises(BadInputError) as caught:
        wait_for([], timeout_s=1, what="learners")
    assert caught.value is own


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            f"The actor died because of an error raised in its creation task, {PAGE}ValueError: no such device\n  hint",
            "ValueError: no such device",
        ),
        (
            "The actor died unexpectedly before finishing this task.\n\tclass_name: X\n\tpid: 7\nThe node is gone.",
            "The node is gone.",
        ),
        ("", "RayActorError"),
    ],
)
def test_a_dead_actor_is_one_line_that_says_why(monkeypatch: pytest.MonkeyPatch, text: str, said: str):
    raising(monkeypatch, RayActorError(error_msg=text))
    with pytest.raises(InfrastructureError) as caught:
        wait_for([], timeout_s=1, what="learners")
    assert str(caught.value).startswith(f"learners died: {said}; its log is under the Ray session's logs/")


@pytest.mark.parametrize(("error", "said"), [(ValueError("\n a\nb"), "ValueError: b"), (ValueError(), "ValueError")])
def test_an_exception_is_one_line(error: Exception, said: str):
    assert one_line(error) == said


# --- with a small local Ray -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def troubled(local_ray: Any) -> Any:
    return local_ray.remote(Troubled).options(num_cpus=0.1).remote()


class TestWaitFor:
    """Everything that can happen to a remote call becomes a result or one error of our tree."""

    pytestmark = needs_ray

    def test_results_come_back_in_order(self, local_ray: Any, troubled: Any):
        references = [local_ray.put(1), troubled.well.remote(), local_ray.put(3)]
        assert wait_for(references, timeout_s=60, what="actors") == [1, "well", 3]

    def test_a_slow_actor_is_an_infrastructure_error(self, local_ray: Any):
        slow = local_ray.remote(Troubled).options(num_cpus=0.1).remote()
        wait_for([slow.well.remote()], timeout_s=60, what="slow ones")
        with pytest.raises(InfrastructureError, match="slow ones did not answer within 0 s"):
            wait_for([slow.sleep.remote(30)], timeout_s=0.3, what="slow ones")
        local_ray.kill(slow)

    def test_a_dead_actor_is_an_infrastructure_error(self, local_ray: Any):
        dead = local_ray.remote(Troubled).options(num_cpus=0.1).remote()
        call = dead.sleep.remote(30)
        local_ray.kill(dead)
        with pytest.raises(InfrastructureError, match="learners died"):
            wait_for([call], timeout_s=60, what="learners")

    def test_an_error_of_our_own_tree_passes_through_unchanged(self, troubled: Any):
        with pytest.raises(AttestationError, match=r"^worker 3 is stale$"):
            wait_for([troubled.stale.remote()], timeout_s=60, what="actors")

    def test_its_parts_survive_the_way(self, troubled: Any):
        with pytest.raises(BadInputError) as caught:
            wait_for([troubled.bad_input.remote()], timeout_s=60, what="actors")
        assert (caught.value.field, caught.value.value, caught.value.exit_code) == ("ppo.epochs", 0, 2)

    def test_a_defect_in_an_actor_is_an_infrastructure_error_with_its_cause(self, troubled: Any):
        with pytest.raises(InfrastructureError, match=r"(?s)actors failed: .*ZeroDivisionError"):
            wait_for([troubled.defect.remote()], timeout_s=60, what="actors")
