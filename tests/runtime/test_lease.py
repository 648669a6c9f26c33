"""The lease of a folder of a store: one holder at a time, passed on when it is dead, and lost with a reason."""

import json
import threading
import time

import pytest

from clipjax.runtime import lease as lease_module
from clipjax.runtime import objects
from clipjax.runtime.lease import VARIABLE, Lease, LeaseLost, refuse_held
from tests.runtime.stores import BUCKET

SECONDS = 1.0


@pytest.fixture(params=["gs", "s3"])
def place(request, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(SECONDS))
    request.getfixturevalue({"gs": "gcs", "s3": "s3"}[request.param])
    place = f"{request.param}://{BUCKET}/lease/{request.node.originalname}"
    yield place
    objects.delete(f"{place}/.owner")


def die(lease: Lease) -> None:
    """End a holder as a kill does."""
    lease._ended.set()
    lease._thread.join()


def test_a_second_run_is_refused_while_the_first_lives(place):
    first = Lease(place)
    time.sleep(1.2 * SECONDS)  # it is renewed
    said = []
    with pytest.raises(ValueError, match=f"--workdir={place}: another run holds it: process .* on host .* wait for it"):
        Lease(place, tell=said.append)
    assert len(said) == 1 and "has an owner; waiting up to 1 s" in said[0]
    first.require()
    first.release()
    start = time.monotonic()
    second = Lease(place, tell=said.append)
    assert time.monotonic() - start < SECONDS / 2 and len(said) == 1 and not second.continues
    second.release()


def test_a_dead_holder_is_followed_after_its_time_and_never_writes_again(place):
    first = Lease(place)
    die(first)
    start, said = time.monotonic(), []
    second = Lease(place, tell=said.append)
    assert SECONDS <= time.monotonic() - start < 4 * SECONDS and said
    first._ended.clear()  # it was only asleep
    lost = []
    first.watch(lost.append)
    with pytest.raises(LeaseLost, match="is not this run's any more .*another run holds it: process"):
        first.require()
    assert len(lost) == 1 and "nothing more is written there" in lost[0]
    first.release()
    second.require()
    second.release()


def test_the_next_start_on_the_same_machine_does_not_wait(place):
    first = Lease(place)
    die(first)
    said = []
    second = Lease(place, own_token=first.token, tell=said.append)
    assert second.continues and not said
    second.release()
    third = Lease(place, own_token=second.token)
    assert third.continues
    third.release()
    assert not Lease(place, own_token=second.token).continues


def test_folders_that_others_hold_are_refused_together(place):
    places, said = [f"{place}/{name}" for name in ("none", "free", "dead", "held")], []
    free, dead, held = (Lease(each) for each in places[1:])
    free.release()
    die(dead)
    start = time.monotonic()
    refuse_held(places[:2], said.append)
    assert time.monotonic() - start < SECONDS / 2 and not said
    refuse_held(places[:3], said.append)
    assert SECONDS <= time.monotonic() - start < 4 * SECONDS
    with pytest.raises(ValueError, match=f"--workdir={places[3]}: another run holds it"):
        refuse_held(places, said.append)
    assert len(said) == 2 and f"{places[2]} has an owner (and 1 more like it); waiting up to 1 s" in said[1]
    held.require()  # nothing was written
    held.release()
    assert not objects.exists(f"{places[0]}/.owner")
    for each in places:
        objects.delete(f"{each}/.owner")


def test_two_that_start_at_once(place):
    found = []

    def take():
        try:
            found.append(Lease(place, tell=lambda _: None))
        except ValueError as error:
            found.append(error)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    leases = [each for each in found if isinstance(each, Lease)]
    assert len(found) == 4 and len(leases) == 1
    leases[0].release()


def test_an_answer_that_is_lost_is_no_loss(gcs, monkeypatch, impatient):
    monkeypatch.setenv(VARIABLE, "600")
    lease = Lease(f"gs://{BUCKET}/lease/answer")
    gcs.plant("^PUT .*owner", times=1, after=lambda: time.sleep(0.8))
    for _ in range(2):
        try:
            lease._renew()
        except OSError:
            continue
    lease.require()
    assert not lease._lost
    lease.release()


def test_a_store_that_is_away_is_no_loss_and_a_deleted_object_comes_back(gcs, monkeypatch, impatient):
    monkeypatch.setenv(VARIABLE, "600")
    place = f"gs://{BUCKET}/lease/away"
    lease = Lease(place)
    gcs.plant("", status=503)
    with pytest.raises(OSError, match="503"):
        lease._renew()
    gcs.reset()
    objects.delete(f"{place}/.owner")
    lease._renew()
    lease.require()
    assert json.loads(objects.read_bytes(f"{place}/.owner", 10_000))["token"] == lease.token
    lease.release()


def test_what_others_write_there_is_no_trouble(gcs, monkeypatch):
    monkeypatch.setattr("clipjax.runtime.lease.SECONDS", 0.3)
    for number, content in enumerate((b"", b"[]", b"{" * 100_000 + b"1", b'{"seconds": -1, "pid": "\x1b[31m"}')):
        place = f"gs://{BUCKET}/lease/others-{number}"
        objects.write_bytes(f"{place}/.owner", content[:60_000])
        Lease(place, tell=lambda _: None).release()


def test_a_start_that_is_killed_once_it_has_the_lease_is_followed_by_the_next_one(place):
    first = Lease(place)
    die(first)
    for _ in range(2):  # neither has kept its token
        killed = Lease(place, own_token=first.token)
        assert killed.continues
        die(killed)
    other = Lease(place, tell=lambda _: None)
    die(other)
    last = Lease(place, own_token=first.token, tell=lambda _: None)
    assert not other.continues and not last.continues
    last.release()


def test_a_start_whose_answer_is_lost_goes_on_from_the_last_one(place, monkeypatch):
    first = Lease(place)
    first.release()
    replace, lost = objects.replace, [True]

    def replace_once(*args):
        version = replace(*args)
        return None if lost and lost.pop() else version

    monkeypatch.setattr(objects, "replace", replace_once)
    said = []
    second = Lease(place, own_token=first.token, tell=said.append)
    assert second.continues and not said
    assert not lost
    second._renew()
    second.require()
    second.release()


def test_the_time_of_a_lease_counts_from_the_request_on(gcs, monkeypatch):
    monkeypatch.setenv(VARIABLE, "600")
    place = f"gs://{BUCKET}/lease/time"
    gcs.plant("^PUT .*owner", delay=0.3, times=2)
    start = lease_module._now()
    lease = Lease(place)
    assert lease._renewed_at < start + 0.3
    start = lease_module._now()
    lease._renew()
    assert lease._renewed_at < start + 0.3
    lease.release()


def test_a_lease_that_was_lost_is_not_deleted(place):
    first = Lease(place)
    die(first)
    second = Lease(place, tell=lambda _: None)
    first._ended.clear()
    first.release(delete=True)
    second.require()
    assert json.loads(objects.read_bytes(f"{place}/.owner", 10_000))["token"] == second.token
    second.release()


def test_a_folder_without_locks_may_have_another_user(place):
    first = Lease(place)
    with pytest.raises(ValueError, match="another run holds it"):
        Lease(place, own_token=first.token, tell=lambda _: None, is_locked=False)
    die(first)
    second = Lease(place, own_token=first.token, tell=lambda _: None, is_locked=False)
    assert second.continues
    second.release()
