"""Inputs of a run, opened and checked before a device is touched: data, tokenizer, evaluation tasks, first weights."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax

from clipjax.checkpoints.records import pack_tokenizer
from clipjax.checkpoints.saved import SavedCheckpoint
from clipjax.config import Config, LossKind, ModelConfig, TextTransformerConfig, most_patches
from clipjax.config.serialization import field_value
from clipjax.config.validation import MEMORY_UNIT
from clipjax.data.digests import ShardDigest, find_order, from_record
from clipjax.data.filters import FilteredSource, unfiltered
from clipjax.data.index_file import FORMAT as INDEX_FORMAT
from clipjax.data.mixture import MixedSource, sizes_of
from clipjax.data.sample import Source
from clipjax.data.sources import build_training_source, check_copies, recording_sources
from clipjax.data.tokenizers.build import build_tokenizer
from clipjax.data.tokenizers.protocol import Tokenizer
from clipjax.data.training_order import (
    DISK_ORDER,
    MixtureFormat,
    RunOrder,
    choose_order,
    make_order,
    parse_order,
    parts_of,
)
from clipjax.data.webdataset import TarSource
from clipjax.evals.runner import Task, build_tasks, task_sources
from clipjax.models.clip import abstract_params
from clipjax.models.positions import fit_positions
from clipjax.pytrees import leaf_paths, match_any
from clipjax.runtime.processes import announce
from clipjax.runtime.storage import is_address

MOST_SAMPLES = 2**31 - 2 * MEMORY_UNIT
"""Samples that int32 can count, with the spare room of the memory."""


@dataclass(frozen=True)
class Inputs:
    """Everything that training reads.

    Attributes:
        source: the training pairs.
        tokenizer: text to ids.
        tasks: evaluation tasks by name.
        init_checkpoint: gives the first parameters where `init_from` names it.
        teacher_checkpoint: the model to learn from where `loss.distill_from` names it.
        sources: everything that is read, for training and evaluation, by the config's name of it.
        order: of the training pairs.
    """

    source: Source
    tokenizer: Tokenizer
    tasks: dict[str, Task]
    init_checkpoint: SavedCheckpoint | None
    teacher_checkpoint: SavedCheckpoint | None = None
    sources: Mapping[str, Source] = field(default_factory=dict)
    order: RunOrder = DISK_ORDER

    def index_formats(self) -> list[int | None]:
        """Return for each training source the format of the index that numbers its samples; None: it has none."""
        parts = map(unfiltered, _parts(self.source))
        return [INDEX_FORMAT if isinstance(part, TarSource) else None for part in parts]


def open_inputs(config: Config, saved: SavedCheckpoint | None = None) -> Inputs:
    """Open all inputs of a run.

    Args:
        config: the run.
        saved: the run's own checkpoint, if it resumes: it then does not need the weights of `init_from`, and keeps
            the step of its teacher that it began with.

    Raises:
        ValueError: something is missing or does not fit the config.
    """
    tokenizer = build_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.text.vocab_size:
        raise ValueError(
            f"model.text.vocab_size={config.model.text.vocab_size} must be at least {tokenizer.vocab_size}, "
            f"the size of data.tokenizer={config.data.tokenizer!r}"
        )
    if config.model.text.finds_end and not tokenizer.ends_highest:
        raise ValueError(
            f"data.tokenizer={config.data.tokenizer!r} does not give the end of a text the largest id, by which "
            "model.text.pool=end and bags of words find it; use pool=last or attention, or another tokenizer"
        )
    init_checkpoint = None
    if config.init_from is not None and saved is None:
        init_checkpoint = _open_checkpoint("init_from", config.init_from)
        check_same_shapes(config, init_checkpoint)
    trained = [part.source for part in config.data.mixture.values()] or [config.data.train]
    check_copies([*((spec, config.data) for spec in trained), *task_sources(config)])
    source = _in_recorded_order(build_training_source(config.data), saved)
    filtered = [
        f"{spec}: {each.counts()}"
        for spec, each in _by_name(config, source).items()
        if isinstance(each, FilteredSource)
    ]
    if len(source) < config.global_batch_size:
        raise ValueError(
            f"global_batch_size={config.global_batch_size} must not exceed the {len(source)} samples of "
            f"{config.data.shown_train}" + "".join(f"; filters: {each}" for each in filtered)
        )
    for line in filtered:
        announce(f"filters: {line}")
    if config.loss.kind is LossKind.GLOBAL and len(source) > MOST_SAMPLES:
        raise ValueError(
            f"loss.kind=global remembers at most {MOST_SAMPLES} samples; {config.data.shown_train} has {len(source)}"
        )
    teacher = None
    if config.loss.distill_from is not None:
        step = None if saved is None else saved.records["data"].get("teacher_step")
        teacher = _open_checkpoint("loss.distill_from", config.loss.distill_from, step=step)
        check_same_inputs(config, tokenizer, teacher)
    sources = _by_name(config, source)
    tasks = build_tasks(config, recording_sources(sources))
    order = _find_run_order(config, source, saved)
    return Inputs(source, tokenizer, tasks, init_checkpoint, teacher, sources, order)


def _by_name(config: Config, source: Source) -> dict[str, Source]:
    """Return the sources of the training pairs by the config's names of them."""
    if isinstance(source, MixedSource):
        found: dict[str, Source] = {}
        for name, part in zip(source.names, source.parts, strict=True):
            spec = config.data.mixture[name].source
            found[f"{spec} (data.mixture.{name})" if spec in found else spec] = part  # two parts may name one place
        return found
    return {config.data.train: source}


