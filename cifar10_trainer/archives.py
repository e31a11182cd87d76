"""What an archive claims to hold is checked before anything is allocated for it. Imports no TensorFlow.

A small file can claim terabytes: deflated zeros, a header of another shape, an HDF5 dataset without its chunks. What this
package and Keras write is stored as it is, so an honest file holds about as many bytes as it claims. Errors are
ValueErrors whose text is a reason, for the reader to put into a line of its own.
"""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import h5py

# An archive that somebody packed again may be smaller than its contents: the weights of a network hardly, its JSON well.
RATIO = 1.2
SLACK = 16 << 20  # bytes
_PIECE = 1 << 20


def check_zip(path: str | os.PathLike[str]) -> int:
    """Checks that a zip archive holds what it claims, and claims no more than its size allows. No member is kept.

    Args:
        path: a regular file.

    Returns:
        the bytes of all members.

    Raises:
        ValueError: if it is not a zip archive, or its members are too large or damaged.
        OSError: if it cannot be read.
    """
    size = os.path.getsize(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            claimed = sum(member.file_size for member in members)
            if claimed > RATIO * size + SLACK:
                raise ValueError(f"it has {size:,} bytes and claims to hold {claimed:,}")
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED:  # its claim may be false: unpack it in pieces
                    with archive.open(member) as file:
                        while file.read(_PIECE):
                            pass
    except OSError:
        raise
    except Exception as error:  # zipfile, zlib, bz2 and lzma raise errors of their own for damaged files
        raise ValueError(str(error) or type(error).__name__) from error
    return claimed


@contextlib.contextmanager
def rewriting(path: str | os.PathLike[str]) -> Iterator[dict[str, bytes]]:
    """Gives the members of a zip archive by name, and writes them again, stored, as they are at the end of the block."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    yield members
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def check_npz(path: str | os.PathLike[str]) -> int:
    """As `check_zip`, for NumPy's .npz: the header of each array must fit its member. Raises ValueError, OSError."""
    claimed = check_zip(path)
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                _check_npy(member.filename, file, member.file_size)
    return claimed


def _check_npy(name: str, file: IO[bytes], size: int) -> None:
    try:
        version = np.lib.format.read_magic(file)
        read: Any = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read[version](file)
    except Exception as error:  # the header is a Python expression, whose errors are of many classes
        raise ValueError(f"{name} has no header of an array") from error
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError(f"{name} has {size:,} bytes, which are not an array {shape} of {dtype}")


def check_hdf5(file: h5py.File, size: int) -> int:
    """Checks that the datasets of an HDF5 file are stored in it, and are not larger than its `size` allows.

    Returns:
        the bytes of all datasets.

    Raises:
        ValueError: if they are larger, or lie in another file.
    """
    import h5py

    claimed = 0

    def visit(group: h5py.Group, depth: int) -> None:
        nonlocal claimed
        if depth > 100:
            raise ValueError("its groups are nested too deep")
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"{group.name}/{name} is a link")
            item = group[name]
            if isinstance(item, h5py.Group):
                visit(item, depth + 1)
            elif isinstance(item, h5py.Dataset):
                if item.is_virtual or item.external:
                    raise ValueError(f"{item.name} lies in another file")
                claimed += item.nbytes
            if claimed > RATIO * size + SLACK:
                raise ValueError(f"it has {size:,} bytes and claims to hold {claimed:,} or more")

    visit(file, 0)
    return claimed
