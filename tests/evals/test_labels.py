"""Labels and templates from a command line, and probabilities against sums in extended precision."""

import json
import math

import numpy as np
import pytest

from clipjax.data.scenes.language import CLASS_NAMES, TEMPLATES
from clipjax.evals.labels import probabilities, read_labels, read_templates


def test_labels_are_listed_or_lie_in_a_file_or_have_a_name(tmp_path):
    assert read_labels("a cat, a dog ,fish") == ("a cat", "a dog", "fish")
    lines, array = tmp_path / "labels.txt", tmp_path / "labels.json"
    lines.write_bytes("\ufeffa cat, black\r\n  dog\n\n".encode())
    assert read_labels(str(lines)) == ("a cat, black", "dog")
    array.write_text(json.dumps(["a, b", "c"]))
    assert read_labels(str(array)) == ("a, b", "c")
    assert read_labels("scenes") == tuple(CLASS_NAMES)
    assert len(read_labels("cifar10")) == 10
    assert len(read_labels(",".join(f"number {i}" for i in range(3000)))) == 3000  # too long for a file's name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cat,,dog",
            "--labels=cat,,dog: label 2 of 3 is blank; give it words; labels that hold a comma go into a file",
        ),
        ("", "label 1 of 1 is blank"),
        ("cat,dog,cat", "labels 1 and 3 are both 'cat', so texts cannot tell them apart"),
        ("{folder}/none.txt", "none.txt: there is no such file; it must be labels with commas between, or a file"),
        ("{folder}/blank.txt", "blank.txt: label 2 of 3 is blank; give it words$"),
        ("{folder}/empty.txt", "empty.txt must be a JSON list of strings, or hold a line for each; at least one"),
        ("{folder}/numbers.json", "numbers.json must be a JSON list of strings"),
        ("{folder}/object.json", "object.json must be a JSON list of strings"),
        ("{folder}/broken.json", "broken.json is no JSON"),
        ("{folder}/latin.txt", "latin.txt is no text in UTF-8: .* at byte 1"),
    ],
)
def test_labels_that_are_refused(tmp_path, text, message):
    contents = {
        "blank.txt": b"a\n \nb\n", "empty.txt": b"\n", "numbers.json": b"[1, 2]", "object.json": b'{"a": "b"}',
        "broken.json": b"[", "latin.txt": b"d\xfcne\n",
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_labels(text.format(folder=tmp_path))


def test_templates_come_with_the_labels_or_by_themselves(tmp_path):
    assert read_templates(None, "a,b") == ("a photo of a {}.",)
    assert read_templates(None, "scenes") == tuple(TEMPLATES)
    assert len(read_templates(None, "imagenet")) == 80
    assert read_templates("plain", "scenes") == ("{}",)
    assert read_templates("a drawing of {}, in ink", "a,b") == ("a drawing of {}, in ink",)
    file = tmp_path / "templates.txt"
    file.write_text("a {}\nthe {}\n")
    assert read_templates(str(file), "a,b") == ("a {}", "the {}")
    file.write_text("a {}\nthe one\n")
    with pytest.raises(ValueError, match=r"--templates=.*templates.txt: 'the one' must hold one {} for the class name"):
        read_templates(str(file), "a,b")
    with pytest.raises(ValueError, match=r"--templates=foto: must be a file, a template with {} for the label, or one"):
        read_templates("foto", "a,b")
    with pytest.raises(ValueError, match="must hold one {}"):
        read_templates("a {} and a {}", "a,b")


@pytest.mark.parametrize("bias", [None, -10.0, 3.0])
def test_probabilities_are_those_of_the_definition_also_where_it_overflows(bias):
    rng = np.random.default_rng(0)
    image, label = (rng.standard_normal((count, 7)).astype(np.float32) for count in (5, 4))
    image, label = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (image, label))
    for scale in (1.0, 100.0, 1e5):
        found = probabilities(image, label, scale, bias)
        assert found.dtype == np.float64
        for i in range(5):
            logits = [scale * math.fsum(map(lambda a, b: float(a) * float(b), image[i], row)) for row in label]
            if bias is None:
                wanted = [1 / math.fsum(math.exp(min(other - one, 700)) for other in logits) for one in logits]
                assert abs(found[i].sum() - 1) < 1e-12
            else:
                wanted = [1 / (1 + math.exp(min(-(one + bias), 700))) for one in logits]
            np.testing.assert_allclose(found[i], wanted, rtol=1e-7, atol=1e-12)
