"""Two processes over loopback that run one program, which prints its findings as JSON behind `FOUND `."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from tests.launch.conftest import free_ports

ROOT = pathlib.Path(__file__).parents[2]


def run_two(folder: pathlib.Path, text: str, *, xla_flags: str = "") -> tuple[list[Any], list[str]]:
    """Run a program on two processes, with a folder, the coordinator's address and the rank.

    Returns:
        The findings of each, and its standard error.
    """
    program = folder / "program.py"
    program.write_text(text)
    environment = {**os.environ, "XLA_FLAGS": xla_flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    address = f"localhost:{free_ports(1)[0]}"
    both = [
        subprocess.Popen(
            (sys.executable, str(program), str(folder), address, str(rank)),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], outputs
    return [json.loads(out.partition("FOUND ")[2]) for out, _ in outputs], [err for _, err in outputs]