def _find_run_order(config: Config, source: Source, saved: SavedCheckpoint | None) -> RunOrder:
    """Return the order that the run began with, or that of a run that begins.

    Raises:
        ValueError: it does not fit the batch.
    """
    is_remote = [any(map(is_address, part.files())) for part in _parts(source)]
    if saved is None:
        found = choose_order(config, sizes_of(source), is_remote)
    else:
        found = parse_order(saved.records["data"].get("order"))
        if warning := warn_of_single_reads(config, found, sizes_of(source), is_remote):
            announce(warning)
    make_order(sizes_of(source), config, found)
    if not isinstance(source, MixedSource) or not isinstance(found, MixtureFormat):
        return found
    shards = _num_shards(source)
    if saved is not None and shards != found.shards:
        raise ValueError(
            f"{config.data.shown_train}: its sources have {', '.join(map(str, shards))} shards, those of the run in "
            f"the workdir had {', '.join(map(str, found.shards))}; each source must keep its own"
        )
    return dataclasses.replace(found, shards=shards)


def warn_of_single_reads(
    config: Config, order: RunOrder, sizes: Sequence[int], is_remote: Sequence[bool]
) -> str | None:
    """Return a warning about a run that began on local disks and now reads an object store; None if it does not.

    Args:
        config: the run.
        order: that the run began with.
        sizes: for each source, the number of its samples.
        is_remote: for each source, whether its samples lie in an object store.
    """
    blocks = [part.block for part in parts_of(order)] or [1] * len(is_remote)
    wanted = [part.block for part in parts_of(choose_order(config, sizes, is_remote))]
    if config.data.cache_dir is not None or not any(
        remote and block == 1 < best for remote, block, best in zip(is_remote, blocks, wanted, strict=False)
    ):
        return None
    return (
        "warning: the run began with an order for local disks, and its training data lies in an object store now: each "
        "sample costs a request. Copy tars to a disk with data.cache_dir, or start anew in another workdir, in blocks "
        f"of {max(wanted)} samples"
    )


def _parts(source: Source) -> Sequence[Source]:
    return source.parts if isinstance(source, MixedSource) else (source,)


def _in_recorded_order(source: Source, saved: SavedCheckpoint | None) -> Source:
    """Return the source of a run that goes on with its shards in the order that the run began with.

    Other shards are left as they are, for `check_same_run` to refuse.
    """
    recorded = None if saved is None else from_record(saved.records["data"].get("shards"))
    if saved is None or recorded is None:
        return source
    if not isinstance(source, MixedSource):
        return _reordered(source, recorded)
    order = parse_order(saved.records["data"].get("order"))
    if not isinstance(order, MixtureFormat) or _num_shards(source) != order.shards:
        return source
    ends = list(itertools.accumulate(order.shards, initial=0))
    parts = zip(source.names, source.parts, itertools.pairwise(ends), strict=True)
    return MixedSource({name: _reordered(part, recorded[begin:end]) for name, part, (begin, end) in parts})


def _num_shards(source: MixedSource) -> tuple[int, ...]:
    return tuple(len(part.digests()) for part in source.parts)


