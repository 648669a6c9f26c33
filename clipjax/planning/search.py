"""Try rematerialisation, meshes, microbatches and loss methods for a run, and rank what fits by predicted seconds.

Every try compiles the whole step. One choice is varied at a time, each from the best so far: rematerialisation first,
which decides what fits, then how parameters and then products are split, then microbatches where nothing has fitted,
then the loss.
"""

import copy
import json
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from clipjax.config import Config, LossMethod, Remat
from clipjax.metrics import format_table
from clipjax.planning.report import DOES_NOT_FIT, GIB, compile_step, make_plan
from clipjax.planning.targets import Target, check_devices
from clipjax.validation import validate

FSDP = (1, 4, 8, 16, 32, 64)
TENSOR = (1, 2, 4)
MICROBATCHES = (2, 4, 8)


@dataclass(frozen=True)
class Try:
    """One configuration and what is predicted of it.

    Attributes:
        changes: of the config, path by path.
        plan: what `report.make_plan` gave.
    """

    changes: dict[str, Any]
    plan: dict[str, Any]

    @property
    def rank(self) -> tuple[bool, float]:
        """What fits comes first, then what is fastest; of what does not fit, what needs least memory."""
        fits = self.plan["fits"]
        worst = self.plan.get("peak_hbm_bytes", float("inf"))
        return not fits, self.plan["predicted_step_seconds"] if fits else worst


class Search:
    """Configurations tried so far, each once."""

    def __init__(self, config: Config, target: Target, *, num_samples: int, teacher: Config | None) -> None:
        self._config, self._target = config, target
        self._num_samples, self._teacher = num_samples, teacher
        self.tries: list[Try] = []

    @property
    def best(self) -> dict[str, Any]:
        """Changes of the best so far."""
        return min(self.tries, key=lambda attempt: attempt.rank).changes if self.tries else {}

    def attempt(self, **changes: Any) -> None:
        """Compile one more; what the mesh or the batch does not allow is passed over."""
        changes = {**self.best, **changes}
        if any(attempt.changes == changes for attempt in self.tries):
            return
        config = changed(self._config, changes)
        try:
            validate(config)
            check_devices(config, self._target, self._teacher)
        except ValueError:
            return
        compiled = compile_step(config, self._target, num_samples=self._num_samples, teacher=self._teacher)
        self.tries.append(Try(changes, make_plan(config, self._target, compiled)))
        print(" ".join(row(self.tries[-1])), flush=True)

    def run(self) -> None:
        """All stages."""
        for changes in _first(self._config):
            self.attempt(**changes)
        if self.best.get("remat") is None and not any(attempt.plan["fits"] for attempt in self.tries):
            return
        for fsdp in FSDP:
            self.attempt(fsdp=fsdp)
        for tensor in TENSOR:
            self.attempt(tensor=tensor)
        if not any(attempt.plan["fits"] for attempt in self.tries):
            for parts in MICROBATCHES:
                self.attempt(microbatch=self._config.global_batch_size // parts)
        for method in (LossMethod.GATHERED, LossMethod.RING):
            self.attempt(method=method)


def _first(config: Config) -> Iterator[dict[str, Any]]:
    mesh = {"fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor}
    start = {**mesh, "microbatch": config.microbatch_size, "method": config.loss.method}
    for remat in (config.model.remat, *(policy for policy in Remat if policy is not config.model.remat)):
        yield {**start, "remat": remat}


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """A copy of a config with these choices."""
    config = copy.deepcopy(config)
    config.model.remat = changes["remat"]
    config.mesh.fsdp = changes["fsdp"]
    config.mesh.tensor = changes["tensor"]
    config.microbatch_size = changes["microbatch"]
    config.loss.method = changes["method"]
    return config


HEADER = ("remat", "mesh.fsdp", "mesh.tensor", "microbatch", "loss.method", "fits", "GiB", "ms predicted", "MFU")


def row(attempt: Try) -> list[str]:
    """A try as a line of the ranking."""
    changes, plan = attempt.changes, attempt.plan
    peak = f"{plan['peak_hbm_bytes'] / GIB:.2f}" if "peak_hbm_bytes" in plan else "-"
    step = f"{1e3 * plan['predicted_step_seconds']:.1f}" if plan["fits"] else "-"
    mfu = f"{plan['predicted_mfu']:.1%}" if plan["fits"] else "-"
    return [
        changes["remat"].value,
        str(changes["fsdp"]),
        str(changes["tensor"]),
        str(changes["microbatch"]),
        changes["method"].value,
        "yes" if plan["fits"] else "no",
        peak,
        step,
        mfu,
    ]


def search(config: Config, target: Target, *, num_samples: int, teacher: Config | None, output: str | None) -> int:
    """Try, print the ranking, and write it; returns the exit code."""
    tries = Search(config, target, num_samples=num_samples, teacher=teacher)
    tries.run()
    ranked = sorted(tries.tries, key=lambda attempt: attempt.rank)
    print("\n" + format_table([row(attempt) for attempt in ranked], HEADER))
    if output:
        plans = [
            {
                "changes": {name: getattr(value, "value", value) for name, value in attempt.changes.items()},
                **attempt.plan,
            }
            for attempt in ranked
        ]
        pathlib.Path(output).write_text(json.dumps(plans, indent=1) + "\n", encoding="utf-8")
    return 0 if ranked and ranked[0].plan["fits"] else DOES_NOT_FIT
