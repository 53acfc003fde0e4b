#!/usr/bin/env python
"""Speed and memory of the WIDER FACE evaluation.

    python bench_wider_eval.py --ground-truth DIR --predictions DIR|ZIP|TAR [--json OUT.json]
    python bench_wider_eval.py --ground-truth DIR --detections 8000000 [--json OUT.json]

The first form evaluates a result set with ``WiderFaceAP`` (Easy, Medium, Hard and All) and with a plain NumPy
transcription of the published protocol (Easy, Medium and Hard), checks that they agree, and compares their times. The
second one streams generated detections and reports the peak memory of the process. One thread each.
"""

import argparse
import platform
import re
import resource
import statistics
import time
from pathlib import Path

import numpy as np

from group_sampling.detections import Detections
from group_sampling.evaluation import WiderFaceAP, read_predictions
from group_sampling.evaluation.wider_face.ground_truth import OfficialGroundTruth, read_official_ground_truth
from group_sampling.files import write_json

NUM_THRESHOLDS = 1000


def transcription(truth: OfficialGroundTruth, predictions: dict[str, Detections]) -> dict[str, float]:
    """AP as the published code computes it: per subset, image, detection and threshold, in NumPy."""
    lowest = min(image.scores.min() for image in predictions.values() if len(image.scores))
    highest = max(image.scores.max() for image in predictions.values() if len(image.scores))
    ap = {}
    for subset, keep in truth.subsets.items():
        totals, num_faces = np.zeros((NUM_THRESHOLDS, 2)), 0
        for image_id, faces in truth.boxes.items():
            num_faces += keep[image_id].sum()
            image = predictions.get(image_id)
            if image is None or len(image.scores) == 0 or len(faces) == 0:
                continue
            order = np.argsort(-image.scores, kind="stable")
            scores = (image.scores[order] - lowest) / (highest - lowest)
            recalled, is_proposal = match_image(image.boxes[order], faces, keep[image_id])
            for t in range(NUM_THRESHOLDS):
                above = np.where(scores >= 1 - (t + 1) / NUM_THRESHOLDS)[0]
                if len(above):
                    totals[t, 0] += len(np.where(is_proposal[: above[-1] + 1] == 1)[0])
                    totals[t, 1] += recalled[above[-1]]
        precision = np.divide(totals[:, 1], totals[:, 0], out=np.zeros(NUM_THRESHOLDS), where=totals[:, 0] > 0)
        precision = np.concatenate([[0], precision, [0]])
        recall = np.concatenate([[0], totals[:, 1] / num_faces, [1]])
        for i in range(len(precision) - 1, 0, -1):
            precision[i - 1] = max(precision[i - 1], precision[i])
        changes = np.where(recall[1:] != recall[:-1])[0]
        ap[subset] = float(np.sum((recall[changes + 1] - recall[changes]) * precision[changes + 1]))
    return ap


def match_image(boxes: np.ndarray, faces: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """After each detection, the faces recalled so far; and which detections are proposals."""
    lower = np.maximum(boxes[:, None, :2], faces[None, :, :2])
    upper = np.minimum(boxes[:, None, 2:], faces[None, :, 2:])
    overlap = np.clip(upper - lower + 1, 0, None).prod(axis=2)
    area = (boxes[:, 2:] - boxes[:, :2] + 1).prod(axis=1)
    face_area = (faces[:, 2:] - faces[:, :2] + 1).prod(axis=1)
    union = area[:, None] + face_area[None] - overlap
    iou = np.divide(overlap, union, out=np.zeros_like(overlap), where=overlap > 0)
    recalled, is_proposal, state = np.zeros(len(boxes)), np.ones(len(boxes)), np.zeros(len(faces))
    for h in range(len(boxes)):
        face = iou[h].argmax()
        if iou[h, face] >= 0.5:
            if not keep[face]:
                state[face] = -1
                is_proposal[h] = -1
            elif state[face] == 0:
                state[face] = 1
        recalled[h] = len(np.where(state == 1)[0])
    return recalled, is_proposal


def compare(ground_truth: Path, predictions_path: Path, repeats: int) -> dict:
    start = time.perf_counter()
    truth = read_official_ground_truth(ground_truth)
    truth_read = time.perf_counter()
    predictions = dict(read_predictions(predictions_path))
    predictions_read = time.perf_counter()

    seconds = []
    for _ in range(repeats):
        evaluator = WiderFaceAP(truth.boxes, ignore=truth.invalid, subsets=truth.subsets)
        begin = time.perf_counter()
        for image_id, found in predictions.items():
            evaluator.update(image_id, found)
        result = evaluator.compute()
        seconds.append(time.perf_counter() - begin)

    begin = time.perf_counter()
    expected = transcription(truth, predictions)
    transcription_seconds = time.perf_counter() - begin
    difference = max(abs(expected[subset] - result.ap[subset]) for subset in expected)
    if difference > 1e-6:
        raise SystemExit(f"the evaluations differ by {difference}: {expected} and {result.ap}")
    return {
        "detections": result.counts["detections"],
        "read_ground_truth_s": truth_read - start,
        "read_predictions_s": predictions_read - truth_read,
        "evaluate_s": statistics.median(seconds),
        "evaluate_spread_s": [min(seconds), max(seconds)],
        "transcription_s": transcription_seconds,
        "speedup": transcription_seconds / statistics.median(seconds),
        "largest_ap_difference": difference,
    }


def stream(ground_truth: Path, num_detections: int) -> dict:
    """Evaluate generated detections, half of them around faces, spread evenly over the images."""
    truth = read_official_ground_truth(ground_truth)
    evaluator = WiderFaceAP(truth.boxes, ignore=truth.invalid, subsets=truth.subsets)
    rng, seconds, remaining = np.random.default_rng(0), 0.0, num_detections
    for number, (image_id, faces) in enumerate(truth.boxes.items()):
        size = remaining // (len(truth.boxes) - number)
        remaining -= size
        corners = rng.random((size, 2)) * 1000
        boxes = np.hstack([corners, corners + rng.random((size, 2)) * 100])
        if len(faces):
            boxes[::2] = faces[rng.integers(len(faces), size=len(boxes[::2]))] + rng.integers(
                -3, 4, (len(boxes[::2]), 4)
            )
            boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])
        found = Detections(boxes, rng.random(size))
        begin = time.perf_counter()
        evaluator.update(image_id, found)
        seconds += time.perf_counter() - begin
    begin = time.perf_counter()
    result = evaluator.compute()
    seconds += time.perf_counter() - begin
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
    peak_mib = peak_kib / (1 << 20 if platform.system() == "Darwin" else 1 << 10)
    return {"detections": result.counts["detections"], "evaluate_s": seconds, "peak_memory_mib": peak_mib}


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ground-truth", type=Path, required=True, help="folder of the four official .mat files")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--predictions", type=Path, help="result set to compare on")
    source.add_argument("--detections", type=int, help="number of detections to generate")
    parser.add_argument("--repeats", type=int, default=5, help="runs of WiderFaceAP, of which the median counts")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if args.predictions:
        figures = compare(args.ground_truth, args.predictions, args.repeats)
    else:
        figures = stream(args.ground_truth, args.detections)
    figures |= {"cpu": cpu_name(), "python": platform.python_version(), "numpy": np.__version__}
    for name, value in figures.items():
        print(f"{name:24s} {value:.4g}" if isinstance(value, float) else f"{name:24s} {value}")
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    main()
