"""Full-size models with random weights, there and back, beside live peers in an environment of their own.

    python -m benchmarks.parity.run --peer_python=PEER/bin/python [--output=benchmarks/results/parity.json]
    python -m benchmarks.parity.run --install=PEER      # makes that environment first: PyTorch for CPUs and the peers

Per model: the peer makes it, `clipjax convert` reads it, both embed the same pairs; `clipjax export` writes it, the
peer's own loader opens that, and embeds once more. Then CLIP's tokenizer on 100,000 captions.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile

import numpy as np

import clipjax
from benchmarks.machine import describe
from clipjax.data.tokenizer import build_tokenizer, tokenize
from clipjax.weights import main_convert, main_export

PEER = pathlib.Path(__file__).with_name("peer.py")
PACKAGES = ("torch==2.13.0", "open_clip_torch==3.3.0", "transformers>=5.23", "safetensors")
MODELS = (
    ("open_clip", "ViT-B-32-quickgelu"),
    ("open_clip", "ViT-B-32"),
    ("open_clip", "RN50"),
    ("open_clip", "ViT-B-16-SigLIP"),
    ("huggingface", "CLIP"),
    ("huggingface", "Siglip"),
)
LIMIT = 1e-5
"""Relative, in float32: twelve blocks of sums in another order move embeddings by less than a millionth."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", type=pathlib.Path)
    parser.add_argument("--install", type=pathlib.Path)
    parser.add_argument("--vocabulary", type=pathlib.Path, help="bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    python = arguments.peer_python or install(arguments.install)
    rows = [compare(python, kind, name) for kind, name in MODELS]
    if arguments.vocabulary:
        rows.append(compare_tokens(python, arguments.vocabulary))
    if arguments.output:
        versions = {name: version(python, name) for name in ("torch", "open_clip_torch", "transformers")}
        record = {"machine": describe(), "versions": versions, "limit": LIMIT, "rows": rows}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(row["agrees"] for row in rows) else 1


def install(folder: pathlib.Path) -> pathlib.Path:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def version(python: pathlib.Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def peer(python: pathlib.Path, *arguments: object) -> None:
    subprocess.run([python, PEER, *map(str, arguments)], check=True, capture_output=True)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def compare(python: pathlib.Path, kind: str, name: str) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        peer(python, "make", kind, name, folder / "peer")
        theirs = dict(np.load(folder / "peer" / "peer.npz", allow_pickle=False))
        (folder / "peer" / "peer.npz").rename(folder / "peer.npz")
        assert main_convert([f"--from={kind}", f"--input={folder / 'peer'}", f"--output={folder / 'ours'}"]) == 0
        model = clipjax.load(folder / "ours")
        ours = {
            "image_embed": model.embed_pixels(theirs["images"].transpose(0, 2, 3, 1)),
            "text_embed": model.embed_tokens(theirs["tokens"].astype(np.int32)),
        }
        row = {"peer": kind, "model": name} | {f"converted {part}": relative(ours[part], theirs[part]) for part in ours}
        assert main_export([f"--to={kind}", f"--checkpoint={folder / 'ours'}", f"--output={folder / 'back'}"]) == 0
        peer(python, "open", kind, folder / "back", folder / "peer.npz", folder / "back.npz")
        back = np.load(folder / "back.npz", allow_pickle=False)
        row |= {f"exported {part}": relative(back[part], theirs[part]) for part in ours}
    row["agrees"] = all(value < LIMIT for value in row.values() if isinstance(value, float))
    print(json.dumps(row), flush=True)
    return row


def captions(count: int = 100_000) -> list[str]:
    """Words, odd Unicode, HTML entities and texts that are too long, by a fixed seed."""
    rng = random.Random(0)
    plain = ["a", "photo", "of", "the", "red", "Dog's", "", "café", "naïve", "don't", "we'll", "3,141", "½"]
    odd_words = ["東京", "😀", "🏳️\u200d🌈", "&amp;", "&lt;b&gt;", "&#39;", "é", "\u200d", "ﬁ", "ЩУКА"]
    words = plain + odd_words
    odd = [chr(rng.randrange(32, 0x2FFFF)) for _ in range(4_000)]
    odd = [char for char in odd if not 0xD800 <= ord(char) < 0xE000]
    return [
        " ".join(rng.choice(words if rng.random() < 0.8 else odd) for _ in range(rng.choice((3, 8, 20, 120))))
        for _ in range(count)
    ]


def compare_tokens(python: pathlib.Path, vocabulary: pathlib.Path) -> dict:
    texts = captions()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        (folder / "captions.json").write_text(json.dumps(texts))
        peer(python, "tokens", folder / "captions.json", folder / "tokens.npz")
        theirs = np.load(folder / "tokens.npz", allow_pickle=False)["tokens"]
    ours = tokenize(build_tokenizer(f"clip:{vocabulary}"), texts, theirs.shape[1])
    different = int((ours != theirs).any(axis=1).sum())
    row = {"peer": "open_clip", "model": "tokenizer", "captions": len(texts), "different": different}
    row["agrees"] = different == 0
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
