"""Predicting captions: CoCa's decoder and the paper's bag of words, against float64 NumPy and by what they may see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.config import (
    BagOfWordsConfig,
    CbowConfig,
    Config,
    DataConfig,
    DecoderConfig,
    Dtype,
    ImagePool,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    ResNetConfig,
    TextPool,
    TextTransformerConfig,
    ViTConfig,
)
from clipjax.config.validation import validate
from clipjax.losses import LossInputs, build_loss
from clipjax.models.captions import bag_of, caption_likelihood, words_likelihood
from clipjax.models.clip import abstract_params, build_clip
from clipjax.models.towers import PARAMETER_RULES
from clipjax.pytrees import to_flat
from clipjax.runtime.sharding import batch_sharding, make_mesh, state_shardings
from clipjax.training import optimizer
from clipjax.training.gradients import CachedGradients, DirectGradients, Microbatches

END, START = 63, 62
VIT = {"image_size": 16, "patch_size": 8, "width": 32, "depth": 1, "num_heads": 4}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "depth": 1, "num_heads": 4}


def config_of(name: str) -> Config:
    image, text = ViTConfig(**VIT), TextTransformerConfig(**TEXT)
    decoder = DecoderConfig(depth=2, num_heads=4)
    model = ModelConfig(embed_dim=32, image=image, text=text, caption=decoder, compute_dtype=Dtype.FLOAT32)
    loss = LossConfig(caption_weight=2.0)
    match name:
        case "coca":
            image.pool, image.num_queries, image.query_heads = ImagePool.QUERIES, 3, 4
            text.pool = TextPool.CLASS
        case "caption":
            loss = LossConfig(contrastive_weight=0.0, caption_weight=1.0)
        case "caption of a resnet":
            model.image = ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8, num_heads=4)
        case "bag of words":
            model.text, model.caption = CbowConfig(context_length=8, vocab_size=64, width=16), BagOfWordsConfig()
            loss = LossConfig(contrastive_weight=0.0, caption_weight=1.0)
    return Config(global_batch_size=8, model=model, loss=loss, data=DataConfig(train="x"), optim=OptimConfig())


NAMES = (
    "coca",
    "bag of words",
    pytest.param("caption", marks=pytest.mark.slow),
    pytest.param("caption of a resnet", marks=pytest.mark.slow),
)


def tokens() -> jax.Array:
    rows = np.zeros((8, 8), np.int32)
    for i, row in enumerate(rows):
        row[0], row[1 : 2 + i % 5], row[2 + i % 5] = START, np.arange(1 + i % 5) * 7 % 50 + 1, END
    return jnp.asarray(rows)


def batch(config: Config) -> dict:
    size = config.model.image.image_size
    image = np.random.default_rng(0).integers(0, 256, (8, size, size, 3), np.uint8)
    return {"image": jnp.asarray(image), "tokens": tokens()}


def test_caption_likelihood_is_the_sum_over_its_tokens():
    logits = np.random.default_rng(0).normal(size=(8, 7, 64)).astype(np.float32) * 5
    nll, count = caption_likelihood(jnp.asarray(logits), tokens())
    wide = logits.astype(np.float64)
    log_p = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    for i, row in enumerate(np.asarray(tokens())):
        end = list(row).index(END)
        assert count[i] == end
        assert nll[i] == pytest.approx(-sum(log_p[i, place, row[place + 1]] for place in range(end)), rel=1e-5)


def test_a_bag_is_the_set_of_a_captions_tokens():
    rows = jnp.asarray([[START, 5, 5, 9, END, 0, 0, 0], [START, END, 0, 0, 0, 0, 0, 0]], jnp.int32)
    bag = np.asarray(bag_of(rows, 64))
    assert np.flatnonzero(bag[0]).tolist() == [5, 9] and bag[0].sum() == 1
    assert bag[1].sum() == 0  # an empty caption asks for nothing
    logits = np.random.default_rng(1).normal(size=(2, 64)).astype(np.float32)
    nll, count = words_likelihood(jnp.asarray(logits), rows)
    log_p = logits[0] - np.log(np.exp(logits[0].astype(np.float64)).sum())
    np.testing.assert_allclose(nll, [-(log_p[5] + log_p[9]) / 2, 0], rtol=1e-5)
    np.testing.assert_array_equal(count, [1, 1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.heavy
def test_the_loss_on_a_mesh_and_in_microbatches_is_the_loss_of_one_device(name: str):
    config = config_of(name)
    validate(config)
    clip, data = build_clip(config.model, data=config.data), batch(config)
    params, batch_stats = jax.jit(clip.init)(jax.random.key(0)), clip.init_batch_stats()
    key = jax.random.key(1)

    def run(mesh, size):
        loss = build_loss(config.loss, mesh)
        grads_fn = CachedGradients(clip, loss, Microbatches(size, 4)) if size else DirectGradients(clip, loss)
        with jax.set_mesh(mesh):
            rows = {name: jax.device_put(data[name], batch_sharding(mesh)) for name in ("image", "tokens")}
            placed = jax.device_put(params, state_shardings(mesh, abstract_params(config.model), PARAMETER_RULES))
            return jax.jit(lambda p, s, b: grads_fn(p, s, b, LossInputs(), key))(placed, batch_stats, rows)

    expected, aux = run(make_mesh(MeshConfig(), jax.devices()[:1]), None)
    parts = [aux.metrics.get("contrastive_loss", 0), config.loss.caption_weight * aux.metrics["caption_loss"]]
    assert float(aux.loss) == pytest.approx(float(sum(parts)), rel=1e-6)
    size = None if aux.batch_stats else 4
    found, other = run(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), size)
    assert float(other.loss) == pytest.approx(float(aux.loss), rel=1e-5)
    for path, grad in to_flat(expected).items():
        ours, norm = np.asarray(to_flat(found)[path]), np.linalg.norm(grad)
        assert np.linalg.norm(ours - np.asarray(grad)) <= 1e-4 * norm + 1e-6, path  # sums in another order
    flat = to_flat(expected)
    assert np.abs(np.asarray(flat["caption/proj/kernel"])).max() > 0
    labels = optimizer.decay_mask(params)
    assert to_flat(labels)["caption/proj/kernel"]


@pytest.mark.heavy
def test_a_decoder_sees_what_came_before_and_the_image():
    config = config_of("coca")
    clip = build_clip(config.model)
    params = jax.jit(clip.init)(jax.random.key(0))
    pixels = jax.random.normal(jax.random.key(2), (1, 16, 16, 3))
    row = jnp.asarray([[START, 5, 6, 7, 8, 9, 10, END]], jnp.int32)

    def predict(params, pixels, row):
        return clip.next_logits(params, clip.encode_image_tokens(params, pixels), row)

    next_logits = jax.jit(predict)
    before = next_logits(params, pixels, row)
    assert before.shape == (1, 8, 64)
    after = next_logits(params, pixels, row.at[0, 4].set(20))
    np.testing.assert_allclose(before[:, :4], after[:, :4], atol=1e-5)
    assert np.abs(before[:, 4:] - after[:, 4:]).max(-1).min() > 1e-4
    assert np.abs(before - next_logits(params, pixels + 1, row)).max(-1).min() > 1e-4


@pytest.mark.parametrize("name", ["caption", "bag of words"])
@pytest.mark.heavy
def test_likelihood_of_every_text_for_every_image(name: str):
    config = config_of(name)
    clip = build_clip(config.model)
    params = jax.jit(clip.init)(jax.random.key(0))
    pixels = jax.random.normal(jax.random.key(2), (3, 16, 16, 3))
    table = jax.jit(clip.likelihood)(params, pixels, tokens()[:4])
    assert table.shape == (3, 4)
    for i in range(3):
        encoded = clip.train(params, {}, jnp.tile(pixels[i : i + 1], (4, 1, 1, 1)), tokens()[:4], jax.random.key(0))
        np.testing.assert_allclose(table[i], -encoded.nll, rtol=1e-4)
    max_length = int(np.argmax(tokens()[:4], axis=1).max()) + 1
    assert max_length < tokens().shape[1]
    short = jax.jit(clip.likelihood, static_argnums=3)(params, pixels, tokens()[:4], max_length)
    np.testing.assert_allclose(short, table, rtol=1e-5)  # the same sums without the padding


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.loss, "caption_weight", 0.0), "model.caption needs a weight"),
        (lambda c: setattr(c.model, "caption", None), "needs model.caption, a DecoderConfig or BagOfWordsConfig"),
        (lambda c: setattr(c.model.text, "causal", False), "a decoder reads a text transformer with"),
        (lambda c: setattr(c.model.caption, "num_heads", 5), "model.caption.num_heads=5 must divide"),
        (lambda c: setattr(c.loss, "contrastive_weight", -1.0), "loss.contrastive_weight=-1.0 must be at least 0"),
        (lambda c: setattr(c.model.image, "query_heads", 5), "model.image.query_heads=5 must be at"),
    ],
)
def test_what_does_not_fit_is_refused(change, message: str):
    config = config_of("coca")
    change(config)
    with pytest.raises(ValueError, match=message):
        validate(config)
    config = config_of("caption")
    config.loss.label_smoothing = 0.1
    with pytest.raises(ValueError, match="loss.label_smoothing would be ignored with loss.contrastive_weight=0"):
        validate(config)
