"""The peer's half of `benchmarks/parity/run.py`; runs in the peer's own environment, knows nothing of clipjax.

peer.py make KIND NAME DIR     a full-size model with random weights: its files, and inputs and outputs in peer.npz
peer.py open KIND DIR OUT      open an exported directory with the peer's own loader, embed DIR's inputs into OUT
peer.py tokens FILE OUT        ids of the captions in FILE, a JSON list, by open_clip's tokenizer
"""

import json
import pathlib
import sys

import numpy as np
import torch

# torchvision's wheel is built for CUDA; on a CPU build of PyTorch its operators are absent, and nothing here uses them.
_LIBRARY = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

PAIRS = 4


def randomise(model: torch.nn.Module) -> None:
    """Move every weight and statistic away from where it starts, so that none is zero or one."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.add_(0.02 * noise)
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.2 * torch.rand(tensor.shape, generator=generator))


def inputs(image_size: int, length: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, vocab_size - 2, (PAIRS, length))
    for i, row in enumerate(tokens):
        row[0], row[3 + i], row[4 + i :] = vocab_size - 2, vocab_size - 1, 0
    return rng.normal(size=(PAIRS, 3, image_size, image_size)).astype(np.float32), tokens


def embed(kind: str, model, images: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    more = {}
    with torch.no_grad():
        if kind == "open_clip":
            out = (
                model.encode_image(torch.tensor(images), normalize=True),
                model.encode_text(torch.tensor(tokens), normalize=True),
            )
            if hasattr(model, "text_decoder"):
                more["caption_logits"] = model(torch.tensor(images), torch.tensor(tokens))["logits"].numpy()
        else:
            both = model(input_ids=torch.tensor(tokens), pixel_values=torch.tensor(images))
            out = both.image_embeds, both.text_embeds
    return {"image_embed": out[0].numpy(), "text_embed": out[1].numpy(), **more}


def make(kind: str, name: str, folder: pathlib.Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    if kind == "open_clip":
        import open_clip

        cfg = open_clip.get_model_config(name)
        model = open_clip.create_model(name, pretrained=None).eval()
        randomise(model)
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
        text = cfg["text_cfg"]
        size, length, vocab = cfg["vision_cfg"]["image_size"], text["context_length"], text.get("vocab_size", 49_408)
    else:
        import transformers

        config = getattr(transformers, f"{name}Config")()
        model = getattr(transformers, f"{name}Model")(config).eval()
        randomise(model)
        model.save_pretrained(folder)
        size, text = config.vision_config.image_size, config.text_config
        length, vocab = text.max_position_embeddings, text.vocab_size
    images, tokens = inputs(size, length, vocab)
    np.savez(folder / "peer.npz", images=images, tokens=tokens, **embed(kind, model, images, tokens))


def open_exported(kind: str, folder: pathlib.Path, given: pathlib.Path, output: pathlib.Path) -> None:
    data = np.load(given, allow_pickle=False)
    if kind == "open_clip":
        import open_clip

        model = open_clip.create_model(f"local-dir:{folder}").eval()
    else:
        import transformers

        name = json.loads((folder / "config.json").read_text())["architectures"][0]
        model, told = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
        assert not any(told.values()), told
        model = model.eval()
    np.savez(output, **embed(kind, model, data["images"], data["tokens"]))


def tokens_of(captions: pathlib.Path, output: pathlib.Path) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    np.savez(output, tokens=SimpleTokenizer()(json.loads(captions.read_text())).numpy())


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    match command:
        case "make":
            make(arguments[0], arguments[1], pathlib.Path(arguments[2]))
        case "open":
            open_exported(arguments[0], *map(pathlib.Path, arguments[1:]))
        case "tokens":
            tokens_of(*map(pathlib.Path, arguments))
