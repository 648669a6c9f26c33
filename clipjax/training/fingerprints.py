"""Fingerprints of a run: the config, code, checkpoints and data that all of its processes must have in common."""

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from clipjax.checkpoints.records import FOLDER, pack_tokenizer
from clipjax.checkpoints.saved import SavedCheckpoint, steps_in
from clipjax.config import Config
from clipjax.config.serialization import flatten, to_dict
from clipjax.data.sample import Source
from clipjax.data.tokenizers.protocol import Tokenizer
from clipjax.evals.overlap import to_json
from clipjax.evals.probe_tasks import FewShot
from clipjax.evals.runner import Task
from clipjax.evals.zero_shot import ZeroShot
from clipjax.monitoring.run_record import versions
from clipjax.training.decisions import Decisions

HOST_LOCAL = ("data.tfds_dir", "data.cache_", "data.num_", "data.prefetch_batches", "compile_cache")
"""Fields (by prefix) that may differ between machines: none of them touches what is computed."""


def digests(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return one digest of each section."""
    return {section: _digest(json.dumps(values, sort_keys=True).encode()) for section, values in facts.items()}


def _digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()[:16]


def config_fingerprint(config: Config) -> dict[str, Any]:
    """Return the fields that must be the same everywhere."""
    return {
        name: value
        for name, value in flatten(to_dict(config)).items()
        if not name.startswith(HOST_LOCAL) and not name.endswith(".tfds_dir")
    }


def code_fingerprint() -> dict[str, Any]:
    """Return a digest of each of the package's files, and the versions of its requirements."""
    package = pathlib.Path(__file__).parents[1]
    files = {
        f"{package.name}/{path.relative_to(package).as_posix()}": _digest(path.read_bytes())
        for path in sorted(package.rglob("*.py"))
    }
    return files | versions()


def checkpoint_fingerprint(workdir: pathlib.Path, decisions: Decisions) -> dict[str, Any]:
    """Return the steps of the checkpoints and the decisions that this process sees in the workdir."""
    steps = steps_in(workdir / FOLDER)
    return {
        "steps in the workdir": ", ".join(map(str, steps)) or "none",
        "decisions": decisions.describe(),  # a network file system may show another process an older file
    }


def data_fingerprint(
    sources: Mapping[str, Source], tokenizer: Tokenizer, checkpoints: Mapping[str, SavedCheckpoint | None]
) -> dict[str, Any]:
    """Return facts, cheap to compute, about the data that this process sees.

    Args:
        sources: by the config's name of them.
        tokenizer: of the run.
        checkpoints: those that give weights, by config field.
    """
    facts: dict[str, Any] = {"tokenizer": _digest(json.dumps(pack_tokenizer(tokenizer), sort_keys=True).encode())}
    for name, source in sources.items():
        facts |= {f"{name} {what}": value for what, value in describe_source(source).items()}
    for name, saved in checkpoints.items():
        if saved is not None:
            facts[f"{name} step"] = saved.step
            facts[f"{name} records"] = _digest(json.dumps(saved.records, sort_keys=True).encode())
    return facts


def prompts_fingerprint(tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Return a digest of the texts of each task that has class names, and of its overlap: all may be from files."""
    facts: dict[str, Any] = {}
    for name, task in tasks.items():
        match task.measure:
            case ZeroShot() as measure:
                texts: Any = [list(measure.names), list(measure.templates), measure.paraphrases]
                if measure.overlap is not None:
                    facts[f"eval.tasks.{name} overlap"] = _digest(to_json(measure.overlap).encode())
            case FewShot(prompts=(names, templates)):
                texts = [list(names), list(templates)]
            case _:
                continue
        facts[f"eval.tasks.{name} texts"] = _digest(json.dumps(texts, sort_keys=True).encode())
    return facts


def describe_source(source: Source) -> dict[str, Any]:
    """Return the number of samples and of shards, and a digest of all shards' digests, in order."""
    shards = source.digests()
    contents = _digest(*(shard.digest.encode() for shard in shards))
    return {"samples": len(source), "shards": len(shards), "contents": contents}
