"""How much is worked on at a time. Free of torch: `seatrial plan` foresees memory and minutes from these numbers."""

from __future__ import annotations

from typing import Final

LOGIT_CHUNK_VALUES: Final[dict[str, int]] = {"cpu": 1 << 24, "cuda": 1 << 27}
"""Logits that exist at a time: 64 MiB of float32 on CPU, 512 MiB on a GPU."""


MICROBATCH_TOKENS: Final = 2048  # what fits the caches of two CPU cores: 8 sequences run 40 % faster a token than 32


MAX_IN_FLIGHT: Final = 128
"""Rollouts that one worker has under way."""


BATCH_PAIRS: Final = 32
"""Pairs in one step of the reward model."""


CALIBRATION_FRACTION: Final = 0.45
"""Share of the pairs that comes from calibration tasks, which never train (decision 20 says why it is so large)."""
