"""Every field of the peers' config classes: converted, accepted with some values only, or without effect here.

The readers (`open_clip_config.py`, `huggingface.py`) take the first kind one by one and hand the other two to
`PeerConfig.check`. A test walks the tables, so a field that a peer adds is refused until it is entered here.
Sources: open_clip_torch 3.3.0 (`model.py`, `coca_model.py`, `transformer.py`, `timm_model.py`) and transformers 5.24.0
(`configuration_utils.py`, `models/clip`, `models/siglip`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

DROPOUT = "acts in training only"
INITIAL = "sets initial values, which the weights replace"
OUTPUT = "chooses the form of the output"
FILES = "says which files to take, and the files at hand are taken"
PRECISION = "is a number format; everything is computed as model.compute_dtype says"
UNREAD = "the peer's code never reads it for such a model"


@dataclass(frozen=True)
class Fields:
    """Fields of one config class of a peer.

    Attributes:
        converted: fields that the reader takes one by one, and refuses by value.
        fixed: by name, the accepted values and the reason why others are refused.
        without_effect: by name, the reason why the field does not change what the weights compute.
    """

    converted: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    without_effect: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of all fields, in any of the three ways."""
        return [*self.converted, *self.fixed, *self.without_effect]


def _because(reason: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, reason)


def _merge(*parts: Fields) -> Fields:
    return Fields(
        tuple(name for part in parts for name in part.converted),
        {name: rule for part in parts for name, rule in part.fixed.items()},
        {name: reason for part in parts for name, reason in part.without_effect.items()},
    )


def _off(reason: str, *names: str) -> dict[str, tuple[tuple[Any, ...], str]]:
    return dict.fromkeys(names, ((False, None), reason))


BLOCK_OPTIONS = Fields(
    fixed=_off(
        "clipjax's blocks have no such normalisation or scale",
        "qk_norm",
        "scaled_cosine_attn",
        "scale_heads",
        "scale_attn_inner",
        "scale_attn",
        "scale_fc",
    )
)
"""Read by open_clip's "custom" block only, which equals its default one where all of them are off."""

_BLOCKS = Fields(
    converted=("block_type", "mlp_ratio", "act_kwargs", "norm_kwargs"),
    fixed={"ls_init_value": ((None,), "clipjax's blocks have no LayerScale")},
)

TIMM = Fields(
    converted=("timm_pool", "timm_proj", "timm_proj_bias"),
    without_effect={
        **_because(FILES, "timm_model_pretrained"),
        **_because(DROPOUT, "timm_drop", "timm_drop_path"),
    },
)
"""Read by open_clip together with `timm_model_name` only."""

VISION = _merge(
    Fields(
        converted=(
            *("layers", "width", "head_width", "patch_size", "image_size", "patch_dropout", "no_ln_pre"),
            *("attentional_pool", "attn_pooler_queries", "attn_pooler_heads", "final_ln_after_pool", "pool_type"),
            "timm_model_name",
        ),
        fixed={
            # A fixed table of sines and cosines travels with the weights, as a learned one does.
            "pos_embed_type": (("learnable", "sin_cos_2d"), "no other positions are known"),
        },
        without_effect=_because(OUTPUT, "output_tokens"),
    ),
    _BLOCKS,
)

