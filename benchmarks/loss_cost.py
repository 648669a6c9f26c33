"""Memory and time of the loss, forward and backward, by the number of pairs, beside bare matrix products.

    python -m benchmarks.loss_cost --output=benchmarks/results/loss_cost.json --plot=docs/images/loss_cost.png
    python -m benchmarks.loss_cost --platform=cuda --pairs 8192 32768 131072 524288 1048576 --ways softmax products

One process per measurement. Memory is what its peak grows by from before the inputs exist, so it counts the inputs
(2 N D numbers) and their gradients (as many) too; on the CPU of the process, on a GPU of the device. The bare products
are the four that any way of computing loss and gradients without keeping the matrix needs: 8 N^2 D FLOPs in tiles of
the same size, with operands of the same dtype, nothing between them. `plain` is the textbook loss with JAX's own
derivative; it keeps the matrix.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

EMBED = 512
WAYS = ("softmax", "sigmoid", "products", "plain")
PAIRS = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
MOST = {"cpu": {"plain": 16_384, "sigmoid": 65_536, "products": 65_536}}  # 4 GiB of matrices; minutes
LIMITS = {"memory": 1.3, "seconds": 1.4}  # x inputs and gradients; x bare products
AT = 32_768


def measure(way: str, n: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """In this process: seconds of each repeat, and by how much the peak of memory grew."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.machine import peak_bytes, reset_peak, unit_rows
    from clipjax.losses import make_loss, softmax_loss
    from clipjax.losses.softmax import Softmax
    from clipjax.losses.tiles import DEFAULT_TILE, TiledLogits

    dot = TiledLogits(Softmax(), DEFAULT_TILE, jnp.dtype(arguments.dtype)).dot

    def products(image: jax.Array, text: jax.Array) -> jax.Array:
        """(image text^T) text, tile by tile, twice: 2 * 2 * 2 N^2 D FLOPs."""
        rows, columns = (x.reshape(-1, min(n, DEFAULT_TILE), EMBED) for x in (image, text))

        def one(row: jax.Array) -> jax.Array:
            def visit(total: jax.Array, column: jax.Array) -> tuple[jax.Array, None]:
                return total + dot(dot(row, column, (1, 1)), column, (1, 0)), None

            return jax.lax.scan(visit, jnp.zeros_like(row), columns)[0]

        return jax.lax.map(one, jax.lax.map(one, rows))

    def run(image: jax.Array, text: jax.Array) -> object:
        if way == "products":
            return products(image, text)
        loss = softmax_loss if way == "plain" else make_loss(kind=way, dtype=arguments.dtype)
        whole = jax.value_and_grad(lambda i, t, s: loss(i, t, s, jnp.float32(-10))[0], argnums=(0, 1, 2))
        return whole(image, text, jnp.float32(14.3))

    small = jax.ShapeDtypeStruct((n, EMBED), jnp.float32)
    compiled = jax.jit(run).lower(small, small).compile()
    jax.block_until_ready(jax.jit(lambda x: x @ x)(jnp.ones((256, 256))))  # thread pools and buffers of the runtime
    device = jax.devices()[0]

    def device_bytes(name: str) -> int:
        return (device.memory_stats() or {})[name]

    before = reset_peak() if device.platform == "cpu" else device_bytes("bytes_in_use")
    rng = np.random.default_rng(0)
    image, text = (jax.block_until_ready(jnp.asarray(unit_rows(rng, n, EMBED))) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < arguments.repeats and sum(seconds) < arguments.seconds:
        start = time.perf_counter()
        jax.block_until_ready(compiled(image, text))
        seconds.append(time.perf_counter() - start)
    peak = peak_bytes() if device.platform == "cpu" else device_bytes("peak_bytes_in_use")
    row = {"way": way, "pairs": n, "seconds": seconds, "extra_bytes": peak - before}
    return row | {"device": device.device_kind, "jax": jax.__version__}


def child(way: str, n: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One measurement in a fresh process."""
    options = {"child": way, "pairs": n, "repeats": arguments.repeats, "seconds": arguments.seconds}
    options |= {"dtype": arguments.dtype, "platform": arguments.platform}
    command = [sys.executable, "-m", "benchmarks.loss_cost", *(f"--{name}={value}" for name, value in options.items())]
    # Large pages, as `clipjax` asks for them; and what is freed goes back at once, or it would count as in use.
    tunables = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1048576"
    settings = {"JAX_PLATFORMS": arguments.platform, "GLIBC_TUNABLES": tunables}
    done = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"way": way, "pairs": n, "failed": done.returncode}
    return json.loads(done.stdout)


def describe(row: dict[str, Any]) -> str:
    """One line."""
    if "failed" in row:
        return f"{row['pairs']:8} {row['way']:9} failed ({row['failed']})"
    seconds, extra = statistics.median(row["seconds"]), row["extra_bytes"]
    rate = 8 * row["pairs"] ** 2 * EMBED / seconds / 1e9
    return (
        f"{row['pairs']:8} {row['way']:9} {seconds:8.2f} s {rate:7.1f} GFLOP/s {extra / 2**20:8.0f} MiB "
        f"= {extra / inputs_and_gradients(row['pairs']):.2f} x inputs and gradients"
    )


def inputs_and_gradients(pairs: int) -> int:
    """Their bytes."""
    return 4 * pairs * EMBED * 4


def exponent(rows: list[dict[str, Any]], way: str, name: str, least: int) -> float:
    """Of the growth with the number of pairs, from `least` pairs on, by least squares of the logarithms."""
    import numpy as np

    chosen = [row for row in rows if row["way"] == way and row["pairs"] >= least and "failed" not in row]
    pairs = [row["pairs"] for row in chosen]
    return float(np.polyfit(np.log(pairs), np.log([np.median(row[name]) for row in chosen]), 1)[0])


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Memory and time by the number of pairs, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"softmax": "tab:blue", "sigmoid": "tab:orange", "products": "tab:gray", "plain": "tab:red"}
    labels = {"products": "bare products", "plain": "textbook softmax"}
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    sizes = sorted({row["pairs"] for row in rows})
    for panel, name, unit, scale in ((panels[0], "extra_bytes", "MiB", 2**20), (panels[1], "seconds", "seconds", 1)):
        for way in dict.fromkeys(row["way"] for row in rows):
            if way == "products" and name == "extra_bytes":
                continue
            chosen = [row for row in rows if row["way"] == way and "failed" not in row]
            values = [row[name] if name == "extra_bytes" else statistics.median(row[name]) for row in chosen]
            label = f"{labels.get(way, way)}"
            if way != "plain":
                label += f", N^{exponent(rows, way, name, 8192):.2f} from 8k"
            panel.plot(
                [row["pairs"] for row in chosen], [v / scale for v in values], "o-", color=colors[way], label=label
            )
        panel.set(xscale="log", yscale="log", xlabel="pairs N", ylabel=unit)
        panel.set_xticks(sizes, [f"{size // 1024}k" for size in sizes])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    least = [inputs_and_gradients(size) / 2**20 for size in sizes]
    panels[0].plot(sizes, least, "k--", label="inputs and their gradients")
    panels[0].set_title("Memory, forward and backward")
    panels[1].set_title("Time, forward and backward")
    for panel in panels:
        panel.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios at 32,768 pairs against their limits, and the exponents of growth."""
    at = {row["way"]: row for row in rows if row["pairs"] == AT and "failed" not in row}
    found: dict[str, Any] = {"limits": LIMITS}
    for way in ("softmax", "sigmoid"):
        if way in at:
            found[f"{way} memory"] = at[way]["extra_bytes"] / inputs_and_gradients(AT)
        if way in at and "products" in at:
            times = (statistics.median(at[name]["seconds"]) for name in (way, "products"))
            found[f"{way} seconds"] = next(times) / next(times)
        if sum(row["way"] == way and row["pairs"] >= 8192 for row in rows) > 1:
            found[f"{way} exponents"] = {name: exponent(rows, way, name, 8192) for name in ("extra_bytes", "seconds")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=PAIRS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=100, help="after so many, a measurement is not repeated")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of operands")
    parser.add_argument("--platform", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.pairs[0], arguments)))
        return
    from benchmarks import machine

    rows = []
    for n in arguments.pairs:
        for way in arguments.ways:
            if n > MOST.get(arguments.platform, {}).get(way, n):
                continue
            rows.append(child(way, n, arguments))
            print(describe(rows[-1]), flush=True)
    found = verdict(rows)
    print(json.dumps(found, indent=1))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        about = {"machine": machine.describe(), "date": time.strftime("%Y-%m-%d"), "dtype": arguments.dtype}
        arguments.output.write_text(
            json.dumps({**about, "embed": EMBED, "verdict": found, "rows": rows}, indent=1) + "\n"
        )
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
