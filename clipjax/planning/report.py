"""A plan: one compiled step, read and priced; as JSON and as text."""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from clipjax.config import Config, flops_per_pair, patch_menu, total_steps
from clipjax.config.variable_aspect import with_budget
from clipjax.planning import hlo, memory, timing, traffic
from clipjax.planning.targets import Target, compiler_versions
from clipjax.runtime import sharding
from clipjax.runtime.compilation import compiler_options
from clipjax.runtime.terminal import format_table
from clipjax.training.program import build_program

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
GIB = 2**30

GPU_POOL = 0.75
"""Share of a GPU's memory that JAX takes when it starts (docs.jax.dev, GPU memory allocation)."""

NEARLY_FULL = (
    f"more than the {GPU_POOL:.0%} of a GPU that JAX takes at first, and older versions at most: "
    "set XLA_CLIENT_MEM_FRACTION=0.95"
)

UNKNOWN = ("peak_hbm_bytes", "predicted_step_seconds", "roofline_step_seconds", "predicted_mfu", "collectives")
"""Keys that every plan has; null where the compiler refuses the step."""


@dataclass(frozen=True)
class Compiled:
    """A step that was compiled, or the reason why it does not fit.

    Attributes:
        executable: None if the compiler found that the step does not fit.
        text: of the compiled program.
        refusal: message of the compiler; "" if it compiled.
        state: shapes of the training state.
        batch: shapes of a batch.
        teacher: shapes of the teacher's parameters; None without one.
        mesh: of the target's devices.
        seconds: of compilation.
        init_state: key -> a fresh state.
    """

    executable: Any
    text: str
    refusal: str
    state: Any
    batch: Any
    teacher: Any
    mesh: Any
    seconds: float
    init_state: Any


def compile_step(config: Config, target: Target, *, num_samples: int, teacher: Config | None = None) -> Compiled:
    """Compile the step that training would run.

    Raises:
        ValueError: the config does not fit the mesh.
    """
    mesh = sharding.make_mesh(config.mesh, target.devices)
    start = time.monotonic()
    with jax.set_mesh(mesh):
        program = build_program(config, mesh, num_samples=num_samples, teacher=teacher)
        state, batch, frozen = program.abstract_state, program.abstract_batch(), program.abstract_teacher()
        executable, refusal = None, ""
        try:
            executable = program.jit(state).lower(state, batch, frozen).compile()
        except jax.errors.JaxRuntimeError as error:
            if OUT_OF_MEMORY not in str(error):
                raise
            refusal = str(error).split(OUT_OF_MEMORY)[-1].lstrip(": ").splitlines()[0]
    text = "" if executable is None else executable.as_text()
    return Compiled(executable, text, refusal, state, batch, frozen, mesh, time.monotonic() - start, program.init_state)


def make_plan(config: Config, target: Target, compiled: Compiled, *, price: float | None = None) -> dict[str, Any]:
    """Make the plan of a run from its compiled step; `docs/planning.md` defines each field."""
    chips = len(target.devices)
    plan: dict[str, Any] = {
        "topology": target.name,
        "slices": target.num_slices,
        "chips": chips,
        "mesh": dict(compiled.mesh.shape),
        "global_batch_size": config.global_batch_size,
        "hbm_bytes": target.chip.memory_bytes,
        "compile_seconds": round(compiled.seconds, 1),
        "versions": compiler_versions(),
        "compiler_options": compiler_options(list(compiled.mesh.devices.flat)),
    }
    if compiled.executable is None:
        return {**plan, **dict.fromkeys(UNKNOWN), "fits": False, "reason": compiled.refusal}
    analysis = compiled.executable.memory_analysis()
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    peak = max(analysis.peak_memory_in_bytes, arguments) if target.chip.platform == "tpu" else arguments + temporaries
    program = hlo.parse(compiled.text)
    moved = traffic.collectives(program, compiled.mesh, target.chip)
    seconds = timing.predict(program, target.chip, moved, 2 * (arguments + temporaries))
    step = seconds.predicted
    useful = 3 * flops_per_pair(config) * config.global_batch_size
    steps = total_steps(config)
    hours = steps * step / 3600
    plan |= {
        "fits": peak <= target.chip.memory_bytes,
        "peak_hbm_bytes": peak,
        "temporary_bytes": temporaries,
        "memory": memory.by_kind(config, compiled.state, compiled.batch, compiled.teacher, peak),
        "flops_per_chip": seconds.flops,
        "model_flops": useful,
        "predicted_step_seconds": step,
        "predicted_seconds": {
            "compute": seconds.compute,
            "kernels": seconds.kernels,
            "exposed_collectives": seconds.exposed,
            "hidden_collectives": seconds.hidden,
        },
        "roofline_step_seconds": seconds.roofline,
        "predicted_mfu": useful / (chips * 1e12 * target.chip.peak_tflops * step),
        "collectives": [dataclasses.asdict(collective) for collective in moved],
        "least_bytes": traffic.min_traffic_bytes(config, compiled.state.params, compiled.mesh),
        "images_per_second_per_host": config.global_batch_size / step / target.num_hosts,
        "hosts": target.num_hosts,
        "steps": steps,
        "predicted_hours": hours,
        "predicted_chip_hours": hours * chips,
    }
    if target.chip.platform == "gpu" and peak > GPU_POOL * target.chip.memory_bytes:
        plan["note"] = NEARLY_FULL
    if price is not None:
        plan |= {"price_per_chip_hour": price, "predicted_cost": price * hours * chips}
    return plan


