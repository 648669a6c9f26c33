"""SigLIP 2 of variable aspect (NaFlex): a tiny config, weights by rule, pictures, and what the peer computes of them.

    PEER/bin/python -m tests.golden.naflex tests/golden/naflex.json

writes the expected numbers, in an environment with torch 2.13.0 and transformers 5.24.0 but without clipjax. Pictures
are resized by Pillow, the way of the processor that needs no torchvision.
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np

from tests.golden.peer_variants import make_weights

_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG: dict[str, Any] = {
    "model_type": "siglip2",
    "vision_config": {**_TOWER, "num_patches": 16, "patch_size": 4},
    "text_config": {**_TOWER, "vocab_size": 64, "max_position_embeddings": 8, "projection_size": 32},
}
PREPROCESSING = {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 4, "max_num_patches": 20}
SIZES = ((30, 30), (17, 40), (64, 9), (5, 5), (6, 90), (100, 61))
"""Height and width of the pictures; none is 1, 3 or 4, which the peer takes for channels."""
GRIDS = tuple((height, width) for height in (1, 7, 16, 97, 224, 513) for width in (1, 10, 15, 16, 100, 333, 2000))
"""Sizes of which the grid alone is compared, at patches of 16 pixels and at most 256 of them."""


def pictures() -> list[np.ndarray]:
    """Pictures uint8 [h, w, 3]: soft noise, of which two ways of resizing make nearly the same."""
    found = []
    for number, (height, width) in enumerate(SIZES):
        coarse = np.random.RandomState(number).uniform(0, 255, (4, 4, 3))
        rows, columns = (np.linspace(0, 3, side) for side in (height, width))
        across = np.stack([[np.interp(columns, range(4), row[:, c]) for c in range(3)] for row in coarse])  # [4, 3, w]
        smooth = np.stack([[np.interp(rows, range(4), across[:, c, x]) for c in range(3)] for x in range(width)])
        found.append(np.round(smooth.transpose(2, 0, 1)).astype(np.uint8))
    return found


def tokens() -> np.ndarray:
    """Two texts int64 [2, 8]."""
    return np.asarray([[62, 5, 9, 63, 0, 0, 0, 0], [62, 11, 4, 8, 30, 21, 7, 63]], np.int64)


def main(output: pathlib.Path) -> None:
    import torch

    # torchvision's wheel is built for CUDA; on a CPU build of PyTorch its operators are absent, and none is used.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import transformers
    from transformers.models.siglip2 import image_processing_pil_siglip2 as by_pillow
    from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

    fields = {name: value for name, value in CONFIG.items() if name != "model_type"}
    model = transformers.Siglip2Model(transformers.Siglip2Config(**fields))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: torch.tensor(array) for name, array in make_weights(shapes).items()})
    model.eval()
    fields = {name: value for name, value in PREPROCESSING.items() if name != "image_processor_type"}
    processor = by_pillow.Siglip2ImageProcessorPil(**fields)
    inputs = processor(pictures(), return_tensors="pt")
    with torch.no_grad():
        both = model(input_ids=torch.tensor(tokens()), **inputs)
    found = {
        "shapes": {name: list(shape) for name, shape in sorted(shapes.items())},
        "grids": inputs["spatial_shapes"].tolist(),
        "image_embed": np.round(both.image_embeds.double().numpy(), 7).tolist(),
        "text_embed": np.round(both.text_embeds.double().numpy(), 7).tolist(),
        "logits_per_image": np.round(both.logits_per_image.double().numpy(), 6).tolist(),
        "more_grids": [
            [side // 16 for side in get_image_size_for_max_num_patches(*size, patch_size=16, max_num_patches=256)]
            for size in GRIDS
        ],
    }
    output.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
