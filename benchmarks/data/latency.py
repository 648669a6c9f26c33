"""Images per second of CPU time from a server whose answers take 30 ms, beside the same shards on a disk.

    apt-get install nginx-light libnginx-mod-http-echo
    python -m benchmarks.data.latency

The server is nginx with its module `echo`, which sleeps before each answer; it takes little of the cores. Shards, rows
and figures are those of `benchmarks.data.loaders`; CPU time is that of the loader and its workers alone.
"""

import argparse
import json
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence

from benchmarks.data.loaders import CLIPJAX, SETS, TICKS, make_shards
from benchmarks.machine import describe

ROUNDS, BATCH, WARM, COUNT, SECONDS = 3, 128, 3, 16, 0.03
SERVER = """
load_module modules/ngx_http_echo_module.so;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location /slow/ {{ echo_sleep {seconds}; echo_exec /files$uri; }}
        location /files/slow/ {{ internal; alias {folder}/; }}
    }}
}}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all rows; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=pathlib.Path, default=pathlib.Path("../shared"))
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/latency.json"))
    options = parser.parse_args(argv)
    nginx = shutil.which("nginx")
    if nginx is None:
        parser.error("there is no nginx here: apt-get install nginx-light libnginx-mod-http-echo")
    vocabulary = str((options.shared / "data/tokenizers/bpe_simple_vocab_16e6.txt.gz").resolve())
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        folder.chmod(0o755)
        paths = {pixels: make_shards(folder, pixels) for pixels in SETS}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (folder / "nginx.conf").write_text(SERVER.format(folder=folder, port=port, seconds=SECONDS))
        server = subprocess.Popen([nginx, "-c", str(folder / "nginx.conf"), "-g", "daemon off; user root;"])
        try:
            url = f"http://127.0.0.1:{port}/slow"
            waited = _wait_for(f"{url}/{pathlib.Path(paths['256'][0]).name}")
            found = [row for pixels in SETS for row in _measure(pixels, paths[pixels], url, vocabulary, folder)]
            requests = sum(" 206 " in line for line in (folder / "access.log").read_text().splitlines())
        finally:
            server.terminate()
            server.wait()
    record = {
        "machine": describe(),
        "command": "python -m benchmarks.data.latency",
        "seconds_of_one_answer": waited,
        "range_requests_of_all_rows": requests,
        "rows": found,
    }
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({**record, "rows": None}))
    for row in found:
        print({name: value for name, value in row.items() if name != "rounds"})
    return 0


def _wait_for(address: str) -> float:
    """Return the seconds that one answer takes, once the server is there."""
    until = time.monotonic() + 10
    while True:
        try:
            start = time.monotonic()
            with urllib.request.urlopen(urllib.request.Request(address, headers={"Range": "bytes=0-99"})) as answer:
                answer.read()
            return round(time.monotonic() - start, 4)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def _measure(pixels: str, paths: Sequence[str], url: str, vocabulary: str, cache: pathlib.Path) -> list[dict]:
    """Return the figures of one set of shards: from the disk and from the server, with one worker and two."""
    places = {"disk": ",".join(paths), "server": f"{url}/{pixels}-{{00000..{len(paths) - 1:05d}}}.tar"}
    rows = [(place, workers) for workers in (1, 2) for place in places]
    rounds: dict[tuple[str, int], list[list[float]]] = {row: [] for row in rows}
    for _ in range(ROUNDS):
        for place, workers in rows:
            words = [str(workers), "host", places[place], str(BATCH), str(WARM), str(COUNT), vocabulary, "", ""]
            done = subprocess.run(
                [sys.executable, "-c", TICKS + CLIPJAX, *words],
                capture_output=True,
                text=True,
                timeout=300,
                env={**os.environ, "XDG_CACHE_HOME": str(cache / "cache")},
            )
            if done.returncode:
                raise RuntimeError(done.stderr[-3000:])
            rounds[place, workers].append(json.loads(done.stdout.strip().splitlines()[-1]))
    found = []
    for (place, workers), figures in rounds.items():
        wall, cpu = (round(statistics.median(each[i] for each in figures), 1) for i in (0, 1))
        row = {"pixels": pixels, "place": place, "workers": workers, "per_second": wall, "per_core_second": cpu}
        found.append({**row, "rounds": figures})
    return found


if __name__ == "__main__":
    sys.exit(main())
