"""The numerics certificate: every computation of a loss against float64 NumPy, the largest relative errors in a table.

    python -m benchmarks.numerics.certificate --jobs=2 --output=benchmarks/results/numerics.json

Every loss x method x tile x dtype x mesh (1, 2, 4, 8 simulated devices, every split over `data`, `fsdp`, `tensor`, and
over slices), with plain and with GradCache gradients. Errors are Euclidean norms relative to the reference's, see
`benchmarks.numerics.reference`.
"""

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.numerics.reference import Truth, reference

PAIRS, EMBED = 96, 64
TILES = (None, 7)
SCALES = (1.0, 14.3, 100.0)
DTYPES = ("float32", "bfloat16")
GAMMA, RHO = 0.3, 6.5


@dataclass(frozen=True)
class Loss:
    """One loss: its kind, the options it is made with, and what it is given besides embeddings."""

    kind: str
    groups: str | None = None
    teacher: bool = False
    rho: float | None = None

    @property
    def bias(self) -> float:
        """The logit bias to measure at; only a sigmoid has one."""
        return -5.0 if self.kind == "sigmoid" else 0.0

    def options(self) -> dict[str, Any]:
        """For `make_loss`."""
        weight = 0.7 if self.teacher else None
        return {"kind": self.kind, "group_role": self.groups or "ignored", "rho": self.rho, "distill_weight": weight}

    def given(self) -> dict[str, Any]:
        """Groups, teacher, memory: arrays by the names that a batch has for them."""
        rng, given = np.random.default_rng(1), {}
        if self.groups:
            given["group"] = np.arange(PAIRS, dtype=np.int32) // 3 * (np.arange(PAIRS) % 5 > 0)
        if self.teacher:
            given["teacher"] = (*inputs(seed=2, embed=48), np.float32(20))
        if self.kind == "global":
            log_mean = rng.normal(-3, 2, (PAIRS, 2)).astype(np.float32)
            log_mean[::4] = -np.inf
            given["memory"] = (log_mean, np.float32(GAMMA))
        return given

    def truth(self, image: np.ndarray, text: np.ndarray, scale: float) -> Truth:
        """In float64."""
        given, options = self.given(), {}
        if self.kind == "global":
            options = {"log_mean": given["memory"][0].astype(np.float64), "gamma": GAMMA, "epsilon": 1e-14}
        elif self.groups == "positive":
            options = {"positives": True}
        return reference(
            self.kind,
            image,
            text,
            scale,
            self.bias,
            group=given.get("group"),
            teacher=given.get("teacher"),
            distill_weight=0.7,
            rho=self.rho,
            **options,
        )


LOSSES = {
    "softmax": Loss("softmax"),
    "sigmoid": Loss("sigmoid"),
    "softmax, positives": Loss("softmax", groups="positive"),
    "sigmoid, positives": Loss("sigmoid", groups="positive"),
    "softmax, distilled": Loss("softmax", teacher=True),
    "global": Loss("global"),
    "global, rho": Loss("global", rho=RHO),
}

COMBINED = {
    "softmax, groups": Loss("softmax", groups="ignored"),
    "sigmoid, distilled": Loss("sigmoid", teacher=True),
    "positives, distilled": Loss("softmax", groups="positive", teacher=True),
    "global, groups, distilled": Loss("global", groups="ignored", teacher=True),
}
"""Measured in the tests only."""


@dataclass(frozen=True)
class Case:
    """One way to compute one loss; the mesh is that of `sharding.make_mesh`."""

    loss: str
    method: str
    tile: int | None
    dtype: str
    mesh: tuple[int, int, int, int]
    cached: bool = False

    def __str__(self) -> str:
        mesh = "x".join(map(str, self.mesh))
        cached = "-cached" if self.cached else ""
        return f"{self.loss}-{self.method}-tile{self.tile}-{self.dtype}-{mesh}{cached}"


def meshes() -> Iterator[tuple[int, int, int, int]]:
    """All splits of 1, 2, 4 and 8 devices over `data`, `fsdp` and `tensor`; then some over slices."""
    for devices in (1, 2, 4, 8):
        for data, fsdp in itertools.product((1, 2, 4, 8), repeat=2):
            if devices % (data * fsdp) == 0:
                yield 1, data, fsdp, devices // (data * fsdp)
    yield from ((2, 1, 1, 1), (2, 2, 2, 1), (4, 2, 1, 1), (2, 2, 1, 2), (8, 1, 1, 1))


def cases(losses: Sequence[str]) -> Iterator[Case]:
    """All of them."""
    return itertools.starmap(
        Case, itertools.product(losses, ("gathered", "ring"), TILES, DTYPES, meshes(), (False, True))
    )


