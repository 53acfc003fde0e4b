"""Frames of a video or a camera, and a video of frames, through PyAV (the extra ``[predict]``)."""

import contextlib
import platform
from collections.abc import Iterator
from fractions import Fraction
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from ..errors import UserError

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".ts")

_CAMERAS = {"Linux": ("/dev/video{}", "v4l2"), "Darwin": ("{}", "avfoundation")}
_MAX_LOST = 0.02  # share of the announced frames; containers announce a few that are not shown


class VideoError(UserError, RuntimeError):
    """A video or camera cannot be read or written; the message says which and why."""


def _av() -> ModuleType:
    try:
        import av
    except ModuleNotFoundError as error:
        raise VideoError(f"videos and cameras need PyAV ({error}): pip install 'group-sampling[predict]'") from error
    return av


class VideoReader:
    """Iterates over the frames of a video, (H, W, 3) uint8 RGB, upright.

    Args:
        path: a file, or a camera's index.

    Attributes:
        frame_rate: frames a second.
        num_frames: as the file announces it; None if it does not, or a camera.

    Raises:
        VideoError: it cannot be opened; while iterating: the file is damaged, or ends before the announced frames. The
            frames before the damage have been given then.
    """

    def __init__(self, path: str | int) -> None:
        av = _av()
        self._name, address, options = str(path), str(path), {}
        if isinstance(path, int):
            self._name = f"camera {path}"
            if platform.system() not in _CAMERAS:
                raise VideoError(f"{self._name}: expected Linux or macOS, got {platform.system()}; record to a file")
            address, options["format"] = _CAMERAS[platform.system()]
            address = address.format(path)
        try:
            self._container = av.open(address, **options)
        except (av.error.FFmpegError, OSError) as error:
            hint = "" if isinstance(path, int) else "; a video that was cut short may lack its index"
            raise VideoError(f"{self._name}: cannot open {address} as a video: {error}{hint}") from error
        if not self._container.streams.video:
            self._container.close()
            raise VideoError(f"{self._name}: expected a video stream, got none")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.frame_rate = Fraction(self._stream.average_rate or 25)
        self.num_frames = None if isinstance(path, int) else self._stream.frames or None

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *error: Any) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        av, count = _av(), 0
        try:
            for frame in self._container.decode(self._stream):
                image = frame.to_ndarray(format="rgb24")
                yield np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))
                count += 1
        except (av.error.FFmpegError, OSError) as error:
            raise VideoError(f"{self._name}: damaged after {count} frames: {error}") from error
        if self.num_frames and count < (1 - _MAX_LOST) * self.num_frames - 1:
            raise VideoError(f"{self._name}: cut short: expected {self.num_frames} frames, got {count}")


class VideoWriter:
    """Writes frames of one size as an MP4 file, H.264 where PyAV has it, without sound.

    Args:
        file: seekable.
        frame_rate: frames a second.
    """

    def __init__(self, file: BinaryIO, frame_rate: Fraction) -> None:
        av = _av()
        self._container = av.open(file, "w", format="mp4")
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        self._stream = self._container.add_stream(codec, rate=frame_rate)
        self._stream.pix_fmt = "yuv420p"
        self._size: tuple[int, int] | None = None

    def write(self, image: np.ndarray) -> None:
        """Append a frame (H, W, 3) uint8 RGB.

        Raises:
            VideoError: it is of another size than the first.
        """
        height, width = image.shape[:2]
        if self._size is None:
            self._size = height, width
            # The codecs want even sides: the last row or column is repeated.
            self._stream.height, self._stream.width = height + height % 2, width + width % 2
        if self._size != (height, width):
            raise VideoError(f"expected frames of {self._size[1]}x{self._size[0]} pixels, got {width}x{height}")
        image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = _av().VideoFrame.from_ndarray(image, format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what is left."""
        with contextlib.closing(self._container):
            if self._size is not None:
                self._container.mux(self._stream.encode())
