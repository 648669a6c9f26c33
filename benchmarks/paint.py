"""Paint a picture for a prompt: follow the gradient of `Model.score` through random crops and changes.

    python -m benchmarks.paint "a pink heart" --checkpoint=runs/quickstart --output=painting.png [--generator=pixels]

A generator makes the picture of parameters, which are learned. `figure` draws one figure of one colour on a ground: a
closed curve in polar coordinates, whose radius is a short Fourier series, with or without a hole. `pixels` are the
pixels themselves, as a sum of pictures from coarse to fine. Small models like many pictures that show nothing: the
fewer a generator can make, the more what it paints looks like the prompt. Reading order: `paint`, `Figure`, `Pixels`.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key
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

HARMONICS = 6  # of a figure's outline
EDGE = 0.02  # of a figure, as a share of the picture's side
Params = Any


@dataclass(frozen=True)
class Pixels:
    """A painting that is its pixels: the sigmoid of a sum of pictures from coarse to fine.

    Attributes:
        size: of its side.
    """

    size: int
    min_side = 0.5  # of a crop

    def start(self, key: Key, count: int) -> Params:
        """Return the parameters of grey paintings: levels `[count, s, s, 3]` whose sides double up to the whole."""
        sides = [self.size]
        while sides[-1] > COARSEST:
            sides.append(max(COARSEST, sides[-1] // 2))
        return [jnp.zeros((count, side, side, 3)) for side in reversed(sides)]

    def compose(self, params: Params) -> Float[Array, "k s s 3"]:
        """Return the paintings, RGB from 0 to 1."""
        shape = params[-1].shape
        return jax.nn.sigmoid(sum(jax.image.resize(level, shape, "bilinear") for level in params))

    def penalty(self, params: Params) -> Float[Array, ""]:
        """Return how rough the paintings are: specks say little to people."""
        return SMOOTHNESS * len(params[0]) * roughness(self.compose(params))


@dataclass(frozen=True)
class Figure:
    """A figure of one colour on a ground of another.

    Attributes:
        size: of the painting's side.
    """

    size: int
    min_side = 0.8  # of a crop: a part of a figure is another figure

    def start(self, key: Key, count: int) -> Params:
        """Return the parameters of grey paintings with a faint figure each, which differ."""
        keys = jax.random.split(key, 3)
        return {
            "ground": 0.1 * jax.random.normal(keys[0], (count, 3)),
            "colour": jax.random.normal(keys[1], (count, 3)),
            "centre": jnp.zeros((count, 2)),
            "log_radius": jnp.full((count,), -1.4),  # a quarter of the side
            "waves": 0.05 * jax.random.normal(keys[2], (count, 2, HARMONICS)),
            "hole": jnp.full((count,), -2.0),
        }

    def compose(self, params: Params) -> Float[Array, "k s s 3"]:
        """Return the paintings, RGB from 0 to 1."""
        axis = (jnp.arange(self.size) + 0.5) / self.size - 0.5
        y = axis[None, :, None] - params["centre"][:, None, None, 0]
        x = axis[None, None, :] - params["centre"][:, None, None, 1]
        distance, angle = jnp.sqrt(x**2 + y**2 + 1e-6), jnp.arctan2(y, x + 1e-6)
        turns = angle[..., None] * jnp.arange(1, HARMONICS + 1)[None, None, None]
        wave = jnp.einsum("kyxh,kh->kyx", jnp.cos(turns), params["waves"][:, 0])
        wave += jnp.einsum("kyxh,kh->kyx", jnp.sin(turns), params["waves"][:, 1])
        radius = jnp.exp(params["log_radius"])[:, None, None] * (1 + wave)
        inner = radius * jax.nn.sigmoid(params["hole"])[:, None, None]
        inside = jax.nn.sigmoid((radius - distance) / EDGE) * jax.nn.sigmoid((distance - inner) / EDGE)
        ground, colour = (jax.nn.sigmoid(3 * params[name])[:, None, None] for name in ("ground", "colour"))
        return ground + inside[..., None] * (colour - ground)

    def penalty(self, params: Params) -> Float[Array, ""]:
        """Return how far figures are from the middle, and how wavy: parts of a figure may be liked as much as one."""
        bends = jnp.square(jnp.arange(1, HARMONICS + 1)[None, None] * params["waves"]).sum()
        return 4 * jnp.square(params["centre"]).sum() + 0.02 * bends + jnp.square(params["log_radius"] + 1.3).sum() / 4


GENERATORS = {"figure": Figure, "pixels": Pixels}


def roughness(pixels: Float[Array, "k s s 3"]) -> Float[Array, ""]:
    """Return the mean absolute difference between neighbours."""
    down, across = (jnp.abs(jnp.diff(pixels, axis=axis)).mean() for axis in (1, 2))
    return down + across


def paint(
    model: Model,
    prompt: str,
    *,
    generator: str = "figure",
    steps: int = 300,
    crops: int = 8,
    starts: int = 4,
    learning_rate: float = 0.05,
    seed: int = 0,
    tell: Callable[[int, float], None] = lambda step, similarity: None,
) -> np.ndarray:
    """Return a picture uint8 `[s, s, 3]` of which the model says that it shows the prompt; s is twice the model's size.

    Args:
        model: that is asked.
        prompt: what to paint.
        generator: a name in `GENERATORS`.
        steps: of Adam.
        crops: of each painting in each step.
        starts: paintings that are begun; the one that the model likes best is returned.
        learning_rate: of Adam.
        seed: of the starts, the crops and the changes.
        tell: gets the step and the mean similarity of the best painting's crops.

    Raises:
        ValueError: what `Model.score` refuses.
    """
    size, key = model.config.model.image.image_size, jax.random.key(seed)
    canvas = GENERATORS[generator](SCALE * size)

    def loss(params: Params, key: Array) -> tuple[Array, Array]:
        keys, pixels = jax.random.split(key, 4), canvas.compose(params)
        views = random_crops(keys[0], pixels, crops, size, min_side=canvas.min_side)
        views = add_noise(keys[3], jitter_colours(keys[2], random_flips(keys[1], views)))
        similarity = model.score(views, prompt).reshape(crops, starts).mean(axis=0)
        return canvas.penalty(params) - similarity.sum(), similarity

    tx = optax.adam(learning_rate)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Params, state: optax.OptState, step: Array) -> tuple[Params, optax.OptState, Array]:
        (_, similarity), gradient = jax.value_and_grad(loss, has_aux=True)(params, jax.random.fold_in(key, step))
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(params, updates), state, similarity

    params = canvas.start(jax.random.fold_in(key, steps), starts)
    state = tx.init(params)
    for step in range(steps):
        params, state, similarity = update(params, state, jnp.asarray(step))
        if (step + 1) % max(1, steps // TOLD) == 0 or step + 1 == steps:
            tell(step + 1, float(similarity.max()))
    pictures = np.asarray(jnp.round(canvas.compose(params) * 255)).astype(np.uint8)
    liked = model.encode_image(list(pictures)) @ model.encode_text(prompt)[0]
    return pictures[liked.argmax()]


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
    picture = paint(
        model,
        words[0],
        generator=options.generator,
        steps=options.steps,
        crops=options.crops,
        starts=options.starts,
        seed=options.seed,
        tell=tell,
    )
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
    choice = arguments.choice(GENERATORS)
    parser.add_argument(
        "--generator", metavar="NAME", type=choice, default="figure", help="figure (default), or pixels"
    )
    for name, least, default in (("steps", 1, 300), ("crops", 1, 8), ("starts", 1, 4), ("seed", 0, 0)):
        parser.add_argument(
            f"--{name}", metavar="N", type=arguments.whole_number(least), default=default, help=f"{default}"
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
