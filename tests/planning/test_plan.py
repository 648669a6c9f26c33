"""Plans of a tiny model: on the simulated devices here as if they were accelerators, and for real TPU topologies."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from clipjax.cli import plan
from clipjax.config import Config, DataConfig, Dtype, LossMethod, ModelConfig, Remat, TextTransformerConfig, ViTConfig
from clipjax.planning import measure, report, search, targets, timing
from clipjax.runtime.chips import CHIPS
from clipjax.training.program import build_program
from tests.commands import exit_code

CONFIG = """
from clipjax.config import *

def get_config():
    return Config(
        total_examples=2560,
        global_batch_size=256,
        model=ModelConfig(
            embed_dim=64,
            image=ViTConfig(image_size=32, patch_size=8, width=128, depth=2, num_heads=2),
            text=TextTransformerConfig(context_length=16, vocab_size=260, width=128, depth=2, num_heads=2),
            remat=Remat.DOTS,
        ),
        data=DataConfig(train="pairs.tar"),
    )
"""


def tiny() -> Config:
    return Config(
        total_examples=2560,
        global_batch_size=64,
        model=ModelConfig(
            embed_dim=32,
            image=ViTConfig(image_size=16, patch_size=8, width=32, depth=2, num_heads=2),
            text=TextTransformerConfig(context_length=8, vocab_size=260, width=32, depth=2, num_heads=2),
            compute_dtype=Dtype.FLOAT32,
            remat=Remat.DOTS,
        ),
        data=DataConfig(train="pairs.tar"),
    )


def here(**changes) -> targets.Target:
    """The simulated devices, as if they were GPUs."""
    chip = CHIPS["h100"]
    values = {field: getattr(chip, field) for field in chip.__dataclass_fields__} | changes
    return targets.Target("test:8", type(chip)(**values), jax.devices(), is_here=True)


@pytest.fixture(scope="module")
def compiled() -> report.Compiled:
    return report.compile_step(tiny(), here(), num_samples=1000)


def test_a_plan_has_all_that_is_promised(compiled):
    plan = report.make_plan(tiny(), here(), compiled, price=2.0)
    promised = "fits peak_hbm_bytes hbm_bytes predicted_step_seconds roofline_step_seconds predicted_mfu collectives"
    assert set(promised.split()) <= set(plan)
    assert plan["fits"]
    assert sum(plan["memory"].values()) == plan["peak_hbm_bytes"]
    assert plan["steps"] == 40
    assert plan["predicted_cost"] == pytest.approx(2.0 * plan["predicted_chip_hours"])
    assert plan["predicted_chip_hours"] == pytest.approx(8 * 40 * plan["predicted_step_seconds"] / 3600)
    assert plan["images_per_second_per_host"] == pytest.approx(64 / plan["predicted_step_seconds"])
    assert plan["predicted_step_seconds"] >= plan["roofline_step_seconds"] > 0
    assert {"kind", "axis", "bytes", "overlapped"} <= set(plan["collectives"][0])
    json.dumps(plan)
    text = report.describe(plan)
    assert "fits" in text and "predicted" in text and "all-reduce" in text


def test_parameters_and_optimizer_are_counted_to_the_byte(compiled):
    plan = report.make_plan(tiny(), here(), compiled)
    params = sum(leaf.size for leaf in jax.tree.leaves(compiled.state.params))
    assert plan["memory"]["parameters"] == 4 * params
    # Two moments, and the step that the optimizer counts.
    assert 8 * params <= plan["memory"]["optimizer"] <= 8 * params + 64


def test_what_does_not_fit_is_said(compiled):
    plan = report.make_plan(tiny(), here(memory_bytes=1000), compiled)
    assert not plan["fits"]
    assert "DOES NOT FIT" in report.describe(plan)


def test_a_compilers_refusal_is_a_plan_too(compiled):
    refused = report.Compiled(None, "", "temporaries (30G) exceed 16G", *[getattr(compiled, f) for f in (
        "state", "batch", "teacher", "mesh", "seconds", "init_state")])  # fmt: skip
    plan = report.make_plan(tiny(), here(), refused)
    assert not plan["fits"]
    assert "temporaries (30G)" in report.describe(plan)


@pytest.mark.slow
def test_a_planned_step_is_the_step_that_trains(compiled):
    """`measure` runs the planned executable; the loss is that of the program that `train` jits."""
    measured = measure.measure(compiled, compiled.init_state)
    assert len(measured["all_step_seconds"]) == measure.ROUNDS
    with jax.set_mesh(compiled.mesh):
        program = build_program(tiny(), compiled.mesh, num_samples=1000)
        places = jax.tree.map(lambda leaf: leaf.sharding, compiled.state)
        state = jax.jit(program.init_state, out_shardings=places)(jax.random.key(0))
        step = program.jit(state)
        for _ in range(measure.WARM_UP + measure.ROUNDS):
            state, metrics = step(state, measure.make_batch(compiled.batch), None)
    assert float(metrics["loss"]) == measured["loss"]


@pytest.mark.slow
def test_a_search_compiles_and_ranks(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "FSDP", (1, 4))
    monkeypatch.setattr(search, "TENSOR", (1, 2))
    tries = search.Search(tiny(), here(), num_samples=1000, price=1.0, output=tmp_path / "plans.json")
    assert search.run_search(tries)
    plans = json.loads((tmp_path / "plans.json").read_text())
    seconds = [plan["predicted_step_seconds"] for plan in plans]
    assert seconds == sorted(seconds)
    for choice, values in {"remat": {policy.value for policy in Remat}, "fsdp": {1, 4}, "tensor": {1, 2}}.items():
        assert {plan["changes"][choice] for plan in plans} == values
    assert all(plan["predicted_cost"] > 0 for plan in plans)
    assert "ms predicted" in capsys.readouterr().out


def searched(monkeypatch, predict, config: Config | None = None) -> list[search.Candidate]:
    """A search for which `predict` tells of a config whether it fits, its peak bytes, and its seconds.

    Peak bytes in words are what a compiler says when it refuses.
    """

    def made(config, _target, _compiled, **_):
        fits, peak, seconds = predict(config)
        refused = isinstance(peak, str)
        plan = {"fits": fits, "predicted_step_seconds": seconds, "predicted_mfu": 0.5}
        return {**plan, "peak_hbm_bytes": None if refused else peak, **({"reason": peak} if refused else {})}

    monkeypatch.setattr(search, "compile_step", lambda *_, **__: None)
    monkeypatch.setattr(search, "make_plan", made)
    tries = search.Search(tiny() if config is None else config, here(), num_samples=1000)
    tries.run()
    return tries.candidates


def test_a_search_goes_on_from_the_best(monkeypatch):
    def predict(config):
        slower = {Remat.NONE: -9, Remat.DOTS: 2, Remat.MLP: 3, Remat.FULL: 4}[config.model.remat]
        return config.model.remat is not Remat.NONE, 1, slower + abs(config.mesh.fsdp - 4) + 1 / config.mesh.tensor

    tries = searched(monkeypatch, predict)
    best = min(tries, key=lambda attempt: attempt.rank)
    assert best.changes["remat"] is Remat.DOTS  # the fastest of those that fit
    assert (best.changes["fsdp"], best.changes["tensor"]) == (4, 2)
    assert {attempt.changes["fsdp"] for attempt in tries} == {1, 4, 8}  # 16 and more do not divide 8 devices
    assert {attempt.changes["microbatch"] for attempt in tries} == {None}  # something fits without
    assert {attempt.changes["method"] for attempt in tries} == {LossMethod.AUTO, LossMethod.GATHERED, LossMethod.RING}
    fastest = min(tries, key=lambda attempt: attempt.plan["predicted_step_seconds"])
    assert fastest.changes["remat"] is Remat.NONE and fastest is not best


def test_a_search_splits_the_batch_where_nothing_fits(monkeypatch):
    def predict(config):
        size = config.microbatch_size or config.global_batch_size
        return size <= 16, size, 1.0

    tries = searched(monkeypatch, predict)
    assert {attempt.changes["microbatch"] for attempt in tries} == {None, 32, 16, 8}
    assert min(tries, key=lambda attempt: attempt.rank).plan["fits"]


def test_a_search_follows_what_the_compiler_says_when_it_refuses(monkeypatch):
    def predict(config):
        size = {Remat.NONE: 90, Remat.DOTS: 60, Remat.MLP: 40, Remat.FULL: 20}[config.model.remat]
        fits = config.model.remat is Remat.FULL and config.mesh.fsdp == 8
        words = f"the total memory required for HLO temporaries ({size - config.mesh.fsdp}.5G) exceeds (15.75G)."
        return (True, 1, 1.0) if fits else (False, words, None)

    best = min(searched(monkeypatch, predict), key=lambda attempt: attempt.rank)
    assert best.plan["fits"] and (best.changes["remat"], best.changes["fsdp"]) == (Remat.FULL, 8)


def test_a_search_starts_from_a_mesh_that_is_possible(monkeypatch):
    config = tiny()
    config.mesh.fsdp = 16  # of 8 devices
    tries = searched(monkeypatch, lambda config: (True, 1, 1.0 / config.mesh.fsdp), config)
    assert min(tries, key=lambda attempt: attempt.rank).changes["fsdp"] == 8
    config.global_batch_size = 60
    with pytest.raises(ValueError, match="global_batch_size=60"):
        search.Search(config, here(), num_samples=1000)


def test_a_step_that_is_refused_has_all_fields(monkeypatch, compiled):
    refused = report.Compiled(**{**vars(compiled), "executable": None, "refusal": "Used 20.00G of 15.75G hbm."})
    plan = report.make_plan(tiny(), here(), refused)
    unknown = ("peak_hbm_bytes", "predicted_step_seconds", "roofline_step_seconds", "predicted_mfu", "collectives")
    assert not plan["fits"] and all(plan[name] is None for name in unknown) and plan["hbm_bytes"] > 0
    assert "DOES NOT FIT: Used 20.00G" in report.describe(plan)
    assert search.needed_bytes(plan) == 20 * 2**30


def test_a_gpu_that_is_nearly_full_is_noted(compiled):
    plan = report.make_plan(tiny(), here(), compiled)
    assert "note" not in plan
    small = here(memory_bytes=int(1.1 * plan["peak_hbm_bytes"]))
    plan = report.make_plan(tiny(), small, compiled)
    assert plan["fits"] and "XLA_CLIENT_MEM_FRACTION" in report.describe(plan)


def test_hidden_collectives_count_only_beyond_what_hides_them():
    assert timing.Timing(compute=3, kernels=1, exposed=0.5, hidden=2, roofline=1, flops=1).predicted == 4.5
    assert timing.Timing(compute=3, kernels=1, exposed=0.5, hidden=6, roofline=1, flops=1).predicted == 6.5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "--topology=CHIP:SHAPE is missing"),
        (("--topology=v99:4x4",), "write CHIP:SHAPE"),
        (("--topology=v5e",), "write CHIP:SHAPE"),
        (("--topology=v5e:4by4",), "looks like 4x4"),
        (("--topology=h100:2x2x2",), "nodes x GPUs"),
        (("--topology=h100:8", "--slices=2"), "one slice"),
        (("--topology=v5e:4x4", "--slices=0"), "--slices=0"),
        (("--topology=v5e:4x4", "--search=maybe"), "--search=maybe must be yes or no"),
        (("--topology=v5e:4x4", "--price=-1"), "--price=-1"),
        (("--topology=v5e:4x4x4",), "v5e chips looks like 4x4: 2 sides at most, and 256 chips in one slice"),
        (("--topology=v5e:64x64",), "256 chips in one slice"),
        (("--topology=here", "--slices=2"), "--topology=here has the slices that it has"),
        (("--topology=v5e:4x4", "--output=."), "--output=. is a folder"),
        (("--topology=v5e:4x4", "--output=no/such"), "there is no folder no"),
        (("--topology=here",), "no accelerator whose peaks are known"),
        (("--topology=h100:8", "--config.model.attention=cudnn"), "plan with --config.model.attention=xla"),
    ],
)
def test_refusals(options, expected, tmp_path, capsys, monkeypatch):
    for name in (*targets.ENVIRONMENT, "XLA_FLAGS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    assert exit_code(plan.main, [f"--config={path}", *options]) == 2
    assert expected in capsys.readouterr().err


def test_a_described_gpu_has_what_the_compiler_asks_for():
    text = targets.gpu_description(CHIPS["h100"])  # type: ignore[arg-type]
    assert "core_count: 132" in text and "major: 9" in text and "NVIDIA H100 80GB HBM3" in text


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def run_plan(tmp_path, *options: str) -> dict:
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [
        sys.executable,
        "-m",
        "clipjax",
        "plan",
        f"--config={path}",
        f"--output={tmp_path / 'plan.json'}",
        *options,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp_path / "plan.json").read_text())


@pytest.mark.skipif(not has("libtpu"), reason="needs the TPU compiler: pip install 'clipjax[plan]'")
@pytest.mark.process
@pytest.mark.compile_ahead
def test_a_tpu_that_is_not_here(tmp_path):
    plan = run_plan(tmp_path, "--topology=v5e:2x2", f"--dump_hlo={tmp_path / 'step.txt'}")
    text = (tmp_path / "step.txt").read_text()
    assert "attention_forward" in text and "attention_backward" in text  # one kernel each, compiled for TPUs
    assert plan["chips"] == 4 and plan["hosts"] == 1 and plan["fits"]
    assert plan["predicted_seconds"]["kernels"] > 0
    assert {one["axis"] for one in plan["collectives"]} <= {"data", "part of data"}
    assert plan["least_bytes"]["data"] <= sum(one["bytes"] for one in plan["collectives"])


@pytest.mark.skipif(not has("jax_cuda12_plugin"), reason="needs JAX's CUDA plugin: pip install 'clipjax[plan-gpu]'")
@pytest.mark.process
@pytest.mark.compile_ahead
def test_a_gpu_that_is_not_here(tmp_path):
    plan = run_plan(tmp_path, "--topology=h100:2x4")
    assert plan["chips"] == 8 and plan["hosts"] == 2 and plan["fits"]
    assert plan["predicted_step_seconds"] > 0
