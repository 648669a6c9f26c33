"""The paper's comparison of objectives (arXiv 2103.00020, figure 2) on `scenes`: which learns from fewer examples?

    clipjax train --config=configs/baselines.py:contrastive --workdir=runs/baselines/contrastive

The argument: `contrastive` (bag of words against image, the paper's CLIP of that figure), `bag_of_words` (predict which
words the caption has), `caption` (a transformer language model predicts the caption's exact words). The image tower,
the data and the number of examples are the same; zero-shot is measured along the way. `make quickstart` makes the data
and the tokenizer; `python -m benchmarks.baselines` trains all three and draws the plot.
"""

import pathlib
import runpy

from clipjax.config import BagOfWordsConfig, CbowConfig, Config, DecoderConfig, TextTransformerConfig

QUICKSTART = pathlib.Path(__file__).with_name("quickstart.py")


def get_config(argument: str = "contrastive") -> Config:
    """The quickstart's image tower under one of three objectives."""
    config: Config = runpy.run_path(str(QUICKSTART))["get_config"]()
    model, loss = config.model, config.loss
    words = CbowConfig(context_length=24, vocab_size=304, width=128)
    match argument:
        case "contrastive":
            model.text = words
        case "bag_of_words":
            model.text, model.caption = words, BagOfWordsConfig()
            loss.contrastive_weight, loss.caption_weight = 0.0, 1.0
        case "caption":
            assert isinstance(model.text, TextTransformerConfig)
            model.caption = DecoderConfig(depth=1, num_heads=4)
            loss.contrastive_weight, loss.caption_weight = 0.0, 1.0
        case _:
            raise ValueError(f"configs/baselines.py:{argument}: choose contrastive, bag_of_words or caption")
    config.eval.tasks = {name: task for name, task in config.eval.tasks.items() if task.classes}
    for task in config.eval.tasks.values():
        task.templates = "plain"  # a language model weighs every prompt against every image
    config.eval.every_examples = 17_600
    return config
