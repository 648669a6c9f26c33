"""The work of `clipjax data bench`: images per second that training gets from a source on this machine."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from clipjax.cli import arguments
from clipjax.cli.overrides import load_config, override
from clipjax.config import Config
from clipjax.config.paths import expand_paths
from clipjax.config.validation import validate
from clipjax.data.loading_speed import LoadingRate, measure_loading
from clipjax.data.mixture import MixedSource
from clipjax.data.sources import build_training_source, check_copies
from clipjax.data.tokenizers.build import build_tokenizer
from clipjax.planning import targets
from clipjax.runtime.storage import is_address, require_writable, write
from clipjax.runtime.terminal import format_table, printable

ABOUT = """Measure how many images per second training gets: clipjax data bench 'cc3m/*.tar' --config=configs/clip.py

Reads, decodes, crops and tokenizes as training does, without a model; beside it runs a bare loop of one thread that
decodes and resizes pictures of the source which lie in memory. With a config and --topology also tells whether the
accelerators would wait for data."""


def add_options(parser: arguments.Parser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--source",
        type=arguments.data_source,
        help="instead of the config's data.train; also as the first argument, without --source=",
    )
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", type=arguments.file_with_argument, help="of the run; the defaults if left out"
    )
    parser.add_argument("--seconds", type=_seconds, default=10.0, help="of each of the measurements (10)")
    parser.add_argument(
        "--topology", metavar="CHIP:SHAPE", help="accelerators of the run, as in clipjax plan: v5e:16x16, h100:32x8"
    )
    parser.add_argument("--slices", metavar="N", type=arguments.whole_number(1), default=1, help="so many of these (1)")
    parser.add_argument("--output", metavar="FILE", type=arguments.place, help="file for the figures as JSON")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"={text} must be a number of seconds above 0, and at most 3600")
    return seconds


def run(parsed: arguments.Arguments) -> int:
    """Measure, print and write; return the exit code.

    Raises:
        ValueError: for the user, with field, value, rule and remedy.
    """
    options = parsed.options
    if options.topology is None and options.slices > 1:
        raise ValueError(f"--slices={options.slices} would be ignored without --topology=CHIP:SHAPE")
    if options.topology is not None:
        if options.config is None:
            raise ValueError(
                f"--topology={options.topology} needs --config=FILE[:ARG], whose model decides on a step's time"
            )
        targets.prepare_environment(options.topology)
    config = _config(parsed)
    if options.output is not None:
        require_writable(options.output, "--output")
    target = None if options.topology is None else targets.find_target(options.topology, options.slices)
    if target is not None:
        targets.check_devices(config, target, None)
    check_copies([(part.source, config.data) for part in config.data.mixture.values()])
    source = build_training_source(config.data)
    parts = source.parts if isinstance(source, MixedSource) else (source,)
    is_remote = [any(map(is_address, part.files())) for part in parts]
    tokenizer = build_tokenizer(config.data.tokenizer)
    rates = list(measure_loading(source, tokenizer, config, is_remote=is_remote, seconds=options.seconds))
    print(printable(f"{config.data.shown_train}: {len(source):,} samples, image_size={config.model.image.image_size}"))
    print(describe_rates(rates), flush=True)
    record: dict[str, Any] = {"rates": [rate.to_record() for rate in rates], "samples": len(source)}
    if target is not None:
        needed = _images_per_host(config, target, len(source))
        record |= {"topology": target.name, "slices": target.num_slices, "hosts": target.num_hosts} | (
            {"images_per_second_per_host": needed}
        )
        print(describe_need(rates, needed, target.name, target.num_hosts))
    if options.output is not None:
        write(options.output, json.dumps(record, indent=1) + "\n")
    return 0


def _config(parsed: arguments.Arguments) -> Config:
    options = parsed.options
    config = override(Config() if options.config is None else load_config(options.config), parsed.overrides)
    if options.source is not None:
        config.data.train, config.data.mixture = options.source, {}
    elif not (config.data.train or config.data.mixture):
        raise ValueError("--source is missing: the first argument, or the data.train of --config=FILE[:ARG]")
    expand_paths(config, skip=("init_from", "compile_cache", "loss.distill_from"))
    validate(config)
    return config


def describe_rates(rates: Sequence[LoadingRate]) -> str:
    """Return a table of the figures; the last column compares with the bare loop."""
    bare = next(rate.images_per_core_second for rate in rates if rate.num_workers is None)
    rows = []
    for rate in rates:
        per_core = rate.images_per_core_second
        rows.append(
            [
                rate.name,
                "-" if rate.num_workers is None else str(rate.num_workers),
                "yes" if rate.with_tokens else "no",
                f"{rate.images_per_second:,.0f}",
                "-" if per_core is None else f"{per_core:,.0f}",
                "-" if per_core is None or bare is None else f"{per_core / bare:.2f}",
                f"{rate.unusable:,}",
            ]
        )
    header = ("", "num_workers", "tokens", "images/s", "images/s per core", "of bare", "unusable")
    return format_table(rows, header)


def describe_need(rates: Sequence[LoadingRate], needed: float | None, name: str, hosts: int) -> str:
    """Return in words whether the accelerators would wait for data.

    Args:
        rates: that were measured.
        needed: images per second of each host; None: the step does not fit.
        name: of the topology.
        hosts: machines that feed the accelerators.
    """
    if needed is None:
        return f"{name}: the step does not fit into the memory of a chip; see clipjax plan"
    found = rates[-1]
    rate, per_core = found.images_per_second, found.images_per_core_second
    verdict = "would wait for data" if rate < needed else "would not wait for data"
    cores = "" if per_core is None else f", the work of {needed / per_core:.1f} cores like these"
    return (
        f"{name}: each of {hosts} hosts needs {needed:,.0f} images/s{cores}; with num_workers={found.num_workers} this "
        f"machine gives {rate:,.0f}: the chips {verdict}"
    )


def _images_per_host(config: Config, target: targets.Target, num_samples: int) -> float | None:
    from clipjax.planning import report

    return report.plan_run(config, target, num_samples=num_samples)[0].get("images_per_second_per_host")
