#!/usr/bin/env python
"""WIDER FACE validation AP of any detector's result files: Easy, Medium, Hard and All.

    python evaluate_wider.py --predictions DIR|ZIP|TAR --ground-truth DIR [--plot OUT.png] [--json OUT.json]
    python evaluate_wider.py --compare OURS=DIR THEIRS=ZIP ... --ground-truth DIR --plot OUT.png [--curves DIR]

The predictions are in the submission format (a folder per event, a text file per image, lines "x y w h score"); the
ground truth is the folder of wider_face_val.mat and wider_{easy,medium,hard}_val.mat. Needs neither model nor torch.
"""

import argparse
import json
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

from group_sampling.errors import add_debug_flag, exit_on_error
from group_sampling.evaluation import WiderFaceAP, WiderFaceResult, read_predictions
from group_sampling.evaluation.results import UnitCheck
from group_sampling.evaluation.thresholds import add_scores_flag
from group_sampling.evaluation.wider_face.curves import plot_comparison, read_published_curves
from group_sampling.files import atomic_file

_SIZES = (16, 32, 64, 128)


def load(predictions: Path, evaluator: WiderFaceAP) -> WiderFaceAP:
    """Feed a result set to the evaluator, file by file. Raises ValueError or OSError for what is not as documented."""
    files = read_predictions(predictions, images=evaluator.image_ids)
    units = UnitCheck()
    for image_id, found in tqdm(files, total=len(evaluator), unit="image", disable=None):
        evaluator.update(image_id, found)
        units.add(found)
    if units.hint():
        logging.warning(f"{predictions}: {units.hint()}")
    return evaluator


def event_table(events: dict[str, WiderFaceResult]) -> str:
    """AP of each event in percent; an event without a face of a subset has none there."""
    subsets = list(next(iter(events.values())).ap)
    width = max(map(len, ["event", *events]))
    lines = [f"{'event':<{width}}" + "".join(f"{subset.capitalize():>9}" for subset in subsets) + "  faces (All)"]
    for event, result in events.items():
        values = ("n/a" if math.isnan(ap) else f"{100 * ap:.2f}" for ap in result.ap.values())
        lines.append(
            f"{event:<{width}}" + "".join(f"{value:>9}" for value in values) + f"{result.num_faces['all']:>13}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=Path, help="folder, ZIP or tar archive of result files")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="NAME=PATH", help="further detectors, drawn in the same figure"
    )
    parser.add_argument("--ground-truth", type=Path, required=True, help="folder of the four official .mat files")
    parser.add_argument("--per-event", action="store_true", help="AP of every event as well")
    parser.add_argument(
        "--per-scale",
        action="store_true",
        help="AP by size of the face as well, near 16, 32, 64 and 128 pixels; not the paper's AP@16 ... AP@128, which "
        "are All of the result sets predictions@16 ... predictions@128 that an evaluation writes",
    )
    add_scores_flag(parser)
    parser.add_argument("--plot", type=Path, help="write the precision-recall curves to this image (.png, .pdf, .svg)")
    parser.add_argument(
        "--curves",
        type=Path,
        help="folder of published curves to draw along, eval_tools' plot/baselines/Val/setting_int",
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    add_debug_flag(parser)
    args = parser.parse_args(argv)
    detectors = {args.predictions.name: args.predictions} if args.predictions else {}
    for entry in args.compare:
        name, separator, path = entry.partition("=")
        if not (name and separator and path) or name in detectors:
            parser.error(f"--compare: expected NAME=PATH with a name that is not taken yet, got {entry!r}")
        detectors[name] = Path(path)
    if not detectors:
        parser.error("expected --predictions or --compare, got neither")
    if args.curves and not args.plot:
        parser.error("--curves: expected --plot as well, got none")

    logging.basicConfig(format="%(message)s")
    with exit_on_error("evaluate_wider.py", args):
        published = (
            read_published_curves(args.curves) if args.curves else []
        )  # first, so that a wrong folder is reported at once
        results, contents = {}, {}
        for name, path in detectors.items():
            sizes = _SIZES if args.per_scale else ()
            evaluator = load(path, WiderFaceAP.from_official(args.ground_truth, sizes=sizes))
            results[name] = result = evaluator.compute().reporting(args.scores)
            contents[name] = result.to_dict()
            print((f"{name}\n" if len(detectors) > 1 else "") + result.table())
            print("{images} images, {images_without_predictions} of them without predictions".format(**result.counts))
            if args.per_event:
                events = evaluator.compute_by(lambda image_id: image_id.split("/")[0])
                contents[name]["events"] = {event: of_event.to_dict() for event, of_event in events.items()}
                print(event_table(events))
        # All or nothing: the last file to fail leaves no other behind.
        with atomic_file(args.json) if args.json else nullcontext() as file:
            if file:
                content = next(iter(contents.values())) if not args.compare else {"detectors": contents}
                file.write((json.dumps(content, indent=2) + "\n").encode())
            if args.plot and (args.compare or args.curves):
                plot_comparison(args.plot, results, published)
            elif args.plot:
                result.plot(args.plot, title=f"WIDER FACE validation: {args.predictions.name}")


if __name__ == "__main__":
    main()
