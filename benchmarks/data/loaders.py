"""Images per second of loaders on the same tars: clipjax, open_clip's own, and the bare loop of decoding and resizing.

    python -m venv /tmp/open_clip
    /tmp/open_clip/bin/pip install torch==2.13.0 torchvision open_clip_torch==3.3.0 webdataset==0.2.86 pandas
    python -m benchmarks.data.loaders --open_clip=/tmp/open_clip/bin/python

Every row runs in a process of its own and reads the same shards, which lie in the page cache: tar to uint8 pixels of
224 (open_clip: to normalised floats, as its trainer does) with 77 tokens of CLIP's vocabulary. Rows take turns; figures
are medians. CPU time is that of the process and its workers. The bare loops have the same JPEGs in memory, one thread,
and no tokens; they resize crops of clipjax's random sizes, as a crop's size decides what resizing it costs. `pillow`
decodes as Pillow does, which is what loaders of PyTorch do; `simplejpeg` is the fastest decoder that we know, and
clipjax's own. Both resize by Pillow, and keep the memory that they free, as clipjax's workers do without being told:
glibc's own choice gives it back and fetches it anew for some sizes of pictures, which takes a fifth of the time
(`--bare_memory=given_back`). `device` is `data.resize_on=device`, where the host only decodes.

A processor's speed moves by a tenth within minutes, so rows of clipjax run between two runs of both bare loops:
`of_simplejpeg` and `of_pillow` are images per second of CPU time divided by the mean of the two, medians of the rounds.
"""

import argparse
import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence

import numpy as np
from PIL import Image

from benchmarks.machine import describe
from clipjax.config import DataConfig
from clipjax.data.images import crop_box

SETS = {"256": (340, 256, 88), "500": (500, 375, 90)}  # width, height, quality
SHARDS, PER_SHARD, BATCH, WARM, ROUNDS = 4, 250, 50, 6, 3
BARE_ROWS = (0, 1)  # simplejpeg and Pillow
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**26), "MALLOC_TRIM_THRESHOLD_": str(2**27)}
WORDS = ("a", "the", "small", "large", "old", "new", "red", "photo", "of", "house", "dog", "tree", "street", "light")

BARE = """
import io, json, sys, tarfile, time
import numpy as np, simplejpeg
from PIL import Image
jpegs = []
for path in sys.argv[3].split(","):
    with tarfile.open(path) as tar:
        jpegs += [tar.extractfile(m).read() for m in tar if m.name.endswith("jpg")]
boxes = json.loads(sys.argv[8])
def decode(content):
    if sys.argv[2] == "pillow":
        return Image.open(io.BytesIO(content)).convert("RGB")
    return Image.fromarray(simplejpeg.decode_jpeg(content, "RGB", strict=True))
def one(number):
    top, left, h, w = boxes[number]
    box = (left, top, left + w, top + h)
    return np.asarray(decode(jpegs[number]).resize((224, 224), Image.Resampling.BICUBIC, box=box))
for number in range(50): one(number)
wall, cpu = time.perf_counter(), time.process_time()
count = 0
while time.perf_counter() - wall < 3:
    for number in range(100): one(number)
    count += 100
print(json.dumps([count / (time.perf_counter() - wall), count / (time.process_time() - cpu)]))
"""

TICKS = """
import os
def ticks():
    total, tasks = 0.0, [os.getpid()]
    for pid in tasks:
        fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        for thread in os.listdir(f"/proc/{pid}/task"):
            tasks += map(int, open(f"/proc/{pid}/task/{thread}/children").read().split())
    return total
"""

CLIPJAX = """
import json, os, sys, time
from clipjax.config import *
from clipjax.data.sources import build_source
from clipjax.data.tokenizers.build import build_tokenizer
from clipjax.data.tokenizers.protocol import TextToTokens
from clipjax.data.training_order import choose_order
from clipjax.data.training_stream import TrainStream
workers, where, paths, vocabulary = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[7]
batch, warm, count = map(int, sys.argv[4:7])
if __name__ == "__main__":
    train = paths if "{" in paths else "{" + paths + "}"
    data = DataConfig(train=train, num_workers=workers, num_threads=1, resize_on=ResizeOn(where))
    if where == "device":
        data.canvas_size = int(sys.argv[9])
    config = Config(global_batch_size=batch, model=ModelConfig(image=ViTConfig(image_size=224)), data=data)
    tokens = TextToTokens(build_tokenizer("clip:" + vocabulary), 77)
    source = build_source(data.train, data=data)
    order = choose_order(config, [len(source)], ["://" in train])
    stream = TrainStream(source, tokenize=tokens, config=config, order=order)
    for _ in range(warm): next(stream)
    wall, cpu = time.perf_counter(), ticks()
    for _ in range(count): next(stream)
    print(json.dumps([count * batch / (time.perf_counter() - wall), count * batch / (ticks() - cpu)]))
    stream.close()
"""