def plan_run(
    config: Config, target: Target, *, num_samples: int, teacher: Config | None = None, price: float | None = None
) -> tuple[dict[str, Any], Compiled]:
    """Return the plan of a run and its compiled step; of several budgets of patches, the largest decides what fits.

    `budgets` then tells the seconds of each, and hours, cost and input are those of the mean step: the seed draws each
    as often.

    Raises:
        ValueError: the config does not fit the mesh.
    """
    largest, *others = sorted(patch_menu(config), reverse=True) or [0]
    compiled = compile_step(config, target, num_samples=num_samples, teacher=teacher)
    plan = make_plan(config, target, compiled, price=price)
    if not others or plan["peak_hbm_bytes"] is None:
        return plan, compiled
    seconds = {largest: plan["predicted_step_seconds"]}
    for patches in others:
        one = with_budget(config, patches)
        smaller = make_plan(one, target, compile_step(one, target, num_samples=num_samples, teacher=teacher))
        seconds[patches] = smaller["predicted_step_seconds"]
    plan["budgets"] = [
        {"patches": patches, "predicted_step_seconds": step, "pairs_per_second": config.global_batch_size / step}
        for patches, step in seconds.items()
    ]
    share = sum(seconds.values()) / len(seconds) / seconds[largest]
    plan["images_per_second_per_host"] /= share
    for name in ("predicted_hours", "predicted_chip_hours", "predicted_cost"):
        if name in plan:
            plan[name] *= share
    return plan, compiled


def describe(plan: Mapping[str, Any]) -> str:
    """Format a plan as text."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
    where = plan["topology"] + (f", {plan['slices']} slices" if plan["slices"] > 1 else "")
    lines = [f"{where}: {plan['chips']} chips ({mesh}), batch {plan['global_batch_size']:,}", ""]
    if plan["peak_hbm_bytes"] is None:
        lines += [f"DOES NOT FIT: {plan['reason']}", "Try --search=yes, or model.remat, microbatch_size, mesh.fsdp."]
        return "\n".join(lines)
    lines += [*_memory_lines(plan), "", *_time_lines(plan), "", *_traffic_lines(plan)]
    if measured := plan.get("measured"):
        step, peak = measured["step_seconds"], measured["peak_hbm_bytes"]
        lines += [
            "",
            f"measured     on {measured['device']}: step {1e3 * step:.1f} ms, MFU {measured['mfu']:.1%}, "
            f"predicted / measured {plan['predicted_step_seconds'] / step:.2f}, "
            f"roofline / measured {plan['roofline_step_seconds'] / step:.2f}",
        ]
        if peak is not None:
            lines.append(
                f"             peak {peak / GIB:.2f} GiB, predicted / measured {plan['peak_hbm_bytes'] / peak:.3f}"
            )
    return "\n".join(lines)


def _memory_lines(plan: Mapping[str, Any]) -> list[str]:
    peak, there = plan["peak_hbm_bytes"], plan["hbm_bytes"]
    verdict = "fits" if plan["fits"] else "DOES NOT FIT"
    kinds = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in plan["memory"].items())
    return [
        f"memory       {peak / GIB:.2f} of {there / GIB:.1f} GiB per chip at the peak: {verdict}",
        f"  GiB        {kinds}",
        *([f"             {plan['note']}"] if "note" in plan else []),
    ]


def _time_lines(plan: Mapping[str, Any]) -> list[str]:
    parts = ", ".join(f"{name.replace('_', ' ')} {1e3 * s:.1f}" for name, s in plan["predicted_seconds"].items())
    lines = [
        f"step         {1e3 * plan['predicted_step_seconds']:.1f} ms predicted, MFU {plan['predicted_mfu']:.1%}; "
        f"roofline of this program {1e3 * plan['roofline_step_seconds']:.1f} ms",
        f"  ms         {parts}",
        *(
            f"  {one['patches']:<10,} patches per image: {1e3 * one['predicted_step_seconds']:.1f} ms, "
            f"{one['pairs_per_second']:,.0f} pairs per second"
            for one in plan.get("budgets", ())
        ),
        f"input        {plan['images_per_second_per_host']:,.0f} images per second on each of {plan['hosts']} hosts",
        f"run          {plan['steps']:,} steps: {plan['predicted_hours']:,.1f} hours, "
        f"{plan['predicted_chip_hours']:,.0f} chip-hours (predicted)",
    ]
    if "predicted_cost" in plan:
        lines.append(
            f"cost         {plan['predicted_cost']:,.0f} at {plan['price_per_chip_hour']} per chip-hour (predicted)"
        )
    return lines


def _traffic_lines(plan: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            found["kind"],
            found["axis"],
            str(found["count"]),
            f"{found['bytes'] / 1e6:.1f}",
            "hidden" if found["overlapped"] else "exposed",
            f"{1e3 * found['seconds']:.2f}",
        ]
        for found in plan["collectives"]
    ]
    table = format_table(rows, ("collective", "axis", "per step", "MB sent", "", "ms"))
    least = ", ".join(f"{axis} {size / 1e6:.1f}" for axis, size in plan["least_bytes"].items())
    return [table, f"no program sends less than (MB) {least or 'nothing'}"]
