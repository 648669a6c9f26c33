"""Word order: shuffles that are the same everywhere, and the metrics against brute force on made-up embeddings."""

from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
import pytest

from clipjax.config import Config, MeshConfig, ModelConfig, TaskConfig, TaskKind, TextTransformerConfig
from clipjax.config.validation import validate
from clipjax.data.sample import Sample
from clipjax.data.sources import ArraySource
from clipjax.data.tokenizers.bytes import BytesTokenizer
from clipjax.evals.encoder import Encoder
from clipjax.evals.runner import build_tasks, check_samples
from clipjax.evals.word_order import WordOrder, cosines, shuffle_words, word_order
from clipjax.runtime.sharding import make_mesh
from tests.config.test_config import valid
from tests.evals.test_evals import FakeEncoder, batch, make_task, unit

CAPTIONS = ("a dog bites a man", "two  red\tballs", "the cat sat", "sun and moon", "one small step", "a b")


class Listener(FakeEncoder):
    """A text tower whose embedding of a text is drawn by its bytes; `deaf`: by its words in any order."""

    def __init__(self, image_embed: np.ndarray, *, deaf: bool = False, longest: int = 99) -> None:
        super().__init__(image_embed, {})
        object.__setattr__(self, "ways", (deaf, longest))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        words = [sorted(text.split()) if self.ways[0] else [text] for text in texts]
        rngs = [np.random.default_rng(list(" ".join(each).encode())) for each in words]
        return unit(np.stack([rng.normal(size=8) for rng in rngs]))

    def is_cut(self, text: str) -> bool:
        return len(text) > self.ways[1]


def batches_of(captions: Sequence[tuple[str, ...]], size: int = 99) -> list[dict]:
    rows = list(range(len(captions)))
    return [
        batch(rows[start : start + size], [-1] * len(rows[start : start + size]), list(captions[start : start + size]))
        for start in range(0, len(rows), size)
    ]


@pytest.mark.parametrize("text", [*CAPTIONS, "a a a a b", "ein Hund beißt einen Mann", " x  y "])
def test_shuffles_hold_the_same_words_in_another_order(text):
    shuffled = shuffle_words(text)
    assert shuffled is not None and shuffled.split() != text.split()
    assert Counter(shuffled.split()) == Counter(text.split())
    assert shuffle_words(text) == shuffle_words(" ".join(text.split())) == shuffled


def test_shuffles_are_the_same_on_every_machine():
    """They belong to results that are compared: other ones would be another measurement."""
    assert shuffle_words("a dog bites a man") == "man a dog a bites"
    assert shuffle_words("one two three four five six") == "two three six five four one"


@pytest.mark.parametrize("text", ["word", "no no no", "The the THE", "猫が魚を食べる", ""])
def test_texts_that_no_order_changes_have_no_shuffle(text):
    assert shuffle_words(text) is None


def test_shuffles_are_as_likely_as_each_other():
    found = Counter(shuffle_words(f"a b {number}").replace(str(number), "c") for number in range(3000))
    assert len(found) == 5 and max(abs(count - 600) for count in found.values()) < 5 * 600**0.5


def test_metrics_agree_with_brute_force():
    rng = np.random.default_rng(0)
    encoder = Listener(unit(rng.normal(size=(6, 8))))
    captions = [(text, f"{text} again") for text in CAPTIONS]
    found = word_order(encoder, batches_of(captions))
    texts = [(" ".join(text.split()), i) for i, own in enumerate(captions) for text in own]
    images = encoder.tables[0].astype(float)
    own = encoder.embed_texts([text for text, _ in texts]).astype(float)
    shuffled = encoder.embed_texts([shuffle_words(text) for text, _ in texts]).astype(float)
    owner = np.asarray([i for _, i in texts])
    wins = [images[i] @ own[j] > images[i] @ shuffled[j] for j, i in enumerate(owner)]
    assert found["caption_preferred"] == np.mean(wins) and 0 < np.mean(wins) < 1
    assert found["shuffled_similarity"] == pytest.approx(np.mean(np.sum(own * shuffled, axis=1)))
    assert found["text_to_image_r1"] == np.mean((own @ images.T).argmax(axis=1) == owner)
    assert found["shuffled_text_to_image_r1"] == np.mean((shuffled @ images.T).argmax(axis=1) == owner)
    assert (found["num_examples"], found["num_texts"], found["num_ties"]) == (6, 12, 0)
    assert (found["num_unchanged"], found["num_cut"]) == (0, 0)
    first = found["details"]["captions"][0]
    assert (first["caption"], first["shuffled"]) == ("a dog bites a man", "man a dog a bites")
    assert first["cosine"] == pytest.approx(images[0] @ own[0])
    assert first["shuffled_cosine"] == pytest.approx(images[0] @ shuffled[0])


