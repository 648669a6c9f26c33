"""The table of docs/planning.md: the presets of configs/clip.py on TPUs that this machine lacks.

    python -m benchmarks.plan_table --chips v4:4x8x8 v5e:16x16 v5p:4x8x8 v6e:16x16 --batches 32768 \
        --output=benchmarks/results/plan_table.json

Every line is one `clipjax plan`, command included, added to those that the output already holds. Of the policies of
rematerialisation that fit, the first of dots, mlp, full is taken: the one that computes least again.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

PRESETS = ("vit_b32", "vit_b16", "vit_l14", "vit_l14_336", "vit_h14", "so400m")
POLICIES = ("dots", "mlp", "full")
FIELDS = (
    "topology", "slices", "chips", "mesh", "global_batch_size", "hbm_bytes", "versions", "compile_seconds", "fits",
    "reason", "peak_hbm_bytes", "temporary_bytes", "memory", "flops_per_chip", "predicted_step_seconds",
    "predicted_seconds", "roofline_step_seconds", "predicted_mfu", "collectives", "least_bytes",
    "images_per_second_per_host", "predicted_chip_hours",
)  # fmt: skip


def plan(preset: str, chip: str, batch: int, remat: str) -> dict:
    topology, _, slices = chip.partition("*")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "plan.json"
        command = [
            "-m", "clipjax", "plan", f"--config=configs/clip.py:{preset},batch={batch}", f"--topology={topology}",
            *([f"--slices={slices}"] if slices else []), f"--config.model.remat={remat}",
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, *command, f"--output={path}"], check=False, capture_output=True, text=True
        )
        if done.returncode not in (0, 3):
            raise RuntimeError(done.stderr)
        found = json.loads(path.read_text())
    shown = "clipjax plan " + " ".join(command[2:])
    return {"preset": preset, "remat": remat, "command": shown, **{k: found[k] for k in FIELDS if k in found}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--chips", nargs="+", default=[], help="topologies; v5e:16x16*2 means two slices")
    parser.add_argument("--batches", nargs="+", type=int, default=[32_768])
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--markdown", action="store_true", help="print the output's rows, compile nothing")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(json.loads(arguments.output.read_text())["rows"]))
        return
    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    for chip in arguments.chips:
        for batch in arguments.batches:
            for preset in arguments.presets:
                for remat in POLICIES:
                    row = plan(preset, chip, batch, remat)
                    rows.append(row)
                    print(describe(row), flush=True)
                    about = {"date": time.strftime("%Y-%m-%d"), "rows": rows}
                    arguments.output.write_text(json.dumps(about, indent=1) + "\n")
                    if row["fits"]:
                        break


def describe(row: dict) -> str:
    where = f"{row['preset']} {row['topology']} x{row['slices']} {row['global_batch_size']} {row['remat']}"
    if not row["fits"]:
        return f"{where}: does not fit"
    ms, bound = (1e3 * row[name] for name in ("predicted_step_seconds", "roofline_step_seconds"))
    return (
        f"{where}: {row['peak_hbm_bytes'] / 2**30:.1f} GiB, {ms:.0f} ms, bound {bound:.0f}, {row['predicted_mfu']:.0%}"
    )


def markdown(rows: list[dict]) -> str:
    lines = [
        "| model | topology | batch | remat | GiB per chip | predicted | roofline | MFU | traffic: exposed, hidden | "
        "images/s per host |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if not row["fits"]:
            continue
        where = row["topology"] + (f" x {row['slices']}" if row["slices"] > 1 else "")
        ms, bound = (f"{1e3 * row[name]:.0f} ms" for name in ("predicted_step_seconds", "roofline_step_seconds"))
        parts = row["predicted_seconds"]
        traffic = ", ".join(f"{1e3 * parts[f'{kind}_collectives']:.1f}" for kind in ("exposed", "hidden"))
        memory = f"{row['peak_hbm_bytes'] / 2**30:.1f} of {row['hbm_bytes'] / 2**30:.0f}"
        lines.append(
            f"| {row['preset']} | {where} | {row['global_batch_size']:,} | {row['remat']} | {memory} | {ms} | {bound} "
            f"| {row['predicted_mfu']:.0%} | {traffic} ms | {row['images_per_second_per_host']:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
