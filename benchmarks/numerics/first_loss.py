"""The first loss that a run logged, against float64 NumPy on the same batch and weights.

    clipjax train --config=configs/clip.py:tiny,batch=32768 --workdir=runs/tiny
    python -m benchmarks.numerics.first_loss --config=configs/clip.py:tiny,batch=32768 --workdir=runs/tiny

The run must have logged its first step. The model computes the embeddings, 1,024 pairs at a time; all after that is
NumPy in float64, a block of rows at a time.
"""

import json
import sys

import jax
import numpy as np

from clipjax.cli import arguments
from clipjax.data.tokenizers.protocol import TextToTokens
from clipjax.data.training_stream import TrainStream
from clipjax.models.clip import abstract_params, build_clip
from clipjax.training import optimizer
from clipjax.training.inputs import open_inputs
from clipjax.training.step import make_init_state

ROWS = 1024


def softmax_loss(image: np.ndarray, text: np.ndarray, scale: float) -> float:
    """By rows of blocks, in float64: a row's sum is complete at once, the columns' sums grow."""
    image, text, n = image.astype(np.float64), text.astype(np.float64), len(image)
    rows, columns = np.empty(n), np.full(n, -np.inf)
    for start in range(0, n, ROWS):
        logits = scale * image[start : start + ROWS] @ text.T
        peak = logits.max(1)
        rows[start : start + ROWS] = peak + np.log(np.exp(logits - peak[:, None]).sum(1))
        peak = logits.max(0)
        columns = np.logaddexp(columns, peak + np.log(np.exp(logits - peak).sum(0)))
    return float((rows + columns - 2 * scale * np.einsum("ne,ne->n", image, text)).mean() / 2)


def main() -> None:
    parser = arguments.Parser("first_loss", "The first loss of a run against float64 NumPy.", config="file")
    parser.add_argument("--workdir", type=arguments.path, help="of the run", missing="=DIR is missing")
    parsed = parser.read(sys.argv[1:])
    config = parsed.config()
    inputs = open_inputs(config)
    clip, tokenize = (
        build_clip(config.model, data=config.data),
        TextToTokens(inputs.tokenizer, config.model.text.context_length),
    )
    tx = optimizer.make_tx(config, abstract_params(config.model))
    params = jax.jit(make_init_state(config, clip.init, tx, num_samples=1))(jax.random.key(config.seed)).params
    stream = TrainStream(inputs.source, tokenize=tokenize, config=config)
    batch = next(stream)
    stream.close()
    encode = jax.jit(clip.encode_batch)
    parts = [
        encode(params, {}, {name: batch[name][start : start + ROWS] for name in ("image", "tokens")}, jax.random.key(0))
        for start in range(0, config.global_batch_size, ROWS)
    ]
    image, text = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in (0, 1))
    expected = softmax_loss(image, text, float(parts[0][2]))
    log = parsed.options.workdir / "metrics.jsonl"
    first = json.loads(log.read_text().splitlines()[0])
    error = abs(first["loss"] - expected) / expected
    print(f"step {first['step']}: logged {first['loss']:.9f}, float64 {expected:.9f}, relative difference {error:.1e}")


if __name__ == "__main__":
    main()
