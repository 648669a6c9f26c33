"""`clipjax eval --follow`: each checkpoint of a run once, in order, beside the run."""

import json
import shutil
from unittest import mock

import pytest

from clipjax.checkpoints import manifest
from clipjax.cli import eval as evaluate
from clipjax.cli import follow
from clipjax.evals import encoder as encoders
from clipjax.evals.runner import Evaluation
from tests.cli.opened_models import place  # noqa: F401
from tests.commands import exit_code

LAST = 24
"""The last step of the golden run: 384 examples in batches of 16."""
OPTIONS = ("--follow=run", "--output=scores.jsonl")


class Clock:
    """Stands in for `time`: each wait does the next of what happens meanwhile."""

    def __init__(self, *meanwhile) -> None:
        self.meanwhile = list(meanwhile)

    def sleep(self, seconds: float) -> None:
        assert seconds == follow.POLL_SECONDS
        assert self.meanwhile, "nothing more happens, and the follower waits for ever"
        self.meanwhile.pop(0)()


@pytest.fixture
def steps(place):  # noqa: F811
    """The folder of steps of the run, with step 9 alone."""
    return place / "run" / "checkpoints"


@pytest.fixture
def scored(monkeypatch):
    """The names of the tasks of each checkpoint whose tasks were run; nothing is computed."""
    calls = []

    def run_tasks(tasks, encoder, *, done=None, keep=None):
        calls.append(list(tasks))
        return Evaluation({name: {"top1": 0.5} for name in tasks}, {})

    monkeypatch.setattr(evaluate, "run_tasks", run_tasks)
    for name in ("load_params", "Encoder", "build_clip"):
        monkeypatch.setattr(follow, name, mock.MagicMock())
    return calls


def add(steps, *numbers: int):
    for number in numbers:
        shutil.copytree(steps / "9", steps / "copying")
        (steps / "copying").rename(steps / str(number))


def run(monkeypatch, *options: str, meanwhile=()) -> int | str | None:
    monkeypatch.setattr(follow, "time", clock := Clock(*meanwhile))
    code = exit_code(evaluate.main, [*OPTIONS, *options])
    assert not clock.meanwhile
    return code


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def test_each_is_scored_once_in_order_and_the_last_step_ends_it(place, steps, scored, monkeypatch, capsys):  # noqa: F811
    add(steps, 12, 10)
    (steps / "11.orbax-checkpoint-tmp").mkdir()
    (steps / "13").mkdir()  # no manifest: not complete
    assert run(monkeypatch, meanwhile=[lambda: add(steps, 14), lambda: None, lambda: add(steps, LAST)]) == 0
    found = lines(place)
    assert [line["step"] for line in found] == [9, 10, 12, 14, LAST]
    assert [line["checkpoint"] for line in found] == [f"run/checkpoints/{line['step']}" for line in found]
    assert found[0]["tasks"] == {"colours": {"top1": 0.5}, "pairs": {"top1": 0.5}}
    assert len(scored) == 5 and follow.build_clip.call_count == 1  # pyright: ignore
    shown = capsys.readouterr().out
    assert "waiting: run has no checkpoint after step 12" in shown
    assert shown.count("waiting: run has no checkpoint after step 14") == 1  # in two looks
    assert "the run has ended at step 24" in shown
    assert sorted(path.name for path in place.glob("scores*")) == ["scores.jsonl"]
    assert run(monkeypatch) == 0 and len(scored) == 5 and lines(place) == found  # all were done before
    assert run(monkeypatch, "--tasks=pairs") == 0  # another question: on the same steps anew
    assert [line["step"] for line in lines(place)] == [9, 10, 12, 14, LAST] * 2 and scored[5:] == [["pairs"]] * 5


def test_a_killed_one_scores_what_is_missing(place, steps, scored, monkeypatch):  # noqa: F811
    add(steps, 12, LAST)
    real = follow.run_with

    def killed(opened, tasks, encoder, name, *rest):
        if name.endswith("12"):
            raise KeyboardInterrupt
        return real(opened, tasks, encoder, name, *rest)

    with monkeypatch.context() as context:
        context.setattr(follow, "run_with", killed)
        assert run(context) == 130
    assert [line["step"] for line in lines(place)] == [9]
    assert run(monkeypatch) == 0
    assert [line["step"] for line in lines(place)] == [9, 12, LAST] and len(scored) == 3


