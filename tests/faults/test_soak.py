"""The soak's arithmetic: growth, compilations and step times are judged by the bounds that it states."""

import pytest

from benchmarks.soak import find_recompilations, slope, summarize


def samples(**growth: float) -> list[dict[str, float]]:
    """An hour, a sample a minute, of a run that grows by so much each minute of the second half."""
    names = [f"{who}_{what}" for who in ("run", "workers") for what in ("mb", "descriptors", "threads")]
    return [
        {"time": 60.0 * i, **{name: 100 + growth.get(name, 0.0) * max(i - 30, 0) for name in names}} for i in range(61)
    ]


def test_the_slope_is_that_of_the_second_half():
    times = [float(i) for i in range(101)]
    assert slope(times, [1000.0 * (t < 50) + 3 * t for t in times]) == pytest.approx(3)


def test_a_program_may_be_compiled_once_by_the_end_of_the_first_evaluation():
    compiled = [("init", 1), ("step", 2), ("step", 3), ("encode", 12), ("encode", 14), ("late", 30), ("step", 31)]
    events = [{"program": program, "time": float(time)} for program, time in compiled]
    found = find_recompilations(events, second_step=5.0, first_evaluation=20.0)
    assert found == ["encode", "late", "step"]


def held(heap: float = 0.0) -> list[dict[str, float]]:
    """What the run holds in that hour."""
    return [{"time": 60.0 * i, "heap_mb": 100 + heap * max(i - 30, 0), "python_blocks": 9.0} for i in range(61)]


QUICK = [0.1] * 36_000
"""Step times of the hour: 36 saves."""


def test_a_steady_run_breaks_no_bound():
    result = summarize(samples(), held(), [0.1] * 98 + [0.2] * 2 + [0.1] * 200, [])
    assert result["broken"] == []
    assert result["run_mb"] == {"last": 100, "growth_per_hour": pytest.approx(0), "growth_per_save": pytest.approx(0)}
    assert result["heap_in_use_mb"] == {"last": 100, "growth_per_hour": pytest.approx(0)}


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        ({"run_mb": 0.7}, "run: memory grows by 1.17 MB per save, more than 1"),
        ({"workers_mb": 0.5}, "workers: memory grows by 30.0 MB per hour"),
        ({"run_descriptors": 0.2}, "run: descriptors grow from 100 to 103"),
        ({"workers_threads": 1}, "workers: threads grow from 100 to 115"),
    ],
)
def test_growth_is_named(growth, message):
    (broken,) = summarize(samples(**growth), held(), QUICK, [])["broken"]
    assert broken.startswith(message)


def test_a_heap_that_grows_is_named():
    (broken,) = summarize(samples(), held(heap=0.5), QUICK, [])["broken"]
    assert broken == "run: the heap in use grows by 30.0 MB per hour, more than 20"


def test_slow_steps_and_compilations_are_named():
    broken = summarize(samples(), held(), [0.1] * 95 + [0.2] * 5, ["step"])["broken"]
    assert broken == ["step time: p99/p50 is 2.00, more than 1.5", "compiled again after step 2: step"]
