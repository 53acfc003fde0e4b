"""The pixels behind a record."""

import numpy as np
from PIL import ExifTags, Image, ImageOps

from . import synthetic
from .records import ImageRecord, UnreadableImageError

_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


def read_image(record: ImageRecord) -> np.ndarray:
    """Read, or render, the image of ``record``.

    Returns:
        (H, W, 3) uint8 RGB, turned upright by its EXIF orientation, writable.

    Raises:
        UnreadableImageError: missing, not an image, cut short, or of another size than the record says.
    """
    if synthetic.is_address(record.file_name):
        return synthetic.render(record.file_name)
    try:
        with Image.open(record.file_name) as file:
            image = np.array(ImageOps.exif_transpose(file).convert("RGB"))
    except FileNotFoundError:
        raise UnreadableImageError(record.file_name, "no such file") from None
    except MemoryError:
        raise
    except Exception as error:  # a broken file makes Pillow's decoders raise nearly anything, SyntaxError included
        raise UnreadableImageError(record.file_name, f"{type(error).__name__}: {error}") from error
    check_size(record, *image.shape[:2])
    return image


def check_size(record: ImageRecord, height: int, width: int) -> None:
    """Raise UnreadableImageError if the upright image has another size than annotated."""
    if record.height is not None and (height, width) != (record.height, record.width):
        reason = f"expected {record.width}x{record.height} pixels as annotated, got {width}x{height} when upright"
        raise UnreadableImageError(record.file_name, reason)


def image_size(record: ImageRecord) -> tuple[int, int]:
    """(height, width) of the upright image: the annotation's, or from the header of the file.

    Raises:
        UnreadableImageError: the header is needed and cannot be read.
    """
    if record.height is not None and record.width is not None:
        return record.height, record.width
    return read_size(record.file_name)


def read_size(file_name: str) -> tuple[int, int]:
    """(height, width) of an upright image, from the header of its file.

    Raises:
        UnreadableImageError: the header cannot be read.
    """
    try:
        with Image.open(file_name) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
    except FileNotFoundError:
        raise UnreadableImageError(file_name, "no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(file_name, f"{type(error).__name__}: {error}") from error
    return (width, height) if turned else (height, width)
