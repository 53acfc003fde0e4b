#!/usr/bin/env python
"""Look at a data set before training on it: are the boxes right, and can the detector's anchors learn the faces?

    python inspect_dataset.py --config-file configs/fpn_finest_sampling.yaml --dataset wider_face_train --output look
    python inspect_dataset.py --config-file FILE --annotations my/train.json --images my/images --output look

Writes samples.png (pictures with their boxes), sizes.png (sizes of the faces next to the anchor scales, and the share
of faces without a positive anchor at each factor of the scale jitter), report.txt and report.json. Reads the header of
every image file, and needs no GPU. The exit code is 1 if files are missing or broken, and everything is written then.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from group_sampling.data.catalog import Catalog
from group_sampling.engines.tv.config import load_config
from group_sampling.errors import add_debug_flag, exit_on_error
from group_sampling.experiments.inspection import draw_sheet, draw_sizes, inspect
from group_sampling.files import write_atomically


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the detector that is to be trained")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", metavar="NAME", help="a data set of the catalog, such as wider_face_train")
    source.add_argument("--annotations", type=Path, metavar="FILE", help=".json: COCO format, else WIDER FACE's text")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="with --annotations: folder of the images")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--samples", type=int, default=12, metavar="K", help="pictures on the sheet (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pictures and of crops (default: 0)")
    add_debug_flag(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    args = parser.parse_intermixed_args(argv)
    if bool(args.annotations) != bool(args.images):
        parser.error("--annotations and --images go together")
    if args.samples < 1:
        parser.error(f"--samples: expected at least 1, got {args.samples}")
    return args


def run(args: argparse.Namespace) -> int:
    # MODEL.DEVICE is of no consequence here, and a config's "cuda" would be refused where there is none.
    cfg = load_config(args.config_file, ["MODEL.DEVICE", "cpu", *args.opts])
    if args.annotations:
        key = "COCO_FORMAT" if args.annotations.suffix == ".json" else "WIDER_FORMAT"
        name = f"{args.annotations.stem} ({args.annotations})"  # such a name no built-in set has
        paths = str(args.annotations.resolve()), str(args.images.resolve())
        source = Catalog({key: [(name, *paths)]})[name]
    else:
        source = Catalog(cfg.DATASETS)[args.dataset]
        name = args.dataset
    records = source.records
    with tqdm(total=len(records), unit="image", dynamic_ncols=True, disable=None) as bar:
        found = inspect(cfg, name, records, source.class_names, source.report, seed=args.seed, on_progress=bar.update)
    problems = draw_sheet(records, source.class_names, args.output / "samples.png", count=args.samples, seed=args.seed)
    found.unreadable += [problem for problem in problems if problem not in found.unreadable]
    if len(found.sizes):
        draw_sizes(found, args.output / "sizes.png")
    text = found.table()
    write_atomically(args.output / "report.txt", f"{text}\n".encode())
    write_atomically(args.output / "report.json", (json.dumps(found.to_dict(), indent=2) + "\n").encode())
    print(text)
    print(f"{args.output}: samples.png, {'sizes.png, ' if len(found.sizes) else ''}report.txt and report.json")
    if found.unreadable:
        print(
            f"inspect_dataset.py: error: {len(found.unreadable)} images cannot be used, the first: "
            f"{found.unreadable[0]}",
            file=sys.stderr,
        )
    return 1 if found.unreadable else 0


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_error("inspect_dataset.py", args):
        status = run(args)
    sys.exit(status)


if __name__ == "__main__":
    main()
