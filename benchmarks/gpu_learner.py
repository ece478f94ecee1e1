"""Sink attention, chunked LM head and expert path at the shapes of a GPT-OSS-20B layer, against eager, on one GPU.

PYTHONPATH=. python benchmarks/gpu_learner.py [--rows 1] [--length 8192] [--out benchmarks/results/gpu_learner.json]
PYTHONPATH=. python benchmarks/gpu_learner.py --tiny      the same code at toy shapes on CPU, to prove the script

Needs torch and transformers only. This script has not been run on a GPU yet: on CPU every line but the CUDA kernels and
the CUDA memory counters has run. Exit codes: 0 done, 1 gradients differ from eager's, 3 no GPU.

Each part is forward and backward, median of the repeats after two warm-ups. MFU counts three times the forward's
floating-point operations (a backward is two), only pairs that a mask allows, over the card's dense peak. Before timing,
outputs and gradients are compared with eager's: the error is ours, as a fraction of the largest entry.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from record import write_results
from torch import Tensor
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from rl_actors.models import (
    allowed_pairs,
    chunked_token_logprobs_and_entropy,
    eager_sink_attention,
    sink_attention,
    sorted_experts,
)

# Dense bfloat16 peaks in TFLOP/s from NVIDIA's data sheets, by a word of the device's name.
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "B200": 2250.0}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}
WARM_UPS = 2
Step = Callable[[], list[Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """Sizes of one layer and of the head; the defaults are GPT-OSS-20B's."""

    hidden: int = 2880
    query_heads: int = 64
    key_heads: int = 8
    head_dim: int = 64
    num_experts: int = 32
    experts_per_token: int = 4
    intermediate: int = 2880
    vocab: int = 201_088
    window: int = 128
    rows: int = 1
    length: int = 8192
    chunk: int = 1024

    @property
    def num_tokens(self) -> int:
        """Tokens of a batch."""
        return self.rows * self.length


