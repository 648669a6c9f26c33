"""big_vision's half of `benchmarks/parity/run.py`; knows nothing of clipjax, needs JAX, Flax and a checkout of theirs.

big_vision_peer.py CHECKOUT PRESET FILE    a full-size SigLIP with random weights as .npz; inputs, outputs in peer.npz
"""

import pathlib
import sys
import types

import numpy as np

MODELS = {  # preset: variant of the image and the text tower, vocabulary, places, pixels, whether layers are stacked
    "SigLIP-B/16@224px": ("B/16", "B", 32_000, 64, 224, False),
    "SigLIP2-B/32@256px": ("B/32", "B", 256_000, 64, 256, True),
    "SigLIP-So400m/14@224px": ("So400m/14", "So400m", 32_000, 16, 224, False),
}
WIDTHS = {"B": 768, "So400m": 1152}
PAIRS = 4


def two_towers(checkout: pathlib.Path):
    """Their module. TensorFlow, of which it would take a way to open remote files, is stood in for meanwhile."""
    import flax.jax_utils
    import flax.training.checkpoints  # noqa: F401  # what would look for TensorFlow while it is stood in for

    sys.path.insert(0, str(checkout))
    absent = {name: types.ModuleType(name) for name in ("tensorflow", "tensorflow.io", "tensorflow.io.gfile")}
    sys.modules.update(absent)
    absent["tensorflow"].io, absent["tensorflow.io"].gfile = absent["tensorflow.io"], absent["tensorflow.io.gfile"]
    try:
        from big_vision.models import vit  # noqa: F401
        from big_vision.models.proj.image_text import text_transformer, two_towers  # noqa: F401
    finally:
        for name in absent:
            del sys.modules[name]
    return two_towers


def make(checkout: pathlib.Path, preset: str, file: pathlib.Path) -> None:
    import jax
    from flax.traverse_util import flatten_dict

    variant, text_variant, vocab, places, pixels, scan = MODELS[preset]
    model = two_towers(checkout).Model(
        image={"variant": variant, "pool_type": "map", "scan": scan},
        text={"variant": text_variant, "vocab_size": vocab, "scan": scan},
        out_dim=(None, WIDTHS[text_variant]),
        temperature_init=10.0,
        bias_init=-10.0,
    )
    rng = np.random.default_rng(0)
    images = rng.normal(size=(PAIRS, pixels, pixels, 3)).astype(np.float32)
    tokens = rng.integers(0, vocab, (PAIRS, places)).astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(0), images, tokens)["params"]
    # Away from where they start, so that no weight is zero or one.
    params = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.02 * rng.normal(size=leaf.shape).astype(np.float32), params)
    image_embed, text_embed, _ = jax.jit(model.apply)({"params": params}, images, tokens)
    np.savez(file, **{f"params/{name}": leaf for name, leaf in flatten_dict(params, sep="/").items()})
    inputs = {"images": images.transpose(0, 3, 1, 2), "tokens": tokens}
    np.savez(file.with_name("peer.npz"), **inputs, image_embed=image_embed, text_embed=text_embed)


if __name__ == "__main__":
    make(pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]))
