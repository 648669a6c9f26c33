"""What a run reads, opened and checked before a device is touched: data, tokenizer, evaluation tasks, first weights."""

from dataclasses import dataclass

import jax

from clipjax.checkpoint import SavedCheckpoint
from clipjax.config import Config
from clipjax.data.sources import Source, build_source
from clipjax.data.tokenizer import Tokenizer, build_tokenizer
from clipjax.evals.runner import Task, build_tasks
from clipjax.models.clip import abstract_params
from clipjax.trees import names


@dataclass(frozen=True)
class Inputs:
    """Everything that training reads. `initial` gives the first parameters where `init_from` names a checkpoint."""

    source: Source
    tokenizer: Tokenizer
    tasks: dict[str, Task]
    initial: SavedCheckpoint | None


def open_inputs(config: Config, *, resumes: bool = False) -> Inputs:
    """Open all of it; a run that resumes has its own weights and does not need those of `init_from`.

    Raises:
        ValueError: something is missing or does not fit the config.
    """
    tokenizer = build_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.text.vocab_size:
        raise ValueError(
            f"model.text.vocab_size={config.model.text.vocab_size} must be at least {tokenizer.vocab_size}, "
            f"the size of data.tokenizer={config.data.tokenizer!r}"
        )
    initial = None
    if config.init_from is not None and not resumes:
        initial = SavedCheckpoint(config.init_from)
        check_same_shapes(config, initial)
    source = build_source(config.data.train, data=config.data)
    if len(source) < config.global_batch_size:
        raise ValueError(
            f"global_batch_size={config.global_batch_size} must not exceed the {len(source)} samples of "
            f"data.train={config.data.train!r}"
        )
    return Inputs(source, tokenizer, build_tasks(config), initial)


def check_same_shapes(config: Config, initial: SavedCheckpoint) -> None:
    """Refuse first weights of another shape.

    Raises:
        ValueError: every parameter that differs.
    """
    ours, theirs = (
        dict(zip(names(tree), (leaf.shape for leaf in jax.tree.leaves(tree)), strict=True))
        for tree in (abstract_params(config.model), abstract_params(initial.config.model))
    )
    differing = [
        f"{name} {ours.get(name)} (checkpoint: {theirs.get(name)})"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise ValueError(f"init_from={config.init_from!r} holds another model: {', '.join(differing)}")
