"""What processes compare before the first step, and how they tell what differs."""

import pathlib
import shutil
import threading

import jax
import numpy as np
import pytest

from clipjax.config import Config, FeatureKind
from clipjax.data.digests import spread
from clipjax.data.sources import ArraySource
from clipjax.data.tokenizers.build import build_tokenizer
from clipjax.evals.probe_tasks import FewShot
from clipjax.evals.retrieval import Retrieval
from clipjax.evals.runner import Task
from clipjax.evals.zero_shot import ZeroShot
from clipjax.runtime import consistency, processes
from clipjax.runtime.consistency import find_differences
from clipjax.training import fingerprints
from clipjax.training.decisions import Decisions

pytestmark = pytest.mark.newest


def report(host: str = "a", **facts: dict) -> dict:
    return {"host": host, "facts": {"config": {"seed": 0}, "code": {"x.py": "12", "jax": "1"}} | facts}


def test_equal_reports_are_fine_whatever_the_hosts():
    assert find_differences([report("a"), report("b"), report("c")]) == []


def test_a_difference_names_processes_section_field_values_and_remedy():
    other = {"config": {"seed": 1, "more": [2]}}
    assert find_differences([report("a"), report("b", **other), report("a"), report("c", **other)]) == [
        "processes 1, 3 (b, c) have another config than process 0 (a): more=[2] (process 0: 'absent'), "
        "seed=1 (process 0: 0); give every process the same config file and command line"
    ]


def test_every_section_that_differs_is_told():
    lines = find_differences([report(), report(code={"x.py": "34", "jax": "1"}, config={"seed": 2})])
    assert len(lines) == 2
    assert "has another config than process 0 (a): seed=2" in lines[0]
    assert "has another code than process 0 (a): x.py='34' (process 0: '12'); install the same version" in lines[1]


def test_many_differences_and_many_processes_are_cut_short():
    fields = {f"field_{i}": i for i in range(20)}
    (line,) = find_differences([report(), *[report("b", config={"seed": 0} | fields)] * 40])
    assert line.startswith("processes 1, 2, 3, 4, 5, 6, 7, 8 and 32 more (b) have another config")
    assert "and 12 more" in line and line.count("field_") == 8


def test_an_error_of_one_is_told_with_its_name_and_one_of_all_without():
    failed = {"host": "b", "error": "no data"}
    assert find_differences([report(), failed, report()]) == ["process 1 (b): no data"]
    assert find_differences([failed, failed]) == ["no data"]
    assert find_differences([report(), failed, failed | {"error": "no config"}]) == [
        "process 1 (b): no data",
        "process 2 (b): no config",
    ]


def run_processes(monkeypatch, works: list) -> list:
    """Each `work` in a thread that thinks it is a process; what `together` returned or raised in each."""
    here, texts, changed = threading.local(), {}, threading.Condition()

    def publish(key: str, value: str) -> None:
        with changed:
            texts[key] = value
            changed.notify_all()

    def fetch(key: str, *, timeout_seconds: float) -> str:
        with changed:
            assert changed.wait_for(lambda: key in texts, timeout=120)
            return texts[key]

    monkeypatch.setattr(jax, "process_count", lambda: len(works))
    monkeypatch.setattr(jax, "process_index", lambda: here.rank)
    monkeypatch.setattr(processes, "kv_set", publish)
    monkeypatch.setattr(processes, "kv_get", fetch)
    outcomes: list = [None] * len(works)

    def process(rank: int) -> None:
        here.rank = rank
        try:
            outcomes[rank] = works[rank]()
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_together_gives_each_its_own_result(monkeypatch):
    works = [lambda rank=rank: consistency.run_on_all("it", lambda: (rank, {"code": {"x": 1}})) for rank in range(3)]
    assert [result for result, _ in run_processes(monkeypatch, works)] == [0, 1, 2]


def test_one_that_fails_or_differs_makes_all_refuse_alike(monkeypatch):
    def fail() -> tuple:
        raise OSError("disk gone")

    fine = lambda: consistency.run_on_all("it", lambda: (None, {"code": {"x": 1}}))  # noqa: E731
    outcomes = run_processes(monkeypatch, [fine, lambda: consistency.run_on_all("it", fail)])
    assert [type(error) for error in outcomes] == [ValueError] * 2
    assert all(str(error).endswith(": disk gone") for error in outcomes)
    outcomes = run_processes(monkeypatch, [lambda: consistency.run_on_all("it", fail), fine])
    assert all(str(error).endswith(": disk gone") for error in outcomes)
    outcomes = run_processes(
        monkeypatch, [fine, lambda: consistency.run_on_all("it", lambda: (None, {"code": {"x": 2}}))]
    )
    assert all("has another code than process 0" in str(error) for error in outcomes)


class Damaged(ValueError):
    """An error with an exit code of its own."""


def test_errors_of_one_kind_keep_it_and_mixed_ones_do_not(monkeypatch):
    def work(error: Exception | None):
        def fail() -> tuple:
            if error is None:
                return None, {}
            raise error

        return lambda: consistency.run_on_all("it", fail, kinds=(Damaged,))

    damaged, other = Damaged("step 3 is damaged"), ValueError("no config")
    for errors, kind in (((None, damaged), Damaged), ((damaged, damaged), Damaged), ((damaged, other), ValueError)):
        outcomes = run_processes(monkeypatch, [work(error) for error in errors])
        assert [type(outcome) for outcome in outcomes] == [kind] * 2
        assert all("step 3 is damaged" in str(outcome) for outcome in outcomes)


