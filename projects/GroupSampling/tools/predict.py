#!/usr/bin/env python
"""Find faces in images, folders, videos or a camera's picture, with a trained detector of either engine.

    python predict.py --weights model_final.pth --input photo.jpg
    python predict.py --weights model_final.pth --input photos/ "more/*.png" --output found \\
        --scales 0.5 1 2 --format images json csv coco wider --crop-faces
    python predict.py --weights model_final.pth --input walk.mp4 --threshold 0.7

The same command again continues where it stopped. Exit code: 0, all inputs were read; 1, some were not, they are listed
at the end; 2, the command cannot be carried out; 130, interrupted.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from group_sampling.data.media import Item, find_items
from group_sampling.data.records import UnreadableImageError
from group_sampling.data.video import VideoError, VideoReader, VideoWriter
from group_sampling.detector import FaceDetector
from group_sampling.env import ENGINES
from group_sampling.errors import add_debug_flag, exit_on_error
from group_sampling.evaluation import write_predictions
from group_sampling.faces import Faces, as_image
from group_sampling.files import atomic_file, write_atomically

FORMATS = ("images", "json", "csv", "coco", "wider")
CROP_MARGIN = 0.2  # of the face's size, on every side
STATE = "predict.jsonl"  # in the output folder: what is finished

EXIT_UNREADABLE, EXIT_FAILED = 1, 2


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, metavar="FILE", help="a checkpoint of either engine")
    parser.add_argument(
        "--input", required=True, nargs="+", help="images, folders, glob patterns, videos, or the index of a camera"
    )
    parser.add_argument("--output", type=Path, default=Path("output/predict"), metavar="DIR", help="[%(default)s]")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score [%(default)s]")
    parser.add_argument("--scales", type=float, nargs="+", help="factors of an image pyramid, such as 0.5 1 2")
    parser.add_argument("--flip", action="store_true", help="look at the mirror image of every scale as well")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["images", "json"], help="[images json]")
    parser.add_argument("--crop-faces", action="store_true", help="write a picture of every face, with some margin")
    parser.add_argument("--batch-size", type=int, default=1, help="images at once, if they are of one size [1]")
    parser.add_argument("--engine", default="auto", choices=("auto", *ENGINES))
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... [a GPU if there is one]")
    parser.add_argument("--config-file", default="", metavar="FILE", help="for weights that do not carry their config")
    parser.add_argument("--fresh", action="store_true", help="start from the beginning instead of continuing")
    add_debug_flag(parser)
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="of the config; last")
    return parser.parse_args(argv)


class State:
    """The finished inputs, a JSON line for each, so that an interrupted run can go on.

    Args:
        settings: lines under other settings do not count.
        fresh: nor do any.
    """

    def __init__(self, path: Path, settings: str, *, fresh: bool) -> None:
        self.done: dict[str, dict[str, Any]] = {}
        if path.is_file() and not fresh:
            for line in path.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # the last line of a run that was killed
                keys = {"settings", "path", "name", "stamp"}
                if isinstance(entry, dict) and keys <= entry.keys() and entry["settings"] == settings:
                    self.done[entry["path"]] = entry
        self._settings = settings
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, b"".join(json.dumps(entry).encode() + b"\n" for entry in self.done.values()))
        self._file = open(path, "ab")  # noqa: SIM115 (open as long as the run)

    def find(self, item: Item) -> dict[str, Any] | None:
        """The entry of an input that is finished and has not changed since."""
        entry = self.done.get(item.path)
        fits = entry is not None and item.camera is None
        return entry if fits and entry["name"] == item.name and entry["stamp"] == item.stamp() else None

    def add(self, item: Item, result: dict[str, Any]) -> None:
        entry = {"settings": self._settings, "path": item.path, "name": item.name, **result}
        entry["stamp"] = None if item.camera is not None else item.stamp()
        self.done[item.path] = entry
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def settings_of(args: argparse.Namespace, detector: FaceDetector) -> str:
    """A digest of all that the outputs depend on, the inputs aside."""
    digest = hashlib.sha256()
    with open(args.weights, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    digest.update(repr((detector.cfg.dump(), detector.engine, args.threshold)).encode())
    digest.update(repr((sorted(set(args.format)), args.crop_faces)).encode())
    return digest.hexdigest()


class Output:
    """Writes what was found, in the formats asked for, below a folder."""

    def __init__(self, folder: Path, formats: Sequence[str], *, crop_faces: bool) -> None:
        self.folder, self.formats, self.crop_faces = folder, set(formats), crop_faces

    def write_image(self, item: Item, image: np.ndarray, faces: Faces) -> dict[str, Any]:
        result = {"image": item.path, **faces.to_dict()}
        if "images" in self.formats:
            suffix = Path(item.path).suffix.lower()
            suffix = suffix if suffix in (".jpg", ".jpeg", ".png", ".webp") else ".png"
            _save(faces.draw(image), self.folder / "images" / f"{item.name}{suffix}")
        if "json" in self.formats:
            write_atomically(self.folder / "json" / f"{item.name}.json", json.dumps(result).encode())
        self._write_parts(item.name, image, faces)
        return result

    def write_stream(
        self, item: Item, reader: VideoReader, detect: Callable[[list[np.ndarray]], list[Faces]], batch_size: int
    ) -> dict[str, Any]:
        """Detect on all frames. What was read before a damage, or before Ctrl-C on a camera, is written as well."""
        frames: list[dict[str, Any]] = []
        result = {"video": item.path, "frame_rate": float(reader.frame_rate), "frames": frames}
        path = self.folder / "images" / f"{item.name}.mp4"
        error: VideoError | None = None
        with atomic_file(path) if "images" in self.formats else open(os.devnull, "wb") as file:
            writer = VideoWriter(file, reader.frame_rate) if "images" in self.formats else None
            try:
                for batch in _batches(reader, batch_size):
                    for image, faces in zip(batch, detect(batch)):
                        if writer:
                            writer.write(np.asarray(faces.draw(image)))
                        self._write_parts(f"{item.name}/{len(frames) + 1:06d}", image, faces)
                        frames.append({"frame": len(frames) + 1, **faces.to_dict()})
            except VideoError as caught:
                error = caught
            except KeyboardInterrupt:
                if item.camera is None:
                    raise
            if error and not frames:
                raise error
            if writer:
                writer.close()
        if "json" in self.formats:
            write_atomically(self.folder / "json" / f"{item.name}.json", json.dumps(result).encode())
        if error:
            raise error
        return result

    def _write_parts(self, name: str, image: np.ndarray, faces: Faces) -> None:
        if "wider" in self.formats:
            *events, stem = name.split("/")
            image_id = "/".join(["_".join(events), stem] if events else [stem])
            write_predictions(self.folder / "wider", image_id, faces.boxes, faces.scores, is_stem=True)
        if self.crop_faces:
            height, width = image.shape[:2]
            for index, (x1, y1, x2, y2) in enumerate(faces.boxes.tolist(), start=1):
                dx, dy = CROP_MARGIN * (x2 - x1), CROP_MARGIN * (y2 - y1)
                left, top = max(0, int(x1 - dx)), max(0, int(y1 - dy))
                right, bottom = min(width, int(x2 + dx) + 1), min(height, int(y2 + dy) + 1)
                crop = Image.fromarray(np.ascontiguousarray(image[top:bottom, left:right]))
                _save(crop, self.folder / "crops" / name / f"{index:04d}.jpg")

    def write_tables(self, results: Iterable[dict[str, Any]], class_names: Sequence[str]) -> None:
        """The files with all images in them, frames of videos as ``<name>/<frame>``."""
        images = list(_images(results))
        if "csv" in self.formats:
            text = io.StringIO()
            table = csv.writer(text, lineterminator="\n")
            table.writerow(["image", "x1", "y1", "x2", "y2", "score", "class", "anchor_scale"])
            for name, image in images:
                for face in image["faces"]:
                    table.writerow([name, *face["box"], face["score"], face["class"], face.get("anchor_scale", "")])
            write_atomically(self.folder / "faces.csv", text.getvalue().encode())
        if "coco" in self.formats:
            category_of = {name: index for index, name in enumerate(class_names, start=1)}
            # Names in COCO's format are relative to a folder, the one that all inputs share.
            root = os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name, _ in images] or ["."])
            content: dict[str, Any] = {
                "info": {"description": "detections; a score with every annotation", "image_root": root},
                "images": [],
                "categories": [{"id": index, "name": name} for name, index in category_of.items()],
                "annotations": [],
            }
            for image_id, (name, image) in enumerate(images, start=1):
                size = {"height": image["height"], "width": image["width"]}
                file_name = Path(os.path.abspath(name)).relative_to(root).as_posix()
                content["images"].append({"id": image_id, "file_name": file_name, **size})
                for face in image["faces"]:
                    x1, y1, x2, y2 = face["box"]
                    content["annotations"].append(
                        {
                            "id": len(content["annotations"]) + 1,
                            "image_id": image_id,
                            "category_id": category_of[face["class"]],
                            "bbox": [x1, y1, x2 - x1, y2 - y1],
                            "area": (x2 - x1) * (y2 - y1),
                            "iscrowd": 0,
                            "score": face["score"],
                        }
                    )
            write_atomically(self.folder / "coco.json", json.dumps(content).encode())


def _images(results: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for result in results:
        if "image" in result:
            yield result["image"], result
        else:
            for frame in result["frames"]:
                yield f"{result['video']}/{frame['frame']:06d}", frame


def _save(picture: Image.Image, path: Path) -> None:
    content = io.BytesIO()
    kind = {".png": "PNG", ".webp": "WEBP"}.get(path.suffix, "JPEG")
    picture.save(content, kind, **({} if kind == "PNG" else {"quality": 92}))
    write_atomically(path, content.getvalue())


def _batches(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of ``size`` values. If ``values`` raises, what came before is given first."""
    batch: list[Any] = []
    try:
        for value in values:
            batch.append(value)
            if len(batch) == size:
                yield batch
                batch = []
    except VideoError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def predict(args: argparse.Namespace) -> int:
    """Return the exit code."""
    items = find_items(args.input, args.output)
    detector = FaceDetector.from_checkpoint(
        args.weights,
        engine=args.engine,
        device=args.device,
        score_thresh=args.threshold,
        scales=args.scales,
        flip=args.flip,
        batch_size=args.batch_size,
        config_file=args.config_file,
        opts=args.opts,
    )
    output = Output(args.output, args.format, crop_faces=args.crop_faces)
    state = State(args.output / STATE, settings_of(args, detector), fresh=args.fresh)
    todo = [item for item in items if state.find(item) is None]
    print(f"engine: {detector.engine}, device: {detector.cfg.MODEL.DEVICE}; {len(items)} inputs", end="")
    print(f", {len(items) - len(todo)} of them finished before (--fresh begins anew)" if len(todo) < len(items) else "")
    unreadable: dict[str, str] = {}
    interval = 0.2 if sys.stderr.isatty() else 10.0
    start, num_images = time.perf_counter(), 0
    with tqdm(total=len(todo), unit="image", mininterval=interval, disable=not todo) as progress:
        pictures = [item for item in todo if not item.is_stream]
        for batch in _batches(pictures, args.batch_size):
            images = {}
            for item in batch:
                try:
                    images[item] = as_image(item.path)
                except UnreadableImageError as error:
                    unreadable[item.path] = error.reason
            for (item, image), faces in zip(images.items(), detector(list(images.values()))):
                state.add(item, output.write_image(item, image, faces))
            num_images += len(images)
            progress.update(len(batch))
        for item in todo:
            if not item.is_stream:
                continue
            try:
                with VideoReader(item.path if item.camera is None else item.camera) as reader:
                    progress.total += (reader.num_frames or 1) - 1

                    def detect(batch: list[np.ndarray]) -> list[Faces]:
                        progress.update(len(batch))
                        return detector(batch)

                    result = output.write_stream(item, reader, detect, args.batch_size)
                state.add(item, result)
                num_images += len(result["frames"])
            except VideoError as error:
                unreadable[item.path] = str(error)
    state.close()
    results = [state.done[item.path] for item in items if item.path in state.done and item.path not in unreadable]
    output.write_tables(results, detector.class_names)

    found = sum(len(image["faces"]) for _, image in _images(results))
    rate = num_images / max(time.perf_counter() - start, 1e-9)
    print(f"{found} faces in {len(results)} inputs, {rate:.2f} images/s; written to {args.output}")
    if unreadable:
        print(f"{len(unreadable)} of {len(items)} inputs could not be read:", file=sys.stderr)
        for path, reason in unreadable.items():
            print(f"  {path}: {reason.removeprefix(f'{path}: ')}", file=sys.stderr)
    return EXIT_UNREADABLE if unreadable else 0


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_error("predict.py", args, code=EXIT_FAILED, after_stop="the same command continues"):
        code = predict(args)
    sys.exit(code)


if __name__ == "__main__":
    main()
