"""The pixels behind a record."""

import numpy as np
from PIL import Image, ImageOps

from . import synthetic
from .records import ImageRecord, UnreadableImageError


def read_image(record: ImageRecord) -> np.ndarray:
    """Reads, or renders, the image of ``record``.

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
    height, width = image.shape[:2]
    if record.height is not None and (height, width) != (record.height, record.width):
        reason = f"its annotation says {record.width}x{record.height} pixels, the upright image has {width}x{height}"
        raise UnreadableImageError(record.file_name, reason)
    return image
