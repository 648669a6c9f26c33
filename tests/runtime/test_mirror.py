"""The copy of a folder on a store: what is complete there is complete, whatever fails in between."""

import os
import shutil
import threading
import time

import pytest

from clipjax.runtime import objects
from clipjax.runtime.lease import LeaseLost
from clipjax.runtime.mirror import Mirror
from clipjax.runtime.staging import Layout, fill
from tests.runtime.stores import BUCKET
from tests.waiting import wait_for

PLAIN = ("plain", "sub", "log", "deep", "new")
LAYOUT = Layout("units", "seal", str.isdecimal, lambda *_: False)


class Held:
    """A lease that is held until it is lost."""

    token, retry_seconds, lost, released = "token", None, False, False

    def require(self):
        if self.lost:
            raise LeaseLost(None, "it is another run's", "")

    def watch(self, on_lost):
        self.on_lost = on_lost

    def release(self, *, delete=False):
        self.released = True


@pytest.fixture(params=["gs", "s3"])
def mirror(request, tmp_path, monkeypatch):
    server = request.getfixturevalue({"gs": "gcs", "s3": "s3"}[request.param])
    monkeypatch.setenv("CLIPJAX_MIRROR_SECONDS", "0.05")
    made = open_mirror(tmp_path, f"{request.param}://{BUCKET}/mirror/{request.node.originalname}")
    made.server = server
    yield made
    server.reset()
    made.close(0.0)
    for path in objects.list_folder(made.place):
        objects.delete(f"{made.place}/{path}")


def open_mirror(folder, place, *, continues=False):
    copies, found = fill(folder, place, LAYOUT, plain=PLAIN, continues=continues)
    mirror = Mirror(folder, place, Held(), layout=LAYOUT, copies=copies, found=found)
    mirror.said = []
    return mirror


def start(mirror):
    mirror.start(say=mirror.said.append, on_lost=mirror.said.append)
    return mirror


