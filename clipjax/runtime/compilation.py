"""Compilation: the cache of compiled steps, and the options of the compiler by chip.

Reading order: `enable` (the cache), `compiler_options`.
"""

import os
import pathlib
import stat
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax

from clipjax.runtime import processes
from clipjax.runtime.chips import find_chip

AUTO = "auto"
Options = Mapping[str, bool | int | str]

_JAX_NAME = "JAX_COMPILATION_CACHE_DIR"
_LEAST_TIME = "jax_persistent_cache_min_compile_time_secs"


def enable(
    setting: str | None,
    environment: Mapping[str, str] = os.environ,
    *,
    outside: Sequence[pathlib.Path] = (),
) -> str | None:
    """Use the cache that a config's `compile_cache` asks for; call it before anything is compiled.

    Every program is kept, however soon it is compiled, unless `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS` says
    otherwise: a run has few, and the second start compiles none. All processes read, the first writes. On CPUs JAX
    gives the programs of each process other names, so there the others compile again.

    Args:
        setting: a directory; `auto`, which is a directory of this user's on accelerators and none on CPUs, where
            compiling is quick and code that was compiled for another machine's instructions could be met; or None.
        environment: `JAX_COMPILATION_CACHE_DIR` beats `auto`: JAX reads it itself.
        outside: folders of data and checkpoints, in which the cache must not lie: others may have made them.

    Returns:
        The directory in use, None without one.

    Raises:
        ValueError: the directory is not safe, or one that was named lies in a folder of `outside` or cannot be made.
    """
    if setting == AUTO:
        if environment.get(_JAX_NAME):
            return environment[_JAX_NAME]
        if jax.default_backend() == "cpu":
            return None
    if setting is None:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    folder = _default_folder(environment) if setting == AUTO else pathlib.Path(setting).expanduser()
    for each in outside:
        if folder.resolve().is_relative_to(each.resolve()):
            if setting == AUTO:  # data that lies in the home itself is no reason to refuse
                processes.announce(f"no compile cache: {folder} lies in {each}, a folder of data or checkpoints")
                return None
            raise ValueError(
                f"compile_cache={setting!r} lies in {each}, a folder of data or checkpoints: what lies in a cache is "
                "executed, and others may have made that folder; name a directory elsewhere, or none"
            )
    try:
        _make_private(folder)
    except OSError as error:
        if setting == AUTO:  # a read-only home: slower starts, and no reason to refuse
            return None
        raise ValueError(
            f"compile_cache={setting!r} cannot be made ({error.strerror}); name another directory, or none"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if _LEAST_TIME.upper() not in environment:
        jax.config.update(_LEAST_TIME, 0.0)
    return str(folder)


def _default_folder(environment: Mapping[str, str]) -> pathlib.Path:
    home = environment.get("XDG_CACHE_HOME") or pathlib.Path(environment.get("HOME") or "~").expanduser() / ".cache"
    return pathlib.Path(home) / "clipjax" / "xla"


def _make_private(folder: pathlib.Path) -> None:
    """Make the directory for this user alone (0700), or check that it is safe.

    Raises:
        ValueError: it belongs to another user, others may write there, or it is no directory.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
        return
    except FileExistsError:
        pass
    found, remedy = folder.lstat(), "use another directory, or compile_cache=none"
    if not stat.S_ISDIR(found.st_mode):
        raise ValueError(f"compile_cache={str(folder)!r} must be a directory, and no link to one; {remedy}")
    if found.st_uid != os.geteuid():
        raise ValueError(
            f"compile_cache={str(folder)!r} belongs to user {found.st_uid}, not to you: what lies there is executed; "
            f"{remedy}"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(
            f"compile_cache={str(folder)!r} may be written to by others (mode {stat.S_IMODE(found.st_mode):04o}): "
            f"what lies there is executed; look for what is not yours, then chmod 700 it, or {remedy}"
        )
    if found.st_mode & 0o077:
        folder.chmod(0o700)


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
"""Gathers of parameters run while products do. Today's compiler does this by itself; named so that it stays so."""


def _scoped_vmem(mebibytes: int) -> Options:
    """Return the limit of a chip's own memory for one operation: more lets products have larger tiles.

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
    """Return the options for a program on these devices; none for a kind that is not known, as on CPUs."""
    chip = find_chip(devices[0].device_kind)
    return {} if chip is None else dict(PRESETS.get(chip.name, {}))
