"""Full-size models with random weights, there and back, beside live peers in an environment of their own.

    python -m benchmarks.parity.run --peer_python=PEER/bin/python [--output=benchmarks/results/parity.json]
    python -m benchmarks.parity.run --install=PEER      # makes that environment first: PyTorch for CPUs and the peers

Per model: the peer makes it, `clipjax convert` reads it, both embed the same pairs; `clipjax export` writes it, the
peer's own loader opens that, and embeds once more. With `--big_vision=CHECKOUT` their models too, on the JAX of this
environment. With `--run=WORKDIR` both peers open a trained run, as exported. With `--vocabulary`, CLIP's tokenizer on
100,000 captions.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile

import jax
import numpy as np

import clipjax
from benchmarks.machine import describe
from clipjax.cli.convert import main_convert, main_export
from clipjax.config import DecoderConfig, Dtype
from clipjax.data.tokenizers.build import build_tokenizer
from clipjax.data.tokenizers.protocol import tokenize
from clipjax.inference import Model
from clipjax.models.clip import build_clip

BIG_VISION_PEER = pathlib.Path(__file__).with_name("big_vision_peer.py")
PEER = pathlib.Path(__file__).with_name("peer.py")
PACKAGES = ("torch==2.13.0", "open_clip_torch==3.3.0", "transformers>=5.23", "safetensors")
MODELS = (
    ("open_clip", "ViT-B-32-quickgelu"),
    ("open_clip", "ViT-B-32"),
    ("open_clip", "RN50"),
    ("open_clip", "ViT-B-16-SigLIP"),
    ("open_clip", "coca_ViT-B-32"),
    ("huggingface", "CLIP"),
    ("huggingface", "Siglip"),
)
BIG_VISION = ("SigLIP-B/16@224px", "SigLIP2-B/32@256px", "SigLIP-So400m/14@224px")
LIMIT = 1e-5
"""Relative, in float32: twelve blocks of sums in another order move embeddings by about a millionth."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", type=pathlib.Path)
    parser.add_argument("--install", type=pathlib.Path)
    parser.add_argument("--big_vision", type=pathlib.Path, help="a checkout of google-research/big_vision")
    parser.add_argument("--run", type=pathlib.Path, help="a workdir or step, to open in both peers")
    parser.add_argument("--vocabulary", type=pathlib.Path, help="bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    python = arguments.peer_python or install(arguments.install)
    rows = [compare(python, kind, name) for kind, name in MODELS]
    if arguments.big_vision:
        rows += [compare_big_vision(arguments.big_vision, preset) for preset in BIG_VISION]
    if arguments.run:
        rows += [compare_run(python, kind, arguments.run) for kind in ("open_clip", "huggingface")]
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
    subprocess.run([python, PEER, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def embed(model: Model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the peers' halves give, by ours."""
    pixels, tokens = inputs["images"].transpose(0, 2, 3, 1), inputs["tokens"].astype(np.int32)
    found = {"image_embed": model.embed_pixels(pixels), "text_embed": model.embed_tokens(tokens)}
    if isinstance(model.config.model.caption, DecoderConfig):
        clip = build_clip(model.config.model)
        image_tokens = jax.jit(clip.encode_image_tokens)(model.params, pixels)
        logits = jax.jit(clip.next_logits)(model.params, image_tokens, tokens)
        found["caption_logits"] = np.asarray(logits)[:, :-1]
    return found


def finish(row: dict) -> dict:
    row["agrees"] = all(value < LIMIT for value in row.values() if isinstance(value, float))
    print(json.dumps(row), flush=True)
    return row


def convert(source: str, path: pathlib.Path, output: pathlib.Path, *more: str) -> Model:
    assert main_convert([f"--from={source}", f"--input={path}", f"--output={output}", *more]) == 0
    return clipjax.load(output)


def compare(python: pathlib.Path, kind: str, name: str) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        peer(python, "make", kind, name, folder / "peer")
        theirs = dict(np.load(folder / "peer" / "peer.npz", allow_pickle=False))
        (folder / "peer" / "peer.npz").rename(folder / "peer.npz")
        ours = embed(convert(kind, folder / "peer", folder / "ours"), theirs)
        row = {"peer": kind, "model": name} | {f"converted {part}": relative(ours[part], theirs[part]) for part in ours}
        row |= open_in_peer(python, kind, folder / "ours", theirs, folder)
    return finish(row)


def open_in_peer(
    python: pathlib.Path, kind: str, checkpoint: pathlib.Path, expected: dict[str, np.ndarray], folder: pathlib.Path
) -> dict[str, float]:
    """How far a checkpoint of ours, exported and opened by the peer, is from what it should give."""
    assert main_export([f"--to={kind}", f"--checkpoint={checkpoint}", f"--output={folder / 'back'}"]) == 0
    np.savez(folder / "inputs.npz", images=expected["images"], tokens=expected["tokens"])
    peer(python, "open", kind, folder / "back", folder / "inputs.npz", folder / "back.npz")
    back = np.load(folder / "back.npz", allow_pickle=False)
    return {f"exported {part}": relative(back[part], expected[part]) for part in back.files}


def compare_big_vision(checkout: pathlib.Path, preset: str) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        subprocess.run([sys.executable, BIG_VISION_PEER, checkout, preset, folder / "weights.npz"], check=True)
        theirs = dict(np.load(folder / "peer.npz", allow_pickle=False))
        ours = embed(convert("big_vision", folder / "weights.npz", folder / "ours", f"--model={preset}"), theirs)
        row = {f"converted {part}": relative(ours[part], theirs[part]) for part in ours}
    return finish({"peer": "big_vision", "model": preset} | row)


def compare_run(python: pathlib.Path, kind: str, checkpoint: pathlib.Path) -> dict:
    """A trained run, exported, in a peer: noise for pictures, a few texts. Both compute in float32."""
    model = clipjax.load(checkpoint)
    model.config.model.compute_dtype, model.config.model.matmul_dtype = Dtype.FLOAT32, None
    model = Model(model.config, model.params, model.tokenizer)
    size, rng = model.config.model.image.image_size, np.random.default_rng(0)
    texts = [f"a photo of a {word}." for word in ("red square", "small blue ring", "dog", "café")]
    inputs = {
        "images": rng.normal(size=(len(texts), 3, size, size)).astype(np.float32),
        "tokens": tokenize(model.tokenizer, texts, model.config.model.text.context_length),
    }
    with tempfile.TemporaryDirectory() as scratch:
        row = open_in_peer(python, kind, checkpoint, inputs | embed(model, inputs), pathlib.Path(scratch))
    return finish({"peer": kind, "model": "a trained run"} | row)


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