def test_a_defect_keeps_its_traceback_and_the_others_end_too(monkeypatch):
    def fail() -> tuple:
        raise KeyError("defect")

    fine = lambda: consistency.run_on_all("it", lambda: (None, {}))  # noqa: E731
    first, second = run_processes(monkeypatch, [fine, lambda: consistency.run_on_all("it", fail)])
    assert isinstance(second, KeyError)
    assert isinstance(first, ValueError) and "KeyError('defect')" in str(first)


@pytest.mark.parametrize("shared", [True, False])
def test_a_workdir_that_is_not_shared_is_refused_by_all(monkeypatch, tmp_path, shared):
    folders = [tmp_path, tmp_path if shared else tmp_path / "own"]
    folders[1].mkdir(exist_ok=True)
    monkeypatch.setattr(consistency, "_SHARED_SECONDS", 0.5)
    outcomes = run_processes(
        monkeypatch, [lambda folder=folder: consistency.check_shared(folder) for folder in folders]
    )
    if shared:
        assert outcomes == [None, None]
    else:
        assert all("workdir of process 0='not seen' (process 0: 'seen'); the workdir" in str(it) for it in outcomes)
    assert not list(tmp_path.glob(".shared-probe*"))


def test_fields_of_a_machine_do_not_count():
    ours, theirs = Config(), Config()
    theirs.data.tfds_dir, theirs.data.num_workers, theirs.compile_cache = "/elsewhere", 3, None
    assert fingerprints.config_fingerprint(ours) == fingerprints.config_fingerprint(theirs)
    theirs.optim.learning_rate = 1.0
    facts = fingerprints.config_fingerprint(ours), fingerprints.config_fingerprint(theirs)
    assert [name for name in facts[0] if facts[0][name] != facts[1][name]] == ["optim.learning_rate"]


def test_code_is_every_file_of_the_package_and_the_versions(tmp_path, monkeypatch):
    facts = fingerprints.code_fingerprint()
    assert {"clipjax/training/step.py", "clipjax/models/vit.py", "jax", "python", "numpy"} <= facts.keys()
    copy = tmp_path / "clipjax"
    shutil.copytree(pathlib.Path(fingerprints.__file__).parents[1], copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fingerprints, "__file__", str(copy / "training" / "fingerprints.py"))
    assert fingerprints.code_fingerprint() == facts
    with (copy / "models" / "vit.py").open("a") as file:
        file.write("\n")
    assert [name for name, value in fingerprints.code_fingerprint().items() if facts[name] != value] == [
        "clipjax/models/vit.py"
    ]


def pictures(seed: int, size: int = 40) -> ArraySource:
    images = np.random.default_rng(seed).integers(0, 256, (size, 4, 4, 3)).astype(np.uint8)
    return ArraySource(images, [f"caption {i}" for i in range(size)])


def test_data_is_told_by_size_and_contents():
    facts = fingerprints.describe_source(pictures(0))
    assert facts == fingerprints.describe_source(pictures(0))
    other = fingerprints.describe_source(pictures(1))
    assert [name for name in facts if facts[name] != other[name]] == ["contents"]
    shorter = fingerprints.describe_source(pictures(0, size=39))
    assert (facts["samples"], shorter["samples"]) == (40, 39)
    assert facts["shards"] == 1
    unusable = fingerprints.describe_source(ArraySource([b"", b""], [[""], [""]]))
    assert unusable["samples"] == 2


def test_a_large_source_is_sampled_from_end_to_end():
    assert spread(5, 16) == [0, 1, 2, 3, 4]
    positions = spread(10**9, 1000)
    assert (positions[0], positions[-1], len(set(positions))) == (0, 10**9 - 1, 1000)


def test_facts_of_data_and_tokenizer():
    facts = fingerprints.data_fingerprint({"train": pictures(0)}, build_tokenizer("bytes"), {"init_from": None})
    assert facts.keys() == {"tokenizer", "train samples", "train shards", "train contents"}


def test_texts_of_tasks_are_told_by_their_contents():
    def task(measure):
        return Task(measure, Config(), [], None)

    tasks = {
        "a": task(ZeroShot(["cat", "dog"], ["a {}"])),
        "b": task(ZeroShot(["dog", "cat"], ["a {}"])),
        "c": task(ZeroShot(["cat", "dog"], ["a {}"], paraphrases={"cat": ["a", "b"]})),
        "d": task(FewShot(FeatureKind.EMBEDDING, 3, (["cat", "dog"], ["a {}"]))),
        "e": task(FewShot(FeatureKind.EMBEDDING, 3)),
        "f": task(Retrieval()),
    }
    facts = fingerprints.prompts_fingerprint(tasks)
    assert list(facts) == [f"eval.tasks.{name} texts" for name in "abcd"] and len(set(facts.values())) == 4
    same = {"a": task(ZeroShot(("cat", "dog"), ("a {}",)))}
    assert fingerprints.prompts_fingerprint(same).items() <= facts.items()


def test_steps_in_the_workdir(tmp_path):
    none = {"steps in the workdir": "none", "decisions": "none"}
    assert fingerprints.checkpoint_fingerprint(tmp_path, Decisions(tmp_path)) == none
    for name in ("9", "12", "12.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    facts = fingerprints.checkpoint_fingerprint(tmp_path, Decisions(tmp_path))
    assert facts == {"steps in the workdir": "9, 12", "decisions": "none"}


def test_other_decisions_are_another_run(tmp_path):
    seen = []
    for sample in (5, 6):
        folder = tmp_path / str(sample)
        folder.mkdir()
        assert not Decisions(folder).keep({3: sample, 40: 7})
        seen.append(fingerprints.checkpoint_fingerprint(folder, Decisions(folder))["decisions"])
    assert all(each.startswith("0 rollbacks and 2 stand-ins (") for each in seen)
    assert seen[0] != seen[1]
