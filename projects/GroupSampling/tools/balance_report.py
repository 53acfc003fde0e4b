#!/usr/bin/env python
"""How many positives and negatives of every scale a detector would train on (paper, Fig. 2), before anyone trains.

    cd projects/GroupSampling
    python tools/balance_report.py --config-file configs/fpn_finest.yaml configs/fpn_finest_sampling.yaml \\
        --dataset wider_face_train --plot balance.png

Prints what is drawn of an image, what it counts in the mean of the losses (MODEL.GROUP_SAMPLING.FILL and LOSS_MEAN),
and how far apart two detectors are: the total variation distance of their samples over scales and labels.

Needs annotations and image sizes, no pixels and no GPU; the augmentation is part of it. Sizes that the annotations do
not give are read from the headers of the images. With --annotations, a file of one JSON object a line with the keys
file, width, height, boxes_xywh and (optional) attr, WIDER FACE's six attributes of each box, no images are needed.
"""

import argparse
import gzip
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from fvcore.common.config import CfgNode
from tqdm import tqdm

from group_sampling.config import ConfigError
from group_sampling.data.catalog import Catalog, MissingDatasetError
from group_sampling.data.records import (
    AnnotationError,
    DataReport,
    ImageRecord,
    usable_boxes,
)
from group_sampling.engines.build import load_records
from group_sampling.engines.tv.config import load_config
from group_sampling.errors import add_debug_flag, exit_on_error
from group_sampling.experiments.balance import SampleBalance, sample_balance, total_variation
from group_sampling.experiments.plots import plot_samples
from group_sampling.files import write_json

