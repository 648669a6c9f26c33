"""Description of the machine, and the memory of a process, for all benchmarks. Imports neither JAX nor torch."""

import contextlib
import os
import pathlib
import platform
from typing import Any

import numpy as np


def describe() -> dict[str, Any]:
    """For the raw results."""
    return {
        "processor": processor(),
        "instruction_set": instruction_set(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def instruction_set() -> str:
    """The widest vectors that the CPU has, where Linux tells; empty if it does not."""
    with contextlib.suppress(OSError):
        content = pathlib.Path("/proc/cpuinfo").read_text()
        flags = next((line.split() for line in content.splitlines() if line.startswith(("flags", "Features"))), [])
        return next((name for name in ("avx512_bf16", "avx512f", "avx2", "avx", "sve", "asimd") if name in flags), "")
    return ""


def processor() -> str:
    """The CPU's name."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def peak_bytes() -> int:
    """The most memory that this process has had since it began, or since `reset_peak`."""
    return int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def reset_peak() -> int:
    """Forget the peak so far (that of compilation would hide what grows up to it); the memory now."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def unit_rows(rng: np.random.Generator, pairs: int, embed: int) -> np.ndarray:
    """Random rows of length 1, float32, made without a second copy."""
    x = rng.standard_normal((pairs, embed), np.float32)
    x /= np.sqrt(np.einsum("ne,ne->n", x, x))[:, None]
    return x
