#!/usr/bin/env python
"""How many training images a second the loader makes of photographs.

    python bench_loading.py FOLDER [--images 64] [--workers 0 1 2] [--rounds 3] [--json FILE]
                            [--opts KEY VALUE ...]

Reads JPEG files below FOLDER and applies the scale jitter, crop and flip of configs/fpn_finest_sampling.yaml, or what
the KEYs say, in three ways: resize, then crop (as most loaders do), crop before the resize (this project's), and the
latter with INPUT.REDUCE_JPEG, which decodes at a fraction where the jitter shrinks. The ways take turns; figures are
medians. Also prints how far pixels of the first two and of the last two are apart. Prints a table in Markdown and
writes JSON.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import numpy as np
from bench_matcher import surroundings
from PIL import Image

from group_sampling.data.images import read_size
from group_sampling.data.loader import build_train_loader
from group_sampling.data.records import ImageRecord
from group_sampling.data.transforms import Geometry, TrainTransform
from group_sampling.engines.build import build_train_transform
from group_sampling.engines.tv.config import load_config
from group_sampling.engines.tv.train import to_example
from group_sampling.errors import UserError, add_debug_flag, exit_on_error
from group_sampling.files import write_atomically

CONFIG = Path(__file__).resolve().parents[1] / "configs/fpn_finest_sampling.yaml"


class ResizeFirst(TrainTransform):
    """The same geometry; the whole image is resized, and cropped then."""

    def apply_image(self, image: np.ndarray, geometry: Geometry, size: tuple[int, int] | None = None) -> np.ndarray:
        height, width = image.shape[:2]
        scaled = max(1, round(width * geometry.scale)), max(1, round(height * geometry.scale))
        if scaled != (width, height):
            image = np.asarray(Image.fromarray(image).resize(scaled, Image.Resampling.BILINEAR))
        x0, y0, x1, y1 = geometry.crop
        crop = image[y0:y1, x0:x1]
        return np.ascontiguousarray(crop[:, ::-1] if geometry.flip else crop)


def loader(records: list[ImageRecord], transform: TrainTransform, reduce_jpeg: bool, workers: int):
    """Of single images, in the order and with the augmentation of seed 0."""
    options = {"seed": 0, "images_per_batch": 1, "max_bad_share": 0.0, "reduce_jpeg": reduce_jpeg}
    return build_train_loader(records, transform, to_example, num_workers=workers, **options)


def images_per_second(batches, count: int) -> float:
    """Of ``count`` images after the first ones, which start the workers."""
    iterator = iter(batches)
    for _ in range(max(2, 2 * batches.num_workers)):
        next(iterator)
    start = time.perf_counter()
    for _ in range(count):
        next(iterator)
    return count / (time.perf_counter() - start)


def difference(first, second, count: int) -> dict[str, float]:
    """Gray levels between the images of two loaders: mean of all, and the largest."""
    means, largest = [], 0
    for a, b in itertools.islice(zip(first, second), count):
        gap = np.abs(a[0].image.numpy().astype(np.int16) - b[0].image.numpy())
        means.append(float(gap.mean()))
        largest = max(largest, int(gap.max()))
    return {"mean": statistics.mean(means), "largest": largest}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with JPEG files, at any depth")
    parser.add_argument("--images", type=int, default=64, help="of each measurement")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("output/bench/bench_loading.json"))
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="of the config; last")
    add_debug_flag(parser)
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> None:
    files = sorted(arguments.folder.rglob("*.jpg"))
    if not files:
        raise UserError(f"{arguments.folder}: expected JPEG files below it, got none")
    cfg = load_config(str(CONFIG), ["MODEL.DEVICE", "cpu", *arguments.opts])
    empty = {"boxes": np.zeros((0, 4), np.float32), "classes": np.zeros(0, int), "ignore": np.zeros(0, bool)}
    records = [ImageRecord(str(file), str(i), *read_size(str(file)), **empty) for i, file in enumerate(files)]
    ours = build_train_transform(cfg)
    slow = ResizeFirst(ours.scales, ours.crop_size, ours.flip_prob, ours.min_visible)
    ways = {"resize, crop": (slow, False), "crop, resize": (ours, False), "REDUCE_JPEG": (ours, True)}

    speeds: dict[tuple[int, str], list[float]] = {}
    for workers, _, name in itertools.product(arguments.workers, range(arguments.rounds), ways):
        found = images_per_second(loader(records, *ways[name], workers), arguments.images)
        speeds.setdefault((workers, name), []).append(found)
    whole, cropped, reduced = (loader(records, *way, 0) for way in ways.values())
    pixels = [record.height * record.width for record in records]
    report = {
        **surroundings("cpu", 1),
        "options": {"images": arguments.images, "rounds": arguments.rounds, "keys": arguments.opts},
        "files": {"count": len(files), "megapixels": statistics.mean(pixels) / 1e6},
        "images_per_second": [
            {"workers": workers, "way": name, "median": statistics.median(found), "all": found}
            for (workers, name), found in speeds.items()
        ],
        "gray_levels": {
            "crop, resize": difference(whole, cropped, 16),
            "REDUCE_JPEG": difference(cropped, reduced, 16),
        },
    }
    write_atomically(arguments.json, (json.dumps(report, indent=1) + "\n").encode())
    print("| workers | " + " | ".join(ways) + " | ratio | ratio with REDUCE_JPEG |")
    print("|---" * (3 + len(ways)) + "|")
    for workers in arguments.workers:
        medians = [statistics.median(speeds[workers, name]) for name in ways]
        cells = [f"{median:.1f} images/s" for median in medians]
        cells += [f"{median / medians[0]:.2f}" for median in medians[1:]]
        print(f"| {workers} | {' | '.join(cells)} |")
    for name, gap in report["gray_levels"].items():
        print(f"{name}: {gap['mean']:.3f} gray levels apart on average, {gap['largest']} at most")
    print(arguments.json)


def main() -> None:
    arguments = parse_arguments()
    with exit_on_error("bench_loading", arguments):
        measure(arguments)


if __name__ == "__main__":
    main()
