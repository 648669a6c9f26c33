"""A training process in which some global batches are poison: one embedding is NaN, or all of them are turned round.

    python -m tests.faults.poison nan 60,61,62 train --config=... --workdir=...

With `unusable` in place of `nan`, process 1 alone finds no sample that it could use there.

The stream marks such a batch by its tokens, and the model answers to the mark. Batches are counted from 0, so the batch
that a rollback leaves out stays out, however often the run is started.
"""

import sys
from typing import Any

import numpy as np

MARK = 258
"""Token of the mark: the end of a text, which no text has at its beginning."""


def install(kind: str, poisoned: frozenset[int]) -> None:
    """Mark the batches, and let the model answer."""
    import jax.numpy as jnp

    from clipjax.data.training_batches import NoUsableSample
    from clipjax.data.training_order import batch_number
    from clipjax.data.training_stream import TrainStream
    from clipjax.models.clip import Clip

    read, encode = TrainStream._read, Clip.encode_batch

    def read_marked(self: Any) -> Any:
        batch = read(self)
        if batch_number(self._position, self._left_out) in poisoned:
            if kind == "unusable":
                if self._process_index == 1:
                    raise NoUsableSample("100 samples in a row are unusable")
                return batch
            batch["tokens"] = np.full_like(np.asarray(batch["tokens"]), MARK)
        return batch

    def encode_marked(self: Any, params: Any, batch_stats: Any, batch: Any, key: Any) -> Any:
        encoded = encode(self, params, batch_stats, batch, key)
        marked = (batch["tokens"] == MARK).all()
        if kind == "nan":
            first = jnp.arange(len(batch["tokens"]))[:, None] == 3  # one sample alone
            return encoded._replace(image_embed=jnp.where(marked & first, jnp.nan, encoded.image_embed))
        turned = jnp.where(marked, -encoded.image_embed, encoded.image_embed)
        return encoded._replace(image_embed=turned, logit_scale=jnp.where(marked, 100.0, encoded.logit_scale))

    TrainStream._read = read_marked
    Clip.encode_batch = encode_marked  # type: ignore[method-assign]


def main() -> int:
    """Run the command."""
    kind, numbers, *arguments = sys.argv[1:]
    install(kind, frozenset(map(int, numbers.split(","))))
    from clipjax.cli.main import main as clipjax

    return clipjax(arguments)


if __name__ == "__main__":
    sys.exit(main())
