"""One way to build a DeepSpeed engine, on CPU (gloo) and GPU (NCCL) alike, and to take an optimizer step with it.

Its small CPU operator is built once per environment and never waited for without a bound.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from rl_actors.contracts import BadInputError
from rl_actors.durable import file_lock

INITIAL_MICRO_STEP = -1  # DeepSpeed's own mark of "no backward pass yet" in ZeRO 1 and 2; in ZeRO-3 it is 0
DIRECTORY_VARIABLE: Final = "TORCH_EXTENSIONS_DIR"
BUILD_TIMEOUT_S: Final = 600.0

# Before anything imports DeepSpeed: it chooses its accelerator once.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """AdamW with a global gradient-norm clip. `zero_stage` shards optimizer state (1, 2) and parameters (3).

    With `muon_learning_rate` above 0, matrices between embedding and head are trained by Muon (orthogonalised momentum,
    kellerjordan.github.io/posts/muon) and everything else by AdamW at `learning_rate`; ZeRO 0 only.
    With `is_bf16` weights and gradients are bfloat16, and the optimizer steps float32 masters of them.
    """

    learning_rate: float
    max_grad_norm: float
    weight_decay: float = 0.0
    zero_stage: int = 0
    beta2: float = 0.98
    muon_learning_rate: float = 0.0
    is_bf16: bool = field(default_factory=torch.cuda.is_available)


def deepspeed_config(settings: OptimizerSettings) -> dict[str, Any]:
    """Return DeepSpeed's own configuration."""
    # Muon trains in float32: only models built from nothing use it, and it wants whole matrices.
    is_bf16 = settings.is_bf16 and not settings.muon_learning_rate
    parameters = {
        "lr": settings.learning_rate,
        "betas": [0.9, settings.beta2],
        "eps": 1e-8,
        "weight_decay": settings.weight_decay,
        "torch_adam": True,
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # microbatches vary in size: the loss is scaled by us, not by it
        "gradient_clipping": settings.max_grad_norm,
        "optimizer": {"type": "AdamW", "params": parameters},
        # Stage 1 is the least with float32 masters of bfloat16 weights; stage 0 would round small steps away.
        "zero_optimization": {"stage": max(settings.zero_stage, 1) if is_bf16 else settings.zero_stage},
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": is_bf16},
        # Sums of many microbatches in bfloat16 would lose the small shares: a split would change the gradient.
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 1 << 30,
    }


def build_engine(
    module: torch.nn.Module, settings: OptimizerSettings, groups: Sequence[Mapping[str, Any]] | None = None
) -> Any:
    """Return a DeepSpeed engine over `module`; torch.distributed must be initialised or initialisable from env.

    `groups` are parameter groups with learning rates of their own; without them every trainable parameter is one group.

    Raises:
        BadInputError: Muon together with ZeRO, which shards the matrices it needs whole.
    """
    ensure_operators()
    import deepspeed

    deepspeed.logger.setLevel("WARNING")
    trainable: Any = list(groups) if groups else [p for p in module.parameters() if p.requires_grad]
    optimizer, config = None, deepspeed_config(settings)
    if settings.muon_learning_rate:
        if settings.zero_stage:
            raise BadInputError("zero_stage", settings.zero_stage, "Muon needs whole matrices; use 0, or AdamW alone")
        optimizer = _muon(module, settings)
        del config["optimizer"]
    made = deepspeed.initialize(model=module, optimizer=optimizer, model_parameters=trainable, config=config)
    engine: Any = made[0]
    # In the group, not beside it: a checkpoint then carries the peak along.
    for group in engine.optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return engine


