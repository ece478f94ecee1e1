"""DeepSpeed's small CPU operator, built once per environment and never waited for without a bound.

torch builds it under a lock that is a plain file: a process killed meanwhile leaves the file, and every later process
waits for it for ever, without a word. Here the kernel holds the lock, and lets go of it when its holder dies; whoever
has it may clear the file away. The build has a folder of its own for each environment, because two environments that
share one rebuild it for each other at every start.
"""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import torch

from rl_actors.durable.files import file_lock

DIRECTORY_VARIABLE: Final = "TORCH_EXTENSIONS_DIR"
BUILD_TIMEOUT_S: Final = 600.0


def extensions_directory() -> Path:
    """Return where this environment's operators are built: the user's choice, or a folder of the user's cache."""
    chosen = os.environ.get(DIRECTORY_VARIABLE)
    if chosen:
        return Path(chosen)
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
        for left_behind in directory.glob("*/lock"):
            left_behind.unlink()
        if builder is not None and builder.is_compatible():
            builder.load(verbose=False)


def build_lock(directory: Path, *, timeout_s: float) -> AbstractContextManager[None]:
    """Hold the folder's lock. Raises InfrastructureError when another process held it for `timeout_s` seconds."""
    remedy = f"end it, or give this run a folder of its own with {DIRECTORY_VARIABLE}"
    return file_lock(directory / "build.lock", timeout_s=timeout_s, remedy=remedy)