def test_one_that_the_run_deletes_is_passed_over(place, steps, scored, monkeypatch, capsys):  # noqa: F811
    add(steps, 12, LAST)

    def load(saved, mesh):
        if saved.path.name == "12":
            shutil.rmtree(saved.path)
            raise manifest.DamagedCheckpoint("checkpoint 12 is damaged")
        return {}

    monkeypatch.setattr(follow, "load_params", load)
    assert run(monkeypatch) == 0
    assert [line["step"] for line in lines(place)] == [9, LAST]
    shown = capsys.readouterr()
    assert "step 12 is passed over: the run has deleted it meanwhile" in shown.out and not shown.err


def test_one_that_the_run_writes_anew_is_scored_anew(place, steps, scored, monkeypatch, capsys):  # noqa: F811
    def rewrite():
        data = steps / "9" / "config" / "metadata"
        data.write_text(data.read_text().replace('"batch_size": 16', '"batch_size": 8'))
        manifest.write(steps / "9", manifest.Manifest(9, None, manifest.hash_files(steps / "9", files(steps / "9"))))
        add(steps, LAST)

    assert run(monkeypatch, meanwhile=[rewrite]) == 0
    found = lines(place)
    assert [line["step"] for line in found] == [9, 9, LAST] and found[0]["key"] != found[1]["key"]


def files(directory) -> list[str]:
    return [path for path in manifest.list_files(directory) if path != manifest.FILE]


def test_a_damaged_one_costs_none_of_the_others_and_the_exit_code_is_3(
    place,  # noqa: F811
    steps,
    scored,
    monkeypatch,
    capsys,
):
    add(steps, 12, LAST)
    (steps / "12" / "tokenizer" / "metadata").write_text("{}")
    assert run(monkeypatch) == 3
    assert [line["step"] for line in lines(place)] == [9, LAST]
    assert "error: step 12 is passed over" in capsys.readouterr().err


def test_storage_that_gives_nothing_is_asked_again_and_then_passed_over(place, steps, scored, monkeypatch, capsys):  # noqa: F811
    add(steps, LAST)
    answers = [OSError(5, "Input/output error"), OSError(5, "Input/output error"), {}, *[OSError(5, "gone dark")] * 3]

    def load(saved, mesh):
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(follow, "load_params", load)
    assert run(monkeypatch, meanwhile=[lambda: None] * 4) == 3
    assert [line["step"] for line in lines(place)] == [9] and not answers
    shown = capsys.readouterr()
    assert shown.out.count("waiting: step 9: [Errno 5] Input/output error") == 1
    assert "step 24 is passed over: [Errno 5] gone dark" in shown.err


def test_failed_tasks_are_in_the_line_and_the_exit_code_is_3_also_after_a_restart(
    place,  # noqa: F811
    steps,
    scored,
    monkeypatch,
    capsys,
):
    add(steps, LAST)
    failing = Evaluation({}, {"colours": "no images", "pairs": "no captions"})
    monkeypatch.setattr(evaluate, "run_tasks", lambda *_, **options: failing)
    assert run(monkeypatch) == 3
    assert [(line["tasks"], line["failed"]) for line in lines(place)] == [({}, failing.failures)] * 2
    assert "error: eval.tasks.colours: no images" in capsys.readouterr().err
    assert run(monkeypatch) == 3 and len(lines(place)) == 2


def test_tasks_come_from_the_config_of_each_step(place, steps, scored, monkeypatch, capsys):  # noqa: F811
    add(steps, LAST)
    path = steps / str(LAST) / "config" / "metadata"
    config = json.loads(path.read_text())
    config["eval"]["tasks"]["more"] = config["eval"]["tasks"].pop("pairs")
    path.write_text(json.dumps(config))
    step = steps / str(LAST)
    manifest.write(step, manifest.Manifest(LAST, None, manifest.hash_files(step, files(step))))
    assert run(monkeypatch) == 0
    assert scored == [["colours", "pairs"], ["colours", "more"]]
    assert run(monkeypatch, "--tasks=pairs") == 3  # which the second one has not
    assert [line["step"] for line in lines(place)] == [9, LAST, 9]
    assert "step 24 is passed over: --tasks=pairs: pairs is not among the tasks" in capsys.readouterr().err


