"""Slow, obviously right versions of the operators, written from the paper, and of WIDER FACE's evaluation.

They share no code with the package.

Boxes come as numpy arrays of float32 or float64; the arithmetic is done in that type, one operation at a time.
"""

import math

import numpy as np


def oracle_anchors(grid, dtype):
    """(boxes, groups) of all anchors, lattice by lattice and cell by cell, from the definition of a lattice."""
    boxes = np.full((grid.num_anchors, 4), np.nan, dtype)
    groups = np.full(grid.num_anchors, -1)
    for lattice in grid.lattices:
        for row in range(lattice.height):
            for column in range(lattice.width):
                index = lattice.start + lattice.step * (row * lattice.width + column)
                x, y = (dtype(lattice.offset * lattice.stride + lattice.stride * cell) for cell in (column, row))
                boxes[index] = np.array([x, y, x, y]) + np.array(lattice.base, dtype)
                groups[index] = lattice.group
    return boxes, groups


def oracle_iou(boxes1: np.ndarray, boxes2: np.ndarray) -> np.ndarray:
    """M(i, j) of Sec. 4.1; 0 with a box that is not finite, empty or inverted, and where the arithmetic gives NaN."""
    with np.errstate(all="ignore"):
        ax1, ay1, ax2, ay2 = (boxes1[:, k, None] for k in range(4))
        bx1, by1, bx2, by2 = (boxes2[None, :, k] for k in range(4))
        width = np.minimum(ax2, bx2) - np.maximum(ax1, bx1)
        height = np.minimum(ay2, by2) - np.maximum(ay1, by1)
        intersection = np.where((width > 0) & (height > 0), width * height, 0).astype(boxes1.dtype)
        union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection
        iou = intersection / union
    usable = oracle_valid(boxes1)[:, None] & oracle_valid(boxes2)[None, :] & ~np.isnan(iou)
    return np.where(usable, iou, 0).astype(boxes1.dtype)


def oracle_valid(boxes: np.ndarray) -> np.ndarray:
    return np.isfinite(boxes).all(axis=1) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def oracle_match(anchors, gt_boxes, pos_iou, neg_iou, second_pass, ignore_boxes=None, ignore_ioa=0.5):
    """Labels, matched ground truths and best IoUs as lists: Sec. 4.1 and Eq. 1, anchor by anchor, face by face."""
    dtype = anchors.dtype.type
    pos, neg, ioa = float(dtype(pos_iou)), float(dtype(neg_iou)), float(dtype(ignore_ioa))
    matrix = oracle_iou(anchors, gt_boxes).tolist()
    labels, matched, best_iou = [], [], []
    for row in matrix:
        best, index = 0.0, -1
        for j, value in enumerate(row):
            if index < 0 or value > best:
                best, index = value, j
        labels.append(1 if best >= pos else 0 if best < neg else -1)
        matched.append(index if best >= neg else -1)
        best_iou.append(best if best >= neg else 0.0)

    first_pass = list(labels)
    for j in range(len(gt_boxes)):
        if any(label == 1 and gt == j for label, gt in zip(first_pass, matched)):
            continue
        rescued = [i for i, (label, gt) in enumerate(zip(first_pass, matched)) if label == -1 and gt == j]
        if second_pass == "best" and rescued:
            highest = max(best_iou[i] for i in rescued)
            rescued = [next(i for i in rescued if best_iou[i] == highest)]
        if second_pass != "none":
            for i in rescued:
                labels[i] = 1

    for region in [] if ignore_boxes is None else ignore_boxes[oracle_valid(ignore_boxes)]:
        for i, anchor in enumerate(anchors):
            if labels[i] == 0 and oracle_valid(anchor[None])[0]:
                width = min(anchor[2], region[2]) - max(anchor[0], region[0])
                height = min(anchor[3], region[3]) - max(anchor[1], region[1])
                area = (anchor[2] - anchor[0]) * (anchor[3] - anchor[1])
                if width > 0 and height > 0 and float(width * height / area) >= ioa:
                    labels[i] = -1
    return labels, matched, best_iou


def oracle_counts(labels, members, samples_per_group, positive_fraction):
    """(positives, negatives) that a group must yield, by counting: Sec. 4.2."""
    positives = sum(1 for i in members if labels[i] == 1)
    negatives = sum(1 for i in members if labels[i] == 0)
    num_pos = min(positives, math.floor(samples_per_group * positive_fraction))
    return num_pos, min(negatives, samples_per_group - num_pos)


