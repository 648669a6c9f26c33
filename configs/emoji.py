"""Captioned emoji in two drawing styles (5,710 training pairs as WebDataset tars), a small CLIP with CLIP's own BPE.

    clipjax train --config=configs/emoji.py --workdir=runs/emoji

The argument is the folder that holds `data/emoji/*.tar` and `data/tokenizers/bpe_simple_vocab_16e6.txt.gz`; without
one it is `../shared`. The concepts of the val shards occur in no training shard.
"""

from clipjax.config import (
    CheckpointConfig,
    Config,
    Crop,
    DataConfig,
    Dtype,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    TaskConfig,
    TaskKind,
    TextTransformerConfig,
    ViTConfig,
)


def get_config(root: str = "../shared") -> Config:
    """A run of 102,400 examples on the tars below `root`."""
    tars = f"{root}/data/emoji/emoji"
    noto, blob = f"{tars}-noto-val-*.tar", f"{tars}-blob-val-*.tar"
    return Config(
        total_examples=102_400,
        warmup_examples=10_240,
        global_batch_size=128,
        model=ModelConfig(
            embed_dim=128,
            image=ViTConfig(image_size=64, patch_size=8, width=128, depth=6, num_heads=4),
            text=TextTransformerConfig(context_length=32, width=128, depth=6, num_heads=4),
            compute_dtype=Dtype.FLOAT32,
            matmul_dtype=Dtype.BFLOAT16,
            scan_layers=False,
        ),
        optim=OptimConfig(learning_rate=1e-3, max_grad_norm=1.0),
        data=DataConfig(
            train=f"{tars}-{{noto,blob}}-train-*.tar",
            tokenizer=f"clip:{root}/data/tokenizers/bpe_simple_vocab_16e6.txt.gz",
            crop=Crop.RANDOM_RESIZED,
        ),
        eval=EvalConfig(
            every_examples=25_600,
            tasks={
                "emoji/val": TaskConfig(kind=TaskKind.RETRIEVAL, source=f"{tars}-*-val-*.tar"),
                "emoji/noto": TaskConfig(kind=TaskKind.RETRIEVAL, source=noto),
                "emoji/blob": TaskConfig(kind=TaskKind.RETRIEVAL, source=blob),
                "emoji/styles": TaskConfig(kind=TaskKind.IMAGE_RETRIEVAL, source=noto, gallery=blob),
            },
        ),
        checkpoint=CheckpointConfig(every_examples=12_800),
        log=LogConfig(every_examples=1_280),
    )
