"""Both towers against what open_clip computed: features, logits, loss and the gradients it stored.

Tolerance: float32 against float64 moves these logits by 3e-6; one wrong activation moves them by 0.04. 2e-5 relative
(norm of the difference over norm of the target) lies between.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.config import Activation, Dtype, ImageTowerConfig, ModelConfig, TextTowerConfig
from clipjax.losses import softmax_loss
from clipjax.models.clip import build_clip

safetensors = pytest.importorskip("safetensors.numpy")
TOLERANCE = 2e-5


def model_config(peer: dict, *, scan: bool) -> ModelConfig:
    vision, text = peer["vision_cfg"], peer["text_cfg"]
    return ModelConfig(
        embed_dim=peer["embed_dim"],
        image=ImageTowerConfig(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["width"],
            depth=vision["layers"],
            num_heads=vision["width"] // vision["head_width"],
        ),
        text=TextTowerConfig(
            context_length=text["context_length"],
            vocab_size=text["vocab_size"],
            width=text["width"],
            depth=text["layers"],
            num_heads=text["heads"],
        ),
        activation=Activation.QUICK_GELU if peer["quick_gelu"] else Activation.GELU,
        compute_dtype=Dtype.FLOAT32,
        scan_layers=scan,
    )


def blocks(weights: dict, prefix: str, depth: int, heads: int) -> dict:
    """open_clip's residual blocks, stacked: kernels transposed from PyTorch's [out, in]."""

    def stack(name, change):
        return np.stack([change(weights[f"{prefix}.{i}.{name}"]) for i in range(depth)])

    width = weights[f"{prefix}.0.ln_1.weight"].shape[0]
    head = width // heads
    same, transpose = (lambda x: x), np.transpose
    return {
        "ln_1": {"scale": stack("ln_1.weight", same), "bias": stack("ln_1.bias", same)},
        "ln_2": {"scale": stack("ln_2.weight", same), "bias": stack("ln_2.bias", same)},
        "attn": {
            "qkv": {
                "kernel": stack("attn.in_proj_weight", lambda x: x.T.reshape(width, 3, heads, head)),
                "bias": stack("attn.in_proj_bias", lambda x: x.reshape(3, heads, head)),
            },
            "out": {
                "kernel": stack("attn.out_proj.weight", lambda x: x.T.reshape(heads, head, width)),
                "bias": stack("attn.out_proj.bias", same),
            },
        },
        "mlp": {
            "fc_in": {"kernel": stack("mlp.c_fc.weight", transpose), "bias": stack("mlp.c_fc.bias", same)},
            "fc_out": {"kernel": stack("mlp.c_proj.weight", transpose), "bias": stack("mlp.c_proj.bias", same)},
        },
    }


def our_params(weights: dict, config: ModelConfig) -> dict:
    def norm(name):
        return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    image, text = config.image, config.text
    return {
        "image": {
            "patch_embed": {"kernel": weights["visual.conv1.weight"].transpose(2, 3, 1, 0)},
            "class_embed": weights["visual.class_embedding"],
            "pos_embed": weights["visual.positional_embedding"],
            "ln_pre": norm("visual.ln_pre"),
            "transformer": {"blocks": blocks(weights, "visual.transformer.resblocks", image.depth, image.num_heads)},
            "ln_post": norm("visual.ln_post"),
            "proj": {"kernel": weights["visual.proj"]},
        },
        "text": {
            "token_embed": weights["token_embedding.weight"],
            "pos_embed": weights["positional_embedding"],
            "transformer": {"blocks": blocks(weights, "transformer.resblocks", text.depth, text.num_heads)},
            "ln_final": norm("ln_final"),
            "proj": {"kernel": weights["text_projection"]},
        },
        "log_logit_scale": weights["logit_scale"],
    }


def relative_error(ours, theirs) -> float:
    return float(np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("folder", ["openclip-vit-gelu", "openclip-vit-quickgelu"])
def test_towers_agree_with_open_clip(shared: pathlib.Path, folder: str, scan: bool):
    root = shared / "reference" / folder
    config = model_config(json.loads((root / "config.json").read_text())["config"], scan=scan)
    weights = safetensors.load_file(root / "weights.safetensors")
    target = np.load(root / "reference.npz", allow_pickle=False)
    clip = build_clip(config)
    params = our_params(weights, config)
    shapes = jax.tree.map(lambda x: x.shape, jax.eval_shape(clip.init, jax.random.key(0)))
    assert jax.tree.map(lambda x: np.shape(x), params) == shapes
    pixels = jnp.asarray(target["images"].transpose(0, 2, 3, 1))
    tokens = jnp.asarray(target["tokens"], jnp.int32)

    def objective(params):
        image_embed, text_embed = clip.encode_image(params, pixels), clip.encode_text(params, tokens)
        scale = jnp.exp(params["log_logit_scale"])
        return softmax_loss(image_embed, text_embed, scale)[0], (image_embed, text_embed, scale)

    (loss, (image_embed, text_embed, scale)), grads = jax.value_and_grad(objective, has_aux=True)(
        jax.tree.map(jnp.asarray, params)
    )
    assert relative_error(image_embed, target["image_features"]) < TOLERANCE
    assert relative_error(text_embed, target["text_features"]) < TOLERANCE
    assert relative_error(scale * image_embed @ text_embed.T, target["logits_per_image"]) < TOLERANCE
    assert relative_error(loss, target["loss"]) < TOLERANCE
    ours = {
        "logit_scale": grads["log_logit_scale"],
        "positional_embedding": grads["text"]["pos_embed"],
        "text_projection": grads["text"]["proj"]["kernel"],
        "visual.positional_embedding": grads["image"]["pos_embed"],
        "visual.proj": grads["image"]["proj"]["kernel"],
        "visual.conv1.weight": grads["image"]["patch_embed"]["kernel"].transpose(3, 2, 0, 1),
    }
    theirs = {name.removeprefix("grad:"): target[name] for name in target.files if name.startswith("grad:")}
    assert set(ours) == set(theirs)
    errors = {name: relative_error(ours[name], theirs[name]) for name in ours}
    assert max(errors.values()) < TOLERANCE, errors
