"""One small Ray for all tests of actors, and a pool of fake workers in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from rl_actors.actors import rollouts
from rl_actors.actors.rollouts import RolloutPool
from tests.rl_actors.actors.fake_actors import FakeWorker, options


@pytest.fixture(scope="package")
def local_ray() -> Iterator[Any]:
    """A Ray of our own, never one that happens to run on this machine."""
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def pool(local_ray: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutPool]:
    """Two fake workers. Closing them leaves a file behind: the graceful way was taken."""
    farewell = tmp_path_factory.mktemp("farewell") / "closed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "RolloutWorker", FakeWorker)
        settings: Any = str(farewell)
        made = RolloutPool("model", settings, num_workers=2, options=options, timeout_s=60)
        yield made
        made.close()
    assert farewell.exists()
    assert made.workers == []
