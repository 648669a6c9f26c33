"""Several models as one: the mean of their logits, or of their embeddings.

Axes: b rows of this process, n rows over all processes, m texts, e embed of the ensemble.
"""

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from clipjax.config import Config, FeatureKind
from clipjax.data.patches import Pixels
from clipjax.evals.encoder import Encoder, unit_norm
from clipjax.evals.runner import Task


class EnsembleKind(enum.Enum):
    """Mean that an ensemble takes: of the models' logits, each with its own scale, or of their embeddings."""

    LOGITS = "logits"
    EMBEDDINGS = "embeddings"


def check_members(configs: Sequence[Config], kind: EnsembleKind) -> None:
    """Refuse what has no mean.

    Raises:
        ValueError: fewer than two models; one without embeddings; the mean of embeddings of unequal widths.
    """
    if len(configs) < 2:
        raise ValueError("an ensemble needs two models or more")
    if any(config.loss.contrastive_weight == 0 for config in configs):
        raise ValueError("an ensemble needs the embeddings of each model; loss.contrastive_weight=0 trains none")
    widths = [config.model.embed_dim for config in configs]
    if kind is EnsembleKind.EMBEDDINGS and len(set(widths)) > 1:
        raise ValueError(
            f"the models have embeddings of {', '.join(map(str, widths))} numbers, and no mean; take their logits"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Ensemble(Encoder):
    """Encoders that act as one; the fields of `Encoder` are those of the first. Its pictures are tuples, one a member.

    For the mean of logits, embeddings are the members' side by side, each times the root of its share of the sum of
    scales: their product times `logit_scale` is the mean of the members' logits. The mean of embeddings means something
    for models whose embeddings share a space: steps of one run, or fine-tuned from the same weights.

    Attributes:
        members: the encoders, two or more.
        kind: of mean.
    """

    members: Sequence[Encoder]
    kind: EnsembleKind

    @classmethod
    def of(cls, members: Sequence[Encoder], kind: EnsembleKind) -> "Ensemble":
        """Return the ensemble of encoders on one mesh.

        Raises:
            ValueError: see `check_members`.
        """
        check_members([member.config for member in members], kind)
        first = members[0]
        return cls(
            config=first.config,
            clip=first.clip,
            mesh=first.mesh,
            tokenizer=first.tokenizer,
            params=first.params,
            members=members,
            kind=kind,
        )

    @property
    def logit_scale(self) -> float:
        """The mean of the members' factors of cosines."""
        return float(np.mean([member.logit_scale for member in self.members]))

    def embed_images(self, image: Pixels | tuple[Pixels, ...]) -> np.ndarray:
        """Return unit-norm float32 `[n, e]` of each member's own pixels, this process's part of a batch."""
        assert isinstance(image, tuple)
        return self._join([member.embed_images(own) for member, own in zip(self.members, image, strict=True)])

    def image_features(self, image: Pixels | tuple[Pixels, ...]) -> np.ndarray:
        """Return what each member projects to embeddings, side by side. Float32 `[n, v]`."""
        assert isinstance(image, tuple)
        features = [member.image_features(own) for member, own in zip(self.members, image, strict=True)]
        return np.concatenate(features, axis=1)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return unit-norm float32 `[m, e]`."""
        return self._join([member.embed_texts(texts) for member in self.members])

    def is_cut(self, text: str) -> bool:
        """Return True if a text is too long for the context of some member."""
        return any(member.is_cut(text) for member in self.members)

    def normalise(self, rows: np.ndarray) -> np.ndarray:
        """Return rows `[..., e]`, such as means of embeddings, with each member's own part scaled as its embeddings."""
        if self.kind is EnsembleKind.EMBEDDINGS:
            return unit_norm(rows)
        widths = [member.config.model.embed_dim for member in self.members]
        return self._join([unit_norm(part) for part in np.split(rows, np.cumsum(widths)[:-1], axis=-1)])

    def _join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        if self.kind is EnsembleKind.EMBEDDINGS:
            return unit_norm(np.mean(parts, axis=0))
        scales = np.asarray([member.logit_scale for member in self.members])
        shares = np.sqrt(scales / scales.sum()).astype(np.float32)
        return np.concatenate([part * share for part, share in zip(parts, shares, strict=True)], axis=-1)


@dataclass(frozen=True)
class JointTask(Task):
    """One task for an ensemble: each member reads its own pictures of the same samples.

    Attributes:
        members: the task as each model reads it; measure, sources, examples and shift are those of the first.
    """

    members: Sequence[Task] = ()

    @classmethod
    def of(cls, members: Sequence[Task]) -> "JointTask":
        """Return the task of tasks that differ in how models see pictures.

        Raises:
            ValueError: it asks for features of no model.
        """
        first = members[0]
        if getattr(first.measure, "features", None) is FeatureKind.PIXELS:
            raise ValueError("features=pixels are not those of a model; leave this task out of an ensemble")
        return cls(**{each.name: getattr(first, each.name) for each in fields(Task)}, members=members)

    def read_together(self, encoder: Encoder, number: int) -> Iterator[tuple[dict, np.ndarray]]:
        """Yield batches whose `image` is a tuple, one a member; a sample counts if each member can use it.

        Raises:
            ReadFailed: a process cannot read its part.
        """
        for parts in zip(*(task.read_together(encoder, number) for task in self.members), strict=True):
            batches, reasons = [batch for batch, _ in parts], [reason for _, reason in parts]
            mask = np.logical_and.reduce([batch["mask"] for batch in batches])
            image = tuple(batch["image"] for batch in batches)
            yield {**batches[0], "image": image, "mask": mask}, np.maximum.reduce(reasons)
