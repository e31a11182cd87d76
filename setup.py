"""Installs the packages cifar10_trainer and tuning."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "cifar10_trainer/__init__.py").read_text(), re.M)

setup(
    name="cifar10-trainer",
    version=VERSION[1],
    description="Train image classifiers on CIFAR-10 with TensorFlow and Keras, fast",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["cifar10_trainer*", "tuning*"]),
    install_requires=[
        "tensorflow>=2.21,<2.22",
        "tensorflow-datasets>=4.9.10",
        "keras-tuner>=1.4.8",
        "numpy",
        "matplotlib>=3.7",
        "scikit-learn",
        "absl-py",
        "pillow",  # reads the image files that users have; matplotlib needs it anyway
        "importlib_resources",  # imported by tensorflow-datasets, which does not declare it
        "tensorboard",  # imported by keras-tuner, which does not declare it
    ],
    extras_require={
        "test": ["pytest", "pytest-timeout", "pytest-xdist", "nbclient", "ipykernel"],
        "dev": ["ruff", "mypy", "build"],
    },
    entry_points={"console_scripts": ["cifar10-trainer = cifar10_trainer.__main__:command"]},
)
