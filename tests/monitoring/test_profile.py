"""Profiles on request: of the next steps, as often as somebody asks, and never an error."""

import jax
import jax.numpy as jnp

from clipjax.monitoring.profile import STEPS, ProfileOnRequest


def test_nobody_asks(tmp_path):
    profiler = ProfileOnRequest(tmp_path)
    profiler.maybe_start(1)
    profiler.maybe_stop(1)
    profiler.close()
    assert not list(tmp_path.iterdir())


def test_each_request_gives_a_profile_of_the_steps_after_it(tmp_path):
    lines: list[str] = []
    profiler, double = ProfileOnRequest(tmp_path, say=lines.append), jax.jit(lambda x: 2 * x)
    for step in range(1, 16):
        if step in (2, 3, 10):  # the one of step 3 comes during a trace: the steps after that are traced too
            profiler.request()
        profiler.maybe_start(step)
        profiler.maybe_stop(step, double(jnp.ones(8)))
    profiler.close()
    first = [2, 2 + STEPS, 2 + 2 * STEPS]
    assert [line.partition(":")[0] for line in lines] == [f"profile of steps {n} to {n + STEPS - 1}" for n in first]
    for step in first:
        (trace,) = (tmp_path / "profile" / str(step)).rglob("*.xplane.pb")
        assert trace.stat().st_size > 1000


def test_a_folder_that_cannot_be_written_costs_the_profile_alone(tmp_path):
    lines: list[str] = []
    profiler = ProfileOnRequest(tmp_path, say=lines.append)
    (tmp_path / "profile").write_text("in the way")
    profiler.request()
    profiler.maybe_start(4)
    profiler.maybe_stop(8)
    assert len(lines) == 1 and lines[0].startswith("no profile from step 4 on: ")
