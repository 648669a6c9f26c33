"""Objects of stores: read by range, listed, written, and what faults of the network and the server do to that."""

import concurrent.futures
import pickle
import time

import numpy as np
import pytest

from clipjax.runtime import objects
from clipjax.runtime.storage import FileChanged, is_address, open_file
from tests.runtime.stores import BUCKET

CONTENT = np.random.default_rng(0).bytes(3_000_000)
KINDS = ("gs", "s3")


@pytest.fixture(params=KINDS)
def store(request):
    """The server of a store, and the address of a folder there."""
    server = request.getfixturevalue({"gs": "gcs", "s3": "s3"}[request.param])
    return server, f"{request.param}://{BUCKET}/{request.node.originalname}"


@pytest.fixture(params=(*KINDS, "http"))
def file(request):
    """A server, and the address of an object there with CONTENT."""
    if request.param == "http":
        server = request.getfixturevalue("web")
        server.backend.contents["/a b.tar"] = CONTENT
        return server, f"{server.url}/a%20b.tar"
    server = request.getfixturevalue({"gs": "gcs", "s3": "s3"}[request.param])
    place = f"{request.param}://{BUCKET}/file/{request.node.name}/a b#%é.tar"
    objects.write_bytes(place, CONTENT)
    server.reset()
    return server, place


def test_reads_by_range(file):
    _, place = file
    opened = open_file(place)
    assert opened.size == len(CONTENT) and opened.version == open_file(place).version
    assert opened.read(0, 10) == CONTENT[:10] and opened.read(1_000_003, 500) == CONTENT[1_000_003:1_000_503]
    assert opened.read(opened.size - 5, 100) == CONTENT[-5:]
    assert opened.read(opened.size, 10) == opened.read(opened.size + 7, 10) == opened.read(3, 0) == b""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda i: opened.read(i * 100_000, 100_000), range(30))
    assert b"".join(parts) == CONTENT


def test_an_open_object_goes_to_other_processes(file):
    _, place = file
    assert pickle.loads(pickle.dumps(open_file(place))).read(7, 9) == CONTENT[7:16]


@pytest.mark.parametrize(
    "fault",
    [{"status": 503}, {"status": 500}, {"status": 429}, {"share": 0.5}, {"share": 0.0}, {"delay": 0.8}],
    ids=["503", "500", "429", "half a body", "no body", "slow first byte"],
)
def test_a_fault_that_passes_is_not_seen(file, fault, impatient):
    server, place = file
    opened = open_file(place)
    planted = server.plant("^GET", times=1, **fault)
    assert opened.read(100, 1_000_000) == CONTENT[100:1_000_100]
    assert planted.hits == 1 and server.count("^GET") == 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"status": 503}, "the server answers 503 Service Unavailable, after retries"),
        ({"delay": 2.0}, "cannot be reached"),
    ],
    ids=["503", "slow"],
)
def test_a_fault_that_stays_ends_in_time_with_one_sentence(file, fault, said, impatient):
    server, place = file
    opened = open_file(place)
    server.plant("^GET", **fault)
    start = time.monotonic()
    with pytest.raises(OSError, match=said) as failed:
        opened.read(0, 1000)
    assert time.monotonic() - start < 4 and failed.value.filename == place and "\n" not in str(failed.value)
    assert server.count("^GET") == 3


def test_half_a_body_always_is_an_error(file, impatient):
    server, place = file
    opened = open_file(place)
    server.plant("^GET", share=0.5)
    with pytest.raises(OSError) as failed:
        opened.read(0, 1_000_000)
    assert failed.value.filename == place


def test_a_server_that_ignores_ranges_is_refused(web):
    web.backend.contents["/a"] = CONTENT
    real = web.backend
    web.backend = lambda method, path, headers, body: real(
        method, path, {name: value for name, value in headers.items() if name != "range"}, body
    )
    with pytest.raises(OSError, match="its server gives no parts of files; download it"):
        open_file(f"{web.url}/a").read(0, 10)