OPEN_CLIP = """
import json, os, sys, time, types
workers, paths, batch, warm, count = int(sys.argv[1]), sys.argv[3], *map(int, sys.argv[4:7])
if __name__ == "__main__":
    import torch
    torch.set_num_threads(1)
    library = torch.library.Library("torchvision", "DEF")  # its wheel is built for CUDA; of these none is used
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import open_clip
    from open_clip_train.data import get_wds_dataset
    preprocess = open_clip.image_transform(224, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    args = types.SimpleNamespace(
        train_data="::".join(paths.split(",")), train_data_upsampling_factors=None, train_num_samples=10**6,
        dataset_resampled=True, seed=0, batch_size=batch, world_size=1, workers=workers, val_num_samples=0,
        val_data=None, distributed=False)
    loader = iter(get_wds_dataset(args, preprocess, True, tokenizer=tokenizer).dataloader)
    for _ in range(warm): next(loader)
    wall, cpu = time.perf_counter(), ticks()
    for _ in range(count): next(loader)
    print(json.dumps([count * batch / (time.perf_counter() - wall), count * batch / (ticks() - cpu)]))
    sys.stdout.flush()
    os._exit(0)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all rows; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--open_clip", help="Python of an environment with open_clip; without it, its rows are missing")
    parser.add_argument("--bare_memory", choices=("kept", "given_back"), default="kept")
    parser.add_argument("--shared", type=pathlib.Path, default=pathlib.Path("../shared"))
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/loaders.json"))
    options = parser.parse_args(argv)
    vocabulary = options.shared / "data/tokenizers/bpe_simple_vocab_16e6.txt.gz"
    rows = [("bare", sys.executable, BARE, 0, decoder) for decoder in ("simplejpeg", "pillow")]
    for workers in (1, 2):
        rows += [("clipjax", sys.executable, CLIPJAX, workers, where) for where in ("host", "device")]
        if options.open_clip:
            rows.append(("open_clip", options.open_clip, OPEN_CLIP, workers, "-"))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in SETS:
            paths = ",".join(make_shards(pathlib.Path(folder), name))
            found += measure(name, rows, paths, str(vocabulary.resolve()), keeps=options.bare_memory == "kept")
    record = {
        "machine": describe(),
        "command": "python -m benchmarks.data.loaders --open_clip=PYTHON",
        "bare_memory": options.bare_memory,
        "columns": ["images per second", "images per second of CPU time"],
        "rows": found,
    }
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    for row in found:
        print({name: value for name, value in row.items() if name not in ("rounds", "shares")})
    return 0


def measure(
    name: str, rows: Sequence[tuple[str, str, str, int, str]], paths: str, vocabulary: str, *, keeps: bool
) -> list[dict]:
    """Return the figures of all rows on one set of shards; `keeps`: the bare loops keep the memory that they free."""
    width, height, _ = SETS[name]
    draw, canvas = np.random.default_rng(0), str(-(-width // 128) * 128)
    boxes = json.dumps([crop_box(height, width, DataConfig().min_crop_area, draw) for _ in range(100)])

    def run(number: int) -> list[float]:
        _, python, code, workers, where = rows[number]
        count = 60 if name == "256" else 40
        words = [str(workers), where, paths, str(BATCH), str(WARM), str(count), vocabulary, boxes, canvas]
        environ = os.environ | (KEPT_MEMORY if keeps and number in BARE_ROWS else {})
        command = [python, "-c", TICKS + code, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return json.loads(done.stdout.strip().splitlines()[-1])

    rounds: dict[int, list[list[float]]] = {number: [] for number in range(len(rows))}
    shares: dict[int, list[list[float]]] = {number: [] for number in range(len(rows))}
    for _ in range(ROUNDS):
        before = [run(number) for number in BARE_ROWS]
        for number in range(len(BARE_ROWS), len(rows)):
            found = run(number)
            rounds[number].append(found)
            if rows[number][0] == "clipjax":
                after = [run(bare) for bare in BARE_ROWS]
                shares[number].append([2 * found[1] / (a[1] + b[1]) for a, b in zip(before, after, strict=True)])
                for bare, figures in zip(BARE_ROWS, after, strict=True):
                    rounds[bare].append(figures)
                before = after
            else:
                before = [run(bare) for bare in BARE_ROWS]
    return [_record(name, row, rounds[number], shares[number]) for number, row in enumerate(rows)]


def _record(
    name: str, row: tuple[str, str, str, int, str], rounds: list[list[float]], shares: list[list[float]]
) -> dict:
    """Return the figures of a row: medians, and each round's."""
    loader, _, _, workers, variant = row
    wall, cpu = (round(statistics.median(each[i] for each in rounds), 1) for i in (0, 1))
    found = {"pixels": name, "loader": loader, "workers": workers, "variant": variant}
    found |= {"per_second": wall, "per_core_second": cpu}
    for i, bare in enumerate(("of_simplejpeg", "of_pillow") if shares else ()):
        found[bare] = round(statistics.median(each[i] for each in shares), 3)
    return found | {"rounds": rounds} | ({"shares": shares} if shares else {})


def make_shards(folder: pathlib.Path, name: str) -> list[str]:
    """Write tars of JPEGs with the detail of photographs: noise of several scales; return their paths."""
    width, height, quality = SETS[name]
    draw = np.random.default_rng(0)
    paths = []
    for number in range(SHARDS):
        path = folder / f"{name}-{number:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(PER_SHARD):
                pixels = np.zeros((height, width, 3), np.float32)
                for scale, strength in ((2, 60), (8, 40), (32, 24), (128, 12), (256, 7)):
                    noise = draw.integers(0, 256, (scale, scale, 3), dtype=np.uint8)
                    layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
                    pixels += (np.asarray(layer, np.float32) - 128) * strength / 64
                content = io.BytesIO()
                picture = Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8))
                picture.save(content, "JPEG", quality=quality)
                text = " ".join(draw.choice(WORDS, 12)).encode()
                for extension, each in (("jpg", content.getvalue()), ("txt", text)):
                    member = tarfile.TarInfo(f"{number:03d}{i:06d}.{extension}")
                    member.size = len(each)
                    tar.addfile(member, io.BytesIO(each))
        paths.append(str(path))
    return paths


if __name__ == "__main__":
    sys.exit(main())
