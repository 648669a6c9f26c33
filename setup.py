"""Package metadata of clipjax. Tool settings lie in pyproject.toml."""

import pathlib

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent

TEST = [
    "beartype>=0.20",
    "flask>=3",  # with flask-cors moto's server; its extra "server" brings all services, and 20 packages more
    "flask-cors>=5",
    "gcp-storage-emulator>=2026.7",
    "import-linter>=2.1",
    "kubeflow-trainer-api>=2.1,<3",  # types of the JobSet API
    "moto[s3]>=5.1",
    "pyright[nodejs]>=1.1.400",
    "pytest>=8.3",
    "pytest-xdist>=3.6",
    "ruff>=0.11",
    "setuptools>=77",  # builds the wheel that a test installs
]

setup(
    name="clipjax",
    version="0.1.0",
    description="Large-scale contrastive image-text pretraining in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["clipjax", "clipjax.*"]),
    package_data={
        "clipjax": [
            "py.typed",
            "evals/datasets/*.json",
            "evals/datasets/*.toml",
            "evals/shift_points/*.json",
            "reports/templates/*.html",
        ],
    },
    entry_points={"console_scripts": ["clipjax=clipjax.cli.main:console"]},
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.8.1",
        "braceexpand>=0.1.7",
        "einops>=0.8",
        "flatbuffers>=24.3",  # jax.export serialises with it, but does not ask for it
        "flax>=0.12.6,<0.13",
        "ftfy>=6.3",
        "grain>=0.2.18,<0.3",  # 0.2.17 silently cut strings in shared memory
        "importlib-resources>=6.4",  # tensorflow-datasets 4.9.10 imports it but does not ask for it
        "jax>=0.10.2",
        "jaxtyping>=0.3",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "ml-collections>=1.1,<2",
        "numpy>=2.1",
        "obstore>=0.12,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pillow>=11.3",  # the first with AVIF
        "prometheus-client>=0.21",
        "pyarrow>=18",
        "regex>=2024.11",
        "rich>=13,<16",
        "safetensors>=0.5",
        "sentencepiece>=0.2.1,<0.3",
        "simplejpeg>=1.8",
        "tensorboardX>=2.6.2",
        "tensorflow-datasets>=4.9.10,<4.10",
        "tokenizers>=0.21",
        "xxhash>=3.5",
    ],
    extras_require={
        "gpu": ["jax[cuda12]>=0.10.2"],
        "gpu13": ["jax[cuda13]>=0.10.2"],
        "plan": ["jax[tpu]>=0.10.2"],  # the TPU compiler, for `clipjax plan` on any machine
        "plan-gpu": ["jax-cuda12-pjrt>=0.10.2", "jax-cuda12-plugin>=0.10.2"],  # the GPU compiler, without CUDA itself
        "torch": ["torch>=2.6"],  # for `clipjax convert` to open .pt and .bin files, and for nothing else
        "tpu": ["jax[tpu]>=0.10.2"],
        "test": TEST,
    },
)