@pytest.mark.parametrize("size", [len(CONTENT), len(CONTENT) + 5, 10])
def test_a_changed_object_is_told(file, size):
    server, place = file
    opened = open_file(place)
    changed = CONTENT[::-1][:size].ljust(size, b"x")
    if place.startswith("http:"):
        server.backend.contents["/a b.tar"] = changed
    else:
        objects.write_bytes(place, changed)
    with pytest.raises(FileChanged, match="another program has written the object anew"):
        opened.read(1000, 1000)


def test_an_object_that_is_gone(file):
    server, place = file
    opened = open_file(place)
    if place.startswith("http:"):
        del server.backend.contents["/a b.tar"]
    else:
        objects.delete(place)
        objects.delete(place)
    with pytest.raises(FileNotFoundError, match="there is no object"):
        opened.read(0, 1000)
    with pytest.raises(FileNotFoundError, match="there is no object"):
        open_file(place)
    assert not objects.exists(place)


def test_a_bucket_that_is_not_there(store):
    _, folder = store
    place = f"{folder.partition('://')[0]}://no-such-bucket/x"
    for work in (
        lambda: open_file(place),
        lambda: objects.read_bytes(place, 10),
        lambda: objects.list_folder(place),
        lambda: objects.write_bytes(place, b""),
    ):
        with pytest.raises(FileNotFoundError, match="there is no bucket no-such-bucket") as failed:
            work()
        assert failed.value.filename == place


@pytest.mark.parametrize("status", [401, 403])
def test_refused_access_is_not_tried_again(store, status):
    server, folder = store
    server.plant("", status=status)
    with pytest.raises(PermissionError, match=f"the store refuses access \\({status}"):
        objects.read_bytes(f"{folder}/x", 10)
    assert server.count("^GET") == 1


def test_credentials_that_have_expired_are_told(s3, monkeypatch):
    answer = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
    monkeypatch.setattr(s3, "backend", lambda *_: (400, {}, answer))
    with pytest.raises(PermissionError, match="the credentials have expired; set AWS_ACCESS_KEY_ID"):
        objects.read_bytes(f"s3://{BUCKET}/x", 10)


def test_no_server(monkeypatch, impatient):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "127.0.0.1:9")
    with pytest.raises(TimeoutError, match="the store cannot be reached"):
        open_file("gs://b/x")


def test_no_credentials(monkeypatch, impatient, tmp_path):
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HTTP_PROXY", "http_proxy"):  # the addresses at which a machine in a cloud asks for its role
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("clipjax.runtime.connections._boto3_credentials", lambda: None)  # moto gives boto3 some
    for place, remedy in {"gs://b/x": "gcloud auth", "s3://b/x": "AWS_ACCESS_KEY_ID"}.items():
        with pytest.raises(PermissionError, match=f"no credentials were found; .*{remedy}"):
            open_file(place)


def test_a_profile_gives_credentials_where_boto3_is_installed(s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    keys = "[other]\naws_access_key_id = of-the-profile\naws_secret_access_key = x\nregion = eu-west-1\n"
    (tmp_path / "credentials").write_text(keys)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "other")
    sent, real = [], s3.backend
    monkeypatch.setattr(s3, "backend", lambda *request: sent.append(request[2]["authorization"]) or real(*request))
    objects.write_bytes(f"s3://{BUCKET}/profile", b"1")
    assert "Credential=of-the-profile/" in sent[0]


def test_small_objects(store):
    _, folder = store
    objects.write_bytes(f"{folder}/a", b"one")
    assert objects.read_bytes(f"{folder}/a", 3) == b"one" and objects.exists(f"{folder}/a")
    with pytest.raises(ValueError, match="is larger than 2 bytes"):
        objects.read_bytes(f"{folder}/a", 2)
    with pytest.raises(FileNotFoundError):
        objects.read_bytes(f"{folder}/b", 2)


def test_large_files_go_in_parts(store, tmp_path, monkeypatch):
    server, folder = store
    monkeypatch.setattr(objects, "PART_BYTES", 5 * 2**20)
    (tmp_path / "large").write_bytes(CONTENT * 4)
    planted = server.plant("^PUT .*partNumber", times=1, status=503)
    objects.write_file(f"{folder}/large", tmp_path / "large")
    assert planted.hits == 1 and server.count("^PUT .*partNumber") == 4
    opened = open_file(f"{folder}/large")
    assert opened.size == 4 * len(CONTENT) and opened.read(0, opened.size) == CONTENT * 4