TINY = Shapes(
    hidden=64, query_heads=4, key_heads=2, head_dim=16, num_experts=4, experts_per_token=2, intermediate=64, vocab=512,
    window=16, rows=2, length=96, chunk=50,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One piece of a training step; each path returns its output and gradients, "eager" the ones to match."""

    name: str
    forward_flops: float
    paths: dict[str, Step]


def drawn(*sizes: int, device: str, dtype: torch.dtype, std: float = 1.0, seed: int = 0) -> Tensor:
    """Return a random leaf, the same on every device."""
    tensor = torch.randn(sizes, generator=torch.Generator().manual_seed(seed)) * std
    return tensor.to(device=device, dtype=dtype).requires_grad_()


def with_gradients(forward: Callable[[], Tensor], leaves: Sequence[Tensor], weights: Tensor) -> Step:
    """Return a step: the output of `forward`, then the gradients of its product with `weights`."""

    def step() -> list[Tensor]:
        out = forward()
        return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.dtype))]

    return step


def attention_part(shapes: Shapes, window: int | None, device: str, dtype: torch.dtype) -> Part:
    """Attention alone: full, or in a sliding window as every other layer has."""
    rows, length, dim = shapes.rows, shapes.length, shapes.head_dim
    query = drawn(rows, length, shapes.query_heads, dim, device=device, dtype=dtype, seed=1)
    key = drawn(rows, length, shapes.key_heads, dim, device=device, dtype=dtype, seed=2)
    value = drawn(rows, length, shapes.key_heads, dim, device=device, dtype=dtype, seed=3)
    sinks = drawn(shapes.query_heads, device=device, dtype=dtype, seed=4)
    leaves = (query, key, value, sinks)
    weights = drawn(rows, shapes.query_heads, length, dim, device=device, dtype=dtype, seed=5).detach()
    seen = min(window or length, length)
    pairs = seen * (seen + 1) / 2 + (length - seen) * seen

    # Heads come second by a transpose, as in the model: kernels must not need another layout.
    def ours() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in leaves[:3])
        return sink_attention(q, k, v, sinks, sliding_window=window)

    def eager() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in leaves[:3])
        return eager_sink_attention(q, k, v, sinks, allowed_pairs(q, k, None, True, window), dim**-0.5)

    return Part(
        name="full attention" if window is None else f"attention in a window of {window}",
        forward_flops=4.0 * rows * shapes.query_heads * dim * pairs,
        paths={
            "seatrial_sink": with_gradients(ours, leaves, weights),
            "eager": with_gradients(eager, leaves, weights),
        },
    )


def head_part(shapes: Shapes, device: str, dtype: torch.dtype) -> Part:
    """Log-probability and entropy of each token from hidden states."""
    hidden = drawn(shapes.rows, shapes.length, shapes.hidden, device=device, dtype=dtype, seed=6)
    weight = drawn(shapes.vocab, shapes.hidden, device=device, dtype=dtype, std=shapes.hidden**-0.5, seed=7)
    ids = torch.randint(shapes.vocab, (shapes.rows, shapes.length), generator=torch.Generator().manual_seed(8))
    ids = ids.to(device)
    weights = drawn(2, shapes.rows, shapes.length, device=device, dtype=torch.float32, seed=9).detach()

    def ours() -> Tensor:
        return torch.stack(chunked_token_logprobs_and_entropy(hidden, weight, ids, shapes.chunk))

    def eager() -> Tensor:
        logp = (hidden[:, :-1] @ weight.T).float().log_softmax(-1)
        chosen = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)
        return torch.nn.functional.pad(torch.stack([chosen, -(logp.exp() * logp).sum(-1)]), (1, 0))

    return Part(
        name="LM head",
        forward_flops=2.0 * shapes.num_tokens * shapes.vocab * shapes.hidden,
        paths={
            "chunked": with_gradients(ours, (hidden, weight), weights),
            "eager": with_gradients(eager, (hidden, weight), weights),
        },
    )


def experts_part(shapes: Shapes, device: str, dtype: torch.dtype) -> Part:
    """The experts of one layer under random routing; `grouped_mm` is Transformers' own fast path."""
    config = GptOssConfig(
        hidden_size=shapes.hidden, intermediate_size=shapes.intermediate, num_local_experts=shapes.num_experts,
        num_experts_per_tok=shapes.experts_per_token, num_hidden_layers=1,
    )  # fmt: skip
    with torch.device(device):
        experts: Any = GptOssExperts(config).to(dtype)
    for seed, parameter in enumerate(experts.parameters()):
        generator = torch.Generator(device).manual_seed(seed)
        torch.nn.init.normal_(parameter, 0.0, shapes.hidden**-0.5, generator=generator)
    tokens = drawn(shapes.num_tokens, shapes.hidden, device=device, dtype=dtype, seed=10)
    scores = drawn(shapes.num_tokens, shapes.num_experts, device=device, dtype=torch.float32, seed=11).detach()
    top, ids = scores.topk(shapes.experts_per_token)
    routing = top.softmax(-1).to(dtype)
    weights = drawn(shapes.num_tokens, shapes.hidden, device=device, dtype=dtype, seed=12).detach()
    leaves = (tokens, *experts.parameters())

    def transformers_path(name: str) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            config._experts_implementation = name
            return experts(tokens, ids, routing)

        return forward

    return Part(
        name="experts",
        forward_flops=6.0 * shapes.num_tokens * shapes.experts_per_token * shapes.hidden * shapes.intermediate,
        paths={
            "seatrial_sorted": with_gradients(lambda: sorted_experts(experts, tokens, ids, routing), leaves, weights),
            "grouped_mm": with_gradients(transformers_path("grouped_mm"), leaves, weights),
            "eager": with_gradients(transformers_path("eager"), leaves, weights),
        },
    )


def largest_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest difference, each tensor's as a fraction of its largest entry."""
    pairs = zip(found, wanted, strict=True)
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)


def timed(step: Step, device: str, repeats: int) -> tuple[float, float | None]:
    """Return (median seconds, peak memory in GiB above what was held before; None on CPU)."""
    if device != "cuda":
        return statistics.median(_seconds(step, repeats)), None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    seconds = statistics.median(_seconds(step, repeats))
    return seconds, (torch.cuda.max_memory_allocated() - held) / 2**30


def _seconds(step: Step, repeats: int) -> list[float]:
    seconds = []
    for _ in range(WARM_UPS + repeats):
        started = time.perf_counter()
        # A GPU works behind the caller's back: reading a number waits for it.
        float(step()[-1].flatten()[0])
        seconds.append(time.perf_counter() - started)
    return seconds[WARM_UPS:]


