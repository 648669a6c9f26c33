"""Other models on the embedded dataset `scenes`, after `make quickstart` has made the data and its tokenizer.

    clipjax train --config=configs/scenes.py:resnet --workdir=runs/resnet

The argument: `resnet` (a small modified ResNet), `cbow` (the text tower is a bag of words), `siglip` (attention
pooling, bidirectional text, sigmoid loss), `flip` (half of the patches left out in training), `coca` (a decoder learns
to write captions besides), or `lit` (the image tower of a converted checkpoint in `runs/converted` stays as it is;
docs/weights.md tells how to make one).
Made for two CPU cores; docs/models.md has the results.
"""

import pathlib
import runpy

from clipjax.config import (
    Activation,
    CbowConfig,
    Config,
    DecoderConfig,
    ImagePool,
    LossKind,
    Projection,
    ResNetConfig,
    TextPool,
    TextTransformerConfig,
    ViTConfig,
)

QUICKSTART = pathlib.Path(__file__).with_name("quickstart.py")


def get_config(argument: str = "resnet") -> Config:
    """The quickstart with another model."""
    config: Config = runpy.run_path(str(QUICKSTART))["get_config"]()
    model = config.model
    assert isinstance(model.image, ViTConfig)
    assert isinstance(model.text, TextTransformerConfig)
    match argument:
        case "resnet":
            model.image = ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=16, num_heads=8)
        case "cbow":
            model.text = CbowConfig(context_length=24, vocab_size=304, width=128)
        case "siglip":
            model.image.pool, model.image.class_token, model.image.ln_pre = ImagePool.ATTENTION, False, False
            model.image.patch_bias, model.image.projection = True, Projection.NONE
            model.text.causal, model.text.pool = False, TextPool.ATTENTION
            model.image.activation = model.text.activation = Activation.GELU_TANH
            model.init_logit_scale, model.init_logit_bias, config.loss.kind = 10.0, -10.0, LossKind.SIGMOID
        case "flip":
            model.image.patch_dropout = 0.5
        case "coca":
            model.image.pool, model.image.num_queries, model.image.query_heads = ImagePool.QUERIES, 8, 4
            model.text.pool, model.caption = TextPool.CLASS, DecoderConfig(depth=1, num_heads=4)
            config.loss.caption_weight = 2.0
        case "lit":
            config.init_from, config.init_match, config.optim.freeze = "runs/converted", ("image/.*",), ("image/.*",)
        case _:
            raise ValueError(f"configs/scenes.py:{argument}: choose resnet, cbow, siglip, flip, coca or lit")
    return config