def test_conditional_writes(store):
    _, folder = store
    place = f"{folder}/lease"
    first = objects.create(place, b"1")
    assert first and objects.create(place, b"2") is None
    second = objects.replace(place, b"3", first)
    assert second and objects.replace(place, b"4", first) is None
    content, version = objects.read_versioned(place, 10)
    assert content == b"3" and objects.replace(place, b"5", version)
    objects.delete(place)
    assert objects.replace(place, b"6", second) is None and not objects.exists(place)


def test_copies(store):
    _, folder = store
    objects.write_bytes(f"{folder}/a #1", b"one")
    objects.copy(f"{folder}/a #1", f"{folder}/sub/b")
    assert objects.read_bytes(f"{folder}/sub/b", 3) == objects.read_bytes(f"{folder}/a #1", 3) == b"one"
    with pytest.raises(FileNotFoundError):
        objects.copy(f"{folder}/no", f"{folder}/c")


def test_lists(store):
    _, folder = store
    names = ["a.tar", "b.tar", "b.txt", ".c.tar", "sub/d.tar", "sub/deep/e.tar", "other/f.tar"]
    for name in names:
        objects.write_bytes(f"{folder}/{name}", name.encode())
    objects.write_bytes(f"{folder}-sibling/g.tar", b"")

    def found(pattern):
        return [place.removeprefix(f"{folder}/") for place in objects.list_files(f"{folder}/{pattern}")]

    assert found("*.tar") == ["a.tar", "b.tar"] and found("?.t[ax]r") == ["a.tar", "b.tar"]
    assert found("*/*.tar") == ["other/f.tar", "sub/d.tar"] and found("sub/*") == ["sub/d.tar"]
    assert found("**/*.tar") == ["a.tar", "b.tar", "other/f.tar", "sub/d.tar", "sub/deep/e.tar"]
    assert found("no/*") == [] and found(".*") == [".c.tar"]
    listed = objects.list_folder(f"{folder}/")
    assert {name: each.size for name, each in listed.items()} == {name: len(name) for name in names}
    assert objects.list_objects(folder) == {name: each for name, each in listed.items() if "/" not in name}
    objects.write_bytes(f"{folder}/a.tar", b"other")
    changed = objects.list_folder(folder)
    assert changed["a.tar"].version != listed["a.tar"].version and changed["b.tar"] == listed["b.tar"]


def test_lists_of_many_pages(gcs):
    for i in range(250):
        objects.write_bytes(f"gs://{BUCKET}/pages/{i:03}", b"")
    assert objects.list_files(f"gs://{BUCKET}/pages/*") == [f"gs://{BUCKET}/pages/{i:03}" for i in range(250)]


def test_the_web_is_read_only_and_lists_nothing(web):
    with pytest.raises(ValueError, match=r"lists no files.*\{00000..00099\}.tar"):
        objects.list_files(f"{web.url}/*.tar")
    with pytest.raises(PermissionError, match="a web server takes no files"):
        objects.write_bytes(f"{web.url}/a", b"")
    with pytest.raises(ValueError, match="an address with a query is not read"):
        open_file(f"{web.url}/a?b=1")


@pytest.mark.parametrize("place", ["http://me:secret@host/a", "s3://me:sec@ret@bucket/a"])
def test_passwords_in_addresses_are_refused_and_not_repeated(place):
    with pytest.raises(
        ValueError, match=r"://\.\.\.@(host|bucket)/a: a name and password in an address would"
    ) as caught:
        open_file(place)
    assert "sec" not in str(caught.value)


@pytest.mark.parametrize("place", ["hdfs://h/x", "gs:///x", "GS://b/x"])
def test_other_addresses_are_refused(place):
    assert is_address(place)
    with pytest.raises(ValueError, match="nothing here opens such an address"):
        open_file(place)