def inputs(n: int = PAIRS, seed: int = 0, embed: int = EMBED) -> tuple[np.ndarray, np.ndarray]:
    """Unit-norm pairs as a model has them halfway: similar, but not so much that the loss is next to nothing."""
    rng = np.random.default_rng(seed)
    text = rng.normal(size=(n, embed))
    image = text + 2 * rng.normal(size=(n, embed))
    return tuple((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (image, text))


def errors(truth: Truth, loss: Any, grads: dict[str, Any]) -> dict[str, float]:
    """Relative errors by name."""
    found = {"loss": abs(float(loss) - truth.loss) / truth.sizes["loss"]}
    for name, grad in grads.items():
        difference = np.linalg.norm(np.asarray(grad, np.float64) - truth.grads[name])
        found[name] = float(difference / truth.sizes[name])
    return found


def measure(case: Case, scales: Sequence[float] = SCALES) -> dict[str, float]:
    """The largest errors of one case over several scales."""
    import jax
    import jax.numpy as jnp

    from clipjax.config import MeshConfig
    from clipjax.losses import LossInputs, MovingAverages, Teacher, TrainingLoss, make_loss
    from clipjax.models.clip import Clip
    from clipjax.runtime import sharding
    from clipjax.training.gradients import CachedGradients, DirectGradients, Microbatches
    from clipjax.typing import Encoded

    slices, data, fsdp, tensor = case.mesh
    config = MeshConfig(slice=slices, data=data, fsdp=fsdp, tensor=tensor)
    mesh = sharding.make_mesh(config, jax.devices()[: slices * data * fsdp * tensor])
    chosen, (image, text) = (LOSSES | COMBINED)[case.loss], inputs()
    loss = TrainingLoss(make_loss(method=case.method, tile=case.tile, dtype=case.dtype, mesh=mesh, **chosen.options()))

    class Table(Clip):
        """Embeddings that are themselves the parameters, picked by number, so that theirs are the gradients."""

        def __init__(self) -> None:
            pass

        def encode_batch(self, params: Any, batch_stats: Any, batch: Any, key: Any) -> Encoded:
            picked = (params["image"][batch["image"]], params["text"][batch["tokens"]])
            return Encoded(*picked, params["scale"], params["bias"])

    devices = sharding.batch_devices(mesh)
    microbatches = Microbatches(len(image) // 2 // devices * devices, devices)
    gradients = CachedGradients(Table(), loss, microbatches) if case.cached else DirectGradients(Table(), loss)
    given = chosen.given()
    given |= {
        name: make(*given[name]) for name, make in (("teacher", Teacher), ("memory", MovingAverages)) if name in given
    }
    found = []
    with jax.set_mesh(mesh):
        batch = sharding.global_batch(mesh, {name: np.arange(len(image)) for name in ("image", "tokens")})
        key = jax.random.key(0)
        run = jax.jit(lambda params, batch, given: gradients(params, {}, batch, LossInputs(**given), key))
        for scale in scales:
            params = {"image": image, "text": text, "scale": jnp.float32(scale), "bias": jnp.float32(chosen.bias)}
            placed = jax.device_put(params, sharding.replicated(mesh))
            grads, aux = run(placed, batch, jax.tree.map(jnp.asarray, given))
            if chosen.kind != "sigmoid":
                del grads["bias"]
            found.append(errors(chosen.truth(image, text, scale), aux.loss, grads))
    return worst(found)


def worst(results: list[dict[str, float]]) -> dict[str, float]:
    """The largest error of each name."""
    return {name: max(result[name] for result in results) for name in results[0]}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The largest errors by loss, dtype and way of taking gradients, in Markdown."""
    lines = ["| loss | operands | gradients | ways | loss | image | text | scale | bias |", "|---" * 9 + "|"]
    for loss, dtype, cached in itertools.product(LOSSES, DTYPES, (False, True)):
        chosen = [row["errors"] for row in rows if (row["loss"], row["dtype"], row["cached"]) == (loss, dtype, cached)]
        if chosen:
            found, way = worst(chosen), "GradCache" if cached else "direct"
            shown = [
                f"{found[name]:.1e}" if name in found else "" for name in ("loss", "image", "text", "scale", "bias")
            ]
            lines.append(f"| {loss} | {dtype} | {way} | {len(chosen)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--jobs", type=int, default=1, help="cases measured at a time, each in a process")
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    rows, every = [], list(cases(arguments.losses))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        for case, found in zip(every, pool.map(measure, every, chunksize=8), strict=True):
            rows.append({**asdict(case), "errors": found})
            print(f"{case!s:70}", "  ".join(f"{name} {value:.1e}" for name, value in found.items()), flush=True)
    print("\n" + table(rows))
    if arguments.output:
        import jax

        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        about = {"jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()}
        record = {**about, "date": time.strftime("%Y-%m-%d"), "pairs": PAIRS, "embed": EMBED, "scales": SCALES}
        arguments.output.write_text(json.dumps({**record, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
