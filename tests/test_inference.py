"""`Model` beyond embeddings: captions by every way of writing, the score and its gradient, hidden states of texts."""

import copy
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from clipjax.config import CbowConfig, Config, DecoderConfig, Dtype, ModelConfig, TextTransformerConfig, ViTConfig
from clipjax.data.tokenizers.bytes import BytesTokenizer
from clipjax.data.tokenizers.protocol import tokenize
from clipjax.inference import Model, _with_ends
from clipjax.models.clip import build_clip

TOKENIZER = BytesTokenizer()

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def model() -> Model:
    text = TextTransformerConfig(context_length=8, vocab_size=TOKENIZER.vocab_size, width=16, depth=1, num_heads=2)
    image = ViTConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2)
    config = Config(
        model=ModelConfig(embed_dim=16, image=image, text=text, caption=DecoderConfig(depth=1, num_heads=2))
    )
    return Model(config, jax.jit(build_clip(config.model).init)(jax.random.key(0)), TOKENIZER)


@pytest.mark.heavy
def test_captions_are_texts_and_programs_are_kept(model: Model):
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), np.uint8)
    for method in ("greedy", "top_k", "beam"):
        first = model.caption(images, method=method)
        assert [type(text) for text in first] == [str] * 3
        assert model.caption(images, method=method) == first
    assert len(model._captioners) == 3
    one_beam = model.caption(images, method="beam", num_beams=1)
    assert one_beam == model.caption(images, method="greedy")
    assert model.caption(images[1], method="greedy") == one_beam[1:2]
    with pytest.raises(ValueError, match="method='best' must be greedy, top_k or beam"):
        model.caption(images, method="best")
    with pytest.raises(ValueError, match="num_beams=0 must be a whole number from 1 to"):
        model.caption(images, num_beams=0)
    with pytest.raises(ValueError, match="top_k=1000000 must be a whole number from 1 to"):
        model.caption(images, method="top_k", top_k=1_000_000)
    assert model.caption([]) == []


def test_pictures_without_pixels_and_wrong_texts_are_refused(model: Model):
    good = np.zeros((4, 4, 3), np.uint8)
    for empty in (np.zeros((0, 5, 3), np.uint8), np.zeros((5, 0, 3), np.uint8), Image.new("RGB", (0, 5))):
        for images in (empty, [empty], [good, empty]):
            with pytest.raises(ValueError, match=r"a picture has \d x \d pixels; leave out empty ones"):
                model.encode_image(images)
            with pytest.raises(ValueError, match=r"a picture has \d x \d pixels"):
                model.caption(images)
    for texts in ([5], ["a", None], [b"a"]):
        with pytest.raises(ValueError, match=r"texts\[\d\]=.* must be a string"):
            model.encode_text(texts)
    with pytest.raises(ValueError, match="names='red' must be a sequence of strings"):
        model.zero_shot_classifier("red", ["a {}"])
    with pytest.raises(ValueError, match="templates='a {}' must be a sequence of strings"):
        model.zero_shot_classifier(["red"], "a {}")
    with pytest.raises(ValueError, match="names is empty"):
        model.zero_shot_classifier([])
    with pytest.raises(ValueError, match="templates is empty"):
        model.zero_shot_classifier(["red"], [])


def test_no_pictures_and_no_texts_give_no_rows(model: Model):
    assert model.encode_image([]).shape == model.encode_text([]).shape == (0, 16)
    assert model.encode_image(np.zeros((0, 4, 4, 3), np.uint8)).shape == (0, 16)
    assert model.caption([]) == []


@pytest.mark.parametrize("images", ["p.png", b"abc", pathlib.Path("p.png"), ["p.png"]])
def test_a_path_is_no_picture(model: Model, images):
    with pytest.raises(ValueError, match="no picture; open a file with PIL.Image.open"):
        model.encode_image(images)


@pytest.mark.heavy
def test_the_score_is_the_cosine_of_the_embeddings_also_where_it_is_compiled(model: Model):
    images = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
    texts = ["a", "bc"]
    image, text = (rows.astype(np.float64) for rows in (model.encode_image(images), model.encode_text(texts)))
    pixels = jnp.asarray(images / 255, jnp.float32)
    score = model.score(pixels, texts)
    assert score.dtype == jnp.float32
    np.testing.assert_allclose(score, image @ text.T, atol=2e-5)
    np.testing.assert_allclose(jax.jit(lambda x: model.score(x, texts))(pixels), score, atol=1e-6)
    np.testing.assert_allclose(model.score(pixels, "a"), score[:, :1], atol=1e-6)
    assert model.score(pixels[:0], texts).shape == (0, 2)