def write(mirror, **files):
    for path, content in files.items():
        target = mirror.folder / path.replace("__", "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def write_unit(mirror, unit, content=b"x"):
    write(mirror, **{f"units__{unit}__{name}": content for name in ("a", "deep__b", "seal")})


def on_store(mirror):
    return sorted(objects.list_folder(mirror.place))


def unit_files(*units):
    return sorted(f"units/{unit}/{name}" for unit in units for name in ("a", "deep/b", "seal"))


def test_plain_files_follow(mirror):
    write(mirror, log=b"1", deep__log=b"2", **{".owner": b"", "log.tmp": b"", ".write-probe": b"", "units__9__x": b"9"})
    start(mirror)
    wait_for(lambda: on_store(mirror) == ["deep/log", "log"])
    write(mirror, log=b"1 and more")
    wait_for(lambda: objects.read_bytes(f"{mirror.place}/log", 100) == b"1 and more")
    write(mirror, log=b"the end")
    assert mirror.close() == "" and objects.read_bytes(f"{mirror.place}/log", 100) == b"the end"
    assert mirror._lease.released and not mirror.said
    mirror.server.reset()
    assert mirror.flush() == "" and mirror.server.count("^PUT") == 0  # nothing is sent twice


def test_a_unit_is_sent_with_its_seal_last_though_it_is_deleted_here(mirror):
    write_unit(mirror, 1)
    write(mirror, log=b"up to 1")
    done = []
    mirror.commit("1", then=lambda: done.append(on_store(mirror)))
    shutil.rmtree(mirror.folder / "units" / "1")
    assert start(mirror).flush() == "" and on_store(mirror) == ["log", *unit_files(1)]
    assert done == [["log", *unit_files(1)]]
    sent = [request for request in mirror.server.requests if request.startswith("PUT")]
    assert "/log" in sent[0] and "units/1/seal" in sent[-1] and len(sent) == 4
    assert not (mirror.folder / ".pinned" / "1").exists()


@pytest.mark.parametrize("pattern", ["^PUT .*1/deep/b", "^PUT .*1/seal"])
def test_a_unit_that_is_not_whole_has_no_seal(mirror, pattern, impatient):
    fault = mirror.server.plant(pattern, status=503)
    write_unit(mirror, 1)
    start(mirror).commit("1")
    wait_for(lambda: mirror.said)
    assert "units/1/seal" not in on_store(mirror) and "training goes on, and tries again" in mirror.said[0]
    fault.times = 0
    wait_for(lambda: len(mirror.said) == 2)
    assert on_store(mirror) == unit_files(1) and mirror.said[1].endswith("takes files again")


def test_a_unit_of_which_the_store_has_lost_a_part_gets_no_seal(mirror):
    mirror.server.plant(
        "^PUT .*1/a", times=1, status=200, headers={"ETag": "1", "x-goog-generation": "1"}
    )  # as if it took it
    write_unit(mirror, 1)
    start(mirror).commit("1")
    wait_for(lambda: mirror.said)
    assert "the store does not list a file as it was sent" in mirror.said[0]
    assert mirror.flush() == "" and on_store(mirror) == unit_files(1)


def test_an_old_unit_stays_until_a_newer_one_is_complete(mirror, impatient):
    write_unit(mirror, 1)
    start(mirror).commit("1")
    assert mirror.flush() == ""
    fault = mirror.server.plant("^PUT .*units/2/seal", status=503)
    write_unit(mirror, 2)
    mirror.commit("2")
    mirror.remove("1")
    wait_for(lambda: mirror.said)
    assert set(unit_files(1)) <= set(on_store(mirror))
    fault.times = 0
    assert mirror.flush(5.0) == "" and on_store(mirror) == unit_files(2)
    deleted = [request for request in mirror.server.requests if "DELETE" in request or "?delete" in request]
    assert deleted


def test_what_nobody_needs_any_more_is_not_sent(mirror, impatient):
    fault = mirror.server.plant("^PUT .*units/1/", status=503)
    for unit in (1, 2, 3):
        write_unit(mirror, unit)
        mirror.commit(str(unit))
    mirror.remove("2")
    start(mirror)
    wait_for(lambda: mirror.said)
    mirror.remove("1")
    fault.times = 0
    assert mirror.flush(5.0) == "" and on_store(mirror) == unit_files(3)
    assert mirror.server.count("^PUT .*units/2/") == 0


def test_a_unit_that_is_set_aside_loses_its_seal_and_keeps_its_contents(mirror):
    write_unit(mirror, 1)
    start(mirror).commit("1")
    assert mirror.flush() == ""
    (mirror.folder / "units" / "1").rename(mirror.folder / "units" / "1.bad")
    mirror.rename("1", "1.bad")
    assert mirror.flush() == "" and on_store(mirror) == unit_files("1.bad")
    write_unit(mirror, 1, b"anew")
    mirror.commit("1")
    assert mirror.flush() == "" and on_store(mirror) == unit_files("1", "1.bad")
    assert objects.read_bytes(f"{mirror.place}/units/1/a", 10) == b"anew"


def test_marks_of_complete_units_follow(mirror):
    write_unit(mirror, 1)
    start(mirror).commit("1")
    assert mirror.flush() == ""
    write(mirror, units__1__good=b"")
    (mirror.folder / "units" / "1" / "seal.new").write_bytes(b"with the best metric")
    (mirror.folder / "units" / "1" / "seal.new").replace(mirror.folder / "units" / "1" / "seal")
    assert mirror.flush() == "" and on_store(mirror) == sorted([*unit_files(1), "units/1/good"])
    assert objects.read_bytes(f"{mirror.place}/units/1/seal", 100) == b"with the best metric"


def test_the_seal_of_a_unit_that_is_made_anew_waits_for_its_contents(mirror):
    write_unit(mirror, 1, b"old")
    start(mirror).commit("1")
    assert mirror.flush() == ""
    write_unit(mirror, 1, b"new")  # and is committed in a moment
    assert mirror.flush() == "" and objects.read_bytes(f"{mirror.place}/units/1/seal", 10) == b"old"
    mirror.commit("1")
    assert mirror.flush() == "" and objects.read_bytes(f"{mirror.place}/units/1/seal", 10) == b"new"


def test_what_a_killed_run_left_is_deleted_or_written_anew(mirror, tmp_path):
    for path in ("units/1/a", "units/1/stale", "units/2/a"):
        objects.write_bytes(f"{mirror.place}/{path}", b"half")
    second = open_mirror(tmp_path / "second", mirror.place)
    write_unit(second, 1)
    start(second).commit("1")
    assert second.close() == "" and on_store(second) == unit_files(1)


def test_trouble_that_stays_is_told_at_the_end_with_the_place_of_what_is_missing(mirror, impatient):
    mirror.server.plant("", status=503)
    write(mirror, log=b"1")
    start(mirror)
    left = mirror.close(0.0)
    assert "not everything is on" in left and "503" in left and str(mirror.folder) in left
    assert len(mirror.said) <= 1


def test_a_call_never_waits_for_the_store(mirror):
    release = threading.Event()
    mirror.server.plant("^PUT", times=1, before=lambda: release.wait(20))
    write(mirror, log=b"1")
    start(mirror)
    wait_for(lambda: mirror.server.count("^PUT"))
    begin = time.monotonic()
    write_unit(mirror, 1)
    mirror.commit("1")
    mirror.remove("0")
    mirror.rename("0", "0.bad")
    assert time.monotonic() - begin < 0.2
    release.set()
    assert mirror.flush() == "" and "units/1/seal" in on_store(mirror)


def test_nothing_is_written_once_the_lease_is_lost(mirror):
    start(mirror)
    mirror._lease.lost = True
    mirror.server.reset()
    write(mirror, log=b"1")
    write_unit(mirror, 1)
    mirror.commit("1")
    assert mirror.flush() == "it is another run's"
    with pytest.raises(LeaseLost):
        mirror.send(mirror.folder / "log")
    assert mirror.server.count("^PUT") == 0


def test_a_file_can_be_waited_for(mirror, impatient):
    write(mirror, decisions=b"1")
    mirror.send(mirror.folder / "decisions")
    assert on_store(mirror) == ["decisions"]
    mirror.server.plant("^PUT", status=503)
    with pytest.raises(OSError, match="503"):
        mirror.send(mirror.folder / "decisions")


def set_aside(mirror, unit):
    (mirror.folder / "units" / unit).rename(mirror.folder / "units" / f"{unit}.bad")
    mirror.rename(unit, f"{unit}.bad")


def test_a_unit_that_is_made_anew_before_it_was_sent_is_the_one_that_is_sent(mirror, impatient):
    fault = mirror.server.plant("^PUT .*units/1/", status=503)
    write_unit(mirror, 1, b"bad")
    start(mirror).commit("1")
    wait_for(lambda: mirror.said)
    set_aside(mirror, "1")
    write_unit(mirror, 1, b"good")
    mirror.commit("1")
    fault.times = 0
    assert mirror.flush(5.0) == "" and set(unit_files(1)) <= set(on_store(mirror))
    assert objects.read_bytes(f"{mirror.place}/units/1/a", 10) == b"good"
    assert not any((mirror.folder / ".pinned").iterdir())


@pytest.mark.parametrize("is_made_anew", [False, True])
def test_a_kill_forgets_no_unit_that_was_set_aside(mirror, is_made_anew):
    write_unit(mirror, 1, b"bad")
    start(mirror).commit("1")
    assert mirror.close() == ""
    set_aside(mirror, "1")  # and the process is killed before its thread sees that
    if is_made_anew:
        write_unit(mirror, 1, b"good")
    second = open_mirror(mirror.folder, mirror.place, continues=True)
    assert (second.folder / "units" / "1").exists() == is_made_anew
    assert start(second).flush() == ""
    assert on_store(second) == (unit_files(1, "1.bad") if is_made_anew else unit_files("1.bad"))
    assert objects.read_bytes(f"{mirror.place}/units/1.bad/a", 10) == b"bad"
    third = open_mirror(mirror.folder, mirror.place, continues=True)  # it is done once only
    assert start(third).flush() == "" and on_store(third) == on_store(second)
    assert second.close() == third.close() == ""


def test_a_kill_while_a_unit_is_sent_anew_does_not_lose_it(mirror, tmp_path):
    write_unit(mirror, 1, b"old")
    start(mirror).commit("1")
    assert mirror.close() == ""
    shutil.rmtree(mirror.folder / "units" / "1")
    write_unit(mirror, 1, b"new")
    objects.delete(f"{mirror.place}/units/1/seal")  # so far the upload had come
    second = open_mirror(mirror.folder, mirror.place, continues=True)
    assert start(second).close() == "" and on_store(second) == unit_files(1)
    assert objects.read_bytes(f"{mirror.place}/units/1/a", 10) == b"new"


def test_a_file_that_cannot_be_read_stands_in_nothings_way(mirror):
    os.mkfifo(mirror.folder / "plain")
    write_unit(mirror, 1)
    os.mkfifo(mirror.folder / "units" / "1" / "pipe")
    mirror.commit("1")
    write_unit(mirror, 2)
    mirror.commit("2")
    assert start(mirror).flush() == "" and on_store(mirror) == sorted(["units/1/a", "units/1/deep/b", *unit_files(2)])
    assert mirror.flush() == ""
    assert [line for line in mirror.said if "plain" in line and "not sent" in line] == mirror.said[:1]
    assert "units/1 is not on" in mirror.said[1] and len(mirror.said) == 2


def test_what_the_store_cannot_copy_stands_in_nothings_way(mirror):
    write_unit(mirror, 1)
    start(mirror).commit("1")
    assert mirror.flush() == ""
    mirror.server.plant("1.bad.*deep|deep.*1.bad", status=403)
    set_aside(mirror, "1")
    write_unit(mirror, 2)
    mirror.commit("2")
    assert mirror.flush() == ""
    assert on_store(mirror) == sorted(["units/1.bad/a", "units/1.bad/seal", *unit_files(2)])
    assert "does not hold all of 1" in mirror.said[0]


def test_an_error_of_any_kind_is_told_and_ends_no_thread(mirror):
    def fails():
        raise RuntimeError("a surprise")

    mirror._lease.require = fails
    write(mirror, log=b"1")
    start(mirror)
    wait_for(lambda: mirror.said)
    assert "RuntimeError: a surprise" in mirror.said[0]
    del mirror._lease.require
    wait_for(lambda: on_store(mirror) == ["log"])


def test_no_write_is_tried_again_for_longer_than_the_lease_allows(mirror):
    mirror._lease.retry_seconds = 0.0
    mirror.server.plant("^PUT", status=503)
    write(mirror, decisions=b"1")
    with pytest.raises(OSError, match="503"):
        mirror.send(mirror.folder / "decisions")
    assert mirror.server.count("^PUT") == 1


def test_nothing_is_deleted_once_the_lease_is_lost(mirror):
    write_unit(mirror, 1)
    start(mirror).commit("1")
    assert mirror.flush() == ""
    mirror.server.plant("^GET .*prefix=.*units/1", times=1, after=lambda: setattr(mirror._lease, "lost", True))
    write_unit(mirror, 1, b"anew")
    mirror.commit("1")
    assert mirror.flush() == "it is another run's"
    assert on_store(mirror) == unit_files(1) and mirror.server.count(r"DELETE|\?delete") == 0


def test_a_store_that_is_away_is_not_waited_for_once_for_each_file(mirror):
    mirror._lease.retry_seconds = 0.0
    mirror.server.plant("^PUT", status=503)
    write(mirror, **{f"deep__{i}": b"1" for i in range(40)})
    assert "503" in mirror.flush(0.0) and mirror.server.count("^PUT") < 10
    mirror.server.reset()
    assert mirror.flush(0.0) == "" and len(on_store(mirror)) == 40


def test_a_store_that_is_away_for_a_moment_loses_nothing_of_what_is_set_aside(mirror):
    mirror._lease.retry_seconds = 0.0
    write_unit(mirror, 1)
    start(mirror).commit("1")
    assert mirror.flush() == ""
    mirror.server.plant("1.bad.*deep|deep.*1.bad", status=503, times=1)
    set_aside(mirror, "1")
    assert mirror.flush(5.0) == "" and on_store(mirror) == unit_files("1.bad")


def test_a_file_that_the_store_refuses_keeps_no_other_back(mirror):
    mirror.server.plant("^PUT .*deep/00", status=400)
    write(mirror, **{f"deep__{i:02d}": b"1" for i in range(20)})
    assert "400" in mirror.flush(0.0) and len(on_store(mirror)) == 19
