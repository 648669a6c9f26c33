"""`clipjax embed`: the rows, going on after a kill, and everything that is refused."""

import contextlib
import hashlib
import json
import pathlib
import shutil
import threading

import numpy as np
import pyarrow.parquet
import pytest

import clipjax
from clipjax.cli import embed, opened_model
from clipjax.data.index_store import locked
from clipjax.evals import embedding_folder
from clipjax.evals.embedding_folder import LOCK, EmbeddingFolder
from tests.cli.opened_models import huge_png, place  # noqa: F401
from tests.commands import exit_code
from tests.golden.test_checkpoint import make_pairs

GIVEN = ["val.tar", "--checkpoint=run", "--output=out", "--what=both", "--batch_size=8", "--samples_per_part=8"]


class FakeEncoder:
    """Unit vectors that depend on the picture, or the text, alone; it stops after so many calls."""

    def __init__(self, calls: int = 1000) -> None:
        self.calls = calls

    def embed_images(self, image):
        return self._rows([each.tobytes() for each in image])

    def embed_texts(self, texts):
        return self._rows([text.encode() for text in texts])

    def _rows(self, contents: list[bytes]) -> np.ndarray:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        seeds = [int.from_bytes(hashlib.sha256(each).digest()[:8], "big") for each in contents]
        rows = np.stack([np.random.default_rng(seed).standard_normal(10) for seed in seeds])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def fake(place, monkeypatch):  # noqa: F811
    encoder = FakeEncoder()
    monkeypatch.setattr(opened_model.OpenedModel, "encoder", lambda self: encoder)
    return encoder


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(folder: str, kind: str):
    paths = sorted(pathlib.Path(folder, kind).glob("*.parquet"))
    return pyarrow.concat_tables([pyarrow.parquet.read_table(path) for path in paths]).to_pylist()


@pytest.mark.heavy
def test_the_embeddings_are_those_of_the_library(place, capsys):  # noqa: F811
    assert exit_code(embed.main, [*GIVEN[:-1], "--samples_per_part=24"]) == 0
    assert "32 images, 32 texts of 32 samples; " in capsys.readouterr().out
    model, pairs = clipjax.load("run"), list(make_pairs("val", 32))
    images, texts = read("out", "images"), read("out", "texts")
    for rows, wanted in (
        (images, model.encode_image([pixels for _, pixels, _, _ in pairs])),
        (texts, model.encode_text([caption for _, _, caption, _ in pairs])),
    ):
        np.testing.assert_allclose([row["embedding"] for row in rows], wanted, atol=1e-5)
        assert [row["id"] for row in rows] == [name for name, _, _, _ in pairs]
        assert [row["caption"] for row in rows] == [caption for _, _, caption, _ in pairs]
        assert [row["index"] for row in rows] == list(range(32))
        centred = np.array([row["embedding"] for row in rows], np.float64)
        centred -= centred.mean(axis=0)
        singular = np.linalg.svd(centred)[1]
        for axis, value in zip("xy", singular, strict=False):
            assert np.linalg.norm([row[axis] for row in rows]) == pytest.approx(value, rel=1e-4)
    schema = pyarrow.parquet.read_schema("out/images/part-00001.parquet")
    assert schema.names == ["id", "index", "caption", "embedding", "x", "y"]
    assert schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), 10)


