"""Places of the documents of a shard of format 2."""

from __future__ import annotations

import io
import re
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datapipe.tar_members import BLOCK, DamagedError, Member, pread

IDS, LENGTHS, CHECKSUMS, MARKED = b".ids.npy", b".lengths.npy", b".crc32.npy", b".marked.npy"
"""Extensions of the members of a sample of format 2."""
# The header that numpy writes for a 1-D uint16 or uint32 array; numpy's own reader takes, or refuses, anything else.
NPY = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '<u([24])', 'fortran_order': False, 'shape': \((\d+),\), \} *\n", re.S
)
_NPY_BITS = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '\|u1', 'fortran_order': False, 'shape': \((\d+),\), \} *\n", re.S
)


class PackedIndex(NamedTuple):
    """Places of the documents of a shard of format 2, `[documents]` each."""

    offsets: NDArray[np.int64]
    """Byte at which the ids begin."""
    sizes: NDArray[np.uint32]
    """Bytes of the ids."""
    checksums: NDArray[np.uint32]
    """`checksum` of each document."""
    dtype: np.dtype[Any]
    """dtype of the ids."""
    bits: NDArray[np.int64] | None = None
    """Bit of the file at which the marks begin, -1 for a sample without marks; None if no sample has any."""


def packed_index(file: IO[bytes], members: list[Member], name: str) -> tuple[PackedIndex | None, DamagedError | None]:
    """Places of the documents of format 2, and the fault of the first damaged sample, where the walk ends."""
    samples: dict[bytes, dict[bytes, Member]] = {}
    for member in members:
        for extension in (IDS, LENGTHS, CHECKSUMS, MARKED):
            if member.name.endswith(extension):
                sample = samples.setdefault(member.name.removesuffix(extension), {})
                # A member that comes twice is one to some readers and another to others.
                sample[b"" if extension in sample else extension] = member
    offsets, sizes, checksums, bits, dtypes = [], [], [], [], set()
    problem = None
    for key, sample in samples.items():
        try:
            if sample.keys() - {MARKED} != {IDS, LENGTHS, CHECKSUMS}:
                raise ValueError("its members are not one .ids.npy, one .lengths.npy and one .crc32.npy")
            lengths, sums = (_integers(file, sample[extension], name) for extension in (LENGTHS, CHECKSUMS))
            ids = sample[IDS]
            header = NPY.match(pread(file, min(ids.size, BLOCK), ids.offset, name))
            if header is None or len(lengths) != len(sums) or int(lengths.sum(dtype=np.uint64)) != int(header[3]):
                raise ValueError("lengths, checksums and ids do not belong together")
            width = int(header[2])
            if header.end() + int(header[3]) * width != ids.size:
                raise ValueError("the ids are cut off")
            first_bit = _first_bit(file, sample[MARKED], int(header[3]), name) if MARKED in sample else None
        except (ValueError, DamagedError) as error:
            label = key.decode(errors="replace")
            problem = DamagedError(f"shard {name}, sample {label}: {str(error).splitlines()[0]}")
            break
        bytes_each = lengths.astype(np.int64) * width
        before = np.cumsum(bytes_each) - bytes_each
        offsets.append(ids.offset + header.end() + before)
        bits.append(np.full(len(lengths), -1) if first_bit is None else first_bit + before // width)
        sizes.append(bytes_each.astype(np.uint32))
        checksums.append(sums.astype(np.uint32))
        dtypes.add(f"<u{width}")
    if len(dtypes) > 1:
        return None, DamagedError(f"shard {name} mixes {' and '.join(sorted(dtypes))}", code="wrong-dtype")
    if not offsets:
        none = np.empty(0, np.uint32)
        return PackedIndex(none.astype(np.int64), none, none, np.dtype("<u2")), problem
    arrays = np.concatenate(offsets), np.concatenate(sizes), np.concatenate(checksums)
    marks = np.concatenate(bits)
    return PackedIndex(*arrays, np.dtype(dtypes.pop()), marks if (marks >= 0).any() else None), problem


def _first_bit(file: IO[bytes], member: Member, tokens: int, name: str) -> int:
    """Bit of the file at which the marks of a sample begin."""
    header = _NPY_BITS.match(pread(file, min(member.size, BLOCK), member.offset, name))
    if header is None or not -(-tokens // 8) == int(header[2]) == member.size - header.end():
        raise ValueError("marks and ids do not belong together")
    return 8 * (member.offset + header.end())


def _integers(file: IO[bytes], member: Member, name: str) -> NDArray[Any]:
    content = pread(file, member.size, member.offset, name)
    if len(content) < member.size:
        raise ValueError("the file ends inside it")
    return any_npy(content, f"shard {name}")


def any_npy(content: bytes, label: str) -> NDArray[Any]:
    """Read `[tokens]` ids by numpy.

    Raises:
        DamagedError: It is no 1-D array of uint16 or uint32.
    """
    try:
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # numpy raises ValueError, SyntaxError, TokenError and more on bytes that are no array
        reason = str(error).splitlines()[0]
        raise DamagedError(f"{label}: not a readable .npy array ({reason})", code="not-an-array") from None
    if array.ndim != 1 or array.dtype.kind != "u" or array.dtype.itemsize not in (2, 4):
        raise DamagedError(
            f"{label}: ids are {array.dtype} {list(array.shape)}, not uint16 or uint32 [tokens]", code="wrong-dtype"
        )
    return array.astype(array.dtype.newbyteorder("="))
