"""A browser without a window, that says what it shows of a page."""

import html
import json
import pathlib
import re
import shutil
import subprocess
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_SECONDS = 60

# The page lies in a frame of the wanted width, as windows are never narrower than some hundred pixels.
_FRAME = """<!doctype html><meta charset="utf-8"><pre id="found"></pre>
<iframe id="frame" style="width: {width}px; height: 900px; border: 0" srcdoc="{page}"></iframe>
<script>
const frame = document.getElementById("frame");
frame.addEventListener("load", () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const all = selector => [...page.querySelectorAll(selector)];
  document.getElementById("found").textContent = JSON.stringify({{
    title: page.title, width: root.scrollWidth, height: root.scrollHeight, text: page.body.innerText,
    images: all("img").length, broken: all("img").filter(each => !each.complete || !each.naturalWidth).length,
    scripts: all("script").length,
    loaded: page.defaultView.performance.getEntriesByType("resource").map(each => each.name)
      .filter(name => !name.startsWith("data:")),
    figures: all("figure").length, plots: all("svg").length, rows: all("table.matrix tbody tr").length,
    cells: all("table.matrix td").length,
    links: all("a[href^='#']").map(each => each.hash).filter(hash => !page.getElementById(hash.slice(1))),
  }});
}});
</script>"""


def find() -> str | None:
    """Return the program of a browser, None if this machine has none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def show(page: str, folder: pathlib.Path, *, width: int) -> dict[str, Any]:
    """Return what a browser shows of a page in so many pixels: elements, texts, what it loaded."""
    (folder / "frame.html").write_text(_FRAME.format(width=width, page=html.escape(page, quote=True)))
    program = find()
    assert program is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [program, *options, (folder / "frame.html").as_uri()], capture_output=True, text=True, timeout=_SECONDS
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], done.stdout[-500:] + done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def count_printed_pages(page: str, folder: pathlib.Path) -> int:
    """Return how many sheets a browser prints a page on."""
    (folder / "page.html").write_text(page)
    program = find()
    assert program is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    target = folder / "page.pdf"
    subprocess.run(
        [program, *options, f"--print-to-pdf={target}", (folder / "page.html").as_uri()],
        capture_output=True,
        check=True,
        timeout=_SECONDS,
    )
    return len(re.findall(rb"/Type /Page\b", target.read_bytes()))
