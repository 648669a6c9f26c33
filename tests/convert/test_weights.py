"""`clipjax convert` and `clipjax export`: there and back on every reference, and what they refuse."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from safetensors import numpy as safetensors

import clipjax
from clipjax.checkpoints.manifest import State, examine
from clipjax.cli.convert import main_convert, main_export
from clipjax.cli.eval import main as main_eval
from clipjax.config import Resize
from clipjax.convert import files, stablehlo
from clipjax.convert.importer import read_peer, save
from tests.commands import exit_code

FOLDERS = {
    "openclip-vit-gelu": "open_clip",
    "openclip-rn-gelu": "open_clip",
    "hf-clip-quickgelu": "huggingface",
    "hf-siglip": "huggingface",
}


def convert(source: str, path: pathlib.Path, output: pathlib.Path, *more: str) -> int:
    return exit_code(main_convert, [f"--from={source}", f"--input={path}", f"--output={output}", *more])


def export(target: str, path: pathlib.Path, output: pathlib.Path) -> int:
    return exit_code(main_export, [f"--to={target}", f"--checkpoint={path}", f"--output={output}"])


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.heavy
def test_there_and_back(shared: pathlib.Path, tmp_path: pathlib.Path, folder: str):
    root, source = shared / "reference" / folder, FOLDERS[folder]
    assert convert(source, root, tmp_path / "ours") == 0
    model, target = clipjax.load(tmp_path / "ours"), np.load(root / "reference.npz", allow_pickle=False)
    assert relative_error(model.embed_pixels(target["images"].transpose(0, 2, 3, 1)), target["image_features"]) < 2e-5
    assert relative_error(model.embed_tokens(target["tokens"].astype(np.int32)), target["text_features"]) < 2e-5
    assert export(source, tmp_path / "ours", tmp_path / "theirs") == 0
    [written] = (tmp_path / "theirs").glob("*.safetensors")
    before, after = safetensors.load_file(root / "weights.safetensors"), safetensors.load_file(written)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    # Their config, as written, is read as the same model, and the weights once more.
    assert convert(source, tmp_path / "theirs", tmp_path / "again") == 0
    again = clipjax.load(tmp_path / "again")
    assert again.config.model == model.config.model


def test_openai_names_are_open_clips(shared: pathlib.Path, tmp_path: pathlib.Path):
    root = shared / "reference" / "openclip-vit-quickgelu"
    assert convert("openai", root, tmp_path / "ours") == 0
    assert export("huggingface", tmp_path / "ours", tmp_path / "hf") == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vision_config"]["hidden_act"] == "quick_gelu"
    assert convert("huggingface", tmp_path / "hf", tmp_path / "again") == 0
    target = np.load(root / "reference.npz", allow_pickle=False)
    pixels = target["images"].transpose(0, 2, 3, 1)
    assert relative_error(clipjax.load(tmp_path / "again").embed_pixels(pixels), target["image_features"]) < 2e-5


def test_weights_of_two_libraries_may_lie_side_by_side(shared: pathlib.Path, tmp_path: pathlib.Path):
    root = shared / "reference" / "openclip-vit-quickgelu"
    assert convert("open_clip", root, tmp_path / "ours") == 0
    for target in ("open_clip", "huggingface"):
        assert export(target, tmp_path / "ours", tmp_path / target) == 0
    both = shutil.copytree(tmp_path / "open_clip", tmp_path / "both")
    shutil.copytree(tmp_path / "huggingface", both, dirs_exist_ok=True)
    for source in ("open_clip", "huggingface"):
        assert convert(source, both, tmp_path / f"from {source}") == 0
        found, ours = (clipjax.load(tmp_path / name).config.model for name in (f"from {source}", "ours"))
        assert (found.image, found.text) == (ours.image, ours.text)


def damaged(shared: pathlib.Path, tmp_path: pathlib.Path, folder: str = "hf-siglip") -> pathlib.Path:
    shutil.copytree(shared / "reference" / folder, tmp_path / "in")
    return tmp_path / "in"


def test_everything_wrong_with_weights_is_one_error(shared, tmp_path, capsys):
    root = damaged(shared, tmp_path)
    weights = safetensors.load_file(root / "weights.safetensors")
    del weights["text_model.head.bias"]
    weights["more"] = np.zeros(2, np.float32)
    weights["vision_model.head.probe"] = np.full((1, 1, 64), np.nan, np.float32)
    weights["text_model.head.weight"] = np.zeros((64, 63), np.float32)
    root.joinpath("weights.safetensors").unlink()
    safetensors.save_file(weights, root / "weights.safetensors")
    assert convert("huggingface", root, tmp_path / "out") == 2
    told = capsys.readouterr().err
    for text in (
        "text_model.head.bias: missing",
        "more: no rule for it",
        "vision_model.head.probe: holds NaN or infinity",
        "text_model.head.weight: text/proj/kernel would have shape (63, 64), but needs (64, 64)",
    ):
        assert text in told
    assert not (tmp_path / "out").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_a_config_is_refused_before_any_weight_is_read(shared, tmp_path, capsys, monkeypatch):
    root = damaged(shared, tmp_path)
    monkeypatch.setattr(files, "read_weights", lambda *_: pytest.fail("weights are read"))
    config = json.loads((root / "config.json").read_text())
    config["config"]["vision_config"]["num_channels"] = 4
    root.joinpath("config.json").unlink()
    (root / "config.json").write_text(json.dumps(config))
    assert convert("huggingface", root, tmp_path / "out") == 2
    assert "num_channels=4 must be 3: pictures have three channels" in capsys.readouterr().err
    # So is a tokenizer of another model.
    config["config"]["vision_config"]["num_channels"], config["config"]["text_config"]["vocab_size"] = 3, 100
    (root / "config.json").write_text(json.dumps(config))
    assert convert("huggingface", root, tmp_path / "out", "--tokenizer=bytes") == 2
    assert "the tokenizer has 259 ids, but the model knows 100" in capsys.readouterr().err


def test_a_truncated_file_is_told(shared, tmp_path, capsys):
    root = damaged(shared, tmp_path)
    content = (root / "weights.safetensors").read_bytes()
    (root / "weights.safetensors").unlink()
    (root / "weights.safetensors").write_bytes(content[: len(content) // 2])
    assert convert("huggingface", root, tmp_path / "out") == 2
    assert "weights.safetensors is damaged or no safetensors file" in capsys.readouterr().err


def test_an_array_of_objects_is_not_opened(tmp_path, capsys):
    np.savez(tmp_path / "evil.npz", **{"params/t": np.asarray([print], dtype=object)})
    arguments = ("--model=SigLIP-B/16@224px",)
    assert convert("big_vision", tmp_path / "evil.npz", tmp_path / "out", *arguments) == 2
    assert "is damaged or no .npz of plain arrays" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        archive.writestr("params/t.npy", b"\x93NUMPY")
    assert convert("big_vision", tmp_path / "short.npz", tmp_path / "out", *arguments) == 2


def test_an_archive_that_unfolds_without_end_is_not_opened(tmp_path, capsys):
    np.savez_compressed(tmp_path / "bomb.npz", **{"params/t": np.zeros(10_000_000, np.float32)})
    arguments = ("--model=SigLIP-B/16@224px",)
    assert convert("big_vision", tmp_path / "bomb.npz", tmp_path / "out", *arguments) == 2
    assert "which no weights allow" in capsys.readouterr().err


def test_another_familys_weights_are_told(shared, tmp_path, capsys):
    assert convert("huggingface", shared / "reference" / "openclip-vit-gelu", tmp_path / "out") == 2
    assert "is a config of open_clip: give --from=open_clip" in capsys.readouterr().err
    assert convert("open_clip", shared / "reference" / "hf-siglip", tmp_path / "out") == 2
    assert "is a config of huggingface: give --from=huggingface" in capsys.readouterr().err
    root = damaged(shared, tmp_path, "hf-clip-quickgelu")
    peer = json.loads((root / "config.json").read_text())["config"]
    peer["vision_config"]["hidden_act"], peer["vision_config"]["novelty"] = "relu", 3
    root.joinpath("config.json").unlink()
    (root / "config.json").write_text(json.dumps(peer))
    assert convert("huggingface", root, tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "config.vision_config.hidden_act='relu' must be 'quick_gelu', 'gelu', 'gelu_pytorch_tanh'" in told
    assert "config.vision_config.novelty=3 is nothing that clipjax has" in told


@pytest.mark.parametrize(
    ("folder", "path", "value", "message"),
    [
        (
            "openclip-vit-gelu",
            "vision_cfg.width",
            10**9,
            "model_cfg.vision_cfg.width=1000000000 must be a whole number",
        ),
        ("openclip-vit-gelu", "vision_cfg.layers", 10**7, "layers=10000000 must be a whole number from 1 to 1000"),
        ("openclip-vit-gelu", "vision_cfg.head_width", 0, "head_width=0 must be a whole number from 1"),
        (
            "openclip-vit-gelu",
            "vision_cfg.head_width",
            20,
            "head_width=20 must make a number of heads that divides the width, 64",
        ),
        ("openclip-vit-gelu", "vision_cfg.patch_size", 0, "patch_size=0 must be a whole number from 1"),
        ("openclip-vit-gelu", "vision_cfg.mlp_ratio", float("inf"), "mlp_ratio=inf must be finite"),
        ("openclip-vit-gelu", "vision_cfg.mlp_ratio", -1.0, "mlp_ratio=-1.0 must make a width between 1"),
        ("openclip-vit-gelu", "vision_cfg.norm_kwargs", {"eps": "x"}, "must hold nothing but eps"),
        ("openclip-rn-gelu", "vision_cfg.layers", ["a", 1, 1, 1], "layers='a' must be a whole number from 1"),
        ("openclip-rn-gelu", "vision_cfg.layers", [1, 2], "model.image.layers=(1, 2) must be four numbers"),
        ("hf-clip-quickgelu", "vision_config.num_attention_heads", 0, "num_attention_heads=0 must be a whole number"),
        ("hf-clip-quickgelu", "vision_config.num_attention_heads", 5, "must be a multiple of model.image.num_heads=5"),
        ("hf-clip-quickgelu", "text_config.num_hidden_layers", 0, "num_hidden_layers=0 must be a whole number from 1"),
        ("hf-clip-quickgelu", "logit_scale_init_value", 1e9, "must lie between -20 and 20"),
        ("hf-clip-quickgelu", "vision_config", [1], "config.vision_config: must be a JSON object"),
        ("hf-clip-quickgelu", "text_config.eos_token_id", 100, "eos_token_id=100 must be 2"),
        ("hf-clip-quickgelu", "vision_config.num_channels", 4, "num_channels=4 must be 3"),
        ("hf-clip-quickgelu", "vision_config.layer_norm_eps", -1.0, "model.image.layer_norm_epsilon=-1.0 must lie"),
    ],
)
def test_numbers_that_no_model_has_are_told(shared, tmp_path, capsys, folder: str, path: str, value, message: str):
    root = damaged(shared, tmp_path, folder)
    config = json.loads((root / "config.json").read_text())
    *groups, name = path.split(".")
    inside = config.get("config", config)
    for group in groups:
        inside = inside[group]
    inside[name] = value
    root.joinpath("config.json").unlink()
    (root / "config.json").write_text(json.dumps(config))
    assert convert(FOLDERS[folder], root, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": {"shortest_edge": 32}, "do_center_crop": False}, "do_center_crop=False would leave pictures as long"),
        ({"size": {"longest_edge": 32}}, "size={'longest_edge': 32} must be the model's 32"),
        ({"crop_size": 7}, "crop_size=7 must be the model's 32"),
        ({"rescale_factor": 1.0}, "rescale_factor=1.0 must be 1/255"),
        ({"rescale_factor": float("nan")}, "rescale_factor=nan must be finite"),
        ({"image_std": [0, 0, 0]}, "image_std=[0, 0, 0] must be greater than 0"),
        ({"image_mean": [10**400, 0, 0]}, "must be three numbers, none beyond 1000"),
    ],
)
def test_preprocessing_that_means_something_else_is_refused(shared, tmp_path, capsys, fields, message: str):
    root = damaged(shared, tmp_path, "hf-clip-quickgelu")
    (root / "preprocessor_config.json").write_text(json.dumps(fields))
    assert convert("huggingface", root, tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_a_square_size_is_squashed_to(shared: pathlib.Path, tmp_path: pathlib.Path):
    root = damaged(shared, tmp_path, "hf-clip-quickgelu")
    picture = {"size": {"height": 32, "width": 32}, "do_center_crop": True, "crop_size": 32}
    (root / "preprocessor_config.json").write_text(json.dumps(picture))
    assert convert("huggingface", root, tmp_path / "out") == 0
    assert clipjax.load(tmp_path / "out").config.data.resize is Resize.SQUASH


def test_a_vocabulary_may_be_larger_than_the_tokenizer(shared: pathlib.Path, tmp_path: pathlib.Path):
    root = shared / "reference" / "hf-clip-quickgelu"
    assert convert("huggingface", root, tmp_path / "ours", "--tokenizer=bytes") == 0
    assert export("huggingface", tmp_path / "ours", tmp_path / "hf") == 0
    # Their text tower reads at the largest id exactly if the end's id is said to be 2.
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["text_config"]["eos_token_id"] == 2
    assert convert("huggingface", tmp_path / "hf", tmp_path / "again") == 0
    again, ours = (clipjax.load(tmp_path / name) for name in ("again", "ours"))
    np.testing.assert_array_equal(again.encode_text(["a dog", "é!"]), ours.encode_text(["a dog", "é!"]))


def test_a_model_without_embeddings_gives_none(shared: pathlib.Path, tmp_path: pathlib.Path, capsys):
    peer = read_peer("huggingface", shared / "reference" / "hf-clip-quickgelu")
    peer.config.loss.contrastive_weight = 0.0
    save(peer, tmp_path / "ours")
    assert examine(tmp_path / "ours" / "checkpoints" / "0").state is State.VERIFIED
    assert export("stablehlo", tmp_path / "ours", tmp_path / "out") == 2
    assert "predicts captions only" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has no embeddings"):
        clipjax.load(tmp_path / "ours").embed_tokens(np.ones((1, 16), np.int32))


def test_what_fails_late_is_told_too(shared: pathlib.Path, tmp_path: pathlib.Path, capsys):
    root = shared / "reference" / "hf-clip-quickgelu"
    (tmp_path / "file").write_text("mine")
    assert convert("huggingface", root, tmp_path / "file" / "x") == 2
    assert "choose another" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert convert("huggingface", root, tmp_path / "link") == 2
    assert "is a link; name the directory itself" in capsys.readouterr().err
    assert convert("huggingface", root, tmp_path / "ours") == 0
    shutil.rmtree(tmp_path / "ours" / "checkpoints" / "0" / "params")
    capsys.readouterr()
    assert export("huggingface", tmp_path / "ours", tmp_path / "hf") == 3
    assert "is damaged: params/_METADATA: missing" in capsys.readouterr().err and not (tmp_path / "hf").exists()


def test_evaluation_without_a_tokenizer_is_refused_at_once(shared: pathlib.Path, tmp_path: pathlib.Path, capsys):
    assert convert("huggingface", shared / "reference" / "hf-clip-quickgelu", tmp_path / "ours") == 0
    assert exit_code(main_eval, [f"--checkpoint={tmp_path / 'ours'}"]) == 2
    assert "--tasks_from=CONFIG takes them from there" in capsys.readouterr().err
    config = tmp_path / "config.py"
    config.write_text(
        "from clipjax.config import *\n\ndef get_config():\n"
        "    tasks = {'t': TaskConfig(source='tfds:scenes/val', classes='scenes', templates='plain')}\n"
        "    return Config(eval=EvalConfig(tasks=tasks))\n"
    )
    assert exit_code(main_eval, [f"--checkpoint={tmp_path / 'ours'}", f"--tasks_from={config}"]) == 2
    assert "convert it again with --tokenizer=KIND:PATH" in capsys.readouterr().err


def test_arguments_are_checked(shared, tmp_path, capsys):
    root = shared / "reference" / "openclip-rn-gelu"
    assert exit_code(main_convert, []) == 2
    assert "--from is missing; one of openai" in capsys.readouterr().err
    assert convert("torch", root, tmp_path / "out") == 2
    assert "--from=torch must be one of" in capsys.readouterr().err
    assert convert("open_clip", root, tmp_path / "out", "--model=RN50") == 2
    assert "give a preset exactly where there is no config" in capsys.readouterr().err
    assert convert("open_clip", root / "weights.safetensors", tmp_path / "out", "--model=ViT-B/32") == 2
    assert "take --model=ViT-B/32-gelu, or --from=openai" in capsys.readouterr().err
    assert convert("open_clip", tmp_path / "absent", tmp_path / "out") == 2
    assert "no such file or directory" in capsys.readouterr().err
    assert convert("open_clip", root, tmp_path / "out") == 0
    assert export("huggingface", tmp_path / "out", tmp_path / "hf") == 2
    assert "model.image is a ResNetConfig: CLIPModel has a ViTConfig there" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["openclip-rn-gelu", "hf-siglip"])
@pytest.mark.process
def test_stablehlo_needs_no_model_code(shared: pathlib.Path, tmp_path: pathlib.Path, folder: str):
    assert convert(FOLDERS[folder], shared / "reference" / folder, tmp_path / "ours") == 0
    assert export("stablehlo", tmp_path / "ours", tmp_path / "programs") == 0
    model = clipjax.load(tmp_path / "ours")
    size, length = model.config.model.image.image_size, model.config.model.text.context_length
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, size, size, 3), np.uint8)
    tokens = rng.integers(0, 512, (3, length)).astype(np.int32)
    np.savez(tmp_path / "inputs.npz", pixels=pixels, tokens=tokens)
    # A process that cannot import the models reads and runs the programs.
    code = f"""