INVALID = 3  # position of the attribute in "attr": blur, expression, illumination, invalid, occlusion, pose
LOG_FROM = 50.0  # ratio of the largest share to the smallest from which the plot's axis is logarithmic


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", nargs="+", required=True, metavar="FILE", help="a detector each")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", metavar="NAME", help="a data set of the catalog, such as wider_face_train")
    source.add_argument("--annotations", type=Path, metavar="FILE", help=".jsonl or .jsonl.gz, instead of a data set")
    parser.add_argument("--images", type=int, metavar="K", help="only the first K images")
    parser.add_argument("--seed", type=int, default=0, help="of augmentation and draws (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help=".png")
    add_debug_flag(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of every config")
    args = parser.parse_args(argv)
    if args.images is not None and args.images < 1:
        parser.error(f"--images: expected at least 1, got {args.images}")
    return args


def read_jsonl(file: Path) -> list[ImageRecord]:
    """Records of a file of one JSON object a line; their paths are those of the file, and need not exist.

    Raises:
        AnnotationError: with file, line, expectation and finding.
    """
    report = DataReport()
    records = []
    for place, line in _lines(file):
        try:
            entry = json.loads(line)
            name, height, width = str(entry["file"]), int(entry["height"]), int(entry["width"])
            rows = np.asarray(entry["boxes_xywh"], dtype=np.float64).reshape(-1, 4)
            invalid = np.array([attr[INVALID] == 1 for attr in entry.get("attr", [[0] * 6] * len(rows))], dtype=bool)
            if height < 1 or width < 1 or len(invalid) != len(rows):
                raise ValueError(f"{width}x{height} pixels, {len(rows)} boxes, attributes of {len(invalid)}")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError) as error:
            raise AnnotationError(
                f"{place}: expected an object with file, width, height, boxes_xywh and optionally attr, "
                f"found: {type(error).__name__}: {error}"
            ) from error
        # Without a size, as WIDER FACE's own text file is read: the transform drops what lies outside.
        boxes, kept = usable_boxes(rows, None, [place] * len(rows), report)
        records.append(
            ImageRecord(name, name, height, width, boxes, np.zeros(len(boxes), dtype=np.int64), invalid[kept])
        )
    return records


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """("file:line", text) of every line that is not empty."""
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield f"{file}:{number}", line
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{file}: expected lines of text, got: {error}") from error


def check_dataset(name: str, cfg: CfgNode) -> None:
    try:
        Catalog(cfg.DATASETS)[name].require()
    except MissingDatasetError as error:
        raise ConfigError(f"{error}\nWith --annotations FILE no images are needed.") from error
    except ValueError as error:
        raise ConfigError(f"--dataset: {error}") from error


def table(balances: dict[str, SampleBalance]) -> str:
    """Text: one line per detector, positives and then negatives of every scale; a second one where they count else."""
    scales = list(dict.fromkeys(scale for balance in balances.values() for scale in balance.per_scale()))
    width = max(len(name) for name in balances) + 2
    head = "".join(f"{'@' + scale:>10}" for scale in scales)
    lines = [" " * width + f"{'positives per image':^{len(head)}}  {'negatives per image':^{len(head)}}"]
    lines.append(" " * width + head + "  " + head)
    for name, balance in balances.items():
        drawn = (balance.positives, balance.negatives)
        effective = (balance.effective_positives, balance.effective_negatives)
        for label, (positives, negatives) in ((name, drawn), ("  effective", effective))[: 1 + (drawn != effective)]:
            counts = dict(zip(balance.per_scale(), zip(positives, negatives)))
            cells = ["".join(f"{counts[s][k]:10.1f}" if s in counts else f"{'-':>10}" for s in scales) for k in (0, 1)]
            lines.append(f"{label:{width}}" + "  ".join(cells))
    return "\n".join(lines)


def distances(balances: dict[str, SampleBalance]) -> list[dict]:
    """Of every two detectors, the total variation of what they draw and of what it counts, in percent."""
    return [
        {
            "detectors": list(names),
            "drawn": round(100 * total_variation(*pair), 2),
            "effective": round(100 * total_variation(*pair, effective=True), 2),
        }
        for names, pair in zip(itertools.combinations(balances, 2), itertools.combinations(balances.values(), 2))
    ]


def report(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    # MODEL.DEVICE is of no consequence here, and a config's "cuda" would be refused where there is none.
    configs = {Path(file).stem: load_config(file, ["MODEL.DEVICE", "cpu", *args.opts]) for file in args.config_file}
    if len(configs) < len(args.config_file):
        raise ConfigError(f"--config-file: expected files of different names, got {args.config_file}")
    if args.dataset:
        for cfg in configs.values():
            check_dataset(args.dataset, cfg)
    balances: dict[str, SampleBalance] = {}
    content = {"data_set": args.dataset or args.annotations.name, "seed": args.seed, "detectors": {}}
    for name, cfg in configs.items():
        records = load_records(cfg, [args.dataset]) if args.dataset else read_jsonl(args.annotations)
        records = records[: args.images]
        with tqdm(total=len(records), desc=name, unit="image", dynamic_ncols=True) as bar:
            balances[name] = sample_balance(cfg, records, seed=args.seed, on_progress=bar.update)
        content["detectors"][name] = {
            "sampler": cfg.MODEL.GROUP_SAMPLING.SAMPLER,
            "images": balances[name].num_images,
            "scales": balances[name].scales,
            "positives": [round(count, 3) for count in balances[name].positives],
            "negatives": [round(count, 3) for count in balances[name].negatives],
            "effective_positives": [round(count, 3) for count in balances[name].effective_positives],
            "effective_negatives": [round(count, 3) for count in balances[name].effective_negatives],
        }
    content["total_variation_in_percent"] = distances(balances)
    print(table(balances))
    for pair in content["total_variation_in_percent"]:
        print(
            f"total variation of {' and '.join(pair['detectors'])}: {pair['drawn']} %, {pair['effective']} % effective"
        )
    if args.json:
        write_json(args.json, content)
    if args.plot:
        shares = {}
        for name, balance in balances.items():
            shares[name], effective = balance.shares(), balance.shares(effective=True)
            if effective != shares[name]:
                shares[f"{name}, effective"] = effective
        found = [share for scales in shares.values() for pair in scales.values() for share in pair if share > 0]
        is_log = bool(found) and max(found) > LOG_FROM * min(found)
        plot_samples(shares, args.plot, log=is_log, ylabel="% of all samples")
    print(f"{len(balances)} detectors in {time.perf_counter() - start:.0f} s on {os.cpu_count()} cores")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_error("balance_report.py", args):
        report(args)


if __name__ == "__main__":
    main()
