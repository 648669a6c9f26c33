"""Time and memory of the contrastive losses, forward and backward, beside peers' losses on the same inputs.

    git clone https://github.com/mlfoundations/open_clip PEERS/open_clip
    git clone https://github.com/DAMO-NLP-SG/Inf-CLIP PEERS/inf_cl
    python benchmarks/loss_peers.py --peer_python=PEER_VENV/bin/python \\
        --open_clip_head=PEERS/open_clip/src/open_clip/loss.py --inf_cl=PEERS/inf_cl \\
        --output=benchmarks/results/loss_peers.json

The peers' environment needs torch and open_clip_torch; a contestant whose option is absent is left out. Every
measurement is a process of its own that has all cores; contestants take turns. Measured are, in float32, the loss and
its gradient by both embeddings and the scale (for a sigmoid also the bias). Memory is what the process's peak grows by
from before the inputs exist, so it counts the inputs and their gradients too; compilation comes before that.

`inf_cl` is the ring of Inf-CL (arXiv 2410.17243), the part of it that is plain torch: its tiles are Triton kernels and
need a GPU. One process alone cannot run its backward pass, so two share the cores and talk over gloo. Their seconds are
those of the slower one, their memory is the sum; what the sockets buffer is not counted.

Exits with 1 where losses or norms of gradients of one kind differ, or a contestant fails other than by its memory.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the peers' environment has no clipjax

from benchmarks import machine  # noqa: E402

EMBED, SCALE, BIAS = 512, 14.3, -10.0
NEEDS = {  # contestant, its kind last: the options without which it cannot run
    "clipjax_softmax": (),
    "open_clip_softmax": ("peer_python",),
    "inf_cl_softmax": ("peer_python", "inf_cl"),
    "clipjax_sigmoid": (),
    "open_clip_sigmoid": ("peer_python",),
    "open_clip_head_sigmoid": ("peer_python", "open_clip_head"),
}
PROCESSES = {"inf_cl_softmax": 2}
CHUNK = 1024  # rows of the matrix that open_clip HEAD's loss has at a time; as many as our tiles
TOLERANCE = {"loss": 1e-5, "gradient_norm": 1e-4}  # relative, among contestants of one kind
OUT_OF_MEMORY = "out of memory"


def kind_of(name: str) -> str:
    return name.rpartition("_")[2]


def clipjax_contestant(name: str, arguments: argparse.Namespace) -> tuple:
    """What places an array; the step, whose gradients begin with images' and texts'; a barrier; versions."""
    import jax
    import jax.numpy as jnp

    from clipjax.losses import make_loss

    loss = make_loss(kind=kind_of(name))
    scalars = [jnp.float32(x) for x in ((SCALE,) if kind_of(name) == "softmax" else (SCALE, BIAS))]
    whole = jax.value_and_grad(lambda *inputs: loss(*inputs)[0], argnums=tuple(range(2 + len(scalars))))
    embeddings = jax.ShapeDtypeStruct((arguments.pairs[0], EMBED), jnp.float32)
    compiled = jax.jit(whole).lower(embeddings, embeddings, *scalars).compile()
    jax.block_until_ready(jax.jit(lambda x: x @ x)(jnp.ones((256, 256))))  # thread pools and buffers of the runtime

    def step(image: Any, text: Any) -> tuple[Any, Any]:
        return jax.block_until_ready(compiled(image, text, *scalars))

    # Waiting, since a copy that is still under way holds on to its source.
    return lambda x: jax.block_until_ready(jnp.asarray(x)), step, lambda: None, {"jax": jax.__version__}


def torch_contestant(name: str, arguments: argparse.Namespace) -> tuple:
    import torch
    import torch.distributed

    processes = PROCESSES.get(name, 1)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    inputs, versions = [torch.tensor(SCALE, requires_grad=True)], {"torch": torch.__version__}
    if name == "inf_cl_softmax":
        meeting, rank = f"file://{arguments.meeting}", arguments.rank
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
        loss_function = inf_cl_loss(arguments.inf_cl)
    elif name == "open_clip_head_sigmoid":
        loss_function = runpy.run_path(str(arguments.open_clip_head))["SigLipLoss"](chunk_size=CHUNK)
    else:
        distribution = importlib.metadata.distribution("open_clip_torch")
        # Not imported as a package: that would bring in models and torchvision.
        losses = runpy.run_path(str(distribution.locate_file("open_clip/loss.py")))
        loss_function = losses["ClipLoss" if kind_of(name) == "softmax" else "SigLipLoss"]()
        versions["open_clip"] = distribution.version
    if kind_of(name) == "sigmoid":
        inputs.append(torch.tensor(BIAS, requires_grad=True))

    def step(image: Any, text: Any) -> tuple[Any, Any]:
        loss = loss_function(image, text, *inputs)
        return loss.detach(), torch.autograd.grad(loss, [image, text, *inputs])

    small = torch.full((256, EMBED), EMBED**-0.5).requires_grad_()
    step(small, small.detach().requires_grad_())  # thread pools, buffers of the runtime, connections
    meet = torch.distributed.barrier if processes > 1 else lambda: None
    return lambda x: torch.from_numpy(x).requires_grad_(), step, meet, versions


def inf_cl_loss(checkout: pathlib.Path) -> Callable[..., Any]:
    """As Inf-CLIP's `RingClipLoss`. Triton only has to be there where the kernels are defined; the ring calls none."""
    triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
    vars(triton).update(jit=lambda kernel: kernel, language=language)
    vars(language).update(constexpr=int)
    sys.modules.update({"triton": triton, "triton.language": language})
    sys.path.insert(0, str(checkout))
    from inf_cl import cal_ring_loss  # pyright: ignore[reportMissingImports]

    return lambda i, t, scale: (cal_ring_loss(i, t, scale=scale) + cal_ring_loss(t, i, scale=scale)) / 2


