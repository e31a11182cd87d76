"""scikit-learn's handwritten digits, built in: small runs without a download."""

from __future__ import annotations

import os

import numpy as np

from ..errors import ConfigError
from .base import Dataset, stratified_mask

_DIGITS_TEST_SEED = 8  # fixes which digits are test images, whatever a run's own seed


def load_digits(data_dir: str | os.PathLike[str] | None) -> Dataset:
    """scikit-learn's handwritten digits, enlarged from 8x8; always the same stratified fifth tests."""
    if data_dir:
        raise ConfigError(f"data_dir is {data_dir}; allowed with the dataset digits: none, it is built in")
    from PIL import Image
    from sklearn import datasets as sklearn_datasets

    digits = sklearn_datasets.load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    large = [np.array(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) for image in grey]
    images = np.repeat(np.stack(large)[..., None], 3, axis=-1)
    labels = digits.target.astype(np.int64)
    test = stratified_mask(labels, 0.2, _DIGITS_TEST_SEED)
    parts = images[~test], labels[~test], images[test], labels[test]
    return Dataset("digits", *parts, tuple("0123456789"), "scikit-learn")
