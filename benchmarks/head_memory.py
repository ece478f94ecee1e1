"""Log-probabilities from hidden states, forward and backward, in a process of its own: seconds, peak memory, results.

python head_memory.py chunked|naive --tokens 2048 --hidden 256 --vocab 200064 [--threads 1] [--results DIR]

Started by learner_alone.py. `naive` makes all logits at once, as a plain training loop does; its entropy, a metric, is
taken outside autograd, so that nothing is kept for it. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from resident import resident_mib
from torch import Tensor

from rl_actors.contracts import LOGIT_CHUNK_VALUES
from rl_actors.models import chunked_token_logprobs_and_entropy

Scores = tuple[Tensor, Tensor]


def chunked(hidden_BTH: Tensor, weight_VH: Tensor, ids_BT: Tensor) -> Scores:
    """The product's path with its own chunk."""
    chunk = max(1, LOGIT_CHUNK_VALUES["cpu"] // len(weight_VH))
    return chunked_token_logprobs_and_entropy(hidden_BTH, weight_VH, ids_BT, chunk)


def naive(hidden_BTH: Tensor, weight_VH: Tensor, ids_BT: Tensor) -> Scores:
    """All logits at once."""
    logp_BTV = (hidden_BTH[:, :-1] @ weight_VH.T).log_softmax(-1)
    chosen_BT = logp_BTV.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
    with torch.no_grad():
        entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1)
    return torch.nn.functional.pad(chosen_BT, (1, 0)), torch.nn.functional.pad(entropy_BT, (1, 0))


PATHS: dict[str, Callable[[Tensor, Tensor, Tensor], Scores]] = {"chunked": chunked, "naive": naive}


def inputs(tokens: int, hidden: int, vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states and head (both want gradients), token ids, and the weight of each log-probability."""
    generator = torch.Generator().manual_seed(0)
    hidden_BTH = torch.randn(1, tokens, hidden, generator=generator).requires_grad_()
    weight_VH = torch.randn(vocab, hidden, generator=generator).mul_(hidden**-0.5).requires_grad_()
    ids_BT = torch.randint(vocab, (1, tokens), generator=generator)
    return hidden_BTH, weight_VH, ids_BT, torch.randn(1, tokens, generator=generator)


def results(path: str, tokens: int, hidden: int, vocab: int) -> Callable[[], dict[str, Tensor]]:
    """Return a step: log-probabilities and entropies, then the gradients of the weighted sum of the former."""
    hidden_BTH, weight_VH, ids_BT, pull_BT = inputs(tokens, hidden, vocab)

    def step() -> dict[str, Tensor]:
        logprobs_BT, entropy_BT = PATHS[path](hidden_BTH, weight_VH, ids_BT)
        grad_hidden, grad_weight = torch.autograd.grad((logprobs_BT * pull_BT).sum(), (hidden_BTH, weight_VH))
        return {
            "logprobs": logprobs_BT.detach(),
            "entropy": entropy_BT.detach(),
            "hidden_gradient": grad_hidden,
            "weight_gradient": grad_weight,
        }

    return step


def main() -> None:
    """Measure one path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", choices=list(PATHS))
    for name in ("tokens", "hidden", "vocab"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2, help="timed steps after one warm-up")
    parser.add_argument("--results", type=Path, help="a folder for the tensors")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    step = results(arguments.path, arguments.tokens, arguments.hidden, arguments.vocab)
    found: dict[str, Tensor] = {}
    before, seconds = resident_mib("VmRSS"), []
    for _ in range(arguments.repeats + 1):
        found.clear()  # the last step's gradients are not part of this one's peak
        started = time.perf_counter()
        found = step()
        seconds.append(time.perf_counter() - started)
    peak = resident_mib("VmHWM") - before
    if arguments.results:
        torch.save(found, arguments.results / f"{arguments.path}.pt")
    print(json.dumps({"seconds": statistics.median(seconds[1:]), "peak_mib": peak}))  # noqa: T201


if __name__ == "__main__":
    main()
