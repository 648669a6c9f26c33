"""Import of a peer's directory as a clipjax checkpoint at step 0, without a training state.

Read `PeerModel`, `read_peer`, `save`.
"""

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from clipjax.checkpoints.manager import Checkpoints, SavesFail
from clipjax.checkpoints.records import make_records
from clipjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    Dtype,
    LossConfig,
    LossKind,
    ModelConfig,
    ViTConfig,
    presets,
)
from clipjax.config.model_validation import caption_errors, model_errors
from clipjax.config.validation import range_errors
from clipjax.convert import big_vision, files, huggingface, open_clip, open_clip_config, preprocessing, tokenizers
from clipjax.convert.peer_config import MOST_LOG_SCALE
from clipjax.convert.rules import Table, to_ours
from clipjax.data.tokenizers.build import build_tokenizer
from clipjax.data.tokenizers.protocol import NoTokenizer, Tokenizer
from clipjax.models.clip import abstract_model
from clipjax.pytrees import from_flat, to_flat

SOURCES = ("openai", "open_clip", "huggingface", "big_vision")
_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
WEIGHT_FILES = {
    "openai": _OPEN_CLIP_FILES,
    "open_clip": _OPEN_CLIP_FILES,
    "huggingface": ("model*.safetensors", "pytorch_model*.bin"),
}
"""Patterns of the names that hubs give to the weights of each library."""

CAPTION_WEIGHT = 2.0
"""Weight of a converted CoCa's captioning loss (arXiv 2205.01917, section 4.1)."""


@dataclass(frozen=True)
class PeerModel:
    """A peer's model as clipjax holds it.

    Attributes:
        config: the config that its checkpoint records.
        params: our arrays by path, `batch_stats/...` among them.
        tokenizer: its tokenizer, or `NoTokenizer`.
    """

    config: Config
    params: Mapping[str, np.ndarray]
    tokenizer: Tokenizer

    @property
    def num_params(self) -> int:
        """Number of parameters, without running statistics."""
        return sum(array.size for name, array in self.params.items() if not name.startswith("batch_stats"))

    def describe_tokenizer(self) -> str:
        """Describe the tokenizer, for the user."""
        if isinstance(self.tokenizer, NoTokenizer):
            return "no tokenizer found (texts cannot be read; --tokenizer=KIND:PATH adds one)"
        return f"tokenizer {self.tokenizer.name} with {self.tokenizer.vocab_size} ids"


def read_peer(source: str, path: pathlib.Path, *, model: str | None = None, tokenizer: str | None = None) -> PeerModel:
    """Read a peer's weights, config, preprocessing and tokenizer.

    Raises:
        ValueError: with all that is wrong in the first of them that is refused.
    """
    preferred = WEIGHT_FILES.get(source, ())
    files.find_weights(path, preferred)
    model_config, data = _read_config(source, path, model)
    model_config.compute_dtype = Dtype.FLOAT32
    loss = LossConfig(caption_weight=0.0 if model_config.caption is None else CAPTION_WEIGHT)
    config = Config(model=model_config, data=data, loss=loss)
    if errors := range_errors(config) or model_errors(config) + caption_errors(config):
        raise ValueError("\n".join(errors))
    _check_known(source, model_config)
    found = _find_tokenizer(path, tokenizer, model_config)
    weights = files.read_weights(path, preferred)  # may be gigabytes: all that can be refused without them is by now
    shapes = {name: tuple(leaf.shape) for name, leaf in to_flat(abstract_model(model_config)).items()}
    params = to_ours(_table(source, model_config, weights), weights, shapes)
    if abs(params["log_logit_scale"]) > MOST_LOG_SCALE:
        raise ValueError(
            f"the logarithm of the logit scale is {float(params['log_logit_scale'])}: it must lie between "
            f"-{MOST_LOG_SCALE} and {MOST_LOG_SCALE}, the file is damaged"
        )
    config.data.tokenizer = tokenizer or found.name
    config.data.train = f"converted from {source}"
    if model_config.init_logit_bias is not None:
        config.loss.kind = LossKind.SIGMOID
    return PeerModel(config, params, found)


def _check_known(source: str, config: ModelConfig) -> None:
    """Refuse models that the peer does not have."""
    (open_clip_config if source in ("openai", "open_clip") else huggingface).check_known(config)


