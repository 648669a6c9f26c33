"""The numerics certificate: every way to compute a loss against float64 NumPy, the largest relative errors in a table.

    python -m benchmarks.numerics.certificate --output=benchmarks/results/numerics.json

Every kind x method x tile x dtype x mesh (1, 2, 4, 8 simulated devices, every split over `data`, `fsdp`, `tensor`),
with plain and with GradCache gradients. Errors are Euclidean norms relative to the reference's. The gradient of the
scale is a sum whose terms cancel; so is that of the bias: their errors are relative to the sum of the terms' sizes.
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

PAIRS, EMBED = 96, 64
TILES = (None, 7)
SCALES = (1.0, 14.3, 100.0)
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One way to compute one loss."""

    kind: str
    method: str
    tile: int | None
    dtype: str
    mesh: tuple[int, int, int]
    cached: bool = False

    def __str__(self) -> str:
        mesh = "x".join(map(str, self.mesh))
        cached = "-cached" if self.cached else ""
        return f"{self.kind}-{self.method}-tile{self.tile}-{self.dtype}-{mesh}{cached}"


def meshes() -> Iterator[tuple[int, int, int]]:
    """All splits of 1, 2, 4 and 8 devices over three axes."""
    for devices in (1, 2, 4, 8):
        for data, fsdp in itertools.product((1, 2, 4, 8), repeat=2):
            if devices % (data * fsdp) == 0:
                yield data, fsdp, devices // (data * fsdp)


def cases() -> Iterator[Case]:
    """All of them."""
    ways = itertools.product(("softmax", "sigmoid"), ("gathered", "ring"), TILES, DTYPES, meshes(), (False, True))
    return itertools.starmap(Case, ways)


def inputs(n: int = PAIRS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit-norm pairs as a model has them halfway: similar, but not so much that the loss is next to nothing."""
    rng = np.random.default_rng(seed)
    text = rng.normal(size=(n, EMBED))
    image = text + 2 * rng.normal(size=(n, EMBED))
    return tuple((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (image, text))


@dataclass(frozen=True)
class Truth:
    """Loss, gradients, and the sizes that errors are relative to."""

    loss: float
    grads: dict[str, Any]
    sizes: dict[str, float]


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


def reference(
    kind: str,
    image: np.ndarray,
    text: np.ndarray,
    scale: float,
    bias: float = 0.0,
    *,
    group: np.ndarray | None = None,
    label_smoothing: float = 0.0,
) -> Truth:
    """By hand, in float64."""
    image, text, n = image.astype(np.float64), text.astype(np.float64), len(image)
    similarity = image @ text.T
    logits = scale * similarity + bias
    own = np.eye(n, dtype=bool)
    group = np.arange(n) if group is None else group
    out = (group[:, None] == group[None, :]) & ~own
    logits = np.where(out, -np.inf, logits)
    if kind == "softmax":
        others = np.where(own, -np.inf, logits)
        loss, slope = 0.0, np.zeros((n, n))
        for axis in (0, 1):
            peak = np.maximum(others.max(axis), -1e300)
            with np.errstate(divide="ignore"):
                excess = peak + np.log(np.exp(others - np.expand_dims(peak, axis)).sum(axis)) - np.diag(logits)
            loss += _softplus(excess).mean() / 2
            share = np.exp(logits - np.expand_dims(np.diag(logits) + _softplus(excess), axis))
            slope += np.where(own, -np.expand_dims(1 / (1 + np.exp(-excess)), axis), share) / (2 * n)
        if label_smoothing:
            loss += label_smoothing * (np.diag(logits).mean() - logits.mean())
            slope += label_smoothing * (own / n - 1 / n**2)
    else:
        loss = (_softplus(np.where(own, -np.inf, logits)).sum() + _softplus(-np.diag(logits)).sum()) / n
        slope = np.where(own, -1 / (1 + np.exp(logits)), 1 / (1 + np.exp(-logits))) / n
    grads = {
        "image": scale * slope @ text,
        "text": scale * slope.T @ image,
        "scale": (slope * similarity).sum(),
        "bias": slope.sum() if kind == "sigmoid" else 0.0,
    }
    sizes = {name: float(np.linalg.norm(grads[name])) for name in ("image", "text")}
    sizes |= {"scale": float(np.abs(slope * similarity).sum()), "bias": float(np.abs(slope).sum())}
    return Truth(float(loss), grads, {"loss": float(loss), **sizes})


def errors(truth: Truth, loss: Any, grads: dict[str, Any]) -> dict[str, float]:
    """Relative errors by name."""
    found = {"loss": abs(float(loss) - truth.loss) / truth.sizes["loss"]}
    for name, grad in grads.items():
        difference = np.linalg.norm(np.asarray(grad, np.float64) - truth.grads[name])
        found[name] = float(difference / truth.sizes[name])
    return found


def measure(case: Case, scales: Sequence[float], bias: float, image: np.ndarray, text: np.ndarray) -> dict[str, float]:
    """The largest errors of one case over several scales."""
    import jax
    import jax.numpy as jnp

    from clipjax import grads, sharding
    from clipjax.config import MeshConfig
    from clipjax.losses import make_loss

    data, fsdp, tensor = case.mesh
    mesh = sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])
    loss = make_loss(kind=case.kind, method=case.method, tile=case.tile, dtype=case.dtype, mesh=mesh)

    def encode(params: Any, batch: Any, key: Any) -> Any:
        """Embeddings that are themselves the parameters, picked by number, so that theirs are the gradients."""
        picked = (params["image"][batch["image"]], params["text"][batch["tokens"]])
        return *picked, params["scale"], params["bias"]

    devices = data * fsdp
    grads_fn = grads.make_cached(len(image) // 2 // devices * devices, devices) if case.cached else grads.direct
    found = []
    with jax.set_mesh(mesh):
        batch = sharding.global_batch(mesh, {name: np.arange(len(image)) for name in ("image", "tokens")})
        key = jax.random.key(0)
        run = jax.jit(lambda params, batch: grads_fn(encode, loss, params, batch, key))
        for scale in scales:
            params = {"image": image, "text": text, "scale": jnp.float32(scale), "bias": jnp.float32(bias)}
            of_params, metrics = run(jax.device_put(params, sharding.replicated(mesh)), batch)
            if case.kind == "softmax":
                del of_params["bias"]
            found.append(errors(reference(case.kind, image, text, scale, bias), metrics["loss"], of_params))
    return worst(found)


def worst(results: list[dict[str, float]]) -> dict[str, float]:
    """The largest error of each name."""
    return {name: max(result[name] for result in results) for name in results[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    image, text = inputs()
    rows = []
    for case in cases():
        bias = 0.0 if case.kind == "softmax" else -5.0
        found = measure(case, SCALES, bias, image, text)
        rows.append({**asdict(case), "errors": found})
        print(f"{case!s:60}", "  ".join(f"{name} {value:.1e}" for name, value in found.items()), flush=True)
    print()
    for kind, dtype, cached in itertools.product(("softmax", "sigmoid"), DTYPES, (False, True)):
        chosen = [row for row in rows if (row["kind"], row["dtype"], row["cached"]) == (kind, dtype, cached)]
        found = worst([row["errors"] for row in chosen])
        print(f"{kind:8} {dtype:9} {'GradCache' if cached else 'direct':9} {len(chosen):4} ways ", found)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        about = {"jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()}
        record = {**about, "date": time.strftime("%Y-%m-%d"), "pairs": PAIRS, "embed": EMBED, "scales": SCALES}
        arguments.output.write_text(json.dumps({**record, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
