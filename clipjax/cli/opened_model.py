"""A checkpoint opened for one question: its encoder, and the embeddings of pictures that a person names.

The commands that use a model (`classify`, `embed`, `search`, `rank`) share this. They run as one process.

Reading order: `open_model`, `OpenedModel`, `embed_files`, `working`.
"""

import collections
import contextlib
import copy
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from clipjax.checkpoints import manifest
from clipjax.checkpoints.records import FOLDER
from clipjax.checkpoints.saved import SavedCheckpoint, load_params
from clipjax.cli import arguments
from clipjax.cli.errors import UNUSABLE_DATA, print_error, stops
from clipjax.config import Config, MeshConfig
from clipjax.config.validation import check_embeddings
from clipjax.data.eval_batches import eval_batches
from clipjax.data.image_lists import ImageListSource, find_images
from clipjax.data.patches import make_view
from clipjax.data.sample import REASONS
from clipjax.evals.encoder import Encoder, NotFiniteEmbeddings
from clipjax.models.clip import build_clip
from clipjax.runtime import compilation, launchers, processes, sharding, storage
from clipjax.runtime.storage import is_address
from clipjax.runtime.terminal import printable

MOST_AT_ONCE = 256
"""Pictures or texts per forward pass on one device, where the checkpoint's own batch is larger."""


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint, its config as it is used here, and its devices.

    Attributes:
        saved: the checkpoint.
        config: its config; `eval.batch_size` fits the devices.
        devices: that the work is split over.
    """

    saved: SavedCheckpoint
    config: Config
    devices: Sequence[Any]

    def encoder(self) -> Encoder:
        """Return the encoder, with the parameters on the devices."""
        mesh = sharding.make_mesh(MeshConfig(), self.devices)
        with jax.set_mesh(mesh):
            params = load_params(self.saved, mesh)
        clip = build_clip(self.config.model, data=self.config.data)
        return Encoder(self.config, clip, mesh, self.saved.tokenizer(), params)


@dataclass(frozen=True)
class ImageEmbeddings:
    """Embeddings of the pictures that could be used.

    Attributes:
        files: of these.
        rows: unit-norm float32 `[n, e]`.
        unusable: reason by file, of the others.
    """

    files: list[str]
    rows: np.ndarray
    unusable: dict[str, str]


def add_checkpoint_option(parser: arguments.Parser, *, missing: str | None = "") -> None:
    """Add `--checkpoint`.

    Args:
        parser: of the command.
        missing: "" where the option must be given, None where it may be left out.
    """
    required = "=WORKDIR_OR_STEP is missing: name a workdir that training has saved to, or a converted checkpoint"
    parser.add_argument(
        "--checkpoint",
        metavar="WORKDIR_OR_STEP",
        type=arguments.place,
        help="a workdir (its newest step is taken), or the directory of one step, which may have any name",
        missing=required if missing == "" else missing,
    )


def add_output_option(parser: arguments.Parser) -> None:
    """Add `--output` of a command that can do without."""
    parser.add_argument("--output", metavar="FILE", type=arguments.place, help="JSON file for the results")


def open_model(
    checkpoint: pathlib.Path | str, *, reads_texts: bool, all_devices: bool = False, batch_size: int | None = None
) -> OpenedModel:
    """Open a checkpoint and its devices.

    Args:
        checkpoint: as `SavedCheckpoint` takes it.
        reads_texts: its tokenizer is needed.
        all_devices: split batches over all devices instead of the first.
        batch_size: of a forward pass over all devices; None: the checkpoint's.

    Raises:
        ValueError: it is no checkpoint, embeds nothing, or has no tokenizer; several processes were started; the batch
            does not fit the devices.
    """
    refuse_several_processes()
    saved = SavedCheckpoint(checkpoint)
    check_embeddings(saved.config)
    if reads_texts:
        saved.tokenizer().encode("a")  # of a checkpoint that was converted without one, this says so
    processes.open_devices()
    compilation.enable(Config().compile_cache, outside=_folders(saved))
    devices = jax.local_devices() if all_devices else jax.local_devices()[:1]
    config = copy.deepcopy(saved.config)
    count = len(devices)
    if batch_size is not None and batch_size % count:
        lower, upper = batch_size // count * count, -(-batch_size // count) * count
        near = ", ".join(str(each) for each in (lower, upper) if each)
        raise ValueError(f"--batch_size={batch_size} must be divisible by {count} devices; nearest: {near}")
    most = min(config.eval.batch_size, MOST_AT_ONCE * count)
    config.eval.batch_size = batch_size or -(-most // count) * count
    return OpenedModel(saved, config, devices)


def refuse_several_processes() -> None:
    """Refuse a launcher's many processes, of which each would do the same.

    Raises:
        ValueError: there are several.
    """
    launch = launchers.find_launch()
    if launch is not None and launch.num_processes not in (None, 1):
        raise ValueError(
            f"this command runs as one process, and {launch.num_processes} were started ({launch.launcher}); start one"
        )


def require_output(place: pathlib.Path | str | None) -> None:
    """Check, before the work, that the results can be written.

    Raises:
        ValueError: they cannot.
    """
    if place is not None:
        storage.require_writable(place, "--output", makes_folder=True)


def write_output(place: pathlib.Path | str | None, results: Mapping[str, Any]) -> None:
    """Write the results as JSON, and tell where they lie."""
    if place is not None:
        storage.write(place, json.dumps(results, indent=2, allow_nan=False) + "\n")
        print(f"results: {printable(str(place))}", flush=True)


def describe(saved: SavedCheckpoint) -> dict[str, Any]:
    """Return what results tell of their checkpoint."""
    return {"checkpoint": place_of(saved), "step": saved.step, "params": saved.params_group}


def place_of(saved: SavedCheckpoint) -> str:
    """Return the place of a checkpoint, which means the same in other working directories."""
    return saved.place if is_address(saved.place) else os.path.abspath(saved.place)  # noqa: PTH100  keeps links


def digest_of(saved: SavedCheckpoint) -> str:
    """Return a digest of all files of a checkpoint, wherever it lies."""
    try:
        files = manifest.read(saved.path).files
    except FileNotFoundError:  # of an old format
        files = manifest.hash_files(saved.path, manifest.list_files(saved.path))
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def find_files(words: Sequence[str]) -> list[str]:
    """Return the pictures that arguments name.

    Raises:
        ValueError: none is named, or one is not there.
    """
    if not words:
        raise ValueError("IMAGE is missing: name files, globs or folders of pictures")
    return find_images(words)


def embed_files(opened: OpenedModel, encoder: Encoder, files: Sequence[str]) -> ImageEmbeddings:
    """Return embeddings of pictures; those that cannot be used are left out, and told.

    Raises:
        NotFiniteEmbeddings: some embeddings are not finite.
        OSError: a disk or a store fails.
    """
    data, files = opened.config.data, list(files)
    kept: list[str] = []
    unusable: dict[str, str] = {}
    parts = [np.zeros((0, opened.config.model.embed_dim), np.float32)]
    batches = eval_batches(
        ImageListSource(files, max_image_pixels=data.max_image_pixels),
        view=make_view(opened.config),
        batch_size=batch_size_of(len(files), opened.config.eval.batch_size),
        max_image_pixels=data.max_image_pixels,
        background=data.background,
        exif_orientation=data.exif_orientation,
        num_threads=data.num_threads,
    )
    for batch in batches:
        if batch["mask"].any():
            parts.append(encoder.embed_images(batch["image"])[batch["mask"]])
        for index, reason in zip(batch["index"].tolist(), batch["skip_reason"].tolist(), strict=True):
            if index >= 0 and reason >= 0:
                unusable[files[index]] = REASONS[reason]
        kept += [files[index] for index in batch["index"][batch["mask"]].tolist()]
    return ImageEmbeddings(kept, np.concatenate(parts), unusable)


def batch_size_of(count: int, most: int) -> int:
    """Return a batch that few rows do not leave empty: a power of two, so that few shapes are compiled, or the most."""
    return min(most, 1 << (max(count, 1) - 1).bit_length())


def tell_unusable(program: str, unusable: Mapping[str, str], config: Config) -> int:
    """Print the pictures that were left out; return the exit code, 3 if there are any."""
    limit = f"data.max_image_pixels={config.data.max_image_pixels:,}"
    for file, reason in unusable.items():
        why = f"{reason}, {limit}" if reason == "image_too_large" else reason
        print_error(program, ValueError(f"{printable(file)}: unusable ({why}), left out"))
    if unusable:
        counts = ", ".join(f"{reason} {count}" for reason, count in collections.Counter(unusable.values()).items())
        print_error(program, ValueError(f"pictures left out: {len(unusable)} ({counts})"))
    return UNUSABLE_DATA if unusable else 0


@contextlib.contextmanager
def working(program: str) -> Iterator[None]:
    """End with a message and exit code 3 where a person has to look at the checkpoint, the data or a disk.

    Raises:
        SystemExit: it did.
    """
    with stops(program):
        try:
            yield
        except BrokenPipeError:  # of the standard output: nobody reads on
            raise
        except (NotFiniteEmbeddings, OSError) as error:
            print_error(program, error)
            raise SystemExit(UNUSABLE_DATA) from error


def _folders(saved: SavedCheckpoint) -> list[pathlib.Path]:
    """Return the folder that came with a checkpoint: that of its workdir, or of the step alone."""
    parent = saved.path.parent
    return [parent.parent if parent.name == FOLDER else saved.path]
