"""The encoder: embeddings of the model on the host, from programs that all encoders of one model share."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.config import (
    Config,
    Dtype,
    MeshConfig,
    ModelConfig,
    Projection,
    ResNetConfig,
    TextTransformerConfig,
    ViTConfig,
)
from clipjax.data.tokenizers.bytes import BytesTokenizer
from clipjax.evals import encoder
from clipjax.evals.encoder import Encoder, NotFiniteEmbeddings
from clipjax.models.clip import Clip, build_clip, unit_norm
from clipjax.runtime import sharding

TOKENIZER = BytesTokenizer()


@pytest.fixture(scope="module")
def parts() -> tuple[Config, Clip, jax.sharding.Mesh]:
    config = Config()
    config.eval.batch_size = 4
    config.model = ModelConfig(
        embed_dim=16,
        image=ViTConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2),
        text=TextTransformerConfig(context_length=8, vocab_size=TOKENIZER.vocab_size, width=16, depth=1, num_heads=2),
        compute_dtype=Dtype.FLOAT32,
    )
    clip = build_clip(config.model, data=config.data)
    return config, clip, sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def test_embeddings_are_the_models_and_programs_are_shared(parts):
    config, clip, mesh = parts
    image = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    encode_image, encode_text = jax.jit(clip.encode_image), jax.jit(clip.encode_text)
    init = jax.jit(clip.init)
    sizes = encoder._encode_image._cache_size(), encoder._encode_text._cache_size()
    for seed in (0, 1):
        params = init(jax.random.key(seed))
        one = Encoder(config, clip, mesh, TOKENIZER, params)
        assert one.has_embeddings
        np.testing.assert_allclose(one.embed_images(image), encode_image(params, image), atol=1e-5)
        texts = one.embed_texts(["a", "b", "c", "d", "e"])  # two batches, the second is padded
        np.testing.assert_allclose(texts[4:], encode_text(params, one.tokenize(["e"])), atol=1e-5)
        assert texts.shape == (5, 16)
    assert encoder._encode_image._cache_size() == sizes[0] + 1
    assert encoder._encode_text._cache_size() == sizes[1] + 1


def test_features_projected_are_the_embedding_bit_for_bit(parts):
    config, clip, mesh = parts
    params = jax.jit(clip.init)(jax.random.key(0))
    image = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    features = clip.image_features(params, jnp.asarray(image))
    embed = unit_norm(jnp.matmul(features, params["image"]["proj"]["kernel"]))
    np.testing.assert_array_equal(embed, clip.encode_image(params, jnp.asarray(image)))
    one = Encoder(config, clip, mesh, TOKENIZER, params)
    np.testing.assert_allclose(one.image_features(image), features, atol=1e-5)


@pytest.mark.parametrize(
    "image",
    [
        ViTConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, projection=Projection.NONE),
        ResNetConfig(image_size=32, width=8, layers=(1, 1, 1, 1)),
    ],
)
def test_features_of_towers_without_a_projection_are_the_embedding_before_normalisation(parts, image):
    config, _, _ = parts
    config = copy.deepcopy(config)
    config.model.image = image
    clip = build_clip(config.model, data=config.data)
    params = {**clip.init(jax.random.key(0)), "batch_stats": clip.init_batch_stats()}
    size = image.image_size
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8))
    features = clip.image_features(params, pixels)
    assert features.shape == (2, 16)
    np.testing.assert_array_equal(unit_norm(features), clip.encode_image(params, pixels))


def test_parameters_that_are_not_finite_are_told(parts):
    config, clip, mesh = parts
    params = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), jax.jit(clip.init)(jax.random.key(0)))
    one = Encoder(config, clip, mesh, TOKENIZER, params)
    with pytest.raises(NotFiniteEmbeddings, match="4 of 4 image embeddings are not finite.*take an earlier one"):
        one.embed_images(np.zeros((4, 16, 16, 3), np.uint8))
    with pytest.raises(NotFiniteEmbeddings, match="1 of 1 text embeddings"):
        one.embed_texts(["a"])


def test_no_texts_give_no_rows_and_rows_are_gathered(parts):
    config, clip, mesh = parts
    config = copy.deepcopy(config)
    config.loss.contrastive_weight = 0.0
    one = Encoder(config, clip, mesh, TOKENIZER, {})
    assert not one.has_embeddings
    assert one.embed_texts([]).shape == (0, 16)
    np.testing.assert_array_equal(one.gather(np.arange(4)), np.arange(4))
    assert one.gather_json({"a": [1]}) == [{"a": [1]}]