@pytest.mark.heavy
def test_the_gradient_of_the_score_is_that_of_finite_differences(model: Model):
    config = copy.deepcopy(model.config)
    config.model.compute_dtype = Dtype.FLOAT32  # bfloat16 rounds away the differences of small steps
    precise, rng, step = Model(config, model.params, TOKENIZER), np.random.default_rng(2), 0.05
    pixels = rng.uniform(0.2, 0.8, (2, 16, 16, 3)).astype(np.float32)
    total = jax.jit(lambda x: (precise.score(x, ["a", "bc"]) @ jnp.asarray([1.0, -0.5])).sum())
    gradient = np.asarray(jax.grad(total)(pixels), np.float64)
    scale = np.linalg.norm(gradient)
    assert scale > 1e-2
    for along in (gradient, *rng.standard_normal((2, *pixels.shape))):
        along = along / np.linalg.norm(along)
        ahead, behind = (float(total((pixels + side * along).astype(np.float32))) for side in (step, -step))
        assert abs((ahead - behind) / (2 * step) - (gradient * along).sum()) < 2e-3 * scale


@pytest.mark.parametrize(
    ("pixels", "texts", "message"),
    [
        (np.zeros((1, 16, 16, 3), np.uint8), "a", "pixels are uint8 .*divide uint8 pixels by 255"),
        (np.zeros((1, 8, 16, 3), np.float32), "a", r"score takes floating-point \[b, 16, 16, 3\]"),
        (np.zeros((16, 16, 3), np.float32), "a", "pixels are float32"),
        (np.zeros((1, 16, 16, 3), np.float32), [], "texts is empty"),
        (np.zeros((1, 16, 16, 3), np.float32), ["a", 3], r"texts\[1\]=3 must be a string"),
    ],
)
def test_wrong_pixels_and_texts_have_no_score(model: Model, pixels, texts, message):
    with pytest.raises(ValueError, match=message):
        model.score(pixels, texts)


@pytest.mark.heavy
def test_hidden_states_are_normalised_tokens_and_that_of_the_end_gives_the_embedding(model: Model):
    config = copy.deepcopy(model.config)
    config.model.compute_dtype = Dtype.FLOAT32
    precise, texts = Model(config, model.params, TOKENIZER), ["a", "bcd", "a text that is cut", ""]
    states = precise.text_hidden_states(texts)
    assert states.shape == (4, 8, 16) and states.dtype == np.float32
    tokens = tokenize(TOKENIZER, texts, 8)
    rows = np.asarray(precise._clip.encode_text_tokens(model.params, jnp.asarray(tokens)), np.float64)
    scale, bias = (np.asarray(model.params["text"]["ln_final"][name], np.float64) for name in ("scale", "bias"))
    spread = np.sqrt(rows.var(axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(states, (rows - rows.mean(axis=-1, keepdims=True)) / spread * scale + bias, atol=1e-4)
    ends = (tokens == TOKENIZER.end_id).argmax(axis=1)
    embed = states[np.arange(4), ends].astype(np.float64) @ np.asarray(model.params["text"]["proj"]["kernel"], float)
    embed /= np.linalg.norm(embed, axis=1, keepdims=True)
    np.testing.assert_allclose(precise.encode_text(texts), embed, atol=1e-4)
    np.testing.assert_array_equal(precise.text_hidden_states("a"), precise.text_hidden_states(["a"]))
    assert precise.text_hidden_states([]).shape == (0, 8, 16)
    padded = precise.text_hidden_states(texts, pads_with_end=True)
    for row, end in enumerate(ends):
        np.testing.assert_allclose(padded[row, : end + 1], states[row, : end + 1], atol=1e-5)
        assert end == 7 or abs(padded[row, end + 1 :] - states[row, end + 1 :]).max() > 1e-3


def test_the_end_is_repeated_behind_the_last_one():
    tokenizer = mock.Mock(end_id=9)
    rows = np.array([[8, 1, 9, 0, 0], [9, 1, 9, 0, 0], [8, 1, 2, 3, 9], [8, 9, 9, 9, 9]])
    ends = [[8, 1, 9, 9, 9], [9, 1, 9, 9, 9], [8, 1, 2, 3, 9], [8, 9, 9, 9, 9]]
    assert _with_ends(rows, tokenizer).tolist() == ends


def test_a_bag_of_words_and_wrong_texts_have_no_hidden_states(model: Model):
    with pytest.raises(ValueError, match=r"texts\[1\]=3 must be a string"):
        model.text_hidden_states(["a", 3])  # type: ignore[list-item]
    config = Config(model=ModelConfig(embed_dim=16, image=model.config.model.image, text=CbowConfig(context_length=8)))
    bag = Model(config, model.params, TOKENIZER)
    with pytest.raises(ValueError, match="this text tower is a bag of words, without a vector for each token"):
        bag.text_hidden_states("a")
