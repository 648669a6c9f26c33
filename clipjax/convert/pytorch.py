"""PyTorch's pickled weights, read by its restricted unpickler. Opt-in: `pip install 'clipjax[torch]'`."""

import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

OLDEST = (2, 6)
"""The oldest PyTorch whose `weights_only=True` is safe (CVE-2025-32434)."""


def read(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Read the tensors of a `.pt`, `.pth`, `.bin` or `.ckpt` by name; of a training checkpoint, its `state_dict`.

    Raises:
        ValueError: PyTorch is absent or too old; the file is damaged, TorchScript, or holds more than tensors.
    """
    torch = _torch(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and PyTorch all raise their own kinds
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{file} is damaged, TorchScript, or holds more than tensors, and nothing else is opened ({reason}); take "
            "the same weights as safetensors"
        ) from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping):
        raise ValueError(f"{file}: holds {type(found).__name__}, not tensors by name")
    if other := [str(name) for name, value in found.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f"{file}: holds more than tensors: {', '.join(other[:5])}")
    # Training on several devices puts all names under `module.`.
    prefix = "module." if found and all(str(name).startswith("module.") for name in found) else ""
    return {str(name).removeprefix(prefix): _array(torch, f"{file}: {name}", value) for name, value in found.items()}


def _torch(file: pathlib.Path) -> Any:
    remedy = f"pip install 'clipjax[torch]', or take the same weights as safetensors ({file})"
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise ValueError(
            "a pickle can run any code when it is opened, so clipjax opens it only with PyTorch's restricted "
            f"unpickler, which is not installed: {remedy}"
        ) from error
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST:
        raise ValueError(f"PyTorch {torch.__version__} cannot open pickles safely: {remedy}")
    return torch


def _array(torch: Any, name: str, tensor: Any) -> np.ndarray:
    """Convert a tensor to NumPy; bfloat16, which NumPy lacks, becomes float32, which holds it exactly."""
    tensor = tensor.detach()
    try:
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name}: is no plain array of floats ({tensor.dtype}, {tensor.layout})") from error
