"""Plans of runs with pictures of variable aspect: memory by the largest budget, hours by the mean step."""

import dataclasses

import numpy as np
import pytest

from clipjax.config import Config, ImagePool, flops_per_pair
from clipjax.planning import report
from clipjax.planning.measure import make_batch
from tests.planning.test_plan import here, tiny


def variable(menu: tuple[int, ...]) -> Config:
    config = tiny()
    tower = {"patch_size": 4, "max_patches": 24, "class_token": False, "pool": ImagePool.AVERAGE}
    config.model.image = dataclasses.replace(config.model.image, **tower)
    config.data = dataclasses.replace(config.data, patch_menu=menu, images_per_row=4, enlarge=False)
    return config


@pytest.fixture(scope="module")
def planned():
    return report.plan_run(variable((4, 12)), here(), num_samples=1000, price=2.0)


def test_the_largest_budget_decides_what_fits(planned):
    plan, compiled = planned
    assert compiled.batch["patches"].shape == (16, 48, 48)
    assert plan["model_flops"] == 3 * 64 * flops_per_pair(variable((12,)))
    alone, _ = report.plan_run(variable((12,)), here(), num_samples=1000)
    assert plan["peak_hbm_bytes"] == alone["peak_hbm_bytes"] and "budgets" not in alone


def test_each_budget_has_its_speed_and_the_run_the_mean(planned):
    plan, _ = planned
    large, small = plan["budgets"]
    assert (large["patches"], small["patches"]) == (12, 4)
    assert large["predicted_step_seconds"] == plan["predicted_step_seconds"] > small["predicted_step_seconds"]
    mean = (large["predicted_step_seconds"] + small["predicted_step_seconds"]) / 2
    assert plan["predicted_hours"] == pytest.approx(40 * mean / 3600)
    assert plan["predicted_cost"] == pytest.approx(2.0 * 8 * 40 * mean / 3600)
    assert plan["images_per_second_per_host"] == pytest.approx(64 / mean)
    text = report.describe(plan)
    assert f"  4          patches per image: {1e3 * small['predicted_step_seconds']:.1f} ms, " in text


def test_noise_for_measuring_is_rows_of_whole_pictures(planned):
    batch = make_batch(planned[1].batch)
    segment, place, grid = (np.asarray(batch[name]) for name in ("segment", "place", "grid"))
    assert (segment >= 0).all() and batch["patches"].dtype == np.uint8
    assert (grid.prod(-1) == [(row == np.arange(4)[:, None]).sum(-1) for row in segment]).all()
    inside = np.take_along_axis(grid, segment[..., None], axis=1)
    assert (place >= 0).all() and (place < inside).all()
