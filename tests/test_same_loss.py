import json
import subprocess
import sys

import pytest

from benchmarks.same_loss import ROOT, find_commit, first_difference, main, read_metrics

LINE = {"step": 1, "loss": 4.25, "grad_norm": 0.5, "samples_skipped": {"corrupt_image": 0}}
NEXT = LINE | {"step": 2}
needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository's history")


def test_equal_lines_have_no_difference():
    assert first_difference([LINE, NEXT], [dict(LINE), dict(NEXT)]) is None


def test_the_first_differing_step_is_named_with_both_values():
    worse = NEXT | {"loss": 4.250000000000001, "grad_norm": 0.25}
    text = first_difference([LINE, NEXT, LINE | {"step": 3}], [LINE, worse, worse | {"step": 3}])
    assert text is not None
    assert "step 2" in text and "step 3" not in text
    assert "loss: 4.25 and 4.250000000000001" in text and "grad_norm: 0.5 and 0.25" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": -0.0}, "loss: 0.0 and -0.0"),
        ({"loss": None, "nonfinite": ["loss"]}, 'nonfinite: absent and ["loss"]'),
        ({"samples_skipped": {"corrupt_image": 1}}, "samples_skipped"),
        ({"step": 3}, "step 1 stands against one of step 3"),
    ],
)
def test_everything_that_differs_is_found(change, message):
    assert message in (first_difference([LINE | {"loss": 0.0}], [LINE | {"loss": 0.0} | change]) or "")


def test_a_missing_line_is_a_difference():
    assert first_difference([LINE, NEXT], [LINE]) == "there are 2 lines and 1 lines"


def test_metrics_are_read_up_to_a_step_without_times_and_halves():
    lines = [LINE | {"examples_per_second": 9.0}, NEXT | {"seconds_left": 3.0}, LINE | {"step": 3}]
    text = "\n".join(json.dumps(line) for line in lines)  # the last one has no end yet
    assert read_metrics(text, 1) == [LINE]
    assert read_metrics(text, 5) == [LINE, NEXT]


@needs_git
def test_an_unknown_revision_is_refused(capsys):
    assert find_commit("HEAD")
    with pytest.raises(SystemExit) as stopped:
        main(["no-such-revision"])
    assert stopped.value.code == 2
    assert "'no-such-revision' is no revision" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "message"), [("--steps=0", "at least 1"), ("--data=nowhere", "no scenes.model")])
def test_bad_options_are_refused(option, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["HEAD", option])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.process
def test_it_imports_nothing_of_the_package():
    code = "import sys, benchmarks.same_loss; sys.exit(any(name.split('.')[0] == 'clipjax' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
