"""Every field of the peers' config classes: with another value it changes the model, changes nothing, or is refused."""

import copy
import dataclasses
from typing import Any

import pytest

from clipjax.config import ModelConfig
from clipjax.convert import huggingface, open_clip_config
from clipjax.convert.peer_fields import HUGGING_FACE, OPEN_CLIP, Fields

_BLOCK = (
    *("act_kwargs", "norm_kwargs", "block_type", "qk_norm", "scaled_cosine_attn", "scale_heads"),
    *("scale_attn_inner", "scale_attn", "scale_fc"),
)
_TEXT = (
    *("context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "width", "heads"),
    *("layers", "mlp_ratio", "ls_init_value", "embed_cls", "pad_id", "eos_id", "no_causal_mask"),
    *("final_ln_after_pool", "pool_type", "proj_bias", "proj_type", "output_tokens", *_BLOCK),
    *("hf_model_name", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
)
# open_clip_torch 3.3.0: `dataclasses.fields` of each class, and the arguments of `CLIP`, `CustomTextCLIP` and `CoCa`
# with the key that its factory takes out, `custom_text`.
OPEN_CLIP_NAMES = {
    "model_cfg": (
        *("embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "quick_gelu", "init_logit_scale"),
        *("init_logit_bias", "nonscalar_logit_scale", "cast_dtype", "output_dict", "pad_id", "custom_text"),
    ),
    "CLIPVisionCfg": (
        *("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value", "patch_dropout"),
        *("attentional_pool", "attn_pooler_queries", "attn_pooler_heads", "no_ln_pre", "pos_embed_type"),
        *("final_ln_after_pool", "pool_type", "output_tokens", *_BLOCK),
        *("timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias"),
        *("timm_drop", "timm_drop_path"),
    ),
    "CLIPTextCfg": _TEXT,
    "MultimodalCfg": (*_TEXT, "dim_head", "n_queries", "attn_pooler_heads"),
}
_BASE = (
    *("transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype", "problem_type"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id"),
    # Not fields, but taken by its `__post_init__` or written by `to_dict`:
    *("num_labels", "torch_dtype", "name_or_path", "_name_or_path", "_commit_hash", "output_attentions"),
    *("attn_implementation", "experts_implementation", "per_layer_config", "tie_last_hidden_states", "model_type"),
)
_TOWER = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("layer_norm_eps", "attention_dropout", *_BASE),
)
_TOKENS = ("vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
_INITIAL = ("initializer_range", "initializer_factor")
# transformers 5.24.0: `dataclasses.fields` of each class.
HUGGING_FACE_NAMES = {
    "CLIPConfig": (
        *("text_config", "vision_config", "projection_dim", "logit_scale_init_value", "initializer_factor"),
        *("text_config_dict", "vision_config_dict", *_BASE),
    ),
    "CLIPTextConfig": (*_TOWER, *_TOKENS, *_INITIAL, "projection_dim"),
    "CLIPVisionConfig": (*_TOWER, *_INITIAL, "projection_dim", "num_channels", "image_size", "patch_size"),
    "SiglipConfig": ("text_config", "vision_config", "initializer_factor", *_BASE),
    "SiglipTextConfig": (*_TOWER, *_TOKENS, "projection_size"),
    "SiglipVisionConfig": (*_TOWER, "num_channels", "image_size", "patch_size", "vision_use_head"),
    "Siglip2Config": ("text_config", "vision_config", "initializer_factor", *_BASE),
    "Siglip2TextConfig": (*_TOWER, *_TOKENS, "projection_size"),
    "Siglip2VisionConfig": (*_TOWER, "num_channels", "num_patches", "patch_size", "vision_use_head"),
}

CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 128, "layers": 2},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 2, "layers": 2},
}
COCA = {**CLIP, "vision_cfg": {**CLIP["vision_cfg"], "attentional_pool": True}}
COCA |= {"text_cfg": {**CLIP["text_cfg"], "embed_cls": True}, "multimodal_cfg": {"width": 64, "context_length": 8}}
_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
HF_CLIP = {
    "model_type": "clip",
    "vision_config": {**_SIZES, "image_size": 16, "patch_size": 8},
    "text_config": {**_SIZES, "vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 2},
}
HF_SIGLIP = {**copy.deepcopy(HF_CLIP), "model_type": "siglip"}
HF_SIGLIP2 = {**copy.deepcopy(HF_CLIP), "model_type": "siglip2"}
HF_SIGLIP2["vision_config"] |= {"num_patches": 9}
del HF_SIGLIP2["vision_config"]["image_size"]
PLACES: dict[str, tuple[dict[str, Any], str | None]] = {
    "model_cfg": (CLIP, None),
    "CLIPVisionCfg": (CLIP, "vision_cfg"),
    "CLIPTextCfg": (CLIP, "text_cfg"),
    "MultimodalCfg": (COCA, "multimodal_cfg"),
    "CLIPConfig": (HF_CLIP, None),
    "CLIPVisionConfig": (HF_CLIP, "vision_config"),
    "CLIPTextConfig": (HF_CLIP, "text_config"),
    "SiglipConfig": (HF_SIGLIP, None),
    "SiglipVisionConfig": (HF_SIGLIP, "vision_config"),
    "SiglipTextConfig": (HF_SIGLIP, "text_config"),
    "Siglip2Config": (HF_SIGLIP2, None),
    "Siglip2VisionConfig": (HF_SIGLIP2, "vision_config"),
    "Siglip2TextConfig": (HF_SIGLIP2, "text_config"),
}
"""A config that holds each class, and where in it."""

TANH, TRUNK = {"approximate": "tanh"}, {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map"}
TRUNK = {**TRUNK, "image_size": 224}
QUERIES, DEFAULT = {"attentional_pool": True}, {"block_type": "default"}
_TEXT_BLOCK = {"act_kwargs": TANH, "norm_kwargs": {"eps": 1e-3}, "mlp_ratio": 2.0}
_HF_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
_HF_TOWER |= {"hidden_act": "gelu", "layer_norm_eps": 1e-3}
_OF_ANY_WIDTH = {name: value for name, value in _HF_TOWER.items() if name != "hidden_size"}
_OPTIONS = dict.fromkeys(_BLOCK[3:], True)

CHANGES: dict[str, list[dict[str, Any]]] = {
    "model_cfg": [
        {"embed_dim": 32, "quick_gelu": True, "init_logit_scale": 1.0, "init_logit_bias": -10.0},
        {"vision_cfg": {"width": 64}, "text_cfg": {"layers": 1}},
    ],
    "CLIPVisionCfg": [
        {"layers": 3, "width": 192, "head_width": 32, "mlp_ratio": 2.0, "patch_size": 4, "image_size": 32},
        {"patch_dropout": 0.5, "attentional_pool": True, "no_ln_pre": True, "pool_type": "avg"},
        {"act_kwargs": TANH, "norm_kwargs": {"eps": 1e-3}, "image_size": [20, 20], "layers": [1, 1, 1, 1]},
    ],
    "CLIPTextCfg": [
        {"context_length": 7, "vocab_size": 65, "width": 32, "heads": 4, "layers": 1, **_TEXT_BLOCK},
        {"embed_cls": True, "no_causal_mask": True, "proj_bias": True, "proj_type": "none"},
    ],
    "MultimodalCfg": [{"heads": 4, "layers": 1}],
    "CLIPConfig": [
        {"projection_dim": 32, "logit_scale_init_value": 1.0, "model_type": "siglip"},
        {"vision_config_dict": {"image_size": 64}, "text_config_dict": {"eos_token_id": 49407}},
        {"vision_config": {}, "text_config": {}},
    ],
    "CLIPVisionConfig": [{**_HF_TOWER, "image_size": 20, "patch_size": 4}],
    "CLIPTextConfig": [{**_HF_TOWER, "vocab_size": 65, "max_position_embeddings": 7}],
    "SiglipConfig": [{"model_type": "clip", "vision_config": {**_SIZES, "image_size": 32}}],
    "SiglipVisionConfig": [{**_OF_ANY_WIDTH, "image_size": 20, "patch_size": 4}],
    "SiglipTextConfig": [{**_OF_ANY_WIDTH, "vocab_size": 65, "max_position_embeddings": 7}],
    "Siglip2VisionConfig": [{**_OF_ANY_WIDTH, "num_patches": 16, "patch_size": 4}],
    "Siglip2TextConfig": [{**_OF_ANY_WIDTH, "vocab_size": 65, "max_position_embeddings": 7}],
}
"""Values that each, alone, change the model; `WITH` adds what a field needs to count."""

WITH = [
    ("CLIPVisionCfg", {"pool_type": "avg"}, {"final_ln_after_pool": True}),
    ("CLIPVisionCfg", QUERIES, {"attn_pooler_queries": 5, "attn_pooler_heads": 4}),
    ("CLIPVisionCfg", TRUNK, {"timm_proj": "none", "timm_proj_bias": True, "patch_dropout": 0.5}),
    ("CLIPVisionCfg", {"image_size": 224, "timm_pool": "map"}, {"timm_model_name": "vit_base_patch16_siglip_224"}),
    ("CLIPTextCfg", {"no_causal_mask": True}, {"pool_type": "last"}),
    ("SiglipTextConfig", {"projection_size": 64}, {"hidden_size": 32}),
    ("SiglipConfig", {}, {"text_config": {**_SIZES, "vocab_size": 65}}),
    ("Siglip2TextConfig", {"projection_size": 64}, {"hidden_size": 32}),
    ("Siglip2Config", {}, {"text_config": {**_SIZES, "vocab_size": 65}}),
    ("Siglip2Config", {}, {"vision_config": {**_SIZES, "num_patches": 4}}),
]

_ANY = {
    **{"transformers_version": "4.0", "architectures": ["Mine"], "output_hidden_states": True, "return_dict": False},
    **{"dtype": "float16", "problem_type": "regression", "chunk_size_feed_forward": 4, "is_encoder_decoder": True},
    **{"id2label": {"0": "a"}, "label2id": {"a": 0}, "num_labels": 3, "torch_dtype": "bfloat16", "name_or_path": "x"},
    **{"_name_or_path": "x", "_commit_hash": "0", "output_attentions": True, "attn_implementation": "eager"},
    **{"experts_implementation": "eager", "tie_last_hidden_states": True, "initializer_range": 1.0},
    **{"initializer_factor": 2.0, "per_layer_config": {}},
}
_ANY_TOWER = {**_ANY, "attention_dropout": 0.5, "projection_dim": 7, "model_type": "any"}
_UNREAD = {
    "eos_id": 5,
    "pad_id": 5,
    "hf_tokenizer_name": "x",
    "tokenizer_mode": "x",
    "tokenizer_kwargs": {"clean": "x"},
}
_UNREAD |= {"output_tokens": True, "final_ln_after_pool": True, "hf_model_pretrained": False, "hf_proj_type": "linear"}
_UNREAD |= {"hf_pooler_type": "cls_pooler"}

SAME = [
    ("model_cfg", {}, {"custom_text": True, "nonscalar_logit_scale": True, "cast_dtype": "fp16", "output_dict": True}),
    ("model_cfg", {}, {"pad_id": 1, "multimodal_cfg": None}),
    ("CLIPVisionCfg", {}, {"output_tokens": True, "final_ln_after_pool": True, "pos_embed_type": "sin_cos_2d"}),
    ("CLIPVisionCfg", {}, {"attn_pooler_queries": 5, "attn_pooler_heads": 4, "block_type": "custom"}),
    ("CLIPVisionCfg", {}, {"timm_model_pretrained": True, "timm_pool": "x", "timm_proj": "x", "timm_proj_bias": True}),
    ("CLIPVisionCfg", {}, {"timm_drop": 0.5, "timm_drop_path": 0.5, "act_kwargs": {"approximate": "none"}}),
    ("CLIPVisionCfg", {}, {"head_width": 43, "norm_kwargs": {"bias": True}, "image_size": [16, 16]}),
    ("CLIPVisionCfg", DEFAULT, _OPTIONS),
    ("CLIPVisionCfg", QUERIES, {"final_ln_after_pool": True}),
    ("CLIPVisionCfg", TRUNK, {"layers": 3, "width": 3, "patch_size": 3, "timm_drop": 0.5, "pool_type": "x"}),
    ("CLIPVisionCfg", {"layers": [1, 1, 1, 1]}, {"mlp_ratio": 2.0, "pool_type": "x", "patch_dropout": 0.5}),
    ("CLIPTextCfg", {}, {**_UNREAD, "block_type": "custom"}),
    ("CLIPTextCfg", {"eos_id": 63}, {"pool_type": "eos"}),
    ("CLIPTextCfg", {"embed_cls": True}, {"pool_type": "last"}),
    ("CLIPTextCfg", DEFAULT, _OPTIONS),
    ("MultimodalCfg", {}, {**_UNREAD, **_OPTIONS, **_TEXT_BLOCK, "block_type": "x", "context_length": 99}),
    ("MultimodalCfg", {}, {"vocab_size": 3, "embed_cls": True, "no_causal_mask": True, "pool_type": "last"}),
    ("MultimodalCfg", {}, {"proj_bias": True, "proj_type": "none", "hf_model_name": "x", "dim_head": 3}),
    ("MultimodalCfg", {}, {"n_queries": 3, "attn_pooler_heads": 3}),
    ("CLIPConfig", {}, _ANY),
    ("CLIPVisionConfig", {}, _ANY_TOWER),
    ("CLIPTextConfig", {}, {**_ANY_TOWER, "pad_token_id": 5, "bos_token_id": 5, "eos_token_id": 63}),
    ("SiglipConfig", {}, _ANY),
    ("SiglipVisionConfig", {}, _ANY_TOWER),
    ("SiglipTextConfig", {}, {**_ANY_TOWER, "pad_token_id": 5, "bos_token_id": 5, "eos_token_id": 5}),
    ("Siglip2Config", {}, _ANY),
    ("Siglip2VisionConfig", {}, _ANY_TOWER),
    ("Siglip2TextConfig", {}, {**_ANY_TOWER, "pad_token_id": 5, "bos_token_id": 5, "eos_token_id": 5}),
]
"""Values that change nothing, beside what is given first."""

_COMMON = {"ls_init_value": 0.1, **_OPTIONS, "block_type": "mine", "pool_type": "none", "norm_kwargs": {"bias": False}}
REFUSED = [
    ("model_cfg", {}, {"embed_dim": 0, "quick_gelu": 1, "init_logit_scale": 99.0, "init_logit_bias": "x"}),
    ("CLIPVisionCfg", {}, {**_COMMON, "pos_embed_type": "rope", "attentional_pool": "parallel", "head_width": 40}),
    (
        "CLIPVisionCfg",
        {},
        {"timm_model_name": "convnext_base", "image_size": [16, 24], "act_kwargs": {"inplace": True}},
    ),
    ("CLIPVisionCfg", TRUNK, {"timm_pool": "avg", "timm_proj": "mlp", "image_size": 256}),
    ("CLIPVisionCfg", QUERIES, {"pool_type": "avg", "norm_kwargs": {"eps": 1e-3}}),
    ("CLIPTextCfg", {}, {**_COMMON, "hf_model_name": "roberta-base"}),
    ("CLIPTextCfg", {}, {"pool_type": "last"}),
    ("CLIPTextCfg", {"pool_type": "eos"}, {"eos_id": 2}),
    ("CLIPTextCfg", {"embed_cls": True}, {"pad_id": 1, "no_causal_mask": True}),
    ("MultimodalCfg", {}, {"ls_init_value": 0.1, "width": 32, "context_length": 6}),
    ("CLIPConfig", {}, {"per_layer_config": {"0": {}}, "model_type": "siglip3", "projection_dim": None}),
    ("CLIPVisionConfig", {}, {"num_channels": 4, "hidden_act": "relu", "image_size": [16, 16], "patch_size": [8, 8]}),
    ("CLIPTextConfig", {}, {"eos_token_id": 49407, "per_layer_config": {"0": {}}}),
    ("SiglipVisionConfig", {}, {"num_channels": 4, "vision_use_head": False, "hidden_act": "relu"}),
    ("SiglipTextConfig", {}, {"projection_size": 32}),
    ("Siglip2Config", {}, {"model_type": "siglip3"}),
    ("Siglip2VisionConfig", {}, {"num_channels": 4, "vision_use_head": False, "hidden_act": "relu", "num_patches": 8}),
    ("Siglip2TextConfig", {}, {"projection_size": 32}),
]
"""Values that are refused with the field's name, beside what is given first."""


def read(kind: str, *fields: dict[str, Any]) -> ModelConfig:
    config, place = PLACES[kind]
    config = copy.deepcopy(config)
    inside = config if place is None else config[place]
    for more in fields:
        inside |= more
    return (open_clip_config if kind in OPEN_CLIP else huggingface).read_config(config)


def one_by_one(rows: list[tuple[str, dict, dict]]) -> list[Any]:
    return [
        pytest.param(
            kind, given, name, value, id=f"{kind}.{name}={value} with {given}" if given else f"{kind}.{name}={value}"
        )
        for kind, given, values in rows
        for name, value in values.items()
    ]


CHANGING = [(kind, {}, values) for kind, rows in CHANGES.items() for values in rows] + WITH


@pytest.mark.parametrize("kind", PLACES)
def test_the_tables_have_every_field_once(kind: str):
    fields: Fields = {**OPEN_CLIP, **HUGGING_FACE}[kind]
    assert len(fields.names) == len(set(fields.names))
    if kind in OPEN_CLIP:
        assert set(fields.names) == set(OPEN_CLIP_NAMES[kind])
    else:  # older versions wrote more
        assert set(HUGGING_FACE_NAMES[kind]) <= set(fields.names)
    siglip = ("SiglipVisionConfig", "Siglip2VisionConfig")
    tried = {"hidden_size"} if kind in siglip else set()  # below, with the text's projection
    tried |= {
        name for rows in (CHANGING, SAME, REFUSED) for place, _, values in rows if place == kind for name in values
    }
    assert set(({**OPEN_CLIP_NAMES, **HUGGING_FACE_NAMES})[kind]) <= tried, "fields that no test tries"


@pytest.mark.parametrize(("kind", "given", "name", "value"), one_by_one(CHANGING))
def test_a_field_changes_the_model_and_comes_back(kind: str, given: dict, name: str, value: Any):
    if (kind, name) == ("CLIPTextCfg", "proj_type"):
        given = {**given, "width": 64}
    found = read(kind, given, {name: value})
    assert found != read(kind, given)
    module = open_clip_config if kind in OPEN_CLIP else huggingface
    if kind in ("SiglipConfig", "Siglip2Config") or name == "model_type":
        found.init_logit_scale = 10.0
    again = module.read_config(module.write_config(found))
    assert again.init_logit_scale == pytest.approx(found.init_logit_scale)
    assert dataclasses.replace(again, init_logit_scale=found.init_logit_scale) == found


@pytest.mark.parametrize(("kind", "given", "name", "value"), one_by_one(SAME))
def test_a_field_without_effect_is_accepted(kind: str, given: dict, name: str, value: Any):
    assert read(kind, given, {name: value}) == read(kind, given)


@pytest.mark.parametrize(("kind", "given", "name", "value"), one_by_one(REFUSED))
def test_a_value_that_no_model_has_is_refused_by_name(kind: str, given: dict, name: str, value: Any):
    with pytest.raises(ValueError, match=rf"(?m)^(model_cfg|config)\.(\w+\.)?{name}=.* must "):
        read(kind, given, {name: value})


def test_siglips_towers_end_in_the_same_width():
    config = copy.deepcopy(HF_SIGLIP)
    config["vision_config"]["hidden_size"] = config["text_config"]["projection_size"] = 32
    found = huggingface.read_config(config)
    assert found.embed_dim == found.image.width == 32 and found.text.width == 64
    again = huggingface.read_config(huggingface.write_config(found))
    assert again == found


@pytest.mark.parametrize("kind", PLACES)
def test_a_field_that_no_table_has_is_refused(kind: str):
    with pytest.raises(ValueError, match=r"novelty=3 is nothing that clipjax has"):
        read(kind, {"novelty": 3})
