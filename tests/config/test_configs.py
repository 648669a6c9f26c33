"""Every config in configs/ can be read, is valid, opens what it names, and its state has a place on a mesh.

Nothing is allocated, and what a run reads is stood in for: sources, checkpoints, and tokenizers of the published size.
"""

import pathlib
import re
import runpy
from types import SimpleNamespace

import jax
import pytest

from clipjax.config import Config, MeshConfig, Remat, total_steps
from clipjax.config.serialization import from_dict, to_dict
from clipjax.config.validation import validate, validate_devices
from clipjax.data import sources
from clipjax.data.tokenizers.build import build_tokenizer
from clipjax.models.clip import abstract_params, build_clip
from clipjax.runtime import sharding
from clipjax.sweeps import Sweep
from clipjax.training import inputs, optimizer
from clipjax.training.step import STATE_RULES, make_init_state

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
CLIP_SIZES = ("vit_b32", "vit_b16", "vit_l14", "vit_l14_336", "vit_h14", "so400m", "tiny,batch=32768")


def configs() -> list[str]:
    """`FILE` or `FILE:ARGUMENT`, as `--config` takes them."""
    files = sorted(path.name for path in CONFIGS.glob("*.py"))
    return files + [f"clip.py:{size}" for size in CLIP_SIZES]


def arguments() -> list[str]:
    """Every file with every argument that it knows, as it says itself when it meets one that it does not know."""
    found = []
    for file in sorted(path.name for path in CONFIGS.glob("*.py")):
        try:
            load(f"{file}:no such argument")
        except ValueError as error:
            choices = re.split(", | or ", str(error).rpartition("choose ")[2])
            found += [f"{file}:{choice}" for choice in choices]
        except TypeError:  # takes none
            found.append(file)
        else:
            found.append(file)  # takes a path
    return found


def load(name: str) -> Config:
    file, _, argument = name.partition(":")
    get_config = runpy.run_path(str(CONFIGS / file))["get_config"]
    return get_config(argument) if argument else get_config()


PUBLISHED = {"clip": (49_408, True), "siglip": (32_000, False), "siglip2": (256_000, False)}
"""Ids of the tokenizers that everybody takes, and whether the end of a text has the largest one."""


def published_tokenizer(spec: str) -> SimpleNamespace:
    """Stand in for a tokenizer of a kind, of its published size or of the size that a config tells how to make."""
    kind, _, path = spec.partition(":")
    if kind == "bytes":
        return build_tokenizer(spec)  # type: ignore[return-value]
    if kind == "sentencepiece":
        texts = "".join(file.read_text() for file in CONFIGS.glob("*.py"))
        sizes = re.findall(rf"clipjax data tokenizer .*--vocab_size=(\d+) --output={re.escape(path)}\n", texts)
        assert len(set(sizes)) == 1, f"no config tells how to make {path}"
        return SimpleNamespace(vocab_size=int(sizes[0]), ends_highest=True)
    vocab_size, ends_highest = PUBLISHED[kind]
    return SimpleNamespace(vocab_size=vocab_size, ends_highest=ends_highest)


class EmptySource:
    """Many samples, which nobody reads."""

    def __len__(self) -> int:
        return 10_000_000

    def files(self) -> list[str]:
        return []


@pytest.fixture
def open_inputs(monkeypatch):
    """`training.inputs.open_inputs` with everything there that a config names."""

    def open_source(spec: str, **options: object) -> EmptySource:
        assert spec and options["data"] is not None
        return EmptySource()

    def run(config: Config) -> inputs.Inputs:
        monkeypatch.setattr(inputs, "build_tokenizer", published_tokenizer)
        monkeypatch.setattr(sources, "build_source", open_source)
        monkeypatch.setattr(inputs, "SavedCheckpoint", lambda path, *, step: SimpleNamespace(config=config))
        return inputs.open_inputs(config)

    return run


def test_arguments_are_found():
    assert {"clip.py:so400m", "scenes.py:lit", "baselines.py:caption", "quickstart.py", "emoji.py"} <= set(arguments())


@pytest.mark.parametrize("name", arguments())
def test_a_run_of_every_argument_opens_what_it_names(name, open_inputs):
    config = load(name)
    validate(config)
    opened = open_inputs(config)
    assert set(opened.tasks) == set(config.eval.tasks)
    for_pod = name.startswith("clip.py") and "tiny" not in name
    validate_devices(config, num_devices=256 if for_pod else 1, num_processes=64 if for_pod else 1)


@pytest.mark.parametrize(
    ("name", "tokenizer", "message"),
    [
        ("clip.py:so400m", "clip:x.gz", "model.text.vocab_size=32000 must be at least 49408"),
        ("clip.py:so400m", "siglip2:x", "model.text.vocab_size=32000 must be at least 256000"),
        ("clip.py:vit_b32", "siglip:x", "does not give the end of a text the largest id"),
        ("baselines.py:contrastive", "siglip:x", "model.text.vocab_size=304 must be at least 32000"),
    ],
)
def test_a_tokenizer_of_another_size_or_kind_is_refused(name, tokenizer, message, open_inputs):
    config = load(name)
    config.data.tokenizer = tokenizer
    with pytest.raises(ValueError, match=re.escape(message)):
        open_inputs(config)


@pytest.mark.parametrize("name", configs())
def test_config_is_valid_and_its_state_has_a_place(name):
    config = load(name)
    validate(config)
    assert total_steps(config) > 0
    assert from_dict(to_dict(config)) == config  # what a checkpoint keeps of it

    tx = optimizer.make_tx(config, abstract_params(config.model))
    init = make_init_state(config, build_clip(config.model).init, tx, num_samples=1)
    state = jax.eval_shape(lambda: init(jax.random.key(0)))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = sharding.with_shardings(state, sharding.state_shardings(mesh, state, STATE_RULES))
    for leaf in jax.tree.leaves(placed):
        leaf.sharding.shard_shape(leaf.shape)  # raises where an axis does not divide a dimension
    largest = max(jax.tree.leaves(placed.params), key=lambda leaf: leaf.size)
    assert not largest.sharding.is_fully_replicated


def test_every_clip_size_is_another_model():
    models = [load(f"clip.py:{size}").model for size in CLIP_SIZES]
    assert all(a != b for i, a in enumerate(models) for b in models[:i])


@pytest.mark.parametrize(
    ("argument", "remat"),
    [
        ("vit_l14", Remat.MLP),
        ("vit_l14,batch=16384", Remat.DOTS),
        ("vit_l14,batch=65536", Remat.FULL),
        ("vit_b16,batch=65536", Remat.DOTS),
        ("vit_h14", Remat.FULL),
    ],
)
def test_a_larger_batch_keeps_less_for_the_backward_pass(argument, remat):
    assert load(f"clip.py:{argument}").model.remat is remat


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").glob("*.py")), ids=lambda path: path.name)
def test_sweep_can_be_read(path):
    assert isinstance(runpy.run_path(str(path))["get_sweep"](), Sweep)


def test_clip_takes_another_batch_and_refuses_what_it_does_not_know():
    assert load("clip.py:vit_b16,batch=4096").global_batch_size == 4096
    for argument in ("vit_b16,4096", "vit_b16,batch=many", "vit_q1"):
        with pytest.raises(ValueError, match=argument):
            load(f"clip.py:{argument}")
