"""`clipjax data dedup`: planted copies, the list of keys, the sheet, and what is refused."""

import io
import json
import signal
import tarfile

import pytest
from PIL import Image

from clipjax.cli.data import main
from clipjax.config import DataConfig
from clipjax.data.sources import build_source
from clipjax.evals.overlap import load_overlap
from tests.data.picture_files import saved
from tests.data.test_near_duplicates import picture


def write_tar(path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for key, image in members.items():
            for name, content in ((f"{key}.jpg", image), (f"{key}.txt", b"words")):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return str(path)


@pytest.fixture
def shards(tmp_path):
    pixels = [picture(seed) for seed in range(4)]
    files = [saved(each, "JPEG", quality=95) for each in pixels]
    smaller = Image.fromarray(pixels[1]).resize((70, 70))
    write_tar(tmp_path / "a.tar", {"one": files[0], "two": files[1], "broken": b"no picture"})
    write_tar(
        tmp_path / "b.tar",
        {
            "exact": files[0],
            "again": saved(pixels[0], "JPEG", quality=60),
            "small": saved(smaller, "JPEG"),
            "cut": saved(pixels[1][1:-1, 1:-1].copy(), "PNG"),
            "new\nline": files[0],
            "own": files[2],
            "shown": files[3],
        },
    )
    write_tar(tmp_path / "test.tar", {"1": saved(pixels[3], "PNG"), "2": saved(picture(50), "PNG")})
    return tmp_path


def test_planted_copies_are_listed(shards, capsys):
    source, output, report = f"{shards}/[ab].tar", shards / "drop.txt", shards / "pairs.png"
    argv = ["dedup", source, f"--against={shards}/test.tar", f"--output={output}", f"--report={report}"]
    assert main(argv) == 0
    assert output.read_text().split() == [f"b.tar/{key}" for key in ("exact", "again", "small", "cut", "shown")]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{source}: 1 unusable samples are no duplicates: corrupt_image 1",
        f"{shards}/test.tar: 1 samples of the source are in it, or nearly so",
        f"{source}: 10 samples, 9 pairs within 6 bits, 2 groups, 6 samples to drop",
        f"list for data.drop_keys: {output}, 5 keys",
        "1 keys are not in the list: they are empty, or no line of text can hold them",
        f"pairs side by side: {report}",
    ]
    with Image.open(report) as drawn:
        assert drawn.format == "PNG" and drawn.size == (1190, 2 * 28 + 46 + 2 * 260 - 30)
    assert main(["dedup", source, "--distance=0", f"--output={output}"]) == 0
    listed = set(output.read_text().split())
    assert {"b.tar/exact"} <= listed < {f"b.tar/{key}" for key in ("exact", "again", "small", "cut")}


def test_what_an_evaluation_set_shares_with_training_data_is_written_for_its_task(shards, capsys):
    source, output = f"{shards}/[ab].tar", shards / "overlap.json"
    argv = ["dedup", source, f"--against={shards}/test.tar", f"--against={shards}/a.tar", f"--overlap={output}"]
    assert main(argv) == 0
    assert f"file for eval.tasks.NAME.overlap: {output}, 8 of 10 samples overlap\n" in capsys.readouterr().out
    content = json.loads(output.read_text())
    assert (content["source"], content["num_samples"], content["distance"]) == (source, 10, 6)
    assert content["not_compared"] == [2]
    assert content["against"] == [
        {"source": f"{shards}/test.tar", "num_samples": 2, "num_unusable": 0, "overlapping": [9]},
        {"source": f"{shards}/a.tar", "num_samples": 3, "num_unusable": 1, "overlapping": [0, 1, 3, 4, 5, 6, 7]},
    ]
    overlap = load_overlap(str(output), build_source(source, data=DataConfig()))
    assert overlap.parts().tolist() == [1, 1, 2, 1, 1, 1, 1, 1, 0, 1]
    with pytest.raises(ValueError, match="with 10 samples; the task's source has 3; write it with"):
        load_overlap(str(output), build_source(f"{shards}/a.tar", data=DataConfig()))


def test_a_set_that_shares_nothing_has_an_empty_overlap(shards):
    argv = ["dedup", f"{shards}/a.tar", f"--against={shards}/test.tar", f"--overlap={shards}/o.json"]
    assert main(argv) == 0
    overlap = load_overlap(f"{shards}/o.json", build_source(f"{shards}/a.tar", data=DataConfig()))
    assert overlap.parts().tolist() == [0, 0, 2]


def test_an_interruption_ends_with_its_code(shards, capsys, monkeypatch):
    monkeypatch.setattr("clipjax.data.hash_store.hash_rows", lambda source, rows: signal.raise_signal(signal.SIGINT))
    assert main(["dedup", f"{shards}/a.tar"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--distance=13"], "must be at most 12"),
        (["--distance=-1"], "must be a whole number of at least 0"),
        (["--report={folder}/a.jpg"], "must end in .png"),
        (["--output={folder}/none/a.txt"], "there is no folder"),
        (["--against={folder}/none.tar"], "match no file"),
        (["--against={folder}/test.tar", "--against={folder}/test.tar"], "is given twice"),
        (["--against={folder}/[ab].tar"], "is the source itself"),
        (["--overlap={folder}/o.json"], "needs --against"),
        (["--overlap={folder}/none/o.json", "--against={folder}/test.tar"], "there is no folder"),
        (["--overlap={folder}/o", "--output={folder}/o", "--against={folder}/test.tar"], "the file of another option"),
        (["--image_field=x"], "would be ignored"),
    ],
)
def test_what_is_refused(shards, capsys, argv, message):
    with pytest.raises(SystemExit) as exit_code:
        main(["dedup", f"{shards}/[ab].tar", *(each.format(folder=shards) for each in argv)])
    assert exit_code.value.code == 2
    assert message in capsys.readouterr().err
