"""Object stores on this machine, with planted faults: moto's S3, gcp-storage-emulator's GCS, and plain HTTP.

All three stand behind one server, `StoreServer`, which answers from a backend and breaks what a test has planted.
"""

import contextlib
import email.utils
import hashlib
import http.client
import http.server
import logging
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape

BUCKET = "bucket"
AWS_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
Headers = Mapping[str, str]
Answer = tuple[int, dict[str, str], bytes]
Backend = Callable[[str, str, Headers, bytes], Answer]
"""Gives status, headers and body for a method, a path with its query, the headers and the body."""


@dataclass
class Fault:
    """What goes wrong with the requests that a pattern finds.

    Attributes:
        pattern: is searched for in "METHOD /path?query".
        times: requests that it strikes, then it is spent.
        status: answered instead of the backend's answer; None: the backend answers.
        delay: seconds before the first byte.
        share: of the body that is sent before the connection breaks.
        headers: of the answer, changed.
        before: is called before the backend answers.
        after: is called once it has answered and before that is sent.
        hits: requests that it has struck.
    """

    pattern: str
    times: int = 10**9
    status: int | None = None
    delay: float = 0.0
    share: float = 1.0
    headers: Headers = field(default_factory=dict)
    before: Callable[[], None] | None = None
    after: Callable[[], None] | None = None
    hits: int = 0


