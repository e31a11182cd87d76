"""Fixtures for more than one test module."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def realdata() -> str:
    """The path of the real CIFAR-10; without it the test is skipped. (Mark such tests `realdata`, too.)"""
    path = os.environ.get("CIFAR10_TRAINER_DATA")
    if not path:
        pytest.skip("needs the real CIFAR-10: set CIFAR10_TRAINER_DATA to an archive or a folder with it")
    return os.path.abspath(path)