@pytest.mark.parametrize("form", ["parquet", "npy"])
@pytest.mark.parametrize("calls", [0, 1, 2, 5])
def test_a_run_that_is_stopped_goes_on_and_gives_the_same_bytes(fake, place, capsys, form, calls):  # noqa: F811
    argv = [*GIVEN, f"--format={form}"]
    assert exit_code(embed.main, argv) == 0
    whole = files_of(place / "out")
    assert sorted(whole) == sorted(
        ["manifest.json", *(f"{kind}/part-0000{i}.{end}" for kind in ("images", "texts") for i in range(4)
                            for end in {"parquet", form})]
    )  # fmt: skip
    shutil.rmtree(place / "out")
    fake.calls = calls
    assert exit_code(embed.main, argv) == 130
    assert "stopped; the same command goes on" in capsys.readouterr().err
    with pytest.raises(ValueError, match="out is not finished; the same clipjax embed goes on"):
        EmbeddingFolder(pathlib.Path("out"))
    fake.calls = 100
    assert exit_code(embed.main, argv) == 0
    assert fake.calls == 100 - 8 + calls // 2 * 2
    assert files_of(place / "out") == whole
    fake.calls = 0
    assert exit_code(embed.main, argv) == 0  # nothing is left to do
    assert files_of(place / "out") == whole
    found = EmbeddingFolder(pathlib.Path("out"))
    assert (found.kinds, found.count("images"), found.about["format"]) == (("images", "texts"), 32, form)
    rows = np.concatenate(list(found.blocks("images")))
    assert rows.dtype == np.float32 and rows.shape == (32, 10)
    assert found.rows("texts", [31, 0, 8]) == [
        {"id": f"val{i:03d}", "index": i, "caption": list(make_pairs("val", 32))[i][2]} for i in (31, 0, 8)
    ]


