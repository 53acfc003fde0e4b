"""A reader of MATLAB files (version 5 to 7.2) for cell arrays, texts and numbers, which is all the ground truth needs.

Not SciPy's ``loadmat``: damaged files end the process there (segmentation fault, SciPy 1.15 and 1.17). Every length is
checked here before it is used. Format: "MAT-File Format", The MathWorks, chapter "Level 5 MAT-File Format".
"""

import math
import os
import struct
import zlib
from collections.abc import Collection
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..files import open_regular

MatValue: TypeAlias = "str | NDArray | list[MatValue]"

_MATRIX, _COMPRESSED = 14, 15
_CELL, _CHAR = 1, 4
# Storage types of data elements, and of characters among them; array classes. Numbers are those of the format.
_STORAGE = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXT = {1: "utf-8", 2: "utf-8", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_NUMERIC = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_MAX_VARIABLE_BYTES = 64 << 20  # unpacked; WIDER FACE's largest has 3 MB
_MAX_DEPTH = 4  # cells in cells


def read_mat5(path: str | os.PathLike, names: Collection[str]) -> dict[str, MatValue]:
    """Read the variables ``names``; one that the file lacks is missing in the result.

    Returns:
        For each variable a ``str``, a numeric array (column-major as in MATLAB), or a list with the entries of a cell
        array in column-major order.

    Raises:
        ValueError: no MATLAB file of these versions, damaged, or a variable is neither cells, text nor real numbers.
    """
    with open_regular(path) as source:
        content = memoryview(source.read())
    try:
        order = {b"IM": "<", b"MI": ">"}.get(bytes(content[126:128]))
        if order is None or struct.unpack(order + "H", content[124:126]) != (0x0100,):
            raise ValueError("no header of version 5")
        file, values = _Elements(content[128:], order), {}
        while not file.at_end():
            kind, data = file.next()
            if kind == _COMPRESSED:
                kind, data = _Elements(_decompress(data), order).next()
            if kind != _MATRIX:
                raise ValueError(f"a variable of the unknown kind {kind}")
            matrix = _Matrix(data, order)
            if matrix.name in names:
                values[matrix.name] = matrix.value()
    except (ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"{path}: expected a MATLAB file (version 5 to 7.2), cannot read it: {error}") from error
    return values


def _decompress(data: memoryview) -> memoryview:
    stream = zlib.decompressobj()
    content = stream.decompress(data, _MAX_VARIABLE_BYTES)
    if not stream.eof:
        raise ValueError(f"a compressed variable is cut off or larger than {_MAX_VARIABLE_BYTES >> 20} MiB")
    return memoryview(content)


class _Elements:
    """Data elements one after the other: a tag of type and size, the data, padding to 8 bytes."""

    def __init__(self, content: memoryview, order: str) -> None:
        self._content, self._order, self._position = content, order, 0

    def at_end(self) -> bool:
        return self._position >= len(self._content)

    def next(self) -> tuple[int, memoryview]:
        """Type and data of the next element."""
        kind, size = struct.unpack_from(self._order + "II", self._content, self._position)
        if kind >> 16:  # small element: size, type and up to 4 bytes of data in the place of the tag
            kind, size, start, end = kind & 0xFFFF, kind >> 16, self._position + 4, self._position + 8
            if size > 4:
                raise ValueError(f"a small element of {size} bytes")
        else:
            start = self._position + 8
            end = start + (size if kind == _COMPRESSED else -(-size // 8) * 8)
        if start + size > len(self._content):
            raise ValueError(f"an element of {size} bytes where {max(0, len(self._content) - start)} are left")
        self._position = end
        return kind, self._content[start : start + size]


class _Matrix:
    """One array: flags, dimensions and name, then its content."""

    def __init__(self, data: memoryview, order: str, depth: int = 0) -> None:
        self._order, self._depth, self._elements = order, depth, _Elements(data, order)
        self.name, self._class, self._is_complex, self._shape = "", 6, False, (0, 0)
        if len(data) == 0:  # an empty entry of a cell array
            return
        (flags, _) = struct.unpack(order + "II", self._elements.next()[1])
        self._class, self._is_complex = flags & 0xFF, bool(flags & 0x0800)
        self._shape = tuple(self._numbers("dimensions").tolist())
        if len(self._shape) < 2 or min(self._shape) < 0:
            raise ValueError(f"dimensions {self._shape}")
        self.name = bytes(self._elements.next()[1]).decode("latin-1")

    def value(self) -> MatValue:
        count = math.prod(self._shape)
        if self._class == _CELL:
            if self._depth == _MAX_DEPTH:
                raise ValueError(f"more than {_MAX_DEPTH} cell arrays inside each other")
            return [self._entry() for _ in range(count)]
        if self._class == _CHAR:
            kind, data = self._elements.next()
            encoding = _TEXT.get(kind)
            if encoding is None or (count and self._shape[0] != 1):
                raise ValueError(f"a text of type {kind} and dimensions {self._shape}")
            suffix = "" if encoding == "utf-8" else {"<": "-le", ">": "-be"}[self._order]
            return bytes(data).decode(encoding + suffix)
        if self._class not in _NUMERIC or self._is_complex:
            what = "complex numbers" if self._is_complex else f"class {self._class}"
            raise ValueError(f"an array of {what}, which is not supported")
        numbers = np.empty(0) if count == 0 else self._numbers("numbers")
        if numbers.size != count:
            raise ValueError(f"{numbers.size} numbers for dimensions {self._shape}")
        return numbers.astype(_NUMERIC[self._class]).reshape(self._shape, order="F")

    def _entry(self) -> MatValue:
        kind, data = self._elements.next()
        if kind != _MATRIX:
            raise ValueError(f"a cell with an element of type {kind}")
        return _Matrix(data, self._order, self._depth + 1).value()

    def _numbers(self, what: str) -> NDArray:
        kind, data = self._elements.next()
        if kind not in _STORAGE:
            raise ValueError(f"{what} of type {kind}")
        return np.frombuffer(data, dtype=self._order + _STORAGE[kind])