def measure(arguments: argparse.Namespace) -> dict:
    """In the process of a contestant."""
    import numpy as np

    name, pairs = arguments.child, arguments.pairs[0]
    prepare = clipjax_contestant if name.startswith("clipjax") else torch_contestant
    place, step, meet, versions = prepare(name, arguments)
    own = pairs // PROCESSES.get(name, 1)
    rng = np.random.default_rng(0)
    before = machine.reset_peak()

    def embeddings() -> Any:
        x = machine.unit_rows(rng, pairs, EMBED)
        return place(x[arguments.rank * own :][:own].copy() if own < pairs else x)

    image, text = embeddings(), embeddings()
    seconds, warm_ups = [], 2 if pairs <= 8192 else 1
    for _ in range(warm_ups + arguments.repeats):
        loss = gradients = None  # or they would live on beside the next ones
        meet()
        start = time.perf_counter()
        loss, gradients = step(image, text)
        seconds.append(time.perf_counter() - start)
    meet()  # nobody leaves while another still reads from it
    extra = machine.peak_bytes() - before
    assert loss is not None and gradients is not None, "--repeats is 0"
    norm = math.hypot(*(float(np.linalg.norm(np.asarray(x))) for x in gradients[:2]))
    results = {"seconds": seconds[warm_ups:], "extra_bytes": extra, "loss": float(loss), "gradient_norm": norm}
    return results | {"versions": versions}


def watch(processes: list[subprocess.Popen], limit: float) -> str | None:
    """Wait for all; kill all when one fails or together they pass the limit. Returns what went wrong."""
    try:
        while True:
            codes = [process.poll() for process in processes]
            if any(codes):
                return f"exit codes {codes}"
            if None not in codes:
                return None
            with contextlib.suppress(OSError):  # one has ended since
                pages = [pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1] for process in processes]
                if sum(map(int, pages)) * os.sysconf("SC_PAGE_SIZE") > limit:
                    return OUT_OF_MEMORY
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()


