"""One GRPO step end to end, seatrial against TRL's GRPOTrainer: generate, score, train and publish, in one run.

python benchmarks/trl_step.py [--threads 2] [--repeats 9] [--out benchmarks/results/trl_step.json]
python benchmarks/trl_step.py --quick      the same on toy sizes, to prove the script; its figures mean nothing

Two models of about 1M parameters (GPT-OSS and dense Qwen3), each written once and loaded by both sides. The same
prompts, 8 of them with 8 completions of exactly 128 tokens (the end token lies outside the vocabulary), the same
microbatches and threads, float32, GRPO loss (mean over sequences), KL coefficient 0.02 with a reference pass, one
epoch, one AdamW step. Both skip the pass for old log-probabilities. The sides are processes of their own that take
steps in turn, the first one of each round in turn as well, and are stopped while the other one works; each figure is
the median after the warm-up rounds.

seatrial: vLLM engines, learners, publish and attestation as Ray actors, one engine and one learner for each thread.
TRL: generation by Transformers, its default; its vLLM modes need a GPU or a server, so this is not TRL at its fastest
on other hardware. TRL lives in an environment of its own, which the first run installs (1.2 GB) under --environment.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from grpo_job import PARTS, Job
from record import write_results
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
TRL_VERSION = "1.16.0"
GOAL = 1.5
SETTLE_S = 0.3  # Ray's heartbeats catch up
SIDES = ("seatrial", "trl")
MODELS = ("gpt_oss", "qwen3")
NUM_PROMPTS = 64
SIZES = {"vocab": 904, "hidden": 128, "layers": 4, "tasks": 8, "attempts": 8, "prompt": 32, "completion": 128}
QUICK_SIZES = {"vocab": 200, "hidden": 64, "layers": 2, "tasks": 2, "attempts": 4, "prompt": 8, "completion": 16}
Answer = dict[str, Any]


def write_model(name: str, directory: Path, sizes: Mapping[str, int]) -> int:
    """Write a random model and its tokenizer (one word per id); returns the number of parameters."""
    from rl_actors.models import build_tiny_model, tiny_config

    vocab, hidden, layers = sizes["vocab"], sizes["hidden"], sizes["layers"]
    if name == "gpt_oss":
        config = tiny_config(
            vocab_size=vocab, hidden_size=hidden, num_layers=layers, num_experts=4, max_length=512, eos_token_id=0
        )
        model: Any = build_tiny_model(config, seed=0)
        # Its head is a copy of its embeddings, for copying: untrained it would repeat one token, without entropy.
        torch.nn.init.normal_(model.lm_head.weight, 0.0, config.initializer_range, torch.Generator().manual_seed(0))
    else:
        torch.manual_seed(0)
        model = transformers.Qwen3ForCausalLM(dense_config(vocab, hidden, layers)).float()
    for about in (model.config, model.generation_config):
        about.eos_token_id = None  # only the tokenizer names an end token, one that the model cannot say
    model.save_pretrained(directory)
    word_tokenizer(vocab).save_pretrained(directory)
    return model.num_parameters()


def dense_config(vocab: int, hidden: int, layers: int) -> transformers.Qwen3Config:
    """Return a dense model of the same width as the tiny GPT-OSS."""
    head_dim = 32
    return transformers.Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // head_dim, num_key_value_heads=hidden // head_dim // 2, head_dim=head_dim,
        max_position_embeddings=512, tie_word_embeddings=False, pad_token_id=0, dtype="float32",
    )  # fmt: skip


def word_tokenizer(vocab: int) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of words w0, w1, ...; its end token is the first id beyond the model's vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{token}": token for token in range(vocab)} | {"<end>": vocab}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="<end>")


def make_job(directory: Path, sizes: Mapping[str, int], microbatch: int, threads: int) -> Job:
    """Return what both sides do with a model; the last microbatch must be a full one, so that both cut alike."""
    if (sizes["tasks"] * sizes["attempts"]) % microbatch:
        raise SystemExit(f"trl_step: --microbatch {microbatch} does not divide the completions of a step")
    rng = random.Random(0)
    prompts = tuple(tuple(rng.choices(range(1, sizes["vocab"]), k=sizes["prompt"])) for _ in range(NUM_PROMPTS))
    return Job(
        model_dir=str(directory), prompts=prompts, tasks=sizes["tasks"], attempts=sizes["attempts"],
        completion_tokens=sizes["completion"], microbatch=microbatch, threads=threads,
    )  # fmt: skip


def trl_python(directory: Path, trl_version: str) -> Path:
    """Return the interpreter of TRL's environment, installing it unless it is there with these versions."""
    python = directory / "bin" / "python"
    wanted = [f"torch=={torch.__version__.partition('+')[0]}", f"transformers=={transformers.__version__}"]
    wanted.append(f"trl=={trl_version}")
    stamp = directory / ".installed"
    if stamp.is_file() and stamp.read_text(encoding="utf8").split() == wanted:
        return python
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if uv is None:
        raise SystemExit("trl_step: no uv found; `make env` installs one beside the interpreter")
    # Only what is such an environment already may be cleared; uv itself refuses any other folder that is not empty.
    clear = ["--clear"] if (directory / "pyvenv.cfg").is_file() else []
    subprocess.run([uv, "venv", "--quiet", *clear, "--python", sys.executable, str(directory)], check=True)
    environment, backend = cpu_source(os.environ)
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", str(python), *backend, *wanted], check=True, env=environment
    )
    stamp.write_text(" ".join(wanted), encoding="utf8")
    return python


