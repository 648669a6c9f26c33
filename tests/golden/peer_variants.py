"""Options of open_clip and Hugging Face that few models use: tiny configs, weights by rule, and what the peers compute.

    PEER/bin/python -m tests.golden.peer_variants tests/golden/peer_variants.json

writes the expected numbers, in an environment with torch 2.13.0, open_clip_torch 3.3.0 and transformers 5.24.0 but
without clipjax (`python -m benchmarks.parity.run --install=PEER` makes it). Weights, images and texts come from streams
of `RandomState`, which NumPy keeps for good, so both sides make the same ones.
"""

import json
import pathlib
import sys
import zlib
from typing import Any

import numpy as np

VIT = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
WORDS = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
EPSILON = {"norm_kwargs": {"eps": 0.03}}
"""Large enough to move the third digit if it is overlooked."""
COCA_WORDS = {"embed_cls": True, "output_tokens": True}
DECODER = {"width": 32, "heads": 4, "layers": 1, "context_length": 8}


def _open_clip(vision: dict[str, Any], text: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"embed_dim": 8, "vision_cfg": {**VIT, **vision}, "text_cfg": {**WORDS, **(text or {})}, **more}


def _coca(vision: dict[str, Any], text: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    text = {**COCA_WORDS, **(text or {})}
    vision = {"output_tokens": True, **vision}
    return _open_clip(vision, text, custom_text=True, multimodal_cfg=DECODER, **more)


OPEN_CLIP = {
    "average, then the norm": _open_clip({"pool_type": "avg", "final_ln_after_pool": True}),
    "average of normalised tokens": _open_clip({"pool_type": "avg"}),
    "class token, then the norm": _open_clip({"final_ln_after_pool": True}, {"final_ln_after_pool": True}),
    "queries without a decoder": _open_clip(
        {"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 2, "final_ln_after_pool": True}
    ),
    "end of text without a causal mask": _open_clip({}, {"no_causal_mask": True}),
    "end of text by its id": _open_clip({}, {"pool_type": "eos", "eos_id": 63}),
    "token behind the text without a decoder": _open_clip({}, {"embed_cls": True}, custom_text=True),
    "sines and cosines": _open_clip({"pos_embed_type": "sin_cos_2d"}),
    "custom blocks with nothing custom": _open_clip({"block_type": "custom"}, {"block_type": "custom"}),
    "default blocks read no options": _open_clip({"block_type": "default", "qk_norm": True, "scale_fc": True}),
    "arrays of one": _open_clip({}, nonscalar_logit_scale=True, init_logit_bias=-10.0, init_logit_scale=1.0),
    "pixels that fill no patch": _open_clip({"image_size": 20}),
    "sizes as lists": _open_clip({"image_size": [16, 16], "patch_size": [8, 8]}),
    "a head's width that leaves a rest": _open_clip({"head_width": 12}),
    "options of each tower": _open_clip(EPSILON, {"act_kwargs": {"approximate": "tanh"}, "mlp_ratio": 3.1}),
    "coca over a class token": _coca({}, EPSILON | {"act_kwargs": {"approximate": "tanh"}}),
    "coca over a class token, then the norm": _coca({"final_ln_after_pool": True}),
    "coca over an average, then the norm": _coca({"pool_type": "avg", "final_ln_after_pool": True}, quick_gelu=True),
}

_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION = {**_TOWER, "image_size": 20, "patch_size": 8}
_TEXT = {**_TOWER, "vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 63}

HUGGING_FACE = {
    "pixels that fill no patch, another gelu": {
        "model_type": "clip",
        "projection_dim": 8,
        "vision_config": {**_VISION, "hidden_act": "gelu_new", "attention_dropout": 0.5},
        "text_config": {**_TEXT, "hidden_act": "gelu_python"},
    },
    "configs of the old form": {
        "model_type": "clip",
        "projection_dim": 8,
        "vision_config": {**_VISION, "hidden_act": "gelu", "layer_norm_eps": 0.03},
        "vision_config_dict": _VISION,
        "text_config": {**_TEXT, "num_attention_heads": 4},
        "text_config_dict": {**_TEXT, "hidden_act": "gelu_fast"},
    },
    "siglip": {
        "model_type": "siglip",
        "vision_config": {**_VISION, "hidden_act": "gelu_accurate"},
        "text_config": {**_TEXT, "projection_size": 32, "layer_norm_eps": 0.03},
    },
}


def make_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights by name, the same for the same names and shapes: matrices shrink with their inputs, norms are about 1."""
    weights = {}
    for name, shape in shapes.items():
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if len(shape) < 2:
            noise = 0.2 * noise + (name.endswith("weight") or "logit_scale" in name)
        weights[name] = np.asarray(noise if len(shape) < 2 else noise * shape[-1] ** -0.5, np.float32)
    return weights


def make_inputs(image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two images `[2, 3, size, size]` and two texts `[2, 8]`, one of them padded."""
    pixels = np.random.RandomState(0).standard_normal((2, 3, image_size, image_size)).astype(np.float32)
    return pixels, np.asarray([[62, 5, 9, 63, 0, 0, 0, 0], [62, 11, 4, 8, 30, 21, 7, 63]], np.int64)


def image_size(config: dict[str, Any]) -> int:
    """Of the pictures that a config wants."""
    size = config.get("vision_cfg", config.get("vision_config"))["image_size"]
    return size[0] if isinstance(size, list) else size


def _load(model: Any, torch: Any) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: torch.tensor(array) for name, array in make_weights(shapes).items()})
    model.eval()


def _of_open_clip(config: dict[str, Any], torch: Any) -> dict[str, np.ndarray]:
    import open_clip

    # As open_clip's factory chooses among them.
    custom = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    kind = custom if config.get("custom_text") else open_clip.CLIP
    model = kind(**{name: value for name, value in config.items() if name != "custom_text"})
    _load(model, torch)
    pixels, tokens = map(torch.tensor, make_inputs(image_size(config)))
    found = {
        "image_embed": model.encode_image(pixels, normalize=True),
        "text_embed": model.encode_text(tokens, normalize=True),
    }
    if "multimodal_cfg" in config:
        found["caption_logits"] = model(pixels, tokens)["logits"][:, :, :4]
    return found


def _of_hugging_face(config: dict[str, Any], torch: Any) -> dict[str, np.ndarray]:
    import transformers

    name = {"clip": "CLIP", "siglip": "Siglip"}[config["model_type"]]
    fields = {name: value for name, value in config.items() if name != "model_type"}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**fields))
    _load(model, torch)
    pixels, tokens = map(torch.tensor, make_inputs(image_size(config)))
    both = model(input_ids=tokens, pixel_values=pixels)
    return {"image_embed": both.image_embeds[:, :8], "text_embed": both.text_embeds[:, :8]}


def main(output: pathlib.Path) -> None:
    import torch

    # torchvision's wheel is built for CUDA; on a CPU build of PyTorch its operators are absent, and none is used.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    found = {}
    with torch.no_grad():
        for make, configs in ((_of_open_clip, OPEN_CLIP), (_of_hugging_face, HUGGING_FACE)):
            for name, config in configs.items():
                arrays = make(config, torch)
                found[name] = {key: np.round(array.double().numpy(), 7).tolist() for key, array in arrays.items()}
    output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
