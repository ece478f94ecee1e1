"""The real path: Ray Serve, two vLLM engines, tool hosts, ledger, HTTP. One Serve for the whole module."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from cluster.simulation.ticket_book import TicketBook
from cluster.simulation.traffic import TrafficConfig, TrafficDriver, TrafficProgress, run_traffic
from cluster.workflows import locate_workflow
from rl_actors.agent.renderers.harmony import demonstration_texts, train_tokenizer
from rl_actors.contracts.errors import BadInputError, EngineError
from rl_actors.contracts.tasks import AgentLimits, Task
from rl_actors.models.loading import build_tiny_model, tiny_config
from serving.contracts.release import SplitRecord
from serving.platform.serve import PlatformConfig, ServePlatform
from serving.split.record import SplitStore
from serving.store.ledger import RequestLedger
from serving.store.served import GatewayConfig, ServedPolicy
from tests.cluster.workflows.desk_runs import right

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(300)]

REF = locate_workflow("support_desk")
WORKFLOW = REF.load()
STABLE, CANDIDATE = "sft-a", "ppo-b"


@dataclass
class Site:
    """A running site, and the tickets nobody has sent yet."""

    platform: ServePlatform
    config: GatewayConfig
    store: SplitStore
    ledger: RequestLedger
    tickets: Iterator[Task]
    num_sent: int = 0

    def put_split(self, share: float) -> float:
        """Put a split in force; returns the seconds until every gateway acknowledged it."""
        current = self.store.read()
        assert current is not None
        record = SplitRecord(
            epoch=current.epoch + 1, stable=STABLE, candidate=CANDIDATE, share=share, salt="r1", updated_at=time.time()
        )
        started = time.monotonic()
        self.store.compare_and_set(record)
        self.platform.set_split(record)
        while self.platform.acknowledged_epoch() < record.epoch:
            assert time.monotonic() - started < 10.0, "never acknowledged"
            time.sleep(0.01)
        return time.monotonic() - started

    def wait_for_rows(self, prefix: str, count: int) -> None:
        """Wait until the ledger holds so many runs whose request id starts like this."""
        deadline = time.monotonic() + 60.0
        while sum(row.request_id.startswith(prefix) for row in self.ledger.rows()) < count:
            assert time.monotonic() < deadline, "no traffic"
            time.sleep(0.05)

    def send(self, count: int, name: str) -> TrafficProgress:
        config = TrafficConfig(url=self.platform.url, live_world=self.config.live_world, run_name=name, concurrency=6)
        self.num_sent += count
        book = TicketBook(self.ledger.path.with_name(f"tickets-{name}.jsonl"))
        return run_traffic(TrafficDriver(WORKFLOW, config, book), [next(self.tickets) for _ in range(count)])


def save_model(directory: Path, seed: int) -> str:
    """An untrained model with a real tokenizer: it talks nonsense at full speed."""
    texts = []
    for task in WORKFLOW.build_tasks("train", 60, 1):
        texts += demonstration_texts(WORKFLOW.system_prompt, right(task))
    tokenizer = train_tokenizer(texts, vocab_size=512)
    config = tiny_config(
        vocab_size=len(tokenizer), hidden_size=64, num_layers=2, num_experts=2, max_length=512,
        eos_token_id=int(tokenizer.eos_token_id),
    )  # fmt: skip
    build_tiny_model(config, seed=seed).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def policy(version: str, path: str) -> ServedPolicy:
    return ServedPolicy(
        version=version, path=path, model_version="tiny", reward_model_version="rm-1", bundle_id=f"bundle-{version}"
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    import ray

    home = tmp_path_factory.mktemp("site")
    tasks = WORKFLOW.build_tasks("live", 200, 21)
    live_world = {"database": str(home / "live.sqlite")}
    WORKFLOW.build_live_database(tasks, live_world["database"])
    config = GatewayConfig(
        root=str(home / "serving"),
        workflow=REF,
        live_world=live_world,
        limits=AgentLimits(
            max_turns=4, max_tool_calls=3, max_tokens_per_turn=24, max_context_tokens=512, timeout_s=20.0
        ),
        temperature=1.0,
        stale_after_s=600.0,
    )
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    platform = ServePlatform(config, PlatformConfig(http_port=18_431, start_timeout_s=240.0))
    try:
        first = policy(STABLE, save_model(home / STABLE, 1))
        platform.start(first, policy(CANDIDATE, save_model(home / CANDIDATE, 2)))
        platform.candidate = CANDIDATE
        ledger = RequestLedger(config.files.ledger, owner="test")
        yield Site(platform, config, SplitStore(config.files.split), ledger, iter(tasks))
    finally:
        platform.shutdown()
        ray.shutdown()


def test_openai_client_gets_an_answer_with_usage_and_stamps(site: Site) -> None:
    client = openai.OpenAI(base_url=f"{site.platform.url}/v1", api_key="none")
    ask = client.chat.completions.with_raw_response
    site.num_sent += 1
    raw = ask.create(model="support_desk", messages=[{"role": "user", "content": next(site.tickets).prompt}])
    completion = raw.parse()
    assert completion.usage is not None
    assert completion.usage.completion_tokens > 0
    assert completion.choices[0].message.content
    assert raw.headers["x-seatrial-policy-version"] == STABLE
    assert raw.headers["x-seatrial-bundle-id"] == "bundle-sft-a"
    assert raw.headers["x-seatrial-release-channel"] == "general"


def test_openai_client_streams(site: Site) -> None:
    client = openai.OpenAI(base_url=f"{site.platform.url}/v1", api_key="none")
    site.num_sent += 1
    stream = client.chat.completions.create(
        model="support_desk",
        messages=[{"role": "user", "content": next(site.tickets).prompt}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_openai_client_sees_our_errors(site: Site) -> None:
    client = openai.OpenAI(base_url=f"{site.platform.url}/v1", api_key="none")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "hi"}])
    assert [model.id for model in client.models.list()] == ["support_desk"]


def test_candidate_is_healthy(site: Site) -> None:
    assert site.platform.candidate_healthy()


def test_split_reaches_both_versions_and_every_request_has_a_row(site: Site) -> None:
    assert site.put_split(0.5) < 2.0
    progress = site.send(24, "split")
    assert progress.num_failed == 0
    assert set(progress.answered) == {"canary", "general"}
    assert progress.num_unlabelled == 0
    rows = [row for row in site.ledger.rows() if row.request_id.startswith("split.")]
    assert len(rows) == 24
    assert {row.policy_version for row in rows if row.release_channel == "canary"} == {CANDIDATE}
    assert all(row.status != "running" and row.success != "unknown" for row in rows)


def test_killed_candidate_fails_no_request(site: Site) -> None:
    """kill -9 of the candidate's engine under load: its requests end on stable, under a second row."""
    import ray
    from ray.util import list_named_actors

    progress: list[TrafficProgress] = []
    traffic = threading.Thread(target=lambda: progress.append(site.send(90, "kill")))
    traffic.start()
    site.wait_for_rows("kill.", 15)
    for actor in list_named_actors(all_namespaces=True):
        if f"policy-{CANDIDATE}" in actor["name"]:
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=True)
    site.wait_for_rows("kill.", 30)
    seconds = site.put_split(0.0)
    traffic.join(timeout=120.0)
    assert progress
    assert progress[0].num_failed == 0
    assert seconds < 2.0
    assert any(row.status == "engine_error" for row in site.ledger.rows()), "the kill hit no request: no proof"


