"""Installs the packages cifar10_trainer and tuning. pyproject.toml holds their metadata."""

from setuptools import setup

setup()
