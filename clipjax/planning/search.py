"""Try rematerialisation, meshes, microbatches and loss methods for a run, and rank what fits by predicted seconds.

Every try compiles the whole step. One choice is varied at a time, each from the best so far: rematerialisation first,
which decides what fits, then how parameters and then products are split, then microbatches where nothing has fitted,
then the loss.
"""

import copy
import json
import pathlib
import re
from dataclasses import dataclass
from typing import Any

from clipjax.config import Config, LossMethod, Remat
from clipjax.config.validation import validate
from clipjax.planning.report import GIB, compile_step, make_plan
from clipjax.planning.targets import Target, check_devices
from clipjax.runtime.terminal import format_table

FSDP = (1, 4, 8, 16, 32, 64)
TENSOR = (1, 2, 4)
MICROBATCHES = (2, 4, 8)


@dataclass(frozen=True)
class Candidate:
    """One configuration and what is predicted of it.

    Attributes:
        changes: of the config, path by path.
        plan: what `run_search.make_plan` gave.
    """

    changes: dict[str, Any]
    plan: dict[str, Any]

    @property
    def rank(self) -> tuple[bool, float]:
        """What fits comes first, then what is fastest; of what does not fit, what needs least memory."""
        fits = self.plan["fits"]
        return not fits, self.plan["predicted_step_seconds"] if fits else needed_bytes(self.plan)


def needed_bytes(plan: dict[str, Any]) -> float:
    """The peak, or what the compiler says when it refuses a step: of temporaries alone at times, so only to rank by."""
    if plan["peak_hbm_bytes"] is not None:
        return plan["peak_hbm_bytes"]
    found = re.search(r"(\d+(?:\.\d+)?)([KMGT])", plan["reason"])
    return float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1) if found else float("inf")


class Search:
    """Configurations tried so far, each once."""

    def __init__(
        self,
        config: Config,
        target: Target,
        *,
        num_samples: int,
        teacher: Config | None = None,
        price: float | None = None,
        output: pathlib.Path | None = None,
    ) -> None:
        """Find a mesh to start from: the config's own, or else the first that the devices allow.

        Raises:
            ValueError: they allow none, nor the config's own, of which the message speaks.
        """
        self._config, self._target = config, target
        self._num_samples, self._teacher = num_samples, teacher
        self._price, self._output = price, output
        self._start = {
            "remat": config.model.remat,
            "fsdp": config.mesh.fsdp,
            "tensor": config.mesh.tensor,
            "microbatch": config.microbatch_size,
            "method": config.loss.method,
        }
        self.tries: list[Candidate] = []
        if refusal := self._refusal(self._start):
            meshes = [{**self._start, "fsdp": fsdp, "tensor": 1} for fsdp in FSDP]
            possible = [changes for changes in meshes if not self._refusal(changes)]
            if not possible:
                raise ValueError(refusal)
            self._start = possible[0]

    @property
    def best(self) -> dict[str, Any]:
        """Changes of the best so far."""
        return self.ranked[0].changes if self.tries else self._start

    def attempt(self, **changes: Any) -> None:
        """Compile one more; what the mesh or the batch does not allow is passed over."""
        changes = {**self.best, **changes}
        if any(attempt.changes == changes for attempt in self.tries) or self._refusal(changes):
            return
        config = changed(self._config, changes)
        compiled = compile_step(config, self._target, num_samples=self._num_samples, teacher=self._teacher)
        self.tries.append(Candidate(changes, make_plan(config, self._target, compiled, price=self._price)))
        print(" ".join(row(self.tries[-1])), flush=True)
        self._write()

    @property
    def ranked(self) -> list[Candidate]:
        """All, the best first."""
        return sorted(self.tries, key=lambda attempt: attempt.rank)

    def _refusal(self, changes: dict[str, Any]) -> str:
        config = changed(self._config, changes)
        try:
            validate(config)
            check_devices(config, self._target, self._teacher)
        except ValueError as error:
            return str(error)
        return ""

    def _write(self) -> None:
        if not self._output:
            return
        plans = [
            {
                "changes": {name: getattr(value, "value", value) for name, value in attempt.changes.items()},
                **attempt.plan,
            }
            for attempt in self.ranked
        ]
        self._output.write_text(json.dumps(plans, indent=1) + "\n", encoding="utf-8")

    def run(self) -> None:
        """All stages."""
        for remat in (self._config.model.remat, *Remat):
            self.attempt(remat=remat)
        for fsdp in FSDP:
            self.attempt(fsdp=fsdp)
        for tensor in TENSOR:
            self.attempt(tensor=tensor)
        if not any(attempt.plan["fits"] for attempt in self.tries):
            for parts in MICROBATCHES:
                self.attempt(microbatch=self._config.global_batch_size // parts)
        for method in (LossMethod.GATHERED, LossMethod.RING):
            self.attempt(method=method)


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


def row(attempt: Candidate) -> list[str]:
    """A try as a line of the ranking."""
    changes, plan = attempt.changes, attempt.plan
    peak = f"{plan['peak_hbm_bytes'] / GIB:.2f}" if plan["peak_hbm_bytes"] is not None else "-"
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


def run_search(tries: Search) -> bool:
    """Try, and print the ranking; return whether the best fits."""
    print("trying, each on a line: " + ", ".join(HEADER), flush=True)
    tries.run()
    print("\n" + format_table([row(attempt) for attempt in tries.ranked], HEADER))
    return tries.ranked[0].plan["fits"]
