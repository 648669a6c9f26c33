"""Layers that towers share: what their fields choose from, and their FLOPs and parameters.

A multiply-add is 2 FLOPs; attention is counted dense, the causal half too; look-ups, norms and softmax are not counted.
The convention of open_clip's `docs/model_profile.csv`.
"""

import enum


class Activation(enum.Enum):
    """Non-linearity of the MLPs: OpenAI's `quick_gelu` (x * sigmoid(1.702 x)), `gelu`, or its tanh form (SigLIP)."""

    QUICK_GELU = "quick_gelu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"


class Projection(enum.Enum):
    """Layer between a tower's width and the embedding: none (they are equal), a matrix, or a matrix and a bias."""

    NONE = "none"
    LINEAR = "linear"
    AFFINE = "affine"

    def flops(self, width: int, embed_dim: int) -> int:
        """Return the FLOPs of one vector."""
        return 0 if self is Projection.NONE else 2 * width * embed_dim

    def num_params(self, width: int, embed_dim: int) -> int:
        """Return the number of parameters of the matrix and of the bias."""
        return {Projection.NONE: 0, Projection.LINEAR: width * embed_dim}.get(self, (width + 1) * embed_dim)


def hidden_dim(mlp_dim: int | None, width: int) -> int:
    """Return the hidden size of an MLP: 4 * width where the config names none."""
    return 4 * width if mlp_dim is None else mlp_dim


class Blocks:
    """A stack of transformer blocks: what `ViTConfig` and `TextTransformerConfig` have in common."""

    __slots__ = ()

    width: int
    depth: int
    num_heads: int
    mlp_dim: int | None
    projection: Projection

    @property
    def hidden_dim(self) -> int:
        """Hidden size of the MLPs."""
        return hidden_dim(self.mlp_dim, self.width)

    def block_flops(self, length: int) -> int:
        """Return the FLOPs of all blocks over `length` tokens."""
        weights = 4 * self.width**2 + 2 * self.width * self.hidden_dim
        return self.depth * (2 * length * weights + 4 * length**2 * self.width)

    def block_params(self) -> int:
        """Return the number of parameters of all blocks."""
        return self.depth * block_params(self.width, self.hidden_dim)

    def block_errors(self, path: str, embed_dim: int) -> list[str]:
        """Return what is wrong between the fields of a stack, a line each."""
        errors = []
        if self.width % self.num_heads:
            errors.append(f"{path}.width={self.width} must be a multiple of {path}.num_heads={self.num_heads}")
        if self.projection is Projection.NONE and self.width != embed_dim:
            errors.append(f"{path}.projection=none needs {path}.width={self.width} to be model.embed_dim={embed_dim}")
        return errors


def linear_params(inputs: int, outputs: int) -> int:
    """Return the number of parameters of a matrix and a bias."""
    return (inputs + 1) * outputs


def block_params(width: int, mlp_dim: int) -> int:
    """Return the number of parameters of one block: attention, MLP and their two norms."""
    return attention_params(width, width, width) + mlp_params(width, mlp_dim) + 4 * width


def mlp_params(width: int, mlp_dim: int) -> int:
    """Return the number of parameters of two layers."""
    return linear_params(width, mlp_dim) + linear_params(mlp_dim, width)


def attention_params(width: int, key_width: int, out_dim: int) -> int:
    """Return the number of parameters of attention from tokens of `width` to tokens of `key_width`."""
    return linear_params(width, width) + 2 * linear_params(key_width, width) + linear_params(width, out_dim)


def attention_pool_flops(length: int, width: int, mlp_dim: int) -> int:
    """Return the FLOPs of one query: its projections, keys and values of all tokens, the mixture, an MLP."""
    return 4 * width**2 + 4 * length * width**2 + 4 * length * width + 4 * width * mlp_dim


def attention_pool_params(width: int, mlp_dim: int) -> int:
    """Return the number of parameters of one query with its attention, norm and MLP."""
    return width + attention_params(width, width, width) + 2 * width + mlp_params(width, mlp_dim)
