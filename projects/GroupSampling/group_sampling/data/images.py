"""The pixels behind a record."""

import functools
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..files import open_regular
from . import synthetic
from .records import ImageRecord, UnreadableImageError

logger = logging.getLogger(__name__)

# What is opened, whatever the name of a file says. Pillow's other formats include some that run an interpreter: it
# gives Encapsulated PostScript to Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Allows larger images than Pillow does, which takes them for an attempt to exhaust the memory.
MAX_PIXELS_VARIABLE = "GS_MAX_IMAGE_PIXELS"

_16_BITS = ("PNG", "PPM")  # have no integers of 32 bits, though Pillow may read 16 into them
_UNKNOWN_RANGE = "expected 8 or 16 bits a pixel, got 32, whose range is not known; convert it"
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width

if os.environ.get(MAX_PIXELS_VARIABLE, "").isdecimal():
    Image.MAX_IMAGE_PIXELS = -(-int(os.environ[MAX_PIXELS_VARIABLE]) // 2)  # Pillow warns from there, and refuses twice


def read_image(record: ImageRecord) -> np.ndarray:
    """Read, or render, the image of ``record``; of an animation the first picture.

    Returns:
        (H, W, 3) uint8 RGB, turned upright by its EXIF orientation unless the record is of the stored pixels. Writable.

    Raises:
        UnreadableImageError: missing, not an image of :data:`FORMATS`, cut short, of pixels without a known range, or
            of another size than the record says.
    """
    return read_reduced(record, 1.0)[0]


def read_picture(file_name: str) -> np.ndarray:
    """The pixels of an image file that belongs to no data set, (H, W, 3) uint8 RGB.

    Raises:
        UnreadableImageError: see :func:`read_image`.
    """
    with _opened(file_name) as image:
        return to_rgb(image)


def read_reduced(record: ImageRecord, scale: float) -> tuple[np.ndarray, tuple[int, int]]:
    """As :func:`read_image`, for who will resize the image by ``scale``: a JPEG is decoded at 1/2, 1/4 or 1/8 of its
    size where ``scale`` is not larger, for a fraction of the work.

    Returns:
        image: (h, w, 3), with h and w at least ``scale`` times H and W, or less than a pixel below that.
        size: (H, W) of the image.
    """
    if synthetic.is_address(record.file_name):
        image = synthetic.render(record.file_name)
        return image, image.shape[:2]
    with _opened(record.file_name) as file:
        width, height = file.size
        if scale < 1:
            file.draft(None, (max(1, int(width * scale)), max(1, int(height * scale))))  # only a JPEG's does something
        if not record.is_raw and file.getexif().get(ExifTags.Base.Orientation) in _TURNED:
            width, height = height, width
        image = to_rgb(file if record.is_raw else ImageOps.exif_transpose(file), file.format)
    check_size(record, height, width)
    return image, (height, width)


def to_rgb(image: Image.Image, file_format: str | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a Pillow image of any mode, writable.

    Pixels of 16 bits are scaled by their range, 0 ... 65,535, and floats by 0 ... 1.

    Args:
        file_format: Pillow's name of the format that it was read from, if any.

    Raises:
        ValueError: integers of 32 bits, whose range nobody knows, or floats outside 0 ... 1.
    """
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            low, high = float(values.min()), float(values.max())
            raise ValueError(f"expected floats from 0 to 1, got {low:g} ... {high:g}; convert it to 8 or 16 bits")
        gray = (values * 255).round().astype(np.uint8)
    elif image.mode.startswith("I;16") or (image.mode == "I" and file_format in _16_BITS):
        gray = ((np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        _say_scaled()
    elif image.mode == "I":
        raise ValueError(_UNKNOWN_RANGE)
    else:
        return np.array(image.convert("RGB"))
    return np.repeat(gray[:, :, None], 3, axis=2)


def check_size(record: ImageRecord, height: int, width: int) -> None:
    """Raise UnreadableImageError if the image, as ``record`` wants it, has another size than annotated."""
    if record.height is not None and (height, width) != (record.height, record.width):
        how = "as stored" if record.is_raw else "when upright"
        reason = f"expected {record.width}x{record.height} pixels as annotated, got {width}x{height} {how}"
        if (width, height) == (record.height, record.width):
            reason += f"; DATASETS.APPLY_EXIF {record.is_raw} takes the other orientation"
        raise UnreadableImageError(record.file_name, reason)


def image_size(record: ImageRecord) -> tuple[int, int]:
    """(height, width) of the image: the annotation's, or from the header of the file.

    Raises:
        UnreadableImageError: the header is needed and cannot be read.
    """
    if record.height is not None and record.width is not None:
        return record.height, record.width
    return read_size(record.file_name, is_raw=record.is_raw)


def read_size(file_name: str, *, is_raw: bool = False) -> tuple[int, int]:
    """(height, width) of an image from the header of its file: upright, or with ``is_raw`` as it is stored.

    Raises:
        UnreadableImageError: the header cannot be read.
    """
    return read_header(file_name).size(is_raw)


class Header(NamedTuple):
    """What the first bytes of an image file say: height and width as stored, and whether EXIF exchanges them."""

    height: int
    width: int
    is_turned: bool

    def size(self, is_raw: bool) -> tuple[int, int]:
        """(height, width) as stored, or upright."""
        return (self.width, self.height) if self.is_turned and not is_raw else (self.height, self.width)


def read_header(file_name: str) -> Header:
    """
    Raises:
        UnreadableImageError: it cannot be read, or the pixels could not be.
    """
    with _opened(file_name) as image:
        if image.mode == "I" and image.format not in _16_BITS:
            raise ValueError(_UNKNOWN_RANGE)
        return Header(image.height, image.width, image.getexif().get(ExifTags.Base.Orientation) in _TURNED)


@contextmanager
def _opened(file_name: str) -> Iterator[Image.Image]:
    """Open an image; what goes wrong in the block is an UnreadableImageError."""
    try:
        with open_regular(file_name) as stream, Image.open(stream, formats=FORMATS) as image:
            yield image
    except FileNotFoundError:
        raise UnreadableImageError(file_name, "no such file") from None
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(file_name, f"expected an image ({', '.join(FORMATS)}), got another file") from error
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        number = pixels[0] if pixels else "<number>"
        reason = f"{number} pixels are more than allowed; {MAX_PIXELS_VARIABLE}={number} in the environment allows them"
        raise UnreadableImageError(file_name, reason) from error
    except OSError as error:
        raise UnreadableImageError(file_name, error.strerror or f"{type(error).__name__}: {error}") from error
    except Exception as error:  # a broken file makes Pillow's decoders raise nearly anything, SyntaxError included
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise UnreadableImageError(file_name, text) from error


@functools.cache
def _say_scaled() -> None:
    """Once a process."""
    logger.warning("images of 16 bits a pixel are scaled to 8 by their range, 0 ... 65,535")