class StoreServer:
    """An HTTP server that answers from a backend.

    Attributes:
        url: of the server.
        requests: "METHOD /path?query" of all requests so far.
        faults: planted; the first that fits strikes.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend, self.requests, self.faults = backend, [], []
        self.lock = threading.Lock()
        outer = self

        class Handler(_Handler):
            owner = outer

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def plant(self, pattern: str, **how: Any) -> Fault:
        fault = Fault(pattern, **how)
        self.faults.append(fault)
        return fault

    def reset(self) -> None:
        self.faults.clear()
        self.requests.clear()

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, request) is not None for request in self.requests)

    def take_fault(self, request: str) -> Fault:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.hits < fault.times and re.search(fault.pattern, request):
                    fault.hits += 1
                    return fault
        return Fault("")


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Say nothing of clients that are killed."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    owner: StoreServer

    def _handle(self) -> None:
        body = self._body()
        fault = self.owner.take_fault(f"{self.command} {urllib.parse.unquote(self.path)}")
        time.sleep(fault.delay)
        if fault.before is not None:
            fault.before()
        if fault.status is None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, answer, content = self.owner.backend(self.command, self.path, headers, body)
        else:
            status, answer, content = fault.status, {}, b""
        if fault.after is not None:
            fault.after()
        answer = {**answer, **fault.headers}
        with contextlib.suppress(OSError):
            self.send_response(status)
            answer.setdefault("Content-Length", str(len(content)))
            for name, value in answer.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: int(len(content) * fault.share)])
            self.wfile.flush()
        self.close_connection = self.close_connection or fault.share < 1

    def handle_expect_100(self) -> bool:
        """Tell a client at once that it may send its body."""
        goes_on = super().handle_expect_100()
        self.wfile.flush()
        return goes_on

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _handle

    def log_message(self, *_: Any) -> None:
        pass


def forward(port: int) -> Backend:
    """Return a backend that asks another server."""

    def answer(method: str, path: str, headers: Headers, body: bytes) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            sent = {name: value for name, value in headers.items() if name not in _NOT_SENT}
            connection.request(method, path, body or None, {**sent, "content-length": str(len(body))})
            got = connection.getresponse()
            kept = {name: value for name, value in got.getheaders() if name.lower() not in _HOP}
            if method == "HEAD":
                kept["Content-Length"] = got.getheader("Content-Length") or "0"
            return got.status, kept, got.read()
        finally:
            connection.close()

    return answer


_NOT_SENT = ("transfer-encoding", "connection", "expect")
_HOP = ("connection", "transfer-encoding", "content-length", "server", "date")


def serve_range(content: bytes, etag: str, headers: Headers) -> Answer:
    """Answer a GET or HEAD of an object, with If-Match and Range."""
    about = {
        "ETag": etag,
        "Last-Modified": email.utils.formatdate(1_700_000_000, usegmt=True),
        "Accept-Ranges": "bytes",
    }
    if headers.get("if-match", etag) != etag:
        return 412, {}, b""
    if match := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", "")):
        start, end = int(match[1]), int(match[2] or len(content)) + 1
        if start >= len(content):
            return 416, {}, b""
        end = min(end, len(content))
        return 206, {**about, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}, content[start:end]
    return 200, about, content


class Files:
    """A backend of plain files, as a web server has them.

    Attributes:
        contents: by path, such as "/a.tar".
    """

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}

    def __call__(self, method: str, path: str, headers: Headers, body: bytes) -> Answer:
        content = self.contents.get(urllib.parse.unquote(path.partition("?")[0]))
        if method not in ("GET", "HEAD"):
            return 405, {}, b""
        if content is None:
            return 404, {}, b""
        status, about, part = serve_range(content, f'"{hashlib.md5(content).hexdigest()}"', headers)
        if method == "HEAD":
            about["Content-Length"] = str(len(part))
        return status, about, part


class Gcs:
    """A backend of gcp-storage-emulator, which speaks the JSON API; obstore speaks the XML API, answered here."""

    def __init__(self) -> None:
        from gcp_storage_emulator.handlers import objects
        from gcp_storage_emulator.server import create_server

        self._objects = objects
        self.emulator = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
        self.emulator.start()
        self.storage = self.emulator._storage
        self._forward = forward(self.emulator._api._httpd.server_address[1])
        self._lock = threading.Lock()
        self._uploads: dict[str, dict[int, bytes]] = {}

    def __call__(self, method: str, path: str, headers: Headers, body: bytes) -> Answer:
        with self._lock:
            if re.match(r"/(storage/|upload/|download/|batch|b/|$)", path):
                return self._forward(method, path, headers, body)
            place, _, query = path.partition("?")
            bucket, _, name = urllib.parse.unquote(place)[1:].partition("/")
            options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
            if bucket not in self.storage.buckets:
                return 404, {}, b"<Error><Code>NoSuchBucket</Code></Error>"
            if not name:
                return self._list(bucket, options)
            if method in ("GET", "HEAD"):
                return self._get(bucket, name, headers, method)
            if method == "DELETE":
                return (204 if self.storage.objects[bucket].get(name) and self._delete(bucket, name) else 404), {}, b""
            if method == "POST":
                return self._multipart(bucket, name, options)
            if "uploadId" in options:
                self._uploads[options["uploadId"]][int(options["partNumber"])] = body
                return 200, {"ETag": f'"{options["partNumber"]}"'}, b""
            if source := headers.get("x-goog-copy-source"):
                origin, _, old = urllib.parse.unquote(source).lstrip("/").partition("/")
                if old not in self.storage.objects.get(origin, {}):
                    return 404, {}, b"<Error><Code>NoSuchKey</Code></Error>"
                body = self.storage.get_file(origin, old)
            return self._put(bucket, name, body, headers.get("x-goog-if-generation-match"))

    def _list(self, bucket: str, options: Mapping[str, str]) -> Answer:
        after, prefix = options.get("continuation-token", ""), options.get("prefix", "")
        found = sorted(name for name in self.storage.objects.get(bucket, {}) if name.startswith(prefix))
        page = [name for name in found if name > after][:100]
        more = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if page[-1:] != found[-1:] else ""
        items = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>{about['updated']}</LastModified>"
            f"<ETag>&quot;{about['generation']}&quot;</ETag><Size>{about['size']}</Size></Contents>"
            for name in page
            for about in [self.storage.objects[bucket][name]]
        )
        return 200, {}, f"<ListBucketResult>{items}{more}</ListBucketResult>".encode()

    def _get(self, bucket: str, name: str, headers: Headers, method: str) -> Answer:
        about = self.storage.objects.get(bucket, {}).get(name)
        if about is None:
            return 404, {}, b"<Error><Code>NoSuchKey</Code></Error>"
        content = self.storage.get_file(bucket, name)
        status, answer, part = serve_range(content, f'"{about["generation"]}"', headers)
        answer["x-goog-generation"] = about["generation"]
        if method == "HEAD":
            answer["Content-Length"] = str(len(part))
        return status, answer, part

    def _delete(self, bucket: str, name: str) -> bool:
        return self._objects._delete(self.storage, bucket, name)

    def _put(self, bucket: str, name: str, body: bytes, generation: str | None) -> Answer:
        now = self.storage.objects.get(bucket, {}).get(name, {}).get("generation", "0")
        if generation not in (None, now):
            return 412, {}, b"<Error><Code>PreconditionFailed</Code></Error>"
        about = self._objects._make_object_resource("", bucket, name, "application/octet-stream", str(len(body)))
        about = self._objects._checksums(body, about)
        self.storage.create_file(bucket, name, body, about)
        return 200, {"ETag": f'"{about["generation"]}"', "x-goog-generation": about["generation"]}, b""

    def _multipart(self, bucket: str, name: str, options: Mapping[str, str]) -> Answer:
        if "uploadId" not in options:
            key = str(len(self._uploads))
            self._uploads[key] = {}
            return (
                200,
                {},
                f"<InitiateMultipartUploadResult><UploadId>{key}</UploadId></InitiateMultipartUploadResult>".encode(),
            )
        parts = self._uploads[options["uploadId"]]
        status, answer, _ = self._put(bucket, name, b"".join(parts[i] for i in sorted(parts)), None)
        etag = answer["ETag"]
        return (
            status,
            answer,
            f"<CompleteMultipartUploadResult><ETag>{etag}</ETag></CompleteMultipartUploadResult>".encode(),
        )

    def close(self) -> None:
        self.emulator.stop()


@contextlib.contextmanager
def s3_server() -> Iterator[tuple[StoreServer, dict[str, str]]]:
    """Yield a server of S3 with one bucket, and the environment variables that lead there."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    _, port = moto.get_host_and_port()
    server = StoreServer(forward(port))
    environment = {**AWS_KEYS, "AWS_ENDPOINT_URL": server.url, "AWS_ALLOW_HTTP": "true"}
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys).create_bucket(Bucket=BUCKET)
    try:
        yield server, environment
    finally:
        server.close()
        moto.stop()


@contextlib.contextmanager
def gcs_server() -> Iterator[tuple[StoreServer, dict[str, str]]]:
    """Yield a server of GCS with one bucket, and the environment variables that lead there."""
    backend = Gcs()
    server = StoreServer(backend)
    try:
        yield server, {"STORAGE_EMULATOR_HOST": server.url}
    finally:
        server.close()
        backend.close()