def test_batches_change_nothing():
    captions = [(text,) for text in CAPTIONS]
    encoder = Listener(unit(np.random.default_rng(0).normal(size=(6, 8))))
    assert word_order(encoder, batches_of(captions, size=2)) == word_order(encoder, batches_of(captions))


def test_a_tower_that_does_not_hear_order_prefers_nothing():
    encoder = Listener(unit(np.random.default_rng(0).normal(size=(6, 8))), deaf=True)
    found = word_order(encoder, batches_of([(text,) for text in CAPTIONS]))
    assert (found["caption_preferred"], found["num_ties"]) == (0.5, 6)
    assert found["shuffled_similarity"] == pytest.approx(1)
    assert found["text_to_image_r1"] == found["shuffled_text_to_image_r1"]


def test_captions_that_cannot_be_compared_are_left_out_and_counted():
    encoder = Listener(unit(np.random.default_rng(0).normal(size=(4, 8))), longest=20)
    captions = [("a b", "word"), ("no no",), (f"long {'x' * 20}",), ()]
    found = WordOrder()(encoder, batches_of(captions))
    names = ("num_examples", "num_texts", "num_unchanged", "num_cut")
    assert tuple(map(found.get, names)) == (3, 1, 2, 1)
    with pytest.raises(ValueError, match="no caption has two different words, separated by white space, and fits"):
        word_order(encoder, batches_of(captions[1:]))
    with pytest.raises(ValueError, match="no sample has a caption"):
        word_order(encoder, batches_of(captions[3:]))


def test_lines_are_captions_if_the_task_says_so(capsys):
    encoder = Listener(unit(np.random.default_rng(0).normal(size=(2, 8))))
    captions = [("a b\nc d\n",), ("e f",)]
    assert WordOrder(by_line=True)(encoder, batches_of(captions))["num_texts"] == 3
    assert capsys.readouterr().err == ""
    assert WordOrder()(encoder, batches_of(captions))["num_texts"] == 2
    assert "1 captions hold several lines" in capsys.readouterr().err


@pytest.mark.parametrize(("captions", "message"), [((), "no sample has a caption"), ("word", "no caption has two")])
def test_data_without_order_is_refused_before_the_work(captions, message):
    config = Config()
    config.eval.tasks = {"t": TaskConfig(kind=TaskKind.WORD_ORDER, source="a.tar", captions_by_line=True)}
    source = ArraySource(np.zeros((4, 1, 1, 3), np.uint8), [captions] * 4)
    tasks = build_tasks(config, lambda spec, **options: source)
    assert tasks["t"].measure == WordOrder(by_line=True)
    with pytest.raises(ValueError, match=f"eval.tasks.t: {message}"):
        check_samples(tasks)
    check_samples({"t": make_task(ArraySource(np.zeros((4, 1, 1, 3), np.uint8), ["a b"] * 4), WordOrder())})


def test_lines_that_are_single_words_have_no_order():
    samples = [Sample(b"", ("one\ntwo",))]
    WordOrder().check_samples(samples, is_all=True)
    with pytest.raises(ValueError, match="no caption has two different words"):
        WordOrder(by_line=True).check_samples(samples, is_all=True)


def test_the_config_takes_the_kind_and_refuses_what_it_ignores():
    config = valid()
    config.eval.tasks["t"] = TaskConfig(kind=TaskKind.WORD_ORDER, source="a.tar", captions_by_line=True)
    validate(config)
    assert config.eval.tasks["t"].reads_texts
    config.eval.tasks["t"].gallery = "b.tar"
    with pytest.raises(ValueError, match="eval.tasks.t.gallery='b.tar': image_retrieval needs a second source"):
        validate(config)


def test_the_metrics_that_rank_a_model_are_among_the_results():
    found = WordOrder()(Listener(np.eye(2, 8, dtype=np.float32)), batches_of([("a b",), ("c d",)]))
    assert set(WordOrder.metrics) <= set(found)


@pytest.mark.parametrize(("text", "is_cut"), [("123456", False), ("1234567", True), ("", False)])
def test_texts_are_cut_that_do_not_fit_with_start_and_end(text, is_cut):
    config = Config(model=ModelConfig(text=TextTransformerConfig(context_length=8)))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    encoder = Encoder(config, None, mesh, BytesTokenizer(), {})
    assert encoder.is_cut(text) is is_cut
    kept = encoder.tokenize([text])[0]
    assert (len(kept[kept != 0]) == 8) is (len(text) >= 6)


def test_cosines_are_those_of_float64():
    x, y = np.random.default_rng(0).normal(size=(2, 5000, 3)).astype(np.float32)
    np.testing.assert_allclose(cosines(x, y), np.sum(x.astype(float) * y, axis=1), rtol=0, atol=1e-15)
    assert cosines(x[:0], y[:0]).shape == (0,)
