"""Pickled weights: only tensors come out of them, whatever they hold."""

import pathlib

import numpy as np
import pytest
from safetensors import numpy as safetensors

import clipjax
from clipjax.cli.convert import main_convert
from clipjax.convert import pytorch
from tests.commands import exit_code


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is an extra: pip install 'clipjax[torch]'")


def test_without_pytorch_the_extra_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "model.pt").write_bytes(b"\x80\x04")
    arguments = ["--from=openai", f"--input={tmp_path / 'model.pt'}", "--model=ViT-B/32"]
    assert exit_code(main_convert, [*arguments, f"--output={tmp_path / 'out'}"]) == 2
    told = capsys.readouterr().err
    assert "a pickle can run any code" in told and "pip install 'clipjax[torch]'" in told


def test_an_old_pytorch_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    old = type("torch", (), {"__version__": "2.5.1+cpu"})
    monkeypatch.setitem(__import__("sys").modules, "torch", old)
    with pytest.raises(ValueError, match=r"PyTorch 2.5.1\+cpu cannot open pickles safely"):
        pytorch.read(tmp_path / "model.bin")


@pytest.mark.parametrize("wrap", [False, True], ids=["weights", "a training checkpoint"])
def test_tensors_are_read(torch, shared: pathlib.Path, tmp_path: pathlib.Path, wrap: bool):
    root = shared / "reference" / "openclip-vit-gelu"
    weights = safetensors.load_file(root / "weights.safetensors")
    saved = {name: torch.tensor(array) for name, array in weights.items()}
    if wrap:
        saved = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in saved.items()}}
    (tmp_path / "in").mkdir()
    torch.save(saved, tmp_path / "in" / "model.bin")
    (tmp_path / "in" / "config.json").write_bytes((root / "config.json").read_bytes())
    assert (
        exit_code(main_convert, ["--from=open_clip", f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'ours'}"])
        == 0
    )
    ours, target = clipjax.load(tmp_path / "ours"), np.load(root / "reference.npz", allow_pickle=False)
    np.testing.assert_allclose(
        ours.embed_tokens(target["tokens"].astype(np.int32)), target["text_features"], rtol=0, atol=2e-5
    )


def test_bfloat16_keeps_every_bit(torch, tmp_path: pathlib.Path):
    values = torch.tensor([1.0, -3.140625, 1e-20], dtype=torch.bfloat16)
    torch.save({"w": values}, tmp_path / "w.pt")
    np.testing.assert_array_equal(pytorch.read(tmp_path / "w.pt")["w"], values.float().numpy())


class Evil:
    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path("ran"),))


def test_nothing_else_is_opened(torch, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.zeros(1), "evil": Evil()}, "evil.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        pytorch.read(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    torch.save({"w": torch.zeros(1), "epoch": 3}, "mixed.pt")
    with pytest.raises(ValueError, match="holds more than tensors: epoch"):
        pytorch.read(tmp_path / "mixed.pt")
    (tmp_path / "short.pt").write_bytes((tmp_path / "mixed.pt").read_bytes()[:200])
    with pytest.raises(ValueError, match="is damaged"):
        pytorch.read(tmp_path / "short.pt")
