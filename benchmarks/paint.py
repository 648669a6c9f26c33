"""Paint a picture for a prompt: follow the gradient of `Model.score` on pixels, through random crops and changes.

    python -m benchmarks.paint "one red circle" --checkpoint=runs/quickstart --output=painting.png

No generator takes part: the pixels themselves are learned, as a sum of pictures from coarse to fine, which finds shapes
before it finds specks. Reading order: `paint`, `compose`.
"""

import functools
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from PIL import Image

import clipjax
from clipjax.cli import arguments
from clipjax.cli.errors import refusals
from clipjax.inference import Model
from clipjax.models.augmentations import add_noise, jitter_colours, random_crops, random_flips
from clipjax.runtime.storage import require_writable

PROGRAM = "python -m benchmarks.paint"
COARSEST = 4  # pixels of a side
SCALE = 2  # of the painting's side to the model's
SMOOTHNESS = 0.1  # weight of the differences between neighbours
TOLD = 10  # lines of progress

Pyramid = list[Float[Array, "1 s s 3"]]


def blank(size: int) -> Pyramid:
    """Return a grey painting: levels whose sides double up to the whole."""
    sides = [size]
    while sides[-1] > COARSEST:
        sides.append(max(COARSEST, sides[-1] // 2))
    return [jnp.zeros((1, side, side, 3)) for side in reversed(sides)]


def compose(levels: Pyramid) -> Float[Array, "1 s s 3"]:
    """Return the painting, RGB from 0 to 1: the sigmoid of the sum of its levels."""
    shape = levels[-1].shape
    return jax.nn.sigmoid(sum(jax.image.resize(level, shape, "bilinear") for level in levels))


def roughness(pixels: Float[Array, "1 s s 3"]) -> Float[Array, ""]:
    """Return the mean absolute difference between neighbours."""
    down, across = (jnp.abs(jnp.diff(pixels, axis=axis)).mean() for axis in (1, 2))
    return down + across


def paint(
    model: Model,
    prompt: str,
    *,
    steps: int = 300,
    crops: int = 16,
    learning_rate: float = 0.05,
    seed: int = 0,
    tell: Callable[[int, float], None] = lambda step, similarity: None,
) -> np.ndarray:
    """Return a picture uint8 `[s, s, 3]` of which the model says that it shows the prompt; s is twice the model's size.

    Args:
        model: that is asked.
        prompt: what to paint.
        steps: of Adam.
        crops: of the painting in each step.
        learning_rate: of Adam.
        seed: of the crops and changes; the painting begins grey.
        tell: gets the step and the mean similarity of its crops.

    Raises:
        ValueError: what `Model.score` refuses.
    """
    size, key = model.config.model.image.image_size, jax.random.key(seed)

    def loss(levels: Pyramid, key: Array) -> tuple[Array, Array]:
        keys, pixels = jax.random.split(key, 4), compose(levels)
        views = random_flips(keys[1], random_crops(keys[0], pixels, crops, size))
        similarity = model.score(add_noise(keys[3], jitter_colours(keys[2], views)), prompt).mean()
        return SMOOTHNESS * roughness(pixels) - similarity, similarity

    tx = optax.adam(learning_rate)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(levels: Pyramid, state: optax.OptState, step: Array) -> tuple[Pyramid, optax.OptState, Array]:
        (_, similarity), gradient = jax.value_and_grad(loss, has_aux=True)(levels, jax.random.fold_in(key, step))
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(levels, updates), state, similarity  # type: ignore[return-value]

    levels = blank(SCALE * size)
    state = tx.init(levels)
    for step in range(steps):
        levels, state, similarity = update(levels, state, jnp.asarray(step))
        if (step + 1) % max(1, steps // TOLD) == 0 or step + 1 == steps:
            tell(step + 1, float(similarity))
    return np.asarray(jnp.round(compose(levels)[0] * 255)).astype(np.uint8)


def main(argv: Sequence[str] | None = None) -> int:
    """Paint, and write the picture; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    if arguments.wants_help(argv):
        print(parser.format_help())
        return 0
    with refusals(PROGRAM):
        words, rest = arguments.split_words(argv)
        options = parser.read(rest).options
        if len(words) != 1 or not words[0].strip():
            raise ValueError(f"{len(words)} prompts are given; give one, in quotes: {' '.join(words)!r}")
        if not str(options.output).lower().endswith(".png"):
            raise ValueError(f"--output={options.output} must end in .png: it is written as one")
        require_writable(options.output, "--output", makes_folder=True)
        model = clipjax.load(options.checkpoint)
        size = model.config.model.image.image_size
        blank_pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        jax.eval_shape(lambda pixels: model.score(pixels, words[0]), blank_pixels)  # refuses before the work
    tell = lambda step, similarity: print(f"step {step}/{options.steps}  similarity {similarity:.3f}", flush=True)  # noqa: E731
    picture = paint(model, words[0], steps=options.steps, crops=options.crops, seed=options.seed, tell=tell)
    Image.fromarray(picture).save(options.output)
    before, after = model.encode_image([np.full_like(picture, 128), picture]) @ model.encode_text(words[0])[0]
    print(f"{options.output}: similarity {after:.3f}, of a grey picture {before:.3f}")
    return 0


def _parser() -> arguments.Parser:
    parser = arguments.Parser(PROGRAM, __doc__ or "")
    parser.usage = f'{PROGRAM} "prompt" --checkpoint=WORKDIR_OR_STEP --output=FILE.png [options]'
    for name, kind, about in (
        ("checkpoint", arguments.place, "a workdir, or one step"),
        ("output", arguments.path, "a PNG"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=about, missing=f" is missing: {about}")
    for name, least, default in (("steps", 1, 300), ("crops", 1, 16), ("seed", 0, 0)):
        parser.add_argument(
            f"--{name}", metavar="N", type=arguments.whole_number(least), default=default, help=f"{default}"
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
