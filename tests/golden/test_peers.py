"""Every family of models against what its peer computed: features, logits, loss and the gradients it stored.

The weights come in through `clipjax.convert`, so its tables are held to the same numbers.
Tolerance: float32 against float64 moves these logits by 3e-6; one wrong activation moves them by 0.04. 2e-5 relative
(norm of the difference over norm of the target) lies between.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from clipjax.config import Dtype, ModelConfig
from clipjax.convert import huggingface, open_clip, open_clip_config
from clipjax.convert.rules import Table, to_ours, to_theirs
from clipjax.losses import sigmoid_loss, softmax_loss
from clipjax.models.clip import abstract_model, build_clip
from clipjax.pytrees import from_flat, to_flat

TOLERANCE = 2e-5
FOLDERS = ("openclip-vit-gelu", "openclip-vit-quickgelu", "openclip-rn-gelu", "hf-clip-quickgelu", "hf-siglip")


@dataclasses.dataclass
class Reference:
    config: ModelConfig
    table: Table
    weights: dict[str, np.ndarray]
    target: Any

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: leaf.shape for name, leaf in to_flat(abstract_model(self.config)).items()}

    def params(self) -> dict:
        return jax.tree.map(jnp.asarray, from_flat(to_ours(self.table, self.weights, self.shapes)))

    def inputs(self) -> tuple[jax.Array, jax.Array]:
        pixels = jnp.asarray(self.target["images"].transpose(0, 2, 3, 1))
        return pixels, jnp.asarray(self.target["tokens"], jnp.int32)


def open_reference(shared: pathlib.Path, folder: str) -> Reference:
    root = shared / "reference" / folder
    peer = json.loads((root / "config.json").read_text())["config"]
    if folder.startswith("hf"):
        config = huggingface.read_config(peer)
        table = huggingface.table(config)
    else:
        config = open_clip_config.read_config(peer)
        table = open_clip.table(config, custom_text=False)
    config.compute_dtype = Dtype.FLOAT32
    weights = safetensors.load_file(root / "weights.safetensors")
    return Reference(config, table, weights, np.load(root / "reference.npz", allow_pickle=False))


def relative_error(ours, theirs) -> float:
    return float(np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.heavy
def test_models_agree_with_the_peer(shared: pathlib.Path, folder: str, scan: bool):
    reference = open_reference(shared, folder)
    reference.config.scan_layers = scan
    clip, target = build_clip(reference.config), reference.target
    pixels, tokens = reference.inputs()
    params = reference.params()
    batch_stats = params.pop("batch_stats", {})

    def objective(params):
        everything = {**params, "batch_stats": batch_stats}
        image_embed, text_embed = clip.encode_image(everything, pixels), clip.encode_text(everything, tokens)
        scale, bias = jnp.exp(params["log_logit_scale"]), params.get("logit_bias")
        loss = softmax_loss if bias is None else sigmoid_loss
        logits = scale * image_embed @ text_embed.T + (0 if bias is None else bias)
        return loss(image_embed, text_embed, scale, bias)[0], (image_embed, text_embed, logits)

    (loss, (image_embed, text_embed, logits)), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    assert relative_error(image_embed, target["image_features"]) < TOLERANCE
    assert relative_error(text_embed, target["text_features"]) < TOLERANCE
    assert relative_error(logits, target["logits_per_image"]) < TOLERANCE
    assert relative_error(loss, target["loss"]) < TOLERANCE
    ours = to_theirs(reference.table, to_flat(jax.tree.map(np.asarray, {**grads, "batch_stats": batch_stats})))
    theirs = {name.removeprefix("grad:"): target[name] for name in target.files if name.startswith("grad:")}
    assert theirs and set(theirs) <= set(ours)
    errors = {name: relative_error(ours[name].reshape(theirs[name].shape), theirs[name]) for name in theirs}
    assert max(errors.values()) < TOLERANCE, errors


def test_resnet_agrees_with_the_peer_in_training(shared: pathlib.Path):
    reference = open_reference(shared, "openclip-rn-gelu")
    clip, target = build_clip(reference.config), reference.target
    params = reference.params()
    batch_stats = params.pop("batch_stats")
    pixels, tokens = reference.inputs()
    encoded = jax.jit(clip.train)(params, batch_stats, pixels, tokens, jax.random.key(0))
    image_embed, changed = encoded.image_embed, encoded.batch_stats
    assert relative_error(image_embed, target["image_features_train_mode"]) < TOLERANCE
    after = to_theirs(reference.table, to_flat(jax.tree.map(np.asarray, {**params, "batch_stats": changed})))
    for name in ("mean", "var"):
        assert (
            relative_error(after[f"visual.bn1.running_{name}"], target[f"bn1_running_{name}_after_one_train_pass"])
            < 1e-6
        )


@pytest.mark.parametrize("folder", FOLDERS)
def test_weights_go_out_as_they_came_in(shared: pathlib.Path, folder: str):
    reference = open_reference(shared, folder)
    ours = to_ours(reference.table, reference.weights, reference.shapes)
    theirs = to_theirs(reference.table, ours)
    assert theirs.keys() == reference.weights.keys()
    for name, array in reference.weights.items():
        np.testing.assert_array_equal(theirs[name], array, err_msg=name)


@pytest.mark.heavy
def test_hidden_states_of_texts_are_those_of_transformers(shared: pathlib.Path):
    """What a diffusion model takes: `last_hidden_state`; `hidden_states.json` tells whose."""
    reference = open_reference(shared, "hf-clip-quickgelu")
    target = json.loads((pathlib.Path(__file__).parent / "hidden_states.json").read_text())["last_hidden_state"]
    states = jax.jit(build_clip(reference.config).text_hidden_states)(reference.params(), reference.inputs()[1])
    assert states.shape == (6, 16, reference.config.text.width)
    assert relative_error(states[:, :, :4], np.asarray(target)) < TOLERANCE
