"""The table of chips: what can be derived from other rows or from arithmetic agrees."""

import math

import pytest

from clipjax.runtime.chips import CHIPS, OTHER_BOARDS, Tpu, find_chip, memory_bytes

MATRIX_UNITS = {"v4": 8 * 128**2, "v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2}


@pytest.mark.parametrize("name", MATRIX_UNITS)
def test_a_tpus_peak_is_its_matrix_units_at_its_clock(name):
    chip = CHIPS[name]
    assert isinstance(chip, Tpu)
    assert 2 * MATRIX_UNITS[name] * chip.clock_hertz == pytest.approx(1e12 * chip.peak_tflops, rel=5e-3)


def test_every_name_that_jax_gives_leads_to_one_chip():
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds] + list(OTHER_BOARDS)
    assert len(kinds) == len(set(kinds))
    assert all(find_chip(kind) is not None for kind in kinds)
    assert find_chip("NVIDIA H200") is CHIPS["h200"]
    assert find_chip("NVIDIA H100 PCIe") is None
    assert memory_bytes("cpu") == math.inf