def cpu_source(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the environment and the options with which uv finds a CPU build of torch; it ignores pip's find-links."""
    if links := environment.get("PIP_FIND_LINKS"):
        return {**environment, "UV_FIND_LINKS": links}, []
    return dict(environment), ["--torch-backend=cpu"]


class Side:
    """One worker process, asked for a step at a time."""

    def __init__(self, python: Path, script: str, job_file: Path, threads: int) -> None:
        """Start the worker and wait until it is ready; what it says beside its answers lies beside the job."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(HERE.parent),
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._script, self._log = script, job_file.with_name(f"{Path(script).stem}.log")
        with self._log.open("w", encoding="utf8") as log:
            self._process = subprocess.Popen(
                [str(python), str(HERE / script), str(job_file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        self.versions = self._answer()
        self._signal(signal.SIGSTOP)

    def step(self) -> Answer:
        """Take one step; returns its seconds. Its processes rest before and after: the cores are the other side's."""
        self._signal(signal.SIGCONT)
        time.sleep(SETTLE_S)
        answer = self._step()
        self._signal(signal.SIGSTOP)
        return answer

    def _step(self) -> Answer:
        assert self._process.stdin
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Hang up, and end a worker that does not leave by itself; idempotent."""
        self._signal(signal.SIGCONT)
        try:
            self._process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def _signal(self, number: int) -> None:
        """Tell the worker and everything it started."""
        with suppress(psutil.NoSuchProcess):
            worker = psutil.Process(self._process.pid)
            for process in (*worker.children(recursive=True), worker):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def _answer(self) -> Answer:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self.close()
        raise SystemExit(f"trl_step: {self._script} ended:\n{self._log.read_text(encoding='utf8')[-3000:]}")


def rounds(sides: Mapping[str, Side], job: Job, repeats: int, warm_ups: int) -> dict[str, list[Answer]]:
    """Take `repeats` steps on each side in turn, after warm-up rounds; whoever begins a round is second in the next."""
    found: dict[str, list[Answer]] = {name: [] for name in sides}
    for number in range(warm_ups + repeats):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            answer = sides[name].step()
            require_whole(name, answer, job)
            found[name].append(answer)
    return {name: answers[warm_ups:] for name, answers in found.items()}


def require_whole(name: str, answer: Answer, job: Job) -> None:
    """Refuse a step that sampled another number of tokens than asked for."""
    if answer["num_tokens"] != job.num_tokens:
        raise SystemExit(f"trl_step: {name} sampled {answer['num_tokens']} tokens instead of {job.num_tokens}")


def summary(found: Mapping[str, Sequence[Answer]], num_tokens: int) -> dict[str, Any]:
    """Return per side the medians of the whole step and of its parts, and the ratio of tokens per second.

    The range of the ratio is that of the rounds: in each of them both sides ran one after the other.
    """
    sides = {name: _medians(answers, num_tokens) for name, answers in found.items()}
    ours, theirs = found["seatrial"], found["trl"]
    by_round = [b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True)]
    return {
        "sides": sides,
        "ratio": sides["seatrial"]["tokens_per_s"] / sides["trl"]["tokens_per_s"],
        "ratio_range": [min(by_round), max(by_round)],
    }


def _medians(answers: Sequence[Answer], num_tokens: int) -> dict[str, Any]:
    seconds = statistics.median(answer["seconds"] for answer in answers)
    parts = {part: statistics.median(answer[part] for answer in answers) for part in (*PARTS, "cpu_s")}
    return {"tokens_per_s": num_tokens / seconds, "step_s": seconds, **parts}


def measure(name: str, arguments: argparse.Namespace, python: Path) -> dict[str, Any]:
    """Measure both sides on one model."""
    sizes = QUICK_SIZES if arguments.quick else SIZES
    with tempfile.TemporaryDirectory() as folder:
        directory, job_file = Path(folder) / name, Path(folder) / "job.json"
        num_parameters = write_model(name, directory, sizes)
        job = make_job(directory, sizes, arguments.microbatch, arguments.threads)
        job.write(job_file)
        interpreters = {"seatrial": Path(sys.executable), "trl": python}
        sides: dict[str, Side] = {}
        try:
            for side in SIDES:
                sides[side] = Side(interpreters[side], f"grpo_step_{side}.py", job_file, arguments.threads)
            found = rounds(sides, job, arguments.repeats, arguments.warm_ups)
        finally:
            for side in sides.values():
                side.close()
    about = {key: value for key, value in asdict(job).items() if key not in ("model_dir", "prompts")}
    versions = {name: side.versions for name, side in sides.items()}
    return {
        "model": name,
        "num_parameters": num_parameters,
        "prompt_tokens": sizes["prompt"],
        "job": about,
        "versions": versions,
        **summary(found, job.num_tokens),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows for a person."""
    heads = (
        "model",
        "side",
        "tokens/s",
        "step s",
        *(part.removesuffix("_s") + " s" for part in PARTS),
        "CPU s",
        "ratio",
    )
    shown = Table(*heads, title=f"one GRPO step, goal {GOAL}x TRL")
    for row in rows:
        for name, side in row["sides"].items():
            times = [f"{side[key]:.3f}" for key in ("step_s", *PARTS, "cpu_s")]
            low, high = row["ratio_range"]
            ratio = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})" if name == "seatrial" else ""
            shown.add_row(row["model"], name, f"{side['tokens_per_s']:,.0f}", *times, ratio)
    return shown


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--warm-ups", type=int, default=2)
    parser.add_argument("--microbatch", type=int, default=8, help="sequences in a forward pass, on both sides")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--trl", default=TRL_VERSION, help="TRL's version")
    parser.add_argument("--environment", type=Path, default=HERE.parent / "build" / "trl_environment")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(words)


def main() -> None:
    """Measure every model, print a table, and write the JSON when asked to."""
    arguments = parsed(sys.argv[1:])
    python = trl_python(arguments.environment, arguments.trl)
    rows = [measure(name, arguments, python) for name in arguments.models]
    Console(width=max(120, Console().width)).print(table(rows))
    if arguments.out:
        hardware = f"{arguments.threads} threads, no GPU"
        write_results(arguments.out, hardware, {"goal": GOAL, "is_quick": arguments.quick, "rows": rows})


if __name__ == "__main__":
    main()
