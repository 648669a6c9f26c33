"""A small model on the embedded dataset `scenes`, from nothing to zero-shot in a few minutes on two CPU cores.

    clipjax data scenes --tfds_dir=data
    clipjax data tokenizer --source=tfds:scenes/train --tfds_dir=data --vocab_size=304 --output=data/scenes.model
    clipjax train --config=configs/quickstart.py --workdir=runs/quickstart

`make quickstart` does all of it.
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


def get_config() -> Config:
    """A run of 140,800 examples."""
    return Config(
        total_examples=140_800,
        warmup_examples=6_400,
        global_batch_size=64,
        model=ModelConfig(
            embed_dim=128,
            image=ViTConfig(image_size=32, patch_size=8, width=128, depth=3, num_heads=4),
            text=TextTransformerConfig(context_length=24, vocab_size=304, width=128, depth=1, num_heads=4),
            compute_dtype=Dtype.FLOAT32,
            matmul_dtype=Dtype.BFLOAT16,
            scan_layers=False,
        ),
        optim=OptimConfig(learning_rate=8e-4, weight_decay=0.1, max_grad_norm=1.0),
        data=DataConfig(
            train="tfds:scenes/train",
            tfds_dir="data",
            tokenizer="sentencepiece:data/scenes.model",
            crop=Crop.CENTER,
        ),
        eval=EvalConfig(
            tasks={
                "scenes/val": TaskConfig(source="tfds:scenes/val", classes="scenes", templates="scenes"),
                "scenes/unseen": TaskConfig(source="tfds:scenes/unseen", classes="scenes", templates="scenes"),
                "scenes/val_retrieval": TaskConfig(kind=TaskKind.RETRIEVAL, source="tfds:scenes/val"),
            }
        ),
        checkpoint=CheckpointConfig(every_examples=32_000),
        log=LogConfig(every_examples=3_200),
    )
