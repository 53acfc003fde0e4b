#!/usr/bin/env python
"""Write the data next to this file: drawn at random, in the formats and the folders of the real data sets.

    python tests/tiny_data/make.py    # needs OpenCV (opencv-python-headless), for the ROC curves

What a test expects of it (expected_ap.json, *ROC.txt, numbers.json) is computed by the tests' own transcriptions of the
published protocols, in plain loops, and by counting here: nothing of the package is asked.
"""

import gzip
import io
import json
import math
import sys
import tarfile
from pathlib import Path

import numpy as np
from scipy.io import savemat

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "evaluation"), str(HERE.parents[1] / "projects/GroupSampling")]

import test_fddb
import test_wider_face

from group_sampling.data.fddb import FDDBImage

SUBSETS = {"easy": 50, "medium": 30, "hard": 10}  # and the height from which a face counts
DETECTOR = "tiny"


def main() -> None:
    numbers = {"images": {}, "fddb_detectors": {}}
    for part, seed, num_images in (("train", 0, 9), ("val", 1, 14)):
        images = wider_images(np.random.default_rng(seed), num_images)
        lines = [
            json.dumps({key: image[key] for key in ("file", "width", "height", "boxes_xywh", "attr")})
            for image in images
        ]
        write_gzip(HERE / f"wider/annotations/wider_{part}_merged.jsonl.gz", "\n".join(lines) + "\n")
        numbers["images"][part] = len(images)
    write_wider_val(images, np.random.default_rng(2), numbers)
    write_fddb(np.random.default_rng(3), numbers)
    (HERE / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")


def wider_images(rng: np.random.Generator, count: int) -> list[dict]:
    """Three events of images; the fourth image has no face, which WIDER FACE annotates with a box of zeros."""
    images = []
    for index in range(count):
        width, height = (int(side) for side in rng.integers(150, 400, 2))
        boxes, attributes = [], []
        for _ in range(int(rng.integers(1, 8)) if index != 3 else 0):
            h = int(np.exp(rng.uniform(math.log(6), math.log(140))))
            w = max(1, round(h * rng.uniform(0.65, 0.95)))
            boxes.append([int(rng.integers(0, width - 5)), int(rng.integers(0, height - 5)), w, h])
            attributes.append([0, 0, 0, int(rng.random() < 0.15), 0, 0])
        if index == 5:
            boxes[0][2] = 0  # an empty box: the parser drops it
        event = f"{index % 3}--Event{index % 3}"
        images.append(
            {
                "file": f"{event}/{index % 3}_Event_{index}.jpg",
                "width": width,
                "height": height,
                "boxes_xywh": boxes or [[0, 0, 0, 0]],
                "attr": attributes or [[0] * 6],
                "is_empty": not boxes,
            }
        )
    return sorted(images, key=lambda image: image["file"])


def write_wider_val(images: list[dict], rng: np.random.Generator, numbers: dict) -> None:
    text, truth = [], {}
    for image in images:
        rows = [[*box, *attr[:4], *attr[4:]] for box, attr in zip(image["boxes_xywh"], image["attr"])]
        text += [
            image["file"],
            "0" if image["is_empty"] else str(len(rows)),
            *(" ".join(map(str, row)) for row in rows),
        ]
        truth[image["file"].removesuffix(".jpg")] = image["boxes_xywh"]
    write_gzip(HERE / "wider/annotations/wider_face_val_bbx_gt.txt.gz", "\n".join(text) + "\n")
    invalid = {image["file"].removesuffix(".jpg"): [attr[3] == 1 for attr in image["attr"]] for image in images}
    counted = {
        subset: {name: [box[3] >= least and not bad for box, bad in zip(truth[name], invalid[name])] for name in truth}
        for subset, least in SUBSETS.items()
    }

    events = list(dict.fromkeys(name.split("/")[0] for name in truth))
    of_event = [[name for name in truth if name.startswith(f"{event}/")] for event in events]

    def per_image(values) -> np.ndarray:
        return cells([cells([values(name) for name in names]) for names in of_event])

    common = {"event_list": cells(events), "file_list": per_image(lambda name: name.split("/")[1])}
    common["face_bbx_list"] = per_image(lambda name: np.array(truth[name], dtype=np.int32).reshape(-1, 4))
    invalid_list = per_image(lambda name: np.array(invalid[name], dtype=np.uint8)[:, None])
    folder = HERE / "wider/ground_truth_mat"
    folder.mkdir(parents=True, exist_ok=True)
    write_mat(folder / "wider_face_val.mat", {**common, "invalid_label_list": invalid_list})
    for subset, flags in counted.items():
        kept = per_image(lambda name, flags=flags: (np.flatnonzero(flags[name])[:, None] + 1).astype(np.uint8))
        write_mat(folder / f"wider_{subset}_val.mat", {**common, "gt_list": kept})

    detections = {name: detect(boxes, rng) for name, boxes in truth.items() if name != list(truth)[1]}
    write_archive(HERE / f"wider/predictions/{DETECTOR}.tar.xz", detections)
    expected = {"detections": sum(map(len, detections.values()))}
    for subset in SUBSETS:
        expected[subset], _ = test_wider_face.published_protocol(
            truth, counted[subset], detections, num_thresholds=1000, skip_empty_images=True
        )
    (HERE / "wider/predictions/expected_ap.json").write_text(json.dumps({DETECTOR: expected}, indent=1) + "\n")

    valid = [(box, bad) for name in truth for box, bad in zip(truth[name], invalid[name]) if min(box[2:]) > 0]
    num_boxes = sum(len(image["boxes_xywh"]) for image in images if not image["is_empty"])
    numbers["result_sets"] = {"published": DETECTOR, "smallest": DETECTOR}
    numbers["events"] = len(events)
    numbers["images_without_faces"] = sum(not any(min(box[2:]) > 0 for box in boxes) for boxes in truth.values())
    numbers["val_text"] = {
        "num_boxes": num_boxes,
        "num_ignore": sum(bad for _, bad in valid),
        "num_dropped": num_boxes - len(valid),
    }
    numbers["num_faces"] = {subset: sum(map(sum, flags.values())) for subset, flags in counted.items()}
    numbers["num_faces"]["all"] = sum(not bad for _, bad in valid)


def detect(boxes: list[list[int]], rng: np.random.Generator) -> list[list[float]]:
    """Rows x, y, w, h, score: near the faces, some of them twice, and anywhere."""
    rows = []
    for x, y, w, h in boxes:
        for _ in range(int(rng.integers(0, 3))):
            dx, dy, dw, dh = rng.normal(0, 0.08 * max(h, 1), 4)
            rows.append([x + dx, y + dy, max(1, w + dw), max(1, h + dh), rng.beta(5, 2)])
    for _ in range(int(rng.integers(1, 6))):
        size = rng.uniform(8, 60)
        rows.append([*rng.uniform(0, 250, 2), size, size * 1.2, rng.beta(2, 3)])
    return [[round(float(value), 2) for value in row[:4]] + [round(float(row[4]), 3)] for row in rows]


def write_fddb(rng: np.random.Generator, numbers: dict) -> None:
    images, detections = [], {}
    for index in range(15):
        height, width = (int(side) for side in rng.integers(60, 110, 2))
        count = int(rng.integers(0, 4))
        ellipses = np.column_stack(
            [
                rng.uniform(12, 26, count),
                rng.uniform(8, 12, count),
                rng.uniform(-0.3, 0.3, count) + math.pi / 2,
                rng.uniform(10, width - 10, count),
                rng.uniform(10, height - 10, count),
            ]
        ).round(4)
        ellipses[:, 2] -= np.pi * (ellipses[:, 2] > np.pi / 2)
        ellipses = ellipses.round(4)
        image = FDDBImage(f"2002/07/{19 + index % 3}/big/img_{index}", index % 3 + 1, ellipses, (height, width))
        images.append(image)
        boxes = []
        for a, b, _, x, y in ellipses.tolist() * 2:
            if rng.random() < 0.7:
                boxes.append(np.array([x - b, y - a, x + b, y + a]) + rng.normal(0, 2.5, 4))
        for _ in range(int(rng.integers(0, 3))):
            x, y = rng.uniform(0, 80, 2)
            boxes.append(np.array([x, y, x + rng.uniform(8, 30), y + rng.uniform(8, 30)]))
        rows = [[*box[:2], box[2] - box[0], box[3] - box[1]] for box in boxes]
        rows = [[round(float(value), 3) for value in row] for row in rows]
        scores = [round(float(score), 3) for score in rng.random(len(rows))]
        detections[image.image_id] = [[x, y, x + w, y + h] for x, y, w, h in rows], scores, rows

    annotations = HERE / "fddb/annotations"
    results = HERE / f"fddb/detections_with_roc/{DETECTOR}"
    for folder in (annotations, results):
        folder.mkdir(parents=True, exist_ok=True)
    sizes = ["image,width,height"]
    for fold in sorted({image.fold for image in images}):
        ellipse_lines, names, result_lines = [], [], []
        for image in (image for image in images if image.fold == fold):
            names.append(image.image_id)
            sizes.append(f"{image.image_id},{image.size[1]},{image.size[0]}")
            rows = [" ".join(map(repr, row)) + "  1" for row in image.ellipses.tolist()]
            ellipse_lines += [image.image_id, str(len(rows)), *rows]
            _, scores, boxes = detections[image.image_id]
            rows = [" ".join(map(repr, [*box, score])) for box, score in zip(boxes, scores)]
            result_lines += [image.image_id, str(len(rows)), *rows]
        (annotations / f"FDDB-fold-{fold:02d}-ellipseList.txt").write_text("\n".join(ellipse_lines) + "\n")
        (annotations / f"FDDB-fold-{fold:02d}.txt").write_text("\n".join(names) + "\n")
        (results / f"fold-{fold:02d}-out.txt").write_text("\n".join(result_lines) + "\n")
    (annotations / "image_sizes.csv").write_text("\n".join(sizes) + "\n")

    num_faces = sum(len(image.ellipses) for image in images)
    found = {image_id: (boxes, scores) for image_id, (boxes, scores, _) in detections.items()}
    discrete, continuous = [], []
    for threshold, number, hits, total in test_fddb.published_protocol(images, found):
        (hit,) = hits  # several best matchings would leave the curve open
        threshold = 1.79769e308 if math.isinf(threshold) else threshold
        discrete.append(f"{hit / num_faces:.7f} {number - hit} {threshold:g}")
        continuous.append(f"{total / num_faces:.7f} {number - hit}")
    (results / f"{DETECTOR}DiscROC.txt").write_text("\n".join(discrete[::-1]) + "\n")
    (results / f"{DETECTOR}ContROC.txt").write_text("\n".join(continuous[::-1]) + "\n")
    numbers["fddb"] = {"images": len(images), "faces": num_faces, "folds": len({image.fold for image in images})}
    numbers["fddb_detectors"][DETECTOR] = [
        float(discrete[-1].split()[0]),
        float(continuous[-1].split()[0]),
        number - hit,
    ]


def cells(values: list) -> np.ndarray:
    array = np.empty((len(values), 1), dtype=object)
    array[:, 0] = values
    return array


def write_mat(path: Path, content: dict) -> None:
    savemat(path, content, do_compression=True)
    with path.open("r+b") as file:  # a time stands in the header
        file.write(b"MATLAB 5.0 MAT-file".ljust(116))


def write_gzip(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def write_archive(path: Path, detections: dict[str, list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:xz") as archive:
        for name, rows in detections.items():
            lines = [name.split("/")[1], str(len(rows)), *(" ".join(map(repr, row)) for row in rows)]
            content = ("\n".join(lines) + "\n").encode()
            member = tarfile.TarInfo(f"{name}.txt")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main()
