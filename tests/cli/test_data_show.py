"""`clipjax data show`: sizes, captions, faults and the contact sheet of a source."""

import io
import json

import pytest
from PIL import Image

from clipjax.cli.data import main


def png(side: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def table(tmp_path):
    rows = []
    for i in range(1, 6):
        (tmp_path / f"{i}.png").write_bytes(png(10 * i) if i != 3 else b"no picture")
        rows.append({"path": f"{i}.png", "caption": "x" * i, "alt": "other"})
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("written", ["{}", "--source={}"])
def test_show(table, capsys, written):
    assert main(["show", written.format(table), "--num=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{table}: 5 samples"
    assert lines[1] == "looked at 5 of them, spread evenly; 4 are usable"
    assert "width min 10, 5 % 10, median 40, 95 % 50, max 50" in [" ".join(line.split()) for line in lines]
    assert any(line.split() == ["unusable", "corrupt_image", "1"] for line in lines)
    assert lines[-2:] == [f"{table}, row {i}, image {i}.png: label -1; {'x' * i}" for i in (1, 2)]


def test_filters(table, tmp_path, capsys):
    assert main(["show", str(table), "--filters=caption!=xx,alt==other", "--num=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        f"{table}: 5 samples",
        "filters: 4 of 5 samples are kept, dropped: 1 by caption!=xx, 0 by alt==other",
        "looked at 4 of them, spread evenly; 3 are usable",
    ]
    (tmp_path / "list").write_text("2.png\na/5.png\n")
    assert main(["show", str(table), f"--keep_keys={tmp_path}/list", "--num=9"]) == 0
    assert [line.rpartition("; ")[2] for line in capsys.readouterr().out.splitlines()[-2:]] == ["xx", "xxxxx"]


def test_columns(table, capsys):
    assert main(["show", str(table), "--caption_field=alt", "--num=1"]) == 0
    assert capsys.readouterr().out.endswith("label -1; other\n")


def test_sheet(table, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert main(["show", str(table), f"--sheet={sheet}"]) == 0
    assert f"contact sheet: {sheet}" in capsys.readouterr().out
    assert sheet.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sheet={folder}/a.jpg"], "must end in .png"),
        (["--sheet={folder}/none/a.png"], "there is no folder"),
        (["--source={folder}/a.jsonl"], "--source is given twice"),
        (["--filters=caption"], "--filters: 'caption' must be NAME, one of <"),
        (["--filters=alt==none"], "filters keep none of 5 samples: 0 of 5 samples are kept, dropped: 5 by alt==none"),
        (["--image_field=x"], "none is 'x': set data.image_field"),
        (["more"], "argument 'more' is not understood"),
    ],
)
def test_what_is_refused(table, tmp_path, capsys, argv, message):
    with pytest.raises(SystemExit) as exit_code:
        main(["show", str(table), *(each.format(folder=tmp_path) for each in argv)])
    assert exit_code.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--image_field=x", "--caption_field=x", "--image_root=x"])
def test_choices_that_a_tar_ignores_are_refused(tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        main(["show", str(tmp_path / "a.tar"), option])
    assert f"{option.partition('=')[0]}='x' would be ignored" in capsys.readouterr().err
