"""The run logger: files and lines, the process that writes them, and the table of results."""

import json
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.config import Config, LogConfig, ModelConfig, TextTransformerConfig, ViTConfig
from clipjax.data.sample import NUM_COUNTERS, REASONS, count_by_reason
from clipjax.monitoring.events import Events
from clipjax.monitoring.goodput import CAUSES, Goodput
from clipjax.monitoring.run_logger import RunLogger, results_table

RESULTS = {"val": {"top1": 0.125, "num_examples": 64}, "pairs": {"image_to_text_r1": 0.5}}

pytestmark = pytest.mark.newest


def make_config(peak_tflops: float | None = None) -> Config:
    return Config(
        total_examples=320,
        global_batch_size=32,
        model=ModelConfig(
            embed_dim=8,
            image=ViTConfig(image_size=16, patch_size=8, width=8, depth=1, num_heads=2),
            text=TextTransformerConfig(context_length=8, vocab_size=64, width=8, depth=1, num_heads=2),
        ),
        log=LogConfig(tensorboard=False, peak_tflops=peak_tflops),
    )


def step_metrics(loss, **skipped: int) -> dict:
    """What a step gives, as far as the logger reads it."""
    counts = np.zeros(NUM_COUNTERS, np.int32)
    for reason, count in skipped.items():
        counts[REASONS.index(reason)] = count
    return {"loss": loss, "logit_scale": jnp.float32(14), "samples_skipped": counts}


def count_samples(step: int, counters: np.ndarray) -> dict:
    return {"samples_skipped": count_by_reason(counters), "step_of_counts": step}


def make_logger(workdir, config: Config, *, start_step: int = 0, **more) -> RunLogger:
    flops = config.model.flops()
    return RunLogger(
        config,
        workdir,
        start_step=start_step,
        flops_per_pair=lambda first, last: flops,
        count_samples=count_samples,
        **more,
    )


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


class Scalar:
    """A metric that is still being computed: fetching it would wait for the device."""

    def __init__(self, value: float) -> None:
        self.value, self.fetched = value, False

    def __float__(self) -> float:
        self.fetched = True
        return self.value


def test_a_step_is_fetched_and_written_on_flush_only(tmp_path, capsys):
    logger = make_logger(tmp_path, make_config(), start_step=0, enabled=True)
    loss = Scalar(3.5)
    logger.log_step(2, step_metrics(loss, corrupt_image=1), 0.0)
    assert not loss.fetched
    assert lines(tmp_path) == []
    logger.flush()
    (line,) = lines(tmp_path)
    assert line["step"] == 2
    assert line["examples_seen"] == 64
    assert line["loss"] == 3.5 and line["step_of_counts"] == 2
    assert line["logit_scale"] == 14
    assert line["samples_skipped"] == {reason: int(reason == "corrupt_image") for reason in REASONS}
    assert line["examples_per_second"] > 0
    assert "step  2/10" in capsys.readouterr().err
    logger.flush()
    logger.close()
    assert len(lines(tmp_path)) == 1


def test_prometheus_gets_the_numbers_of_each_logged_step(tmp_path):
    exporter, config = mock.Mock(), make_config()
    logger = make_logger(tmp_path, config, exporter=exporter)
    logger.log_step(2, step_metrics(3.5), 0.0)
    logger.flush()
    logger.close()
    ((step, values),) = [call.args for call in exporter.update.mock_calls]
    assert step == 2 and values["loss"] == 3.5 and values["examples_seen"] == 64


def test_lines_hold_the_times_of_the_run_by_cause(tmp_path):
    now = [1000.0]
    ledger = Goodput(Events(tmp_path, enabled=False), began=999.0, clock=lambda: now[0])
    config = make_config()
    logger = make_logger(tmp_path, config, goodput=ledger)
    ledger.step(1)
    now[0] += 3
    logger.log_step(1, step_metrics(3.5), 0.0)
    with ledger.phase("evaluation"):
        now[0] += 2
    logger.flush()
    logger.results(1, RESULTS)
    logger.close()
    step, evaluation = lines(tmp_path)
    assert step["wall_seconds"] == dict.fromkeys(CAUSES, 0.0) | {"initialisation": 1.0, "steps": 3.0}
    assert step["goodput"] == 0.75
    assert evaluation["wall_seconds"] == step["wall_seconds"] | {"evaluation": 2.0} and evaluation["eval"] == RESULTS


def test_going_on_counts_from_the_start_step(tmp_path):
    first = make_logger(tmp_path, make_config(), start_step=0, enabled=True)
    for step in (1, 2, 3):
        first.log_step(step, step_metrics(float(step)), 0.0)
        first.flush()
    first.close()
    again = make_logger(tmp_path, make_config(), start_step=2, enabled=True)
    again.log_step(3, step_metrics(30.0), 0.0)
    again.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_other_processes_write_and_say_nothing_and_fetch_nothing(tmp_path, capsys):
    logger = make_logger(tmp_path, make_config(), start_step=0, enabled=False)
    loss = Scalar(1.0)
    logger.log_step(1, step_metrics(loss), 0.0)
    logger.flush()
    logger.results(1, RESULTS)
    logger.message("hello")
    with logger.pause():
        pass
    logger.close()
    assert not loss.fetched
    assert list(tmp_path.iterdir()) == []
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_mfu_needs_a_peak(tmp_path):
    for peak in (None, 2.0):
        logger = make_logger(tmp_path, make_config(peak), start_step=0, enabled=True)
        logger.log_step(1, step_metrics(1.0), 0.0)
        logger.close()
        (line,) = lines(tmp_path)
        if peak is None:  # and no table knows a CPU's
            assert "mfu" not in line
        else:
            # Three forward passes per pair, over 8 devices of 2 TFLOP/s.
            expected = 3 * make_config().model.flops() * line["examples_per_second"] / (8 * 2e12)
            assert line["mfu"] == pytest.approx(expected)


def test_results_are_one_line_in_the_log_and_one_for_a_person(tmp_path, capsys):
    logger = make_logger(tmp_path, make_config(), start_step=0, enabled=True)
    logger.results(4, RESULTS)
    logger.message("hello")
    logger.close()
    assert lines(tmp_path) == [{"step": 4, "examples_seen": 128, "eval": RESULTS}]
    assert capsys.readouterr().err == "val top1 0.125  pairs image_to_text_r1 0.500\nhello\n"


def test_results_table_shows_shares_as_percentages_and_counts_as_numbers():
    assert [line.split() for line in results_table(RESULTS).splitlines() if "--" not in line] == [
        ["task", "metric", "value"],
        ["val", "top1", "12.5", "%"],
        ["val", "num_examples", "64"],
        ["pairs", "image_to_text_r1", "50.0", "%"],
    ]