def _muon(module: torch.nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return DeepSpeed's Muon over the matrices, experts included, with AdamW beside it for the rest."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    parts: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parts[is_muon_matrix(name, parameter)].append(parameter)
    muon = {"lr": settings.muon_learning_rate, "momentum": 0.95, "ns_method": "standard", "use_muon": True}
    adam = {"lr": settings.learning_rate, "betas": (0.9, settings.beta2), "eps": 1e-8, "use_muon": False}
    groups = [{"params": parts[True], **muon}, {"params": parts[False], **adam}]
    return MuonWithAuxAdam([{"weight_decay": settings.weight_decay, **group} for group in groups])


def is_muon_matrix(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter maps hidden states to hidden states: no embedding, head, router or (stacked) bias."""
    is_excluded = any(part in name for part in ("embed", "lm_head", "router", "bias"))
    return parameter.dim() >= 2 and not is_excluded


def accumulate(engine: Any, microbatches: Iterable[Any], loss_of: Callable[[Any], torch.Tensor]) -> float:
    """Sum the gradients of all microbatches and return their global norm before clipping; nothing is stepped yet.

    `loss_of` must already divide by the *global* number of loss tokens and multiply by the number of ranks, because
    DeepSpeed averages gradients over ranks. Follow with `engine.step()`, or with `discard`.
    """
    batches = list(microbatches)
    for index, microbatch in enumerate(batches):
        engine.set_gradient_accumulation_boundary(is_boundary=index == len(batches) - 1)
        engine.backward(loss_of(microbatch))
    return gradient_norm(engine, engine.module)


def accumulate_and_step(engine: Any, microbatches: Iterable[Any], loss_of: Callable[[Any], torch.Tensor]) -> float:
    """Take one optimizer step and return the gradient norm before clipping; see `accumulate`."""
    norm = accumulate(engine, microbatches, loss_of)
    engine.step()
    return norm


def discard(engine: Any) -> None:
    """Drop accumulated gradients without a step, clearing what DeepSpeed itself clears after an overflow."""
    engine.zero_grad()
    optimizer = engine.optimizer
    optimizer.zero_grad()  # under ZeRO-3 this also says that the next gradient is the first of its sum
    if engine.zero_optimization_stage() in (1, 2):  # these keep copies of their own, and add to them until a step
        optimizer.micro_step_id = INITIAL_MICRO_STEP
        for name in ("averaged_gradients", "all_grad_tensors"):
            held = getattr(optimizer, name, {})
            held.update(dict.fromkeys(held))


def gradient_norm(engine: Any, module: torch.nn.Module) -> float:
    """Return the norm over a module's parameters, at any ZeRO stage, of the whole accumulated batch."""
    from deepspeed.utils import safe_get_full_grad

    parameters = [p for p in module.parameters() if p.requires_grad]
    # Under ZeRO a gradient is not where autograd puts it: DeepSpeed keeps its own, in shards.
    is_sharded = engine.zero_optimization_stage() > 0
    gradients = [safe_get_full_grad(p) if is_sharded else p.grad for p in parameters]
    return float(torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None]))


def scale_learning_rate(engine: Any, factor: float) -> None:
    """Set the learning rate of every parameter group to this share of its own peak."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def whole_parameters(module: torch.nn.Module, *, is_sharded: bool) -> dict[str, torch.Tensor]:
    """Return a CPU copy of a module's state, by name; shards are gathered one parameter at a time, by all ranks."""
    import deepspeed

    found = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([tensor], enabled=is_sharded and hasattr(tensor, "ds_id")):
            found[name] = tensor.detach().to("cpu", copy=True)
    return found


def extensions_directory() -> Path:
    """Return where this environment's operators are built: the user's choice, or a folder of the user's cache."""
    if chosen := os.environ.get(DIRECTORY_VARIABLE):
        return Path(chosen)
    # A folder for each environment: an operator built against another torch does not load.
    environment = hashlib.sha256(f"{sys.prefix} {torch.__version__}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "seatrial" / "torch_extensions" / environment


def ensure_operators() -> None:
    """Build or load what DeepSpeed will ask for when it joins a process group; nothing on a GPU.

    Raises:
        InfrastructureError: Another process has been building for longer than `BUILD_TIMEOUT_S`.
    """
    os.environ.setdefault(DIRECTORY_VARIABLE, str(extensions_directory()))
    if torch.cuda.is_available():
        return
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    builder = accelerator.create_op_builder("ShareMemCommBuilder")
    directory = extensions_directory()
    with build_lock(directory, timeout_s=BUILD_TIMEOUT_S):
        # torch's own lock is the file's existence: one that a killed builder left would be waited for for ever.
        for left_behind in directory.glob("*/lock"):
            left_behind.unlink()
        if builder is not None and builder.is_compatible():
            builder.load(verbose=False)


def build_lock(directory: Path, *, timeout_s: float) -> AbstractContextManager[None]:
    """Hold the folder's lock. Raises InfrastructureError when another process held it for `timeout_s` seconds."""
    remedy = f"end it, or give this run a folder of its own with {DIRECTORY_VARIABLE}"
    return file_lock(directory / "build.lock", timeout_s=timeout_s, remedy=remedy)
