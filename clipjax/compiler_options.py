"""What XLA's compiler is told beyond its defaults, by chip: a preset for each, and why.

`clipjax plan` compiles with them, so what an option is worth is seen there; `run.json` records them for every start.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from clipjax.chips import of_kind

Options = Mapping[str, bool | int | str]

OVERLAP: Options = MappingProxyType(
    {
        "xla_tpu_enable_latency_hiding_scheduler": True,
        "xla_enable_async_all_gather": True,
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
    }
)
"""Gathers of parameters run while products do. Today's compiler does this by itself; said so that it stays so."""


def _scoped_vmem(mebibytes: int) -> Options:
    """How much of a chip's own memory one operation may take: more lets products have larger tiles.

    ViT-L/14 on v5e:16x16 by cycles: 697 ms with 16 MiB, the default, 656 with 48, 675 with 64; ViT-B/16: 195, 184, 195.
    """
    return {"xla_tpu_scoped_vmem_limit_kib": mebibytes * 1024}


PRESETS: Mapping[str, Options] = MappingProxyType(
    {
        "v4": OVERLAP,  # has 16 MiB
        "v5e": MappingProxyType({**OVERLAP, **_scoped_vmem(48)}),
        "v5p": MappingProxyType({**OVERLAP, **_scoped_vmem(32)}),
        "v6e": MappingProxyType({**OVERLAP, **_scoped_vmem(48)}),
    }
)


def compiler_options(devices: Sequence[Any]) -> dict[str, bool | int | str]:
    """The options for a program on these devices; none where nothing is known of their kind, as on CPUs."""
    chip = of_kind(devices[0].device_kind)
    return {} if chip is None else dict(PRESETS.get(chip.name, {}))