@pytest.mark.parametrize("at", [0, 1, 3, 4, 5, 9, 10, 11, 13, 15])  # of 16 writes
def test_a_kill_between_any_two_writes_costs_no_byte(fake, place, monkeypatch, at):  # noqa: F811
    argv = [*GIVEN[:-1], "--samples_per_part=16", "--format=npy"]
    assert exit_code(embed.main, argv) == 0
    whole = files_of(place / "out")
    shutil.rmtree(place / "out")
    left, write = at, embedding_folder.write_atomic

    def write_some(*arguments, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        write(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(embedding_folder, "write_atomic", write_some)
        with contextlib.suppress(KeyboardInterrupt):  # of the first write, before the work
            assert embed.main(argv) == 130
    assert exit_code(embed.main, argv) == 0
    assert files_of(place / "out") == whole


def test_lost_and_cut_files_are_made_anew(fake, place):  # noqa: F811
    assert exit_code(embed.main, GIVEN) == 0
    whole = files_of(place / "out")
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(b"cut")):
        damage(place / "out" / "images" / "part-00001.parquet")
        with pytest.raises(ValueError, match="part-00001.parquet .*; the same clipjax embed makes it anew"):
            EmbeddingFolder(pathlib.Path("out"))
        assert exit_code(embed.main, GIVEN) == 0
        assert files_of(place / "out") == whole


def test_unusable_samples_are_left_out_and_counted(fake, place, capsys):  # noqa: F811
    rows = [{"path": f"photos/val00{i}.png", "caption": f"number {i}"} for i in range(8)]
    (place / "photos" / "val001.png").write_bytes(b"no picture")
    (place / "photos" / "val002.png").write_bytes(huge_png())
    rows[3]["caption"] = " "
    (place / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["a.jsonl", *GIVEN[1:3], "--batch_size=8"]
    assert exit_code(embed.main, argv) == 0
    out = capsys.readouterr().out
    assert "5 images of 8 samples" in out
    assert "left out of the images: corrupt_image 1, empty_caption 1, image_too_large 1" in out
    assert [row["index"] for row in read("out", "images")] == [0, 4, 5, 6, 7]
    manifest = json.loads((place / "out" / "manifest.json").read_text())
    assert manifest["counts"] == {
        "samples": 8, "images": 5,
        "unusable": {"images": {"corrupt_image": 1, "empty_caption": 1, "image_too_large": 1}},
    }  # fmt: skip
    assert manifest["about"]["checkpoint"] == str(place / "run" / "checkpoints" / "9")
    for i in range(8):
        (place / "photos" / f"val00{i}.png").write_bytes(b"no picture")
    assert exit_code(embed.main, [*argv[:2], "--output=none", argv[3]]) == 3
    assert "nothing was embedded: no sample can be used" in capsys.readouterr().err


def test_a_folder_of_pictures_needs_no_captions(fake, place, capsys):  # noqa: F811
    assert exit_code(embed.main, ["photos", *GIVEN[1:3], "--batch_size=8"]) == 0
    assert "its pictures are taken alone" in capsys.readouterr().out
    assert [row["id"] for row in read("out", "images")] == [f"photos/val00{i}.png" for i in range(8)]
    assert {row["caption"] for row in read("out", "images")} == {""}
    assert exit_code(embed.main, ["photos", *GIVEN[1:2], "--output=b", "--what=texts"]) == 2
    assert "no image has a caption beside it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--what": "images"}, "with what 'both', now 'images'"),
        ({"--format": "npy"}, "with format 'parquet', now 'npy'"),
        ({"--samples_per_part": "16"}, "with samples_per_part 8, now 16"),
        ({"--batch_size": "16", "--samples_per_part": "16"}, "with batch_size 8, now 16; samples_per_part 8, now 16"),
        ({"--samples_per_part": "24"}, "remove this one, or go on with --batch_size=8 --samples_per_part=8"),
        ({"--source": "train.tar"}, "now 64: name another folder, or remove this one"),
        ({"--checkpoint": "changed"}, "checkpoint_digest"),
    ],
)
def test_the_folder_of_another_run_is_refused(fake, place, capsys, monkeypatch, change, message):  # noqa: F811
    given = {"--source": "val.tar"} | dict(each.split("=") for each in GIVEN[1:])
    run = lambda options: exit_code(embed.main, [f"{name}={value}" for name, value in options.items()])  # noqa: E731
    assert run(given) == 0
    whole = files_of(place / "out")
    shutil.copytree("run", "elsewhere")
    assert run(given | {"--checkpoint": "elsewhere/checkpoints/9"}) == 0  # the same one
    shutil.copytree("run", "changed")
    if "--checkpoint" in change:
        monkeypatch.setattr(embed, "digest_of", lambda saved: "another")
    assert run(given | change) == 2
    assert message in capsys.readouterr().err
    assert files_of(place / "out") == whole


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (GIVEN[1:], "--source is missing"),
        ([GIVEN[0], *GIVEN[2:]], "--checkpoint=WORKDIR_OR_STEP is missing"),
        (GIVEN[:2], "--output=DIR is missing"),
        (["none.tar", *GIVEN[1:]], "match no file"),
        ([*GIVEN[:2], "--output=photos"], "--output=photos holds 'val000.png', which is of something else"),
        ([*GIVEN[:2], "--output=val.tar"], "--output=val.tar: cannot be written to"),
        ([*GIVEN[:2], "--output=gs://a/b"], "nothing here opens an address of gs://"),
        ([*GIVEN[:3], "--batch_size=12"], "--batch_size=12 must be divisible by 8 devices; nearest: 8, 16"),
        ([*GIVEN[:5], "--samples_per_part=12"], "--samples_per_part=12 must be a multiple of 8, the batch"),
        ([*GIVEN[:3], "--what=videos"], "--what=videos must be one of images, texts, both"),
        ([*GIVEN[:3], "--image_field=x"], "--image_field='x' would be ignored"),
    ],
)  # fmt: skip
def test_what_is_refused(place, monkeypatch, capsys, argv, message):  # noqa: F811
    monkeypatch.setattr(opened_model.OpenedModel, "encoder", lambda self: pytest.fail("the model is loaded"))
    assert exit_code(embed.main, argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 1}', '{"format": 1, "about": {"what": "images"}, "parts": [1], "counts": null}']
)
def test_a_damaged_manifest_is_told(fake, place, capsys, content):  # noqa: F811
    (place / "out").mkdir()
    (place / "out" / "manifest.json").write_text(content)
    assert exit_code(embed.main, GIVEN) == 2
    assert "out/manifest.json is damaged" in capsys.readouterr().err


def test_two_runs_at_once_are_refused(fake, place, capsys):  # noqa: F811
    (place / "out").mkdir()
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with locked(str(place / "out" / LOCK), may_wait=False):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(60)
    try:
        assert exit_code(embed.main, GIVEN) == 2
    finally:
        leave.set()
        thread.join()
    assert "--output=out: another clipjax embed writes there" in capsys.readouterr().err
    assert exit_code(embed.main, GIVEN) == 0


def test_npy_stays_on_the_disk_until_it_is_read(fake, place):  # noqa: F811
    assert exit_code(embed.main, ["photos", *GIVEN[1:3], "--batch_size=8", "--format=npy"]) == 0
    (rows,) = EmbeddingFolder(pathlib.Path("out")).blocks("images")
    assert isinstance(rows, np.memmap) and rows.shape == (8, 10)
