"""The handwritten digits of scikit-learn: a small data set without a download."""

from __future__ import annotations

import os

import numpy as np

from ..errors import ConfigError
from .base import Dataset, stratified_mask

_DIGITS_TEST_SEED = 8  # the test images are the same ones for every seed of a run


def load_digits(data_dir: str | os.PathLike[str] | None) -> Dataset:
    """Reads scikit-learn's handwritten digits.

    Args:
        data_dir: must be None, because the images come with scikit-learn.

    Returns:
        1,797 grey images, enlarged from 8x8 to 32x32 and with three equal channels. The same stratified fifth of them
        always are the test images.

    Raises:
        ConfigError: if there is a `data_dir`.
    """
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
