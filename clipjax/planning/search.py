"""Search over rematerialisation, meshes, microbatches and loss methods, ranked by predicted seconds.

Every candidate compiles the whole step. The search varies one choice at a time, each from the best so far:
rematerialisation first, which decides what fits; then the axes `fsdp` and `tensor`; then microbatches where nothing
has fitted; then the loss.
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
    """One configuration and its plan.

    Attributes:
        changes: choices by name, which `changed` makes in the config.
        plan: of `report.make_plan`.
    """

    changes: dict[str, Any]
    plan: dict[str, Any]

    @property
    def rank(self) -> tuple[bool, float]:
        """Key to sort by: candidates that fit by seconds, then those that do not by the memory that they need."""
        fits = self.plan["fits"]
        return not fits, self.plan["predicted_step_seconds"] if fits else needed_bytes(self.plan)


def needed_bytes(plan: dict[str, Any]) -> float:
    """Return the peak, or the bytes in the compiler's refusal: at times of temporaries alone, so only to rank by."""
    if plan["peak_hbm_bytes"] is not None:
        return plan["peak_hbm_bytes"]
    found = re.search(r"(\d+(?:\.\d+)?)([KMGT])", plan["reason"])
    return float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1) if found else float("inf")


class Search:
    """Candidates so far, each once."""

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
            ValueError: no mesh is possible; the message tells why the config's own is refused.
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
        self.candidates: list[Candidate] = []
        if refusal := self._refusal(self._start):
            meshes = [{**self._start, "fsdp": fsdp, "tensor": 1} for fsdp in FSDP]
            possible = [changes for changes in meshes if not self._refusal(changes)]
            if not possible:
                raise ValueError(refusal)
            self._start = possible[0]

    @property
    def best(self) -> dict[str, Any]:
        """Choices of the best candidate so far."""
        return self.ranked[0].changes if self.candidates else self._start

    def evaluate(self, **changes: Any) -> None:
        """Compile and rank one more candidate; skip those that the mesh or the batch does not allow."""
        changes = {**self.best, **changes}
        if any(candidate.changes == changes for candidate in self.candidates) or self._refusal(changes):
            return
        config = changed(self._config, changes)
        compiled = compile_step(config, self._target, num_samples=self._num_samples, teacher=self._teacher)
        self.candidates.append(Candidate(changes, make_plan(config, self._target, compiled, price=self._price)))
        print(" ".join(row(self.candidates[-1])), flush=True)
        self._write()

    @property
    def ranked(self) -> list[Candidate]:
        """All candidates, the best first."""
        return sorted(self.candidates, key=lambda candidate: candidate.rank)

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
                "changes": {name: getattr(value, "value", value) for name, value in candidate.changes.items()},
                **candidate.plan,
            }
            for candidate in self.ranked
        ]
        self._output.write_text(json.dumps(plans, indent=1) + "\n", encoding="utf-8")

    def run(self) -> None:
        """Run all stages of the search."""
        for remat in (self._config.model.remat, *Remat):
            self.evaluate(remat=remat)
        for fsdp in FSDP:
            self.evaluate(fsdp=fsdp)
        for tensor in TENSOR:
            self.evaluate(tensor=tensor)
        if not any(candidate.plan["fits"] for candidate in self.candidates):
            for parts in MICROBATCHES:
                self.evaluate(microbatch=self._config.global_batch_size // parts)
        for method in (LossMethod.GATHERED, LossMethod.RING):
            self.evaluate(method=method)


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """Return a copy of a config with these choices."""
    config = copy.deepcopy(config)
    config.model.remat = changes["remat"]
    config.mesh.fsdp = changes["fsdp"]
    config.mesh.tensor = changes["tensor"]
    config.microbatch_size = changes["microbatch"]
    config.loss.method = changes["method"]
    return config


HEADER = ("remat", "mesh.fsdp", "mesh.tensor", "microbatch", "loss.method", "fits", "GiB", "ms predicted", "MFU")


def row(candidate: Candidate) -> list[str]:
    """Format a candidate as a row of the ranking."""
    changes, plan = candidate.changes, candidate.plan
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


def run_search(search: Search) -> bool:
    """Search and print the ranking; return true if the best candidate fits."""
    print("trying, each on a line: " + ", ".join(HEADER), flush=True)
    search.run()
    print("\n" + format_table([row(candidate) for candidate in search.ranked], HEADER))
    return search.ranked[0].plan["fits"]
