"""Memory and time of the loss, forward and backward, by the number of pairs, beside bare matrix products.

    python benchmarks/loss_cost.py --pairs 1024 4096 16384 32768 --output=benchmarks/results/loss_cost.json

One process per measurement. Memory is what the process's peak grows by from before the inputs exist, so it counts the
inputs (2 N D numbers) and their gradients (as many) too. The bare products are the four that any way of computing loss
and gradients without keeping the matrix needs: 8 N^2 D FLOPs in tiles of the same size, nothing between them. `plain`
is the textbook loss with JAX's own derivative.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
EMBED = 512
WAYS = ("softmax", "sigmoid", "plain", "products")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(way: str, n: int, repeats: int) -> dict:
    """In this process: seconds of each repeat, and by how much the peak of memory grew."""
    sys.path.insert(0, str(ROOT))
    import jax
    import jax.numpy as jnp
    import numpy as np

    from clipjax.losses import make_loss, softmax_loss
    from clipjax.losses.tiles import DEFAULT_TILE

    loss = {"plain": softmax_loss, "products": None}.get(way, make_loss(kind=way if way == "sigmoid" else "softmax"))

    def products(image: jax.Array, text: jax.Array) -> jax.Array:
        """(image text^T) text, tile by tile, twice: 2 * 2 * 2 N^2 D FLOPs."""
        rows, columns = (x.reshape(-1, min(n, DEFAULT_TILE), EMBED) for x in (image, text))

        def one(row: jax.Array) -> jax.Array:
            def visit(total: jax.Array, column: jax.Array) -> tuple[jax.Array, None]:
                return total + (row @ column.T) @ column, None

            return jax.lax.scan(visit, jnp.zeros_like(row), columns)[0]

        once = jax.lax.map(one, rows)
        return jax.lax.map(one, once)

    def run(image: jax.Array, text: jax.Array) -> object:
        if loss is None:
            return products(image, text)
        whole = jax.value_and_grad(lambda i, t, s: loss(i, t, s, jnp.float32(-10))[0], argnums=(0, 1, 2))
        return whole(image, text, jnp.float32(14.3))

    step = jax.jit(run)
    small = jax.ShapeDtypeStruct((n, EMBED), jnp.float32)
    compiled = step.lower(small, small).compile()
    jax.block_until_ready(jax.jit(lambda x: x @ x)(jnp.ones((256, 256))))  # thread pools and buffers of the runtime
    before = peak_bytes()
    rng = np.random.default_rng(0)

    def embeddings() -> jax.Array:
        x = rng.standard_normal((n, EMBED), np.float32)
        x /= np.sqrt(np.einsum("ne,ne->n", x, x))[:, None]
        return jnp.asarray(x)

    image, text = embeddings(), embeddings()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(image, text))
        seconds.append(time.perf_counter() - start)
    return {"way": way, "pairs": n, "seconds": seconds, "extra_bytes": peak_bytes() - before}


def child(way: str, n: int, repeats: int) -> dict:
    command = [sys.executable, __file__, f"--child={way}", f"--repeats={repeats}", "--pairs", str(n)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"way": way, "pairs": n, "failed": done.returncode}
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1024, 4096, 16_384, 32_768])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["softmax", "sigmoid", "products"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.pairs[0], arguments.repeats)))
        return
    rows = []
    for n in arguments.pairs:
        inputs_and_gradients = 4 * n * EMBED * 4
        for way in arguments.ways:
            row = child(way, n, arguments.repeats)
            rows.append(row)
            if "failed" in row:
                print(f"{n:8} {way:9} failed ({row['failed']})", flush=True)
                continue
            seconds, extra = statistics.median(row["seconds"]), row["extra_bytes"]
            rate = 8 * n * n * EMBED / seconds / 1e9
            print(
                f"{n:8} {way:9} {seconds:8.2f} s {rate:7.1f} GFLOP/s {extra / 2**20:8.0f} MiB "
                f"= {extra / inputs_and_gradients:.2f} x inputs and gradients",
                flush=True,
            )
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        about = {"cores": os.cpu_count(), "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
        arguments.output.write_text(json.dumps({**about, "embed": EMBED, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
