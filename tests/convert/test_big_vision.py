"""big_vision's SigLIP: the reference of Hugging Face, written as big_vision names and shapes it."""

import pathlib

import numpy as np
import pytest
from safetensors import numpy as safetensors

import clipjax
from clipjax.cli.convert import main_convert
from clipjax.config import presets
from clipjax.convert.importer import read_peer
from tests.commands import exit_code

HEADS = 4


def dense(kernel: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
    return {"kernel": kernel.T, "bias": bias}


def heads_in(kernel: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
    width = len(bias)
    return {"kernel": kernel.T.reshape(width, HEADS, -1), "bias": bias.reshape(HEADS, -1)}


def heads_out(kernel: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
    return {"kernel": kernel.T.reshape(HEADS, -1, len(bias)), "bias": bias}


def scale(gain: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
    return {"scale": gain, "bias": bias}


class Peer:
    """Hugging Face's weights in big_vision's names (google-research/big_vision, models/vit.py, models/proj)."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self.theirs, self.found = weights, {}

    def put(self, name: str, make, source: str) -> None:
        parts = make(self.theirs[f"{source}.weight"], self.theirs[f"{source}.bias"])
        self.found |= {f"params/{name}/{kind}": array for kind, array in parts.items()}

    def encoder(self, name: str, source: str, depth: int) -> None:
        for layer in range(depth):
            ours, theirs = f"{name}/encoderblock_{layer}", f"{source}.layers.{layer}"
            for number in (0, 1):
                self.put(f"{ours}/LayerNorm_{number}", scale, f"{theirs}.layer_norm{number + 1}")
                self.put(f"{ours}/MlpBlock_0/Dense_{number}", dense, f"{theirs}.mlp.fc{number + 1}")
            attn = f"{ours}/MultiHeadDotProductAttention_0"
            for part in ("query", "key", "value"):
                self.put(f"{attn}/{part}", heads_in, f"{theirs}.self_attn.{part[0]}_proj")
            self.put(f"{attn}/out", heads_out, f"{theirs}.self_attn.out_proj")

    def pool(self, name: str, source: str) -> None:
        attn = f"{name}/MultiHeadDotProductAttention_0"
        kernels = np.split(self.theirs[f"{source}.attention.in_proj_weight"], 3)
        biases = np.split(self.theirs[f"{source}.attention.in_proj_bias"], 3)
        for part, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
            self.found |= {f"params/{attn}/{part}/{kind}": array for kind, array in heads_in(kernel, bias).items()}
        self.put(f"{attn}/out", heads_out, f"{source}.attention.out_proj")
        self.put(f"{name}/LayerNorm_0", scale, f"{source}.layernorm")
        for number in (0, 1):
            self.put(f"{name}/MlpBlock_0/Dense_{number}", dense, f"{source}.mlp.fc{number + 1}")
        self.found[f"params/{name}/probe"] = self.theirs[f"{source}.probe"]


def as_big_vision(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    peer = Peer(weights)
    patches = lambda kernel, bias: {"kernel": kernel.transpose(2, 3, 1, 0), "bias": bias}  # noqa: E731
    peer.put("img/embedding", patches, "vision_model.embeddings.patch_embedding")
    peer.encoder("img/Transformer", "vision_model.encoder", 2)
    peer.put("img/Transformer/encoder_norm", scale, "vision_model.post_layernorm")
    peer.pool("img/MAPHead_0", "vision_model.head")
    peer.encoder("txt/Encoder_0", "text_model.encoder", 2)
    peer.put("txt/Encoder_0/encoder_norm", scale, "text_model.final_layer_norm")
    peer.put("txt/head", dense, "text_model.head")
    places = "embeddings.position_embedding.weight"
    return peer.found | {
        "params/img/pos_embedding": weights[f"vision_model.{places}"][None],
        "params/txt/pos_embedding": weights[f"text_model.{places}"][None],
        "params/txt/Embed_0/embedding": weights["text_model.embeddings.token_embedding.weight"],
        "params/t": weights["logit_scale"],
        "params/b": weights["logit_bias"],
    }


def stack_layers(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As models with `scan=True` are saved."""
    found = {name: array for name, array in arrays.items() if "encoderblock_" not in name}
    for name in arrays:
        if "encoderblock_0" in name:
            layers = [arrays[name.replace("encoderblock_0", f"encoderblock_{layer}")] for layer in range(2)]
            found[name.replace("encoderblock_0", "encoderblock")] = np.stack(layers)
    return found


@pytest.mark.parametrize("arrange", [dict, stack_layers], ids=["layer by layer", "stacked"])
def test_weights_agree_with_the_peer(shared: pathlib.Path, tmp_path: pathlib.Path, monkeypatch, arrange):
    root = shared / "reference" / "hf-siglip"
    model = read_peer("huggingface", root).config.model
    monkeypatch.setitem(presets.MODELS, "small", presets.Preset(model, "this test"))
    arrays = arrange(as_big_vision(safetensors.load_file(root / "weights.safetensors")))
    np.savez(tmp_path / "weights.npz", **arrays)
    arguments = ["--from=big_vision", f"--input={tmp_path / 'weights.npz'}", "--model=small"]
    assert exit_code(main_convert, [*arguments, f"--output={tmp_path / 'ours'}"]) == 0
    ours, target = clipjax.load(tmp_path / "ours"), np.load(root / "reference.npz", allow_pickle=False)
    found = {
        "image_features": ours.embed_pixels(target["images"].transpose(0, 2, 3, 1)),
        "text_features": ours.embed_tokens(target["tokens"].astype(np.int32)),
    }
    for name, value in found.items():  # the reference's bound, in float32
        assert np.linalg.norm(value - target[name]) / np.linalg.norm(target[name]) < 2e-5


def test_a_missing_and_an_unknown_array_are_told(shared: pathlib.Path, tmp_path: pathlib.Path, monkeypatch, capsys):
    root = shared / "reference" / "hf-siglip"
    model = read_peer("huggingface", root).config.model
    monkeypatch.setitem(presets.MODELS, "small", presets.Preset(model, "this test"))
    arrays = as_big_vision(safetensors.load_file(root / "weights.safetensors"))
    del arrays["params/img/Transformer/encoderblock_1/LayerNorm_0/scale"]
    np.savez(tmp_path / "weights.npz", **arrays, **{"params/opt": np.zeros(1, np.float32)})
    arguments = ["--from=big_vision", f"--input={tmp_path / 'weights.npz'}", "--model=small"]
    assert exit_code(main_convert, [*arguments, f"--output={tmp_path / 'ours'}"]) == 2
    told = capsys.readouterr().err
    assert "params/img/Transformer/encoderblock_1/LayerNorm_0/scale: missing" in told
    assert "params/opt: no rule for it" in told
    assert not (tmp_path / "ours").exists()
