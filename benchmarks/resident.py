"""Resident memory of this process, from the kernel's own account."""

from __future__ import annotations

import re
from pathlib import Path


def resident_mib(field: str) -> float:
    """Return VmRSS, or VmHWM (the highest VmRSS since this program was loaded), in MiB; NaN where there is no /proc.

    Not `ru_maxrss`: a child begins with its parent's maximum there, which would hide what it allocates itself.
    """
    status = Path("/proc/self/status")
    text = status.read_text(encoding="utf8") if status.is_file() else ""
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) / 1024 if found else float("nan")
