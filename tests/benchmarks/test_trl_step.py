"""What `benchmarks/trl_step.py` says about two sides is about the same work; TRL itself is not installed here."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trl_step
from grpo_job import PARTS, Job, as_text, reward
from rich.console import Console
from trl_step import (
    QUICK_SIZES,
    Side,
    cpu_source,
    make_job,
    parsed,
    require_whole,
    rounds,
    summary,
    table,
    trl_python,
    word_tokenizer,
    write_model,
)

WORKER = f"""
import pathlib, sys
sys.path.append({str(trl_step.HERE)!r})
from grpo_job import Answers, Job
job, answers = Job.read(pathlib.Path(sys.argv[1])), Answers()
print("a library that talks")
answers.say({{"name": "one"}})
for step in answers.requests():
    if step == 2:
        raise RuntimeError("out of patience")
    answers.say({{"seconds": 1.0 + step, "num_tokens": job.num_tokens}})
"""


def job(tmp_path: Path) -> Job:
    return make_job(tmp_path / "model", QUICK_SIZES, 4, 1)


def answer(seconds: float, num_tokens: int = 128) -> dict[str, Any]:
    return {"seconds": seconds, **dict.fromkeys(PARTS, seconds / 4), "cpu_s": seconds, "num_tokens": num_tokens}


class FakeSide:
    """Takes no time, and writes down whose turn it was."""

    versions: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, name: str, turns: list[str], num_tokens: int) -> None:
        self.name, self.turns, self.num_tokens = name, turns, num_tokens

    def step(self) -> dict[str, Any]:
        self.turns.append(self.name)
        return answer(float(len(self.turns)), self.num_tokens)


def test_a_job_reads_as_it_was_written(tmp_path: Path):
    made = job(tmp_path)
    made.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == made
    assert (made.num_completions, made.num_tokens, made.sequence_tokens) == (8, 128, 24)


def test_prompts_go_round(tmp_path: Path):
    made = job(tmp_path)
    assert made.prompts_of(0) == list(made.prompts[:2])
    assert made.prompts_of(len(made.prompts) // 2) == made.prompts_of(0)


def test_a_microbatch_that_leaves_a_rest_is_refused(tmp_path: Path):
    with pytest.raises(SystemExit, match="does not divide"):
        make_job(tmp_path, QUICK_SIZES, 3, 1)


def test_text_becomes_exactly_its_ids():
    tokenizer = word_tokenizer(50)
    assert tokenizer(text=[as_text((1, 49, 7))])["input_ids"] == [[1, 49, 7]]


@pytest.mark.parametrize("name", trl_step.MODELS)
def test_a_model_cannot_say_its_end_token(name: str, tmp_path: Path):
    assert write_model(name, tmp_path, QUICK_SIZES) > 100_000
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf8"))
    assert config["eos_token_id"] is None
    assert word_tokenizer(QUICK_SIZES["vocab"]).eos_token_id == config["vocab_size"]


def test_the_reward_tells_completions_apart():
    assert reward((2, 4, 5, 7)) == 0.5
    assert reward((2, 4)) == 1.0


def test_a_short_step_is_refused(tmp_path: Path):
    require_whole("trl", answer(1.0, 128), job(tmp_path))
    with pytest.raises(SystemExit, match="trl sampled 127 tokens instead of 128"):
        require_whole("trl", answer(1.0, 127), job(tmp_path))


def test_sides_take_turns_and_warm_ups_do_not_count(tmp_path: Path):
    turns: list[str] = []
    sides: Any = {name: FakeSide(name, turns, 128) for name in trl_step.SIDES}
    found = rounds(sides, job(tmp_path), repeats=2, warm_ups=1)
    assert turns == ["seatrial", "trl", "trl", "seatrial", "seatrial", "trl"]
    assert [a["seconds"] for a in found["seatrial"]] == [4.0, 5.0]
    assert [a["seconds"] for a in found["trl"]] == [3.0, 6.0]


def test_the_ratio_is_of_tokens_per_second():
    found = {"seatrial": [answer(1.0), answer(2.0), answer(1.0)], "trl": [answer(2.0), answer(2.0), answer(3.0)]}
    row = summary(found, 128)
    assert row["sides"]["seatrial"]["tokens_per_s"] == 128.0
    assert row["ratio"] == 2.0
    assert row["ratio_range"] == [1.0, 3.0]
    assert row["sides"]["trl"]["train_s"] == 0.5


def test_the_table_shows_both_sides():
    row = {"model": "qwen3", **summary({"seatrial": [answer(1.0)], "trl": [answer(2.0)]}, 1280)}
    text = io.StringIO()
    Console(width=140, file=text).print(table([row]))
    assert "1,280" in text.getvalue()
    assert "2.00 (2.00 to 2.00)" in text.getvalue()


def test_a_worker_answers_and_its_libraries_may_talk(tmp_path: Path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf8")
    job(tmp_path).write(tmp_path / "job.json")
    side = Side(Path(sys.executable), str(script), tmp_path / "job.json", 1)
    assert side.versions == {"name": "one"}
    assert [side.step()["seconds"], side.step()["seconds"]] == [1.0, 2.0]
    with pytest.raises(SystemExit, match="out of patience"):
        side.step()
    side.close()


def test_a_cpu_build_comes_from_the_links_or_from_uv():
    assert cpu_source({"PIP_FIND_LINKS": "there"}) == ({"PIP_FIND_LINKS": "there", "UV_FIND_LINKS": "there"}, [])
    assert cpu_source({"A": "b"}) == ({"A": "b"}, ["--torch-backend=cpu"])


def test_trl_is_installed_once_per_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[list[str]] = []

    def run(words: list[str], **_: Any) -> None:
        calls.append(words)
        (tmp_path / "trl").mkdir(exist_ok=True)
        (tmp_path / "trl" / "pyvenv.cfg").touch()

    monkeypatch.setattr(subprocess, "run", run)
    first = trl_python(tmp_path / "trl", "1.2.3")
    assert first == trl_python(tmp_path / "trl", "1.2.3") == tmp_path / "trl" / "bin" / "python"
    assert [words[1] for words in calls] == ["venv", "pip"]
    assert "trl==1.2.3" in calls[1]
    trl_python(tmp_path / "trl", "1.2.4")
    assert len(calls) == 4
    assert ["--clear" in words for words in calls] == [False, False, True, False]


def test_the_environment_lies_in_an_ignored_folder():
    where = parsed([]).environment.relative_to(trl_step.HERE.parent)
    assert where.parts[0] == "build"