import sys
sys.modules["flax"] = None
import jax, numpy as np
from jax import export
from safetensors.numpy import load_file
data = np.load("{tmp_path}/inputs.npz")
weights = load_file("{tmp_path}/programs/model.safetensors")
for name, rows in (("image", data["pixels"]), ("text", data["tokens"])):
    program = export.deserialize(bytearray(open("{tmp_path}/programs/" + name + ".stablehlo", "rb").read()))
    np.save("{tmp_path}/" + name, program.call(weights, rows))
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "XLA_FLAGS": ""})
    np.testing.assert_allclose(np.load(tmp_path / "image.npy"), model.encode_image(pixels), atol=2e-6)
    np.testing.assert_allclose(np.load(tmp_path / "text.npy"), model.embed_tokens(tokens), atol=2e-6)
    programs = stablehlo.read(tmp_path / "programs")
    for count in (1, 5):  # any batch size
        found = np.asarray(programs.encode_image(pixels[:count]))
        np.testing.assert_allclose(found, model.encode_image(pixels[:count]), atol=2e-6)
    (tmp_path / "programs" / "text.stablehlo").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"text.stablehlo is damaged or absent"):
        stablehlo.read(tmp_path / "programs")


def test_nothing_is_written_over(shared: pathlib.Path, tmp_path: pathlib.Path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    assert convert("open_clip", shared / "reference" / "openclip-vit-gelu", tmp_path / "out") == 2
    assert "is not empty; choose another" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").read_text() == "precious"