def test_a_workdir_that_is_not_there_yet_is_waited_for(place, steps, scored, monkeypatch, capsys):  # noqa: F811
    add(steps, LAST)
    (place / "run").rename(place / "later")
    back = lambda: (place / "later").rename(place / "run")  # noqa: E731
    assert run(monkeypatch, meanwhile=[(place / "run").mkdir, (place / "run").rmdir, back]) == 0
    assert [line["step"] for line in lines(place)] == [9, LAST]
    assert capsys.readouterr().out.count("waiting: run has no checkpoint at all so far") == 1


def test_a_file_that_another_program_changes_stops_it(place, steps, scored, monkeypatch, capsys):  # noqa: F811
    add(steps, LAST)
    real = follow.run_with

    def meddle(*arguments):
        (place / "scores.jsonl").write_text('{"step": 1, "key": "", "tasks": {}}\n')
        return real(*arguments)

    monkeypatch.setattr(follow, "run_with", meddle)
    assert run(monkeypatch) == 3
    assert [line["step"] for line in lines(place)] == [1]
    assert "scores.jsonl was changed by another program meanwhile" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint=run"], "--checkpoint would be ignored beside --follow"),
        (["--ensemble=logits"], "--ensemble would be ignored beside --follow"),
        (["--report=page"], "--report would be ignored beside --follow"),
        (["--csv=a.csv"], "--csv would be ignored beside --follow"),
        (["--config.seed=3"], "config.seed=3: only training reads it"),
        (["--tasks=other"], "other is not among the tasks"),
        (["--config.eval.tasks['pairs'].source=gone.tar"], "gone.tar"),
        (["--num_processes=2", "--process_id=0", "--coordinator=localhost:1"], "--follow runs as one process, and 2"),
    ],
)
def test_what_would_be_ignored_or_cannot_work_is_refused(options, message, place, scored, monkeypatch, capsys):  # noqa: F811
    assert run(monkeypatch, *options) == 2
    assert message in capsys.readouterr().err and not scored and not (place / "scores.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--follow=run"], "--output=FILE.jsonl is missing"),
        (["--follow=", "--output=a.jsonl"], "--follow= must name a file or folder"),
        (["--follow=run", "--output=run/a.jsonl"], "--output=run/a.jsonl lies in the workdir"),
        (["--follow=run/checkpoints", "--output=run/a.jsonl"], "--output=run/a.jsonl lies in the workdir"),
        (["--follow=gs://b/run", "--output=gs://b/run/a.jsonl"], "lies in the workdir"),
        (["--follow=run/checkpoints/9", "--output=a.jsonl"], "checkpoints/9 is the directory of one checkpoint"),
        (["--follow=val.tar", "--output=a.jsonl"], "val.tar is a file; name the workdir"),
        (["--follow=run", "--output=classes.json"], "--output=classes.json: line 1 is not one of --follow's"),
        (["--follow=run", "--output=val.tar"], "val.tar"),
    ],
)
def test_wrong_places_are_refused(options, message, place, scored, monkeypatch, capsys):  # noqa: F811
    assert exit_code(evaluate.main, options) == 2
    assert message in capsys.readouterr().err and not scored


@pytest.mark.heavy
def test_results_are_those_of_one_checkpoint_and_nothing_is_compiled_twice(place, steps, monkeypatch):  # noqa: F811
    assert exit_code(evaluate.main, ["--checkpoint=run", "--output=one.json"]) == 0
    add(steps, LAST)
    programs = []
    real = follow.run_with

    def counted(*arguments):
        outcome = real(*arguments)
        programs.append(encoders._encode_image._cache_size() + encoders._encode_text._cache_size())
        return outcome

    monkeypatch.setattr(follow, "run_with", counted)
    assert run(monkeypatch) == 0
    one = json.loads((place / "one.json").read_text())["tasks"]
    assert [line["tasks"] for line in lines(place)] == [one, one] and programs[0] == programs[1]