def _find_tokenizer(path: pathlib.Path, tokenizer: str | None, config: ModelConfig) -> Tokenizer:
    found = build_tokenizer(tokenizer) if tokenizer else tokenizers.find(path if path.is_dir() else None)
    if found.vocab_size > config.text.vocab_size:
        raise ValueError(
            f"the tokenizer has {found.vocab_size} ids, but the model knows {config.text.vocab_size}: it belongs to "
            "another model"
        )
    return found


def _read_config(source: str, path: pathlib.Path, model: str | None) -> tuple[ModelConfig, DataConfig]:
    """Read the config of the model and of its preprocessing."""
    found = None
    if path.is_dir():
        names = ("open_clip_config.json", "config.json") if source in ("openai", "open_clip") else ("config.json",)
        found = next((path / name for name in names if (path / name).is_file()), None)
    if (found is None or source == "big_vision") == (model is None):
        raise ValueError(
            f"--model={model}: give a preset exactly where there is no config of {source} beside the weights"
            f" ({found or 'none found'}); presets: {', '.join(presets.MODELS)}"
        )
    if model is not None:
        config = presets.model(model)
        if source == "open_clip" and f"{model}{presets.GELU_SUFFIX}" in presets.MODELS:
            raise ValueError(
                f"--model={model} is OpenAI's, with QuickGELU, but open_clip's model of that size has GELU: take "
                f"--model={model}{presets.GELU_SUFFIX}, or --from=openai if these weights were trained with QuickGELU"
            )
        return config, preprocessing.default(siglip=config.init_logit_bias is not None)
    assert found is not None
    peer = files.read_json(found)
    inside = peer.get("config", peer) if isinstance(peer, dict) else peer
    if not isinstance(inside, dict):
        raise ValueError(f"{found}: must be a JSON object")
    fields = {"model_type": "huggingface", "model_cfg": "open_clip", "vision_cfg": "open_clip"}
    theirs = next((kind for name, kind in fields.items() if name in inside), None)
    if theirs is not None and (theirs == "huggingface") != (source == "huggingface"):
        raise ValueError(f"{found} is a config of {theirs}: give --from={theirs}, or take the directory of {source}")
    if source == "huggingface":
        config = huggingface.read_config(inside)
        siglip, picture = huggingface.is_siglip(config), path / "preprocessor_config.json"
        if isinstance(config.image, ViTConfig) and config.image.max_patches is not None:
            if not picture.is_file():
                return config, preprocessing.default_of_patches()
            data, most = preprocessing.read_huggingface_patches(files.read_json(picture), config.image.patch_size)
            config.image.max_patches = most
            return config, data
        if picture.is_file():
            size = config.image.image_size
            return config, preprocessing.read_huggingface(files.read_json(picture), size, siglip=siglip)
        return config, preprocessing.default(siglip=siglip)
    config = open_clip_config.read_config(inside)
    siglip = config.init_logit_bias is not None
    return config, preprocessing.read_open_clip(inside.get("preprocess_cfg", {}), siglip=siglip)


def _table(source: str, config: ModelConfig, weights: Mapping[str, np.ndarray]) -> Table:
    match source:
        case "huggingface":
            return huggingface.table(config)
        case "big_vision":
            return big_vision.table(config, stacked=any("/encoderblock/" in name for name in weights))
        case _:
            custom_text = any(name.startswith("text.") for name in weights)
            return open_clip.table(config, custom_text=custom_text, weights=weights)


def save(peer: PeerModel, output: pathlib.Path | str) -> None:
    """Write a checkpoint at step 0, as a whole or not at all.

    Raises:
        ValueError: it cannot be written.
    """
    tree = from_flat(peer.params)
    batch_stats = tree.pop("batch_stats", None)
    arrays = {"params": tree, **({} if batch_stats is None else {"batch_stats": batch_stats})}
    with files.new_directory(output) as folder:
        checkpoints = Checkpoints(folder, CheckpointConfig())
        checkpoints.save(0, jax.tree.map(jax.numpy.asarray, arrays), make_records(peer.config, peer.tokenizer, {}))
        try:
            checkpoints.wait()
        except SavesFail as error:
            raise ValueError(f"--output={output}: {error}; make room, or choose another") from error
