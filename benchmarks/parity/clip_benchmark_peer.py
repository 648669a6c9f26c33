"""The peer's half of `benchmarks/parity/clip_benchmark.py`; runs in the peer's environment, knows nothing of clipjax.

clip_benchmark_peer.py eval OUT ARGUMENT...       CLIP_benchmark's command, and open_clip's metrics on the same inputs
clip_benchmark_peer.py probe OUT TRAIN TEST C...  scikit-learn's probes on the embeddings that `eval` has written

CLIP_benchmark is not changed: functions that its command calls are wrapped, to write down what goes in and comes out.
"""

import argparse
import copy
import functools
import importlib.metadata
import json
import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

# torchvision's wheel is built for CUDA; on a CPU build of PyTorch its operators are absent, and nothing here uses them.
_LIBRARY = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

BATCH = 256


class Recorder:
    """What the command was given and gave, in the order of its calls."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple]] = {}
        self.model = self.tokenizer = None

    def wrap(self, module: object, name: str) -> None:
        """Write down arguments and result of each call of a function of a module."""
        function = getattr(module, name)
        setattr(module, name, self.recorded(name, function))

    def recorded(self, name: str, function: Callable) -> Callable:
        """Return the function that also writes down its calls."""

        def call(*arguments, **options):
            result = function(*arguments, **options)
            self.calls.setdefault(name, []).append((arguments, options, result))
            return result

        return call

    def load(self, function: Callable) -> Callable:
        """Return the loader whose model and tokenizer write down their inputs."""

        def call(*arguments, **options):
            model, transform, tokenizer = function(*arguments, **options)
            self.model, self.tokenizer = copy.deepcopy(model), tokenizer
            model.encode_image = self.recorded("encode_image", model.encode_image)
            return model, transform, self.recorded("tokenizer", tokenizer)

        return call

    def results(self, name: str) -> list:
        """Return the results of all calls."""
        return [result for _, _, result in self.calls.get(name, [])]

    def inputs(self, name: str) -> list:
        """Return the first argument of all calls."""
        return [arguments[0] for arguments, _, _ in self.calls.get(name, [])]


def evaluate(output: str, arguments: list[str]) -> None:
    """Run the command with these arguments, then open_clip's metrics on the same tensors, and write all of it."""
    from clip_benchmark import cli
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    recorder = Recorder()
    cli.load_clip = recorder.load(cli.load_clip)
    recorder.wrap(zeroshot_classification, "run_classification")
    recorder.wrap(zeroshot_classification, "average_precision_per_class")
    recorder.wrap(zeroshot_retrieval, "recall_at_k")
    sys.argv = ["clip_benchmark", *arguments]
    cli.main()
    pixels = torch.cat(recorder.inputs("encode_image"))
    tokens = torch.cat(recorder.results("tokenizer"))
    found = {"pixels": pixels.numpy(), "tokens": tokens.numpy()}
    if runs := recorder.results("run_classification"):
        ((logits, target),) = runs
        found |= {"logits": logits.numpy(), "target": target.numpy()}
        if target.ndim == 1:
            found |= open_clip_classification(recorder, pixels, target)
        else:
            (found["average_precision"],) = (each.numpy() for each in recorder.results("average_precision_per_class"))
    else:
        found |= retrieval_hits(recorder, len(tokens), len(pixels))
        if len(tokens) == len(pixels):
            found |= open_clip_retrieval(recorder, pixels, tokens)
    found |= embed(recorder.model, pixels, tokens, "32")
    found |= embed(recorder.model.double(), pixels.double(), tokens, "64")
    np.savez(output, versions=json.dumps(versions()), **found)


def retrieval_hits(recorder: Recorder, num_texts: int, num_images: int) -> dict[str, np.ndarray]:
    """Return by query what the command took for hits: for each depth first all texts were asked, then all images."""
    by_depth: dict[int, list[np.ndarray]] = {}
    for _, options, recall in recorder.calls["recall_at_k"]:
        by_depth.setdefault(options["k"], []).append((recall > 0).numpy())
    found = {}
    for depth, parts in by_depth.items():
        hits = np.concatenate(parts)
        assert len(hits) == num_texts + num_images, (len(hits), num_texts, num_images)
        found |= {f"image_retrieval_{depth}": hits[:num_texts], f"text_retrieval_{depth}": hits[num_texts:]}
    return found