def oracle_draw(labels, members, samples_per_group, positive_fraction, key_parts):
    """The sample of one group: the documented permutation walked step by step on Python integers."""
    num_pos, num_neg = oracle_counts(labels, members, samples_per_group, positive_fraction)
    positives, negatives = [], []
    size = len(members)
    if size:
        rows = math.isqrt(size - 1) + 1
        columns = (size + rows - 1) // rows
        key = _key(key_parts)
        round_keys = [_splitmix(key + 0x9E3779B97F4A7C15 * (r + 1)) >> 32 for r in range(24 if size < 1024 else 8)]
    for place in range(size):
        x = place
        while True:
            x = _feistel(x, rows, columns, round_keys)
            if x < size:
                break
        anchor = members[x]
        if labels[anchor] == 1 and len(positives) < num_pos:
            positives.append(anchor)
        if labels[anchor] == 0 and len(negatives) < num_neg:
            negatives.append(anchor)
    sample = positives + negatives
    return sample + [-1] * (samples_per_group - len(sample))


def _feistel(x, rows, columns, round_keys):
    left, right = divmod(x, columns)
    for number, key in enumerate(round_keys):
        if number % 2 == 0:
            left = (left + (_hash(right, key) * rows) // 2**32) % rows
        else:
            right = (right + (_hash(left, key) * columns) // 2**32) % columns
    return left * columns + right


def _hash(x, key):
    x = (x ^ key) * 0x9E3779B1 % 2**32
    return (x ^ x // 2**15) * 0x85EBCA77 % 2**32


def _key(parts):
    key = 0
    for part in parts:
        key = _splitmix((key ^ part % 2**64) + 0x9E3779B97F4A7C15)
    return key


def _splitmix(z):
    z %= 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def published_protocol(truth, counted, detections, *, num_thresholds, skip_empty_images):
    """The published evaluation, loop by loop. Boxes are (x, y, w, h), detections (x, y, w, h, score), dicts by image.

    Returns AP and the (proposals, hits) at every threshold.
    """
    if any(math.isnan(detection[4]) for rows in detections.values() for detection in rows):
        raise ValueError("NaN score")
    scores = [detection[4] for rows in detections.values() for detection in rows]
    lowest, highest = min(scores, default=0), max(scores, default=0)
    totals = [[0, 0] for _ in range(num_thresholds)]
    for image, faces in truth.items():
        rows = detections.get(image, [])
        if not rows or (not faces and skip_empty_images):
            continue
        rows = sorted(rows, key=lambda row: -row[4])
        normalized = [(row[4] - lowest) / (highest - lowest) if highest > lowest else 1.0 for row in rows]
        state = [0] * len(faces)
        is_proposal, recalled = [], []
        for x, y, w, h, _ in rows:
            best, best_index = 0.0, None
            for index, (fx, fy, fw, fh) in enumerate(faces):
                overlap_w = min(x + w, fx + fw) - max(x, fx) + 1
                overlap_h = min(y + h, fy + fh) - max(y, fy) + 1
                if overlap_w <= 0 or overlap_h <= 0:
                    continue
                overlap = overlap_w * overlap_h
                area = ((x + w) - x + 1) * ((y + h) - y + 1)
                face_area = ((fx + fw) - fx + 1) * ((fy + fh) - fy + 1)
                iou = overlap / (area + face_area - overlap)
                if iou > best:
                    best, best_index = iou, index
            is_proposal.append(True)
            if best >= 0.5:
                if not counted[image][best_index]:
                    state[best_index] = -1
                    is_proposal[-1] = False
                elif state[best_index] == 0:
                    state[best_index] = 1
            recalled.append(state.count(1))
        for t in range(num_thresholds):
            threshold = 1 - (t + 1) / num_thresholds
            above = sum(score >= threshold for score in normalized)
            if above:
                totals[t][0] += is_proposal[:above].count(True)
                totals[t][1] += recalled[above - 1]
    num_faces = sum(sum(flags) for flags in counted.values())
    if num_faces == 0:
        return math.nan, totals
    recall = [0.0] + [hits / num_faces for _, hits in totals] + [1.0]
    precision = [0.0] + [hits / proposals if proposals else 0.0 for proposals, hits in totals] + [0.0]
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    return sum((recall[i] - recall[i - 1]) * precision[i] for i in range(1, len(recall))), totals