def test_fail_back_leaves_nothing_on_the_candidate(site: Site) -> None:
    site.put_split(0.0)
    progress = site.send(8, "after")
    assert dict(progress.answered) == {"general": 8}
    assert progress.num_failed == 0


def test_removed_candidate_is_ill_and_its_name_is_spent(site: Site) -> None:
    site.platform.remove_policy(CANDIDATE)
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        try:
            site.platform.candidate_healthy()
        except EngineError:
            break
        time.sleep(0.2)
    else:
        pytest.fail("a removed candidate still answers")
    with pytest.raises(BadInputError, match="give a new name"):
        site.platform.deploy_policy(policy(CANDIDATE, "/elsewhere"))


def test_rows_equal_requests(site: Site) -> None:
    """One row per request, plus one per retry on stable; none lost, none open."""
    rows = list(site.ledger.rows())
    assert len([row for row in rows if "~" not in row.request_id]) == site.num_sent
    assert all(row.status != "running" for row in rows)
    retried = {row.request_id.partition("~")[0] for row in rows if "~" in row.request_id}
    assert retried == {row.request_id for row in rows if row.status == "engine_error"}


def test_health_of_the_gateway(site: Site) -> None:
    reply = httpx.get(f"{site.platform.url}/healthz", timeout=10.0)
    assert reply.status_code == 200
    assert reply.json()["running"] == 0
