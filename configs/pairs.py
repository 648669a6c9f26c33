"""A starting point for your own WebDataset shards: a small CLIP, without evaluation tasks.

    clipjax data tokenizer --source='shards/{00000..00099}.tar' --vocab_size=8192 --output=data/pairs.model
    clipjax train --config='configs/pairs.py:shards/{00000..00099}.tar' --workdir=runs/pairs

The argument is a path, glob or brace pattern of tars. For one accelerator; raise `global_batch_size` on more.
"""

from clipjax.config import Config, DataConfig, ModelConfig, OptimConfig, TextTransformerConfig, ViTConfig


def get_config(shards: str = "data/pairs/*.tar") -> Config:
    """A run on the tars that `shards` names."""
    return Config(
        total_examples=10_000_000,
        warmup_examples=500_000,
        global_batch_size=1024,
        model=ModelConfig(
            embed_dim=384,
            image=ViTConfig(image_size=224, patch_size=16, width=384, depth=12, num_heads=6),
            text=TextTransformerConfig(context_length=77, vocab_size=8192, width=384, depth=12, num_heads=6),
        ),
        optim=OptimConfig(learning_rate=1e-3, max_grad_norm=1.0),
        data=DataConfig(train=shards, tokenizer="sentencepiece:data/pairs.model", num_workers=4),
    )
