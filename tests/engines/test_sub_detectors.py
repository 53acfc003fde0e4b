"""The paper's @s (Sec. 6.1): what the anchors of one scale find by themselves, from the head's outputs to AP."""

import importlib.util
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from oracles import published_protocol
from PIL import Image
from scipy import ndimage
from torch import nn
from tv_cases import CONFIGS, SMALL_OPTS, write_tiny_config

from group_sampling.anchors import AnchorGrid, cell_anchors
from group_sampling.config import ConfigError
from group_sampling.engines.tv import train as tv_train
from group_sampling.engines.tv.config import load_config
from group_sampling.engines.tv.model import build_model
from group_sampling.inference import select_proposals

CPU = torch.device("cpu")
SCALES = (16, 32, 64, 128)
NEEDS_DETECTRON2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="Detectron2 is not installed"
)
ENGINES = ["torchvision", pytest.param("detectron2", marks=NEEDS_DETECTRON2)]


def write_set(folder, images, faces):
    """A data set in WIDER FACE's format, as options of a config.

    Args:
        images: name -> (H, W, 3) uint8.
        faces: name -> rows (x, y, w, h, invalid).
    """
    (folder / "images").mkdir(exist_ok=True)
    lines = []
    for name, pixels in images.items():
        Image.fromarray(pixels).save(folder / f"images/{name}.png")
        lines += [f"{name}.png", str(len(faces[name]))]
        lines += [f"{x} {y} {w} {h} 0 0 0 {invalid} 0 0" for x, y, w, h, invalid in faces[name]]
    (folder / "gt.txt").write_text("\n".join(lines))
    declared = f"(('mine', '{folder}/gt.txt', '{folder}/images'),)"
    return ["DATASETS.WIDER_FORMAT", declared, "DATASETS.TEST", "('mine',)", "OUTPUT_DIR", str(folder / "out")]


# From the head's outputs to AP in plain Python.


class Limits(NamedTuple):
    """Of one scale in an image: candidates, boxes inside the image, detections."""

    pre_nms: int
    post_nms: int
    most: int


def plain_iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def plain_nms(rows):
    """Rows (score, box) by falling score, without those that overlap a better one by more than 0.3."""
    kept = []
    for score, box in sorted(rows, key=lambda row: -row[0]):
        if all(plain_iou(box, other) <= 0.3 for _, other in kept):
            kept.append((score, box))
    return kept


def clipped(rows, height, width):
    """Rows inside the image, without boxes that have no area there."""
    rows = [
        (score, [min(max(v, 0), limit) for v, limit in zip(box, (width, height, width, height))]) for score, box in rows
    ]
    return [(score, box) for score, box in rows if box[2] > box[0] and box[3] > box[1]]


def plain_sub_detector(hidden, head, scale, height, width, limits):
    """(score, box) of what the anchors of ``scale`` find in an image, from what the head's convolution gives for it.

    Args:
        hidden: (C, H, W) before the ReLU, with a stride of 4 pixels.
        head: name -> weights of the two 1 x 1 convolutions: logits of the background, then of a face, of each scale;
            then four deltas of each scale.
        height, width: of the image without padding.
    """
    number, candidates = SCALES.index(scale), []
    cls_weight, cls_bias = head["cls_logits.weight"][:, :, 0, 0], head["cls_logits.bias"]
    box_weight, box_bias = head["bbox_pred.weight"][:, :, 0, 0], head["bbox_pred.bias"]
    for row in range(hidden.shape[1]):
        for column in range(hidden.shape[2]):
            x = np.maximum(hidden[:, row, column], 0)
            background, face = (cls_weight[k] @ x + cls_bias[k] for k in (number, len(SCALES) + number))
            dx, dy, dw, dh = box_weight[4 * number : 4 * number + 4] @ x + box_bias[4 * number : 4 * number + 4]
            center_x, center_y = 4 * column + dx * scale, 4 * row + dy * scale
            w, h = scale * math.exp(dw), scale * math.exp(dh)
            box = [center_x - w / 2, center_y - h / 2, center_x + w / 2, center_y + h / 2]
            candidates.append((math.exp(face) / (math.exp(face) + math.exp(background)), box))
    candidates = sorted(candidates, key=lambda row: -row[0])[: limits.pre_nms]
    candidates = clipped(candidates, height, width)[: limits.post_nms]
    return plain_nms([row for row in candidates if row[0] > 0.01])[: limits.most]


