"""clipjax: large-scale contrastive image-text pretraining in JAX.

`clipjax.load(path)` opens a checkpoint; everything else is imported from its own module. Nothing heavy is
imported here, so that `import clipjax.config` (all that a config file needs) stays free of JAX.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipjax.inference import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from clipjax.inference import load

        return load
    raise AttributeError(f"module 'clipjax' has no attribute {name!r}")