def open_clip_classification(recorder: Recorder, pixels: torch.Tensor, target: torch.Tensor) -> dict[str, np.ndarray]:
    """Return top-1 and top-5 of open_clip's own evaluation, on the prompts that the command has made."""
    import open_clip
    from open_clip_train import zero_shot

    prompts = recorder.inputs("tokenizer")
    templates = [functools.partial(prompt_of, prompts, number) for number in range(len(prompts[0]))]
    classifier = open_clip.build_zero_shot_classifier(
        recorder.model,
        tokenizer=recorder.tokenizer,
        classnames=list(range(len(prompts))),
        templates=templates,
        num_classes_per_batch=10,
        device="cpu",
    )
    options = argparse.Namespace(device="cpu", precision="fp32", batch_size=BATCH)
    batches = list(zip(pixels.split(BATCH), target.split(BATCH), strict=True))
    top1, top5 = zero_shot.run(recorder.model, classifier, batches, options)
    return {"open_clip_acc1": np.asarray(top1), "open_clip_acc5": np.asarray(top5)}


def prompt_of(prompts: list[list[str]], number: int, label: int) -> str:
    """Return a class's prompt of a number."""
    return prompts[label][number]


def open_clip_retrieval(recorder: Recorder, pixels: torch.Tensor, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """Return the recalls of open_clip's own evaluation, which knows one caption an image."""
    from open_clip_train.train import get_clip_metrics

    found = embed(recorder.model, pixels, tokens, "")
    image, text = torch.tensor(found["image"]), torch.tensor(found["text"])
    metrics = get_clip_metrics(image, text, recorder.model.logit_scale.exp().detach())
    return {f"open_clip_{name}": np.asarray(value) for name, value in metrics.items()}


@torch.no_grad()
def embed(model: torch.nn.Module, pixels: torch.Tensor, tokens: torch.Tensor, suffix: str) -> dict[str, np.ndarray]:
    """Return unit-norm embeddings of images and texts."""
    image = [F.normalize(model.encode_image(part), dim=-1) for part in pixels.split(BATCH)]
    text = [F.normalize(model.encode_text(part), dim=-1) for part in tokens.split(BATCH)]
    return {f"image{suffix}": torch.cat(image).numpy(), f"text{suffix}": torch.cat(text).numpy()}


def probe(output: str, train: str, test: str, *strengths: str) -> None:
    """Write which test images scikit-learn's logistic regression gets right, by strength."""
    from sklearn.linear_model import LogisticRegression

    with np.load(train, allow_pickle=False) as content:
        x, y = content["image32"].astype(np.float64), content["target"]
    with np.load(test, allow_pickle=False) as content:
        test_x, test_y = content["image32"].astype(np.float64), content["target"]
    fits = [LogisticRegression(C=float(c), solver="lbfgs", max_iter=20_000, tol=1e-7).fit(x, y) for c in strengths]
    found = [(fitted.predict(test_x) == test_y).tolist() for fitted in fits]
    np.savez(output, right=np.asarray(found), iterations=np.asarray([int(fitted.n_iter_.max()) for fitted in fits]))


def versions() -> dict[str, str]:
    """Return the versions of the peers."""
    names = (
        "clip_benchmark",
        "open_clip_torch",
        "torch",
        "torchvision",
        "webdataset",
        "scikit-learn",
        "numpy",
        "pillow",
    )
    return {name: importlib.metadata.version(name) for name in names}


if __name__ == "__main__":
    command, place, *rest = sys.argv[1:]
    if command == "eval":
        evaluate(place, rest)
    elif command == "probe":
        probe(place, *rest)
    else:
        sys.exit(f"{command} is neither eval nor probe")