def plain_pyramid(maps, head, scale, size, levels, limits):
    """The same of an image (height, width) ``size`` seen at ``levels``, one entry of ``maps`` each."""
    height, width = size
    found = []
    for hidden, level in zip(maps, levels):
        h, w = round(level * height), round(level * width)
        rows = plain_sub_detector(hidden, head, scale, h, w, limits)
        rows = [(s, [v * f for v, f in zip(box, (width / w, height / h) * 2)]) for s, box in rows]
        found += clipped(rows, height, width)
    return plain_nms(found)[: limits.most] if len(levels) > 1 else found


class InDouble(nn.Module):
    """Backbone and head in float64.

    The detector then rounds their outputs to float32, the oracle does not. AP depends on scores and boxes through
    comparisons only. It is equal unless one of a few thousand is decided by the last bits of a float32; with other
    processors the head's outputs differ by the last bits of a float64, so that it would be seen here.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model.double()

    def forward(self, images):
        return self.model([image.double() for image in images])


@pytest.mark.parametrize(
    "levels, limits",
    [((1.0,), Limits(pre_nms=40, post_nms=100, most=9)), ((1.0, 0.5), Limits(pre_nms=150, post_nms=40, most=9))],
    ids=["single scale", "two levels"],
)
def test_ap_equals_plain_python(tmp_path, levels, limits):
    rng = np.random.default_rng(5)
    sizes = {"a": (64, 96), "b": (50, 70), "c": (64, 64)}
    images = {name: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for name, size in sizes.items()}
    opts = ["MODEL.RPN.PRE_NMS_TOPK_TEST", limits.pre_nms, "MODEL.RPN.POST_NMS_TOPK_TEST", limits.post_nms]
    opts += ["TEST.DETECTIONS_PER_IMAGE", limits.most, "TEST.PYRAMID.SCALES", levels if len(levels) > 1 else ()]
    opts += ["INPUT.MIN_SIZE_TEST", 0]
    config = write_tiny_config(tmp_path)

    torch.manual_seed(0)
    model = InDouble(build_model(load_config(config, list(map(str, opts)))).eval())
    head = model.model.rpn.head
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.05)
    weights = {name: value.detach().numpy() for name, value in head.state_dict().items()}
    maps = []
    head.conv.register_forward_hook(lambda module, inputs, output: maps.append(output[0].numpy()))

    def evaluate(faces):
        """The metrics, and what the oracle makes of the outputs of that evaluation: scale -> rows by image."""
        maps.clear()
        cfg = load_config(config, list(map(str, [*opts, *write_set(tmp_path, images, faces)])))
        metrics = tv_train.evaluate(cfg, model, CPU)
        assert len(maps) == len(levels) * len(sizes)
        of_image = dict(zip(sizes, (maps[i : i + len(levels)] for i in range(0, len(maps), len(levels)))))
        return metrics, {
            scale: {n: plain_pyramid(of_image[n], weights, scale, sizes[n], levels, limits) for n in sizes}
            for scale in SCALES
        }

    # Faces near some of what each sub-detector finds; some of them are invalid.
    _, found = evaluate({name: [] for name in sizes})
    faces = {name: [] for name in sizes}
    for by_image in found.values():
        for name, rows in by_image.items():
            for _, (x1, y1, x2, y2) in rows[:: rng.integers(2, 5)]:
                x, y, w, h = (np.array([x1, y1, x2 - x1, y2 - y1]) * rng.uniform(0.9, 1.1, 4)).astype(int).tolist()
                faces[name].append((x, y, max(w, 1), max(h, 1), int(rng.random() < 0.2)))
    metrics, found = evaluate(faces)
    counted = {name: [not invalid for *_, invalid in rows] for name, rows in faces.items()}
    truth = {name: [row[:4] for row in rows] for name, rows in faces.items()}
    expected = {}
    for scale, by_image in found.items():
        rows = {n: [(x1, y1, x2 - x1, y2 - y1, s) for s, (x1, y1, x2, y2) in r] for n, r in by_image.items()}
        expected[scale], _ = published_protocol(truth, counted, rows, num_thresholds=1000, skip_empty_images=False)
    assert len(set(expected.values())) == 4 and min(expected.values()) > 0.01 and max(expected.values()) < 0.9
    for scale, ap in expected.items():
        assert metrics[f"wider_face/AP@{scale}"] == pytest.approx(100 * ap, abs=1e-9), scale


# The shape of the paper's figures: a sub-detector misses nothing that another one finds.


class EveryFourthPixel(nn.Module):
    def forward(self, images):
        return {"p2": images[:, :, ::4, ::4]}


class FindsBrightSquares(nn.Module):
    """A head that knows each bright square, and is the surer of an anchor the better it fits: from an IoU of 0.4 on."""

    def forward(self, features):
        bright = features[0][0, 0].numpy() > 0
        boxes = torch.tensor(
            [
                [4 * columns.start, 4 * rows.start, 4 * columns.stop, 4 * rows.stop]
                for rows, columns in ndimage.find_objects(ndimage.label(bright)[0])
            ]
        ).reshape(-1, 4)
        anchors = AnchorGrid.from_cell_anchors([cell_anchors(SCALES, [1.0])], [4], [bright.shape]).boxes()
        overlap = torch.minimum(anchors[:, None, 2:], boxes[:, 2:]) - torch.maximum(anchors[:, None, :2], boxes[:, :2])
        overlap = overlap.clamp(min=0).prod(dim=2)
        areas = [(b[:, 2:] - b[:, :2]).prod(dim=1) for b in (anchors, boxes)]
        best = (overlap / (areas[0][:, None] + areas[1] - overlap)).amax(dim=1)
        logits = (50 * (best - 0.5)).reshape(1, *bright.shape, len(SCALES)).permute(0, 3, 1, 2)
        return [logits], [torch.zeros(1, 4 * len(SCALES), *bright.shape)]


@pytest.mark.parametrize(
    "levels, expected",
    [((), [0, 100, 0, 0]), ((0.5, 1.0, 2.0, 4.0), [100] * 4), ((1.0, 2.0), [0, 100, 100, 0])],
    ids=["single scale", "all", "two"],
)
def test_every_sub_detector_finds_every_face_at_its_level(tmp_path, levels, expected):
    """Faces of 32 pixels, which are 16, 32, 64 and 128 at the levels of the pyramid: @s add up to 400 %.

    One NMS for all would leave one detection of a face, and faces divided by size would all be of scale 32.
    """
    centers = [(24, 24), (80, 40), (24, 88), (136, 96)]
    image = np.zeros((128, 160, 3), dtype=np.uint8)
    for x, y in centers:
        image[y - 16 : y + 16, x - 16 : x + 16] = 255
    opts = write_set(tmp_path, {"a": image}, {"a": [(x - 16, y - 16, 32, 32, 0) for x, y in centers]})
    opts += ["TEST.PYRAMID.SCALES", str(levels), "INPUT.MIN_SIZE_TEST", "0"]
    cfg = load_config(write_tiny_config(tmp_path), opts)
    model = build_model(cfg)
    model.backbone, model.rpn.head = EveryFourthPixel(), FindsBrightSquares()
    metrics = tv_train.evaluate(cfg, model, CPU)
    assert [metrics[f"wider_face/AP@{scale}"] for scale in SCALES] == expected
    assert metrics["wider_face/AP_all"] == 100


# Against a detector in which no other anchor fires.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "name, sizes",
    [
        ("fpn_finest_sampling", [SCALES]),
        ("rpn_c4", [SCALES]),
        ("fpn", [[scale] for scale in SCALES]),
        ("fpn_finest_stride", [[scale] for scale in SCALES]),
        ("table5/grouped_fast_rcnn", [SCALES]),
    ],
)
def test_sub_detector_is_the_detector_without_the_others(tmp_path, engine, name, sizes):
    """The same bits, for one and two stages; and what the whole detector finds does not depend on the key."""
    opts = [*SMALL_OPTS, "OUTPUT_DIR", str(tmp_path), "TEST.DETECTIONS_PER_IMAGE", "25"]
    config = str(CONFIGS / f"{name}.yaml")
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 96, 130))).float()

    def make(*more):
        if engine == "torchvision":
            load, build = load_config, build_model
        else:
            from detectron2.modeling import build_model as build

            from group_sampling.engines.d2.train import load_config as load
        cfg = load(config, [*opts, *more])
        torch.manual_seed(0)
        model = build(cfg).eval()
        head = model.rpn.head if engine == "torchvision" else model.proposal_generator.rpn_head
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.05)
        return model, head

    def silence(module, inputs, outputs):
        """-inf for all anchors but those of ``scale``."""
        for level, level_sizes in zip(outputs[0], sizes):
            level[:, [size != scale for size in level_sizes]] = -math.inf

    @torch.no_grad()
    def detect(model):
        """Boxes, scores and anchor scales of the detections, and the same of each sub-detector."""
        if engine == "torchvision":
            (output,) = model([image])
            by_scale = output.pop("sub_detectors", {})
            return columns(output), {scale: columns(found) for scale, found in by_scale.items()}
        (output,) = model([{"image": image, "height": 96, "width": 130}])
        by_scale = output.get("sub_detectors", {})
        return columns(output["instances"]), {scale: columns(found) for scale, found in by_scale.items()}

    def columns(found):
        if engine == "torchvision":
            return found["boxes"], found["scores"], found["anchor_scales"]
        return found.pred_boxes.tensor, found.scores, found.anchor_scales

    joint, by_scale = detect(make()[0])
    model, head = make("TEST.SUB_DETECTORS", "False")
    off, nothing = detect(model)
    assert nothing == {} and all(map(torch.equal, joint, off))
    assert list(by_scale) == list(SCALES)
    head.register_forward_hook(silence)
    for scale, found in by_scale.items():
        expected, _ = detect(model)
        assert len(expected[0]) > 1 and all(map(torch.equal, found, expected)), scale
        assert (found[2] == scale).all()
    # More than one scale found what the joint list has once.
    assert sum(len(found[0]) for found in by_scale.values()) > len(joint[0])


@pytest.mark.parametrize("nms_thresh, top", [(0.5, 6), (0.5, 100), (1.0, 6)])
def test_proposals_of_a_scale_on_several_levels(nms_thresh, top):
    """Two ratios of each size, a size on both levels, and one level without the smallest."""
    bases = [cell_anchors(sizes, [0.5, 1.0]) for sizes in ([8, 16], [16])]
    scales = [[8, 8, 16, 16], [16, 16]]
    grid = AnchorGrid.from_cell_anchors(bases, [4, 8], [(5, 6), (3, 3)], scales=scales)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, grid.num_anchors, generator=generator)
    deltas = 0.3 * torch.randn(2, grid.num_anchors, 4, generator=generator)
    options = {"pre_nms_topk": top, "post_nms_topk": 9, "nms_thresh": nms_thresh}
    sizes = [(20, 24), (17, 21)]
    for group, scale in enumerate(grid.scales):
        others = grid.scales_at(torch.arange(grid.num_anchors)) != scale
        expected = select_proposals(grid, logits.masked_fill(others, -math.inf), deltas, sizes, **options)
        found = select_proposals(grid, logits, deltas, sizes, group=group, **options)
        for ours, theirs in zip(found, expected):
            assert all(map(torch.equal, ours, theirs)) and (ours.anchor_scales == scale).all()
            assert len(ours.boxes) == (9 if scale == 16 or top == 100 else 6) or nms_thresh < 1


@NEEDS_DETECTRON2
@pytest.mark.parametrize(
    "key, value", [("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"), ("MODEL.PROPOSAL_GENERATOR.NAME", "RPN")]
)
def test_parts_that_have_no_sub_detectors_are_refused(tmp_path, key, value):
    """Else their @s would be missing without a word."""
    from detectron2.modeling import build_model as build

    from group_sampling.engines.d2.train import load_config as load

    config = str(CONFIGS / "fpn_finest_sampling.yaml")
    opts = [*SMALL_OPTS, "OUTPUT_DIR", str(tmp_path), key, value]
    with pytest.raises(ConfigError, match=rf"{value}.*TEST\.SUB_DETECTORS|TEST\.SUB_DETECTORS.*got {value}"):
        build(load(config, opts))
    build(load(config, [*opts, "TEST.SUB_DETECTORS", "False"]))
