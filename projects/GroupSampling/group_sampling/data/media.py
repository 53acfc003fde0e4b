"""The images, videos and cameras that a command line names."""

import glob
import itertools
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from .video import SUFFIXES as VIDEO_SUFFIXES

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class InputError(UserError, ValueError):
    """What --input names cannot be used."""


class Item(NamedTuple):
    """An input: an image, a video, or with ``camera`` the index of one."""

    path: str
    name: str  # of its outputs: relative, with "/", without suffix
    camera: int | None = None

    @property
    def is_stream(self) -> bool:
        return self.camera is not None or Path(self.path).suffix.lower() in VIDEO_SUFFIXES

    def stamp(self) -> list[int]:
        """Changes when the file does."""
        stat = os.stat(self.path)
        return [stat.st_size, stat.st_mtime_ns]


def find_items(inputs: Sequence[str], output: Path) -> list[Item]:
    """What ``--input`` names, each file once, in the order given; files of a folder are sorted.

    Raises:
        InputError: something names nothing.
    """
    found: dict[str, tuple[str, Path]] = {}  # resolved path -> path, folder below which its name is
    items = []
    for value in inputs:
        path = Path(value)
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if _is_media(file.relative_to(path))]
            pairs = [(file, path) for file in files if output.resolve() not in file.resolve().parents]
            if not pairs:
                suffixes = ", ".join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
                raise InputError(f"--input {value}: expected a folder with images or videos ({suffixes}), got none")
        elif path.is_file():
            pairs = [(path, path.parent)]
        elif value.isdecimal():
            items.append(Item(value, f"camera{value}", int(value)))
            continue
        elif glob.has_magic(value):
            fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
            files = [Path(file) for file in sorted(glob.glob(value, recursive=True)) if os.path.isfile(file)]
            pairs = [(file, fixed) for file in files]
            if not pairs:
                raise InputError(f"--input {value}: the pattern matches no file")
        else:
            raise InputError(f"--input {value}: expected a file, folder, pattern or index of a camera, got nothing")
        for file, folder in pairs:
            found.setdefault(str(file.resolve()), (str(file), folder))
    relative = [(file, Path(file).relative_to(folder)) for file, folder in found.values()]
    stems = Counter(str(name.with_suffix("")) for _, name in relative)
    taken: set[str] = set()
    for file_name, name in relative:
        stem = name.with_suffix("")
        if stems[str(stem)] > 1:  # photo.jpg and photo.png
            stem = stem.with_name(f"{stem.name}_{name.suffix[1:]}")
        unique, count = stem.as_posix(), 1
        while unique in taken:  # a/photo.jpg and b/photo.jpg
            count += 1
            unique = f"{stem.as_posix()}_{count}"
        taken.add(unique)
        items.append(Item(file_name, unique))
    return items


def _is_media(path: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in path.parts)
    return not is_hidden and path.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
