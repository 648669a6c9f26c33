"""CLIP as the paper trained it: 32 epochs of 400 million pairs at batch 32,768 (arXiv 2103.00020, tables 18 to 20).

    clipjax train --config=configs/clip.py:vit_b32 --workdir=runs/vit_b32 \
        --config.data.train='/data/pairs/{00000..41455}.tar'

The argument is `vit_b32`, `vit_b16`, `vit_l14` or `vit_l14_336`, the paper's extra epoch at 336 pixels; `vit_h14` or
`so400m`, two larger models of later papers (arXiv 2212.07143, 2303.15343) with nothing tuned for them here; or `tiny`,
a model for trying the batch itself. `,batch=N` after it sets another global batch. `so400m` reads SigLIP's tokenizer,
`data/siglip.model` (32,000 pieces), the others CLIP's, `data/bpe_simple_vocab_16e6.txt.gz`.
Made for 256 accelerators of 16 GB (128 pairs each), by `clipjax plan`; not run at that size by us. With a smaller batch
more is kept for the backward pass, with a larger one less (`FITS`).
"""

from clipjax.config import (
    CheckpointConfig,
    Config,
    Crop,
    DataConfig,
    Dtype,
    LogConfig,
    LossKind,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    Remat,
    TextTransformerConfig,
    ViTConfig,
    presets,
)

NAMES = ("vit_b32", "vit_b16", "vit_l14", "vit_l14_336", "vit_h14", "so400m", "tiny")
BATCH = 32_768
EPOCH = 400_000_000  # pairs in the paper's WebImageText

FITS = {
    "vit_b32": {Remat.DOTS: 65_536},
    "vit_b16": {Remat.DOTS: 65_536},
    "vit_l14": {Remat.DOTS: 16_384, Remat.MLP: 32_768},
    "vit_l14_336": {Remat.MLP: 16_384},
    "vit_h14": {Remat.MLP: 16_384},
    "so400m": {Remat.DOTS: 16_384, Remat.MLP: 32_768},
}
"""The largest batch that 256 accelerators of 16 GB hold with a policy of rematerialisation: of 16,384, 32,768 and
65,536, the last planned as 32,768 on half as many (docs/planning.md, the table)."""


def get_config(argument: str = "vit_b32") -> Config:
    """The run of one architecture, with the paper's hyper-parameters for it."""
    architecture, *options = argument.split(",")
    match architecture:
        case "vit_b32":
            config = _run(presets.model("ViT-B/32"), learning_rate=5e-4)
        case "vit_b16":
            config = _run(presets.model("ViT-B/16"), learning_rate=5e-4)
        case "vit_l14":
            config = _run(presets.model("ViT-L/14"), learning_rate=4e-4, fsdp=16)
        case "vit_l14_336":
            config = _run(presets.model("ViT-L/14@336px"), learning_rate=2e-5, fsdp=16)
            config.total_examples = EPOCH
        case "vit_h14":
            config = _run(presets.model("ViT-H/14"), learning_rate=5e-4, fsdp=16)
        case "so400m":
            config = _run(presets.model("SigLIP-So400m/14@224px"), learning_rate=1e-3, fsdp=16)
            config.loss.kind = LossKind.SIGMOID
            config.data.tokenizer = "siglip:data/siglip.model"  # big_vision's c4_en, cc_en.32000
        case "tiny":
            config = _tiny()
        case _:
            raise ValueError(f"configs/clip.py:{argument}: choose {', '.join(NAMES)}")
    for option in options:
        name, _, value = option.partition("=")
        if name != "batch" or not value.isdigit():
            raise ValueError(f"configs/clip.py:{argument}: {option!r} is not understood; options look like batch=32768")
        config.global_batch_size = int(value)
    config.model.remat = _remat(architecture, config.global_batch_size)
    return config


def _remat(architecture: str, batch: int) -> Remat:
    """Return the policy that recomputes least of those that fit."""
    if architecture not in FITS:
        return Remat.NONE
    return next((policy for policy, largest in FITS[architecture].items() if batch <= largest), Remat.FULL)


def _tiny() -> Config:
    """A few steps at the paper's batch on any machine, by GradCache: `clipjax data scenes --config=large` first."""
    config = _run(
        ModelConfig(
            embed_dim=64,
            image=ViTConfig(image_size=32, patch_size=16, width=64, depth=1, num_heads=2),
            text=TextTransformerConfig(context_length=48, vocab_size=260, width=64, depth=1, num_heads=2),
            compute_dtype=Dtype.FLOAT32,
            matmul_dtype=Dtype.BFLOAT16,
        ),
        learning_rate=5e-4,
    )
    config.total_examples, config.warmup_examples, config.microbatch_size = 4 * BATCH, 0, 1_024
    config.data = DataConfig(train="tfds:scenes/large/train", tfds_dir="data", tokenizer="bytes", crop=Crop.CENTER)
    config.checkpoint.every_examples = config.log.every_examples = BATCH
    return config


def _run(model: ModelConfig, *, learning_rate: float, fsdp: int = 1) -> Config:
    return Config(
        total_examples=32 * EPOCH,
        warmup_examples=2_000 * BATCH,
        global_batch_size=BATCH,
        model=model,
        optim=OptimConfig(learning_rate=learning_rate, weight_decay=0.2, beta1=0.9, beta2=0.98, epsilon=1e-6),
        mesh=MeshConfig(fsdp=fsdp),
        data=DataConfig(
            train="data/pairs/*.tar", tokenizer="clip:data/bpe_simple_vocab_16e6.txt.gz", num_workers=8, num_threads=4
        ),
        checkpoint=CheckpointConfig(every_examples=1_000 * BATCH),
        log=LogConfig(every_examples=10 * BATCH),
    )