def _reordered(source: Source, recorded: Sequence[ShardDigest]) -> Source:
    """Return a source with its shards in a recorded order, if it is one of tars and they are the same."""
    if not isinstance(source, TarSource | FilteredSource) or not isinstance(unfiltered(source), TarSource):
        return source
    order = find_order(recorded, source.digests())
    return source if order in (None, list(range(len(recorded)))) else source.reordered(order)


def _open_checkpoint(field: str, path: str, *, step: int | None = None) -> SavedCheckpoint:
    """Open the checkpoint that a field names.

    Raises:
        ValueError: there is none, or it is damaged; with the field.
    """
    try:
        return SavedCheckpoint(path, step=step)
    except ValueError as error:
        raise ValueError(f"{field}={path}: {error}") from error


def check_same_inputs(config: Config, tokenizer: Tokenizer, teacher: SavedCheckpoint) -> None:
    """Refuse a teacher that cannot see the pictures and read the tokens of this run.

    Raises:
        ValueError: everything that differs.
    """
    aspects = most_patches(config.model.image), most_patches(teacher.config.model.image)
    differing = []
    if (aspects[0] is None) != (aspects[1] is None):
        differing.append(f"model.image.max_patches={aspects[0]} (teacher: {aspects[1]})")
    pixels = (
        "image_size" if None in aspects else "patch_size"
    )  # of variable aspect, image_size is of the positions alone
    differing += [
        f"{path}={ours} (teacher: {theirs})"
        for path in (f"model.image.{pixels}", "model.text.context_length")
        if (ours := field_value(config, path)) != (theirs := field_value(teacher.config, path))
    ]
    if teacher.records["tokenizer"] != pack_tokenizer(tokenizer):
        differing.append(f"data.tokenizer={config.data.tokenizer} (teacher: another)")
    if differing:
        raise ValueError(
            f"loss.distill_from={config.loss.distill_from!r} takes other inputs: {', '.join(differing)}; "
            "student and teacher see the same pixels and tokens"
        )


def comes_from_init(config: Config, name: str) -> bool:
    """Return True if `init_from` gives this parameter."""
    return not config.init_match or match_any(config.init_match, name)


def _kept_positions_error(config: Config, old: ModelConfig) -> str | None:
    """Return what keeps the first positions of a checkpoint's texts from staying where texts become longer."""
    keep, length, longer = config.init_keep_positions, old.text.context_length, config.model.text.context_length
    if not all(isinstance(text, TextTransformerConfig) for text in (old.text, config.model.text)):
        return "a bag of words has no positions; leave it 0"
    if not comes_from_init(config, "text/pos_embed"):
        return f"init_match={config.init_match} does not take text/pos_embed from init_from; leave it 0, or add that"
    if longer <= length:
        return (
            f"model.text.context_length={longer} is not longer than the {length} of init_from, so that no position is "
            "interpolated; leave it 0"
        )
    if keep > length - 2:
        return f"it must leave at least 2 of the {length} positions of init_from to interpolate between"
    return None


def check_same_shapes(config: Config, initial: SavedCheckpoint) -> None:
    """Refuse first weights of another shape; positions are fitted to another image size or context length.

    Raises:
        ValueError: every parameter that differs, a pattern of `init_match` that matches none, or `init_keep_positions`
            that cannot be kept.
    """
    old, new, keep = initial.config.model, config.model, config.init_keep_positions
    if keep and (problem := _kept_positions_error(config, old)):
        raise ValueError(f"init_keep_positions={keep}: {problem}")
    given = jax.eval_shape(lambda params: fit_positions(params, old, new, keep), abstract_params(old))
    ours, theirs = (
        dict(zip(leaf_paths(tree), (leaf.shape for leaf in jax.tree.leaves(tree)), strict=True))
        for tree in (abstract_params(new), given)
    )
    for pattern in config.init_match:
        if not any(match_any([pattern], name) for name in ours):
            raise ValueError(f"init_match={pattern!r} matches no parameter; paths look like {next(iter(ours))!r}")
    differing = [
        f"{name} {ours.get(name)} (checkpoint: {theirs.get(name)})"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name) and comes_from_init(config, name)
    ]
    if differing:
        raise ValueError(f"init_from={config.init_from!r} holds another model: {', '.join(differing)}")