def run_contestant(name: str, pairs: int, arguments: argparse.Namespace) -> dict:
    """One measurement in fresh processes; what several of them measured is put together."""
    python = sys.executable if name.startswith("clipjax") else arguments.peer_python
    command = [python, __file__, f"--child={name}", f"--repeats={arguments.repeats}", f"--pairs={pairs}"]
    command += [f"--{option}={getattr(arguments, option)}" for option in NEEDS[name]]
    settings = {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        command.append(f"--meeting={folder}/meeting")
        start = functools.partial(subprocess.Popen, env=os.environ | settings, stdout=subprocess.PIPE, text=True)
        processes = [start([*command, f"--rank={rank}"]) for rank in range(PROCESSES.get(name, 1))]
        failed = watch(processes, arguments.memory_limit_gb * 1e9)
        outputs = [process.communicate()[0] for process in processes]
    row = {"contestant": name, "pairs": pairs}
    if failed:
        return row | {"failed": failed}
    parts = [json.loads(output) for output in outputs]
    return row | {
        "seconds": [max(repeat) for repeat in zip(*(part["seconds"] for part in parts), strict=True)],
        "extra_bytes": sum(part["extra_bytes"] for part in parts),
        "loss": statistics.mean(part["loss"] for part in parts),
        # Each process differentiates the mean over its own pairs only.
        "gradient_norm": math.hypot(*(part["gradient_norm"] for part in parts)) / len(parts),
        "versions": parts[0]["versions"],
    }


def summarize(rounds: dict[str, list[dict]]) -> list[dict]:
    """Of one kind at one size: medians over rounds, and how many times our time it is. Ours comes first."""
    summary: list[dict] = []
    for rows in rounds.values():
        entry = {key: rows[-1][key] for key in ("contestant", "pairs", "failed") if key in rows[-1]}
        if "failed" not in entry:
            entry["seconds"] = statistics.median(statistics.median(row["seconds"]) for row in rows)
            entry["extra_bytes"] = statistics.median(row["extra_bytes"] for row in rows)
            base = [*summary, entry][0]
            entry["ratio"] = entry["seconds"] / base["seconds"] if "seconds" in base else None
        summary.append(entry)
    return summary


def compare(arguments: argparse.Namespace) -> dict:
    absent = {name: [f"--{o} is absent" for o in needs if not getattr(arguments, o)] for name, needs in NEEDS.items()}
    results: dict = {"left_out": {name: why for name, why in absent.items() if why}, "versions": {}}
    results |= {"agrees": True, "differences": [], "summary": [], "rows": []}
    for pairs in arguments.pairs:
        rounds: dict[str, list[dict]] = {name: [] for name in NEEDS if not absent[name]}
        for name in [*rounds] * arguments.rounds:
            if not any("failed" in row for row in rounds[name]):
                row = run_contestant(name, pairs, arguments)
                print(f"{pairs:8} {name:24} {row.get('failed') or row['seconds']}", flush=True)
                results["versions"] |= row.pop("versions", {})
                rounds[name].append(row)
                results["rows"].append(row)
        for kind in ("softmax", "sigmoid"):
            same = {name: rows for name, rows in rounds.items() if kind_of(name) == kind}
            results["summary"] += summarize(same)
            for quantity, most in TOLERANCE.items():
                values = [row[quantity] for rows in same.values() for row in rows if "failed" not in row]
                apart = (max(values) - min(values)) / max(values) if values else 0.0
                results["agrees"] &= apart <= most
                results["differences"].append({"pairs": pairs, "kind": kind, "of": quantity, "relative": apart})
    return results


def print_table(summary: list[dict]) -> None:
    print(f"\n{'pairs':>8} {'contestant':24} {'seconds':>9} {'/ ours':>7} {'MiB':>7}")
    for entry in summary:
        mebibytes = entry.get("extra_bytes", 0) / 2**20
        figures = entry.get("failed") or f"{entry['seconds']:9.3f} {entry['ratio'] or math.nan:7.2f} {mebibytes:7.0f}"
        print(f"{entry['pairs']:8} {entry['contestant']:24} {figures}")


def commit_of(path: pathlib.Path) -> str | None:
    """The last that changed it, if it lies in a checkout."""
    log = ["git", "-C", path.parent, "log", "-1", "--format=%H", "--", path.name]
    return subprocess.run(log, capture_output=True, text=True, check=False).stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", help="interpreter of an environment with torch and open_clip_torch")
    parser.add_argument("--open_clip_head", type=pathlib.Path, help="loss.py of open_clip's development version")
    parser.add_argument("--inf_cl", type=pathlib.Path, help="a checkout of Inf-CLIP")
    parser.add_argument("--pairs", type=int, nargs="+", default=[4096, 8192, 16_384, 32_768])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="counted steps of one measurement")
    parser.add_argument("--memory_limit_gb", type=float, default=20.0)
    parser.add_argument("--output", type=pathlib.Path)
    for internal, kind in {"child": str, "meeting": str, "rank": int}.items():
        parser.add_argument(f"--{internal}", type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments)), flush=True)
        os._exit(0)  # one in twenty regular exits aborts in a thread of gloo, whether or not its group is destroyed
    files = {"open_clip_head": arguments.open_clip_head, "inf_cl": arguments.inf_cl and arguments.inf_cl / "inf_cl"}
    results = {
        "machine": machine.describe(),
        "date": time.strftime("%Y-%m-%d"),
        "inputs": {"embed": EMBED, "scale": SCALE, "bias": BIAS},
        "memory_limit_gb": arguments.memory_limit_gb,
        "commits": {name: commit_of(path) for name, path in files.items() if path},
        **compare(arguments),
    }
    print_table(results["summary"])
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    if not results["agrees"] or any(row.get("failed", OUT_OF_MEMORY) != OUT_OF_MEMORY for row in results["rows"]):
        raise SystemExit(f"a contestant failed or disagrees: {results['differences']}")


if __name__ == "__main__":
    main()