TEXT = _merge(
    Fields(
        converted=(
            *("context_length", "vocab_size", "width", "heads", "layers", "embed_cls", "pad_id", "eos_id"),
            *("no_causal_mask", "pool_type", "proj_bias", "proj_type"),
        ),
        fixed={
            "hf_model_name": ((None, ""), "clipjax has no text tower of Hugging Face's; take one of open_clip's own")
        },
        without_effect={
            **_because(FILES, "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "hf_model_pretrained"),
            **_because(OUTPUT, "output_tokens"),
            **_because(UNREAD, "final_ln_after_pool", "hf_proj_type", "hf_pooler_type"),
        },
    ),
    _BLOCKS,
)

MULTIMODAL = Fields(
    converted=("context_length", "width", "heads", "layers"),
    fixed={"ls_init_value": ((None,), "clipjax's blocks have no LayerScale")},
    without_effect=_because(
        UNREAD,
        *("mlp_ratio", "dim_head", "n_queries", "attn_pooler_heads", "vocab_size", "embed_cls", "pad_id", "eos_id"),
        *("no_causal_mask", "final_ln_after_pool", "pool_type", "proj_bias", "proj_type", "output_tokens"),
        *("act_kwargs", "norm_kwargs", "block_type", *BLOCK_OPTIONS.fixed),
        *("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"),
        *("hf_model_name", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
    ),
)

MODEL = Fields(
    converted=(
        *("embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg"),
        *("quick_gelu", "init_logit_scale", "init_logit_bias"),
    ),
    without_effect={
        **_because("the weights' names say it", "custom_text"),
        **_because("the weights' shapes say it", "nonscalar_logit_scale"),
        **_because(PRECISION, "cast_dtype"),
        **_because(OUTPUT, "output_dict"),
        **_because("fills up generated captions", "pad_id"),
    },
)
"""Arguments of open_clip's `CLIP`, `CustomTextCLIP` and `CoCa`, and its factory's `custom_text`."""

OPEN_CLIP: Mapping[str, Fields] = {
    "model_cfg": MODEL,
    "CLIPVisionCfg": _merge(VISION, BLOCK_OPTIONS, TIMM),
    "CLIPTextCfg": _merge(TEXT, BLOCK_OPTIONS),
    "MultimodalCfg": MULTIMODAL,
}

_BASE = Fields(
    fixed={
        "per_layer_config": ((None, {}), "clipjax's blocks are all alike"),
        "pruned_heads": ((None, {}), "clipjax's blocks are all alike"),
        "quantization_config": ((None, {}), "quantised weights are not read"),
    },
    without_effect={
        **_because(PRECISION, "dtype", "torch_dtype", "use_bfloat16"),
        **_because(INITIAL, "initializer_range", "initializer_factor"),
        **_because(DROPOUT, "attention_dropout", "dropout", "gradient_checkpointing"),
        **_because(
            OUTPUT, "return_dict", "output_hidden_states", "output_attentions", "tie_last_hidden_states", "torchscript"
        ),
        **_because(
            FILES,
            "transformers_version",
            "architectures",
            "model_type",
            "name_or_path",
            "_name_or_path",
            "_commit_hash",
        ),
        **_because(
            "chooses among ways to compute the same",
            *("chunk_size_feed_forward", "attn_implementation", "experts_implementation", "use_cache"),
            *("_attn_implementation_autoset", "_attn_implementation_internal", "_experts_implementation_internal"),
        ),
        **_because("is for other tasks", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
        **_because(
            UNREAD,
            *("pad_token_id", "bos_token_id", "sep_token_id", "decoder_start_token_id", "is_encoder_decoder"),
            *("is_decoder", "add_cross_attention", "cross_attention_hidden_size", "tie_word_embeddings"),
            *("tie_encoder_decoder", "tokenizer_class", "prefix", "task_specific_params", "tf_legacy_loss"),
        ),
        **_because(
            "is for generated texts",
            *("begin_suppress_tokens", "suppress_tokens", "bad_words_ids", "do_sample", "early_stopping"),
            *("max_length", "min_length", "num_beams", "num_beam_groups", "diversity_penalty", "temperature"),
            *("top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
            *("encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores", "return_dict_in_generate"),
            *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
            "exponential_decay_length_penalty",
        ),
    },
)
"""Fields of `PreTrainedConfig`, now and in older versions."""

_TOWER = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("hidden_act", "layer_norm_eps"),
)
_HEAD = "without the head SigLIP's images have no embedding"
_THREE_CHANNELS = {"num_channels": ((3,), "pictures have three channels")}


def _hugging_face(*converted: str, fixed: Mapping[str, Any] | None = None, unread: Iterable[str] = ()) -> Fields:
    silent = {name: reason for name, reason in _BASE.without_effect.items() if name not in converted}
    return _merge(Fields(converted, fixed or {}, _because(UNREAD, *unread)), Fields((), _BASE.fixed, silent))


HUGGING_FACE: Mapping[str, Fields] = {
    "CLIPConfig": _hugging_face(
        *("model_type", "text_config", "vision_config", "text_config_dict", "vision_config_dict"),
        *("projection_dim", "logit_scale_init_value"),
        unread=["eos_token_id"],
    ),
    "CLIPTextConfig": _hugging_face(
        *_TOWER, "vocab_size", "max_position_embeddings", "eos_token_id", unread=["projection_dim"]
    ),
    "CLIPVisionConfig": _hugging_face(
        *_TOWER, "image_size", "patch_size", fixed=_THREE_CHANNELS, unread=["projection_dim", "eos_token_id"]
    ),
    "SiglipConfig": _hugging_face(
        *("model_type", "text_config", "vision_config"),
        unread=["text_config_dict", "vision_config_dict", "eos_token_id"],
    ),
    "SiglipTextConfig": _hugging_face(
        *_TOWER, "vocab_size", "max_position_embeddings", "projection_size", unread=["eos_token_id", "projection_dim"]
    ),
    "SiglipVisionConfig": _hugging_face(
        *_TOWER,
        *("image_size", "patch_size"),
        fixed={**_THREE_CHANNELS, "vision_use_head": ((True,), _HEAD)},
        unread=["eos_token_id", "projection_dim"],
    ),
    "Siglip2Config": _hugging_face(
        *("model_type", "text_config", "vision_config"),
        unread=["text_config_dict", "vision_config_dict", "eos_token_id"],
    ),
    "Siglip2TextConfig": _hugging_face(
        *_TOWER, "vocab_size", "max_position_embeddings", "projection_size", unread=["eos_token_id", "projection_dim"]
    ),
    "Siglip2VisionConfig": _hugging_face(
        *_TOWER,
        *("num_patches", "patch_size"),
        fixed={**_THREE_CHANNELS, "vision_use_head": ((True,), _HEAD)},
        unread=["eos_token_id", "projection_dim"],
    ),
}