def measure(part: Part, shapes: Shapes, device: str, repeats: int, peak_tflops: float | None) -> dict[str, Any]:
    """Return a row: per path its error against eager, tokens per second, MFU and peak memory, or why there is none."""
    wanted = _attempt(part.paths["eager"])
    row: dict[str, Any] = {"part": part.name, "forward_tflop": part.forward_flops / 1e12, "paths": {}}
    for name, step in part.paths.items():
        found = _attempt(step)
        if found is None:
            row["paths"][name] = {"failed": "out of memory"}
            continue
        error = None if wanted is None else largest_error(found, wanted)
        del found
        seconds, peak_gib = timed(step, device, repeats)
        row["paths"][name] = {
            "error": error,
            "tokens_per_s": shapes.num_tokens / seconds,
            "mfu": 3.0 * part.forward_flops / seconds / (peak_tflops * 1e12) if peak_tflops else None,
            "peak_gib": peak_gib,
        }
    return row


def _attempt(step: Step) -> list[Tensor] | None:
    try:
        return step()
    except torch.OutOfMemoryError:
        return None


def describe(row: dict[str, Any]) -> str:
    """Return a few lines for a human."""
    lines = [f"{row['part']} ({row['forward_tflop']:.4f} TFLOP forward)"]
    for name, found in row["paths"].items():
        if "failed" in found:
            lines.append(f"  {name:16} {found['failed']}")
            continue
        mfu = "-" if found["mfu"] is None else f"{found['mfu']:.1%}"
        peak = "-" if found["peak_gib"] is None else f"{found['peak_gib']:.2f} GiB"
        error = "-" if found["error"] is None else f"{found['error']:.1e}"
        lines.append(f"  {name:16} {found['tokens_per_s']:12,.0f} tokens/s  MFU {mfu}  peak {peak}  error {error}")
    return "\n".join(lines)


def differing(rows: Sequence[dict[str, Any]], tolerance: float) -> list[str]:
    """Return our paths (the first of each row) whose output or gradients are not eager's."""
    ours = [(f"{row['part']}: {next(iter(row['paths']))}", next(iter(row["paths"].values()))) for row in rows]
    # `not <=` and not `>`: a NaN must not pass.
    return [name for name, found in ours if found.get("error") is not None and not found["error"] <= tolerance]


def make_parts(shapes: Shapes, device: str, dtype: torch.dtype) -> list[Callable[[], Part]]:
    """Return the parts, each built when its turn comes: together they would fill the card."""
    return [
        lambda: attention_part(shapes, None, device, dtype),
        lambda: attention_part(shapes, shapes.window, device, dtype),
        lambda: head_part(shapes, device, dtype),
        lambda: experts_part(shapes, device, dtype),
    ]


def known_peak(hardware: str) -> float | None:
    """Return the card's dense bfloat16 peak in TFLOP/s, or None for one that is not in the table."""
    return next((peak for word, peak in PEAK_TFLOPS.items() if word in hardware), None)


def main() -> int:
    """Compare, measure, print, and write the JSON when asked to; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy shapes on CPU in float32")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--peak-tflops", type=float, help="dense bfloat16 peak of a card that is not in the table")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        print("gpu_learner: no GPU found; --tiny runs the same code at toy shapes on CPU", file=sys.stderr)  # noqa: T201
        return 3
    device, dtype = ("cpu", torch.float32) if arguments.tiny else ("cuda", torch.bfloat16)
    shapes = TINY if arguments.tiny else Shapes(rows=arguments.rows, length=arguments.length)
    hardware = "no GPU" if arguments.tiny else torch.cuda.get_device_name()
    peak = None if arguments.tiny else arguments.peak_tflops or known_peak(hardware)
    rows = []
    for make_part in make_parts(shapes, device, dtype):
        rows.append(measure(make_part(), shapes, device, arguments.repeats, peak))
        print(describe(rows[-1]), flush=True)  # noqa: T201
    if arguments.out:
        write_results(arguments.out, hardware, {"shapes": asdict(shapes), "rows": rows})
    if wrong := differing(rows, TOLERANCES[dtype]):
        print(f"gpu_learner: gradients differ from eager's: {', '.join(wrong)}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
