"""The balance report: geometry, anchors and counts against independent ones, and the command."""

import gzip
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import oracle_counts, oracle_match
from PIL import Image

from group_sampling.config import ConfigError
from group_sampling.data import wider_face
from group_sampling.data.catalog import Catalog
from group_sampling.data.images import image_size
from group_sampling.data.loader import TrainingStream
from group_sampling.data.records import ImageRecord, UnreadableImageError
from group_sampling.data.transforms import TrainTransform
from group_sampling.engines.tv.config import load_config
from group_sampling.engines.tv.model import build_model
from group_sampling.experiments.balance import SampleBalance, anchor_grid, sample_balance, total_variation

PROJECT = Path(__file__).resolve().parents[2] / "projects/GroupSampling"
TOOL = PROJECT / "tools/balance_report.py"
CONFIGS = PROJECT / "configs"
ROWS = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml") if p.parent.name != "quick")
SMALL = [
    "MODEL.DEVICE",
    "cpu",
    "MODEL.WEIGHTS",
    "",
    "MODEL.RESNETS.DEPTH",
    "18",
    "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "64",
]
# No augmentation: what is counted can be worked out image by image.
STILL = ["INPUT.SCALE_JITTER", "(1.0,)", "INPUT.CROP.ENABLED", "False", "INPUT.RANDOM_FLIP", "none"]


def config(name, *opts):
    return load_config(str(CONFIGS / name), [*SMALL, *opts])


def record(boxes, ignore=None, size=(96, 128), file="none.jpg"):
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    ignore = np.zeros(len(boxes), dtype=bool) if ignore is None else np.array(ignore, dtype=bool)
    return ImageRecord(file, file, *size, boxes, np.zeros(len(boxes), dtype=np.int64), ignore)


def test_anchors_are_those_of_the_network():
    """For every config; those that agree in what decides on anchors share one network."""
    seen = set()
    for name in ROWS:
        cfg = config(name)
        key = repr((cfg.MODEL.BACKBONE, cfg.MODEL.FPN, cfg.MODEL.RPN.IN_FEATURES, cfg.MODEL.ANCHOR_GENERATOR))
        key += repr(cfg.MODEL.GROUP_SAMPLING.ANCHOR_STRIDES)
        if key in seen:
            continue
        seen.add(key)
        model = build_model(cfg).eval()
        for height, width in ((64, 96), (97, 130)):
            images, _ = model.transform([torch.zeros(3, height, width)])
            features = model.backbone(images.tensors)
            in_use = [features[feature] for feature in cfg.MODEL.RPN.IN_FEATURES]
            assert anchor_grid(cfg, height, width) == model.rpn.anchor_generator.grid(in_use), name
    assert len(seen) >= 8  # the five detectors, P3, P4 and C3


def test_unknown_feature_is_refused():
    cfg = config("fpn_finest.yaml")
    cfg.MODEL.RPN.IN_FEATURES = ["stem"]
    with pytest.raises(ConfigError, match="IN_FEATURES.*'stem'"):
        anchor_grid(cfg, 64, 64)


def test_annotations_move_as_they_do_with_the_image():
    records = Catalog({"SYNTHETIC": {"NUM_TRAIN": 12, "HEIGHT": 90, "WIDTH": 120}})["synthetic_faces_train"].records
    transform = TrainTransform(scales=(0.5, 1.0, 1.5), crop_size=(64, 80))
    stream = TrainingStream(records, transform, lambda *example: example, seed=0, images_per_batch=12, max_bad_share=0)
    for image, boxes, classes, ignore_boxes, source, draw in stream.batch(0):
        rng = np.random.default_rng([0, 1, draw])  # the stream's: seed, augmentation, draw
        geometry = transform.sample(90, 120, rng)
        moved = transform.apply_annotations(source.boxes, source.ignore, source.classes, geometry, 90, 120)
        for found, expected in zip(moved, (boxes, classes, ignore_boxes)):
            np.testing.assert_array_equal(found, expected)
        x0, y0, x1, y1 = geometry.crop
        assert image.shape[:2] == (y1 - y0, x1 - x0)


RECORDS = [
    record([[4, 4, 22, 22], [30, 10, 64, 44], [10, 40, 52, 84]]),
    record([[60, 20, 90, 52], [5, 5, 40, 40]], ignore=[False, True]),
    record([]),
    record([[40, 30, 56, 46]], size=(64, 64)),
]


def oracle_labels(cfg, image):
    """Labels and scales of the anchors of an image that is not augmented, in Python."""
    height, width = (-(-side // 32) * 32 for side in (image.height, image.width))
    anchors, scales = [], []
    for y in range(height // 4):
        for x in range(width // 4):
            for size in (16, 32, 64, 128):
                anchors.append([4 * x - size / 2, 4 * y - size / 2, 4 * x + size / 2, 4 * y + size / 2])
                scales.append(size)
    faces, ignored = image.boxes[~image.ignore], image.boxes[image.ignore]
    return oracle_match(np.float32(anchors), faces, 0.6, 0.4, "all", ignored)[0], scales


def mean_counts(per_image):
    return np.mean(per_image, axis=0)


@pytest.mark.parametrize("samples", [8, 64])
def test_group_sampler_counts(samples):
    cfg = config("fpn_finest_sampling.yaml", *STILL, "MODEL.GROUP_SAMPLING.SAMPLES_PER_GROUP", str(samples))
    balance = sample_balance(cfg, RECORDS)
    expected = []
    for image in RECORDS:
        labels, scales = oracle_labels(cfg, image)
        members = [[i for i, scale in enumerate(scales) if scale == size] for size in (16, 32, 64, 128)]
        expected.append(np.transpose([oracle_counts(labels, group, samples, 0.25) for group in members]))
    np.testing.assert_allclose((balance.positives, balance.negatives), mean_counts(expected))
    assert balance.scales == (16, 32, 64, 128) and balance.num_images == 4
    assert list(balance.per_scale()) == ["16", "32", "64", "128"]


def test_focal_sampler_counts_all_anchors():
    cfg = config("fpn_finest_sampling.yaml", *STILL, "MODEL.GROUP_SAMPLING.SAMPLER", "focal")
    expected = []
    for image in RECORDS:
        labels, scales = oracle_labels(cfg, image)
        pairs = list(zip(labels, scales))
        expected.append([[pairs.count((label, size)) for size in (16, 32, 64, 128)] for label in (1, 0)])
    balance = sample_balance(cfg, RECORDS)
    np.testing.assert_allclose((balance.positives, balance.negatives), mean_counts(expected))


def test_uniform_sampler_counts():
    """All positives fit, so they are counted exactly; negatives fill up, evenly over scales of as many anchors."""
    cfg = config("fpn_finest.yaml", *STILL, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "1000")
    positives = []
    for image in RECORDS:
        labels, scales = oracle_labels(cfg, image)
        positives.append([list(zip(labels, scales)).count((1, size)) for size in (16, 32, 64, 128)])
    balance = sample_balance(cfg, RECORDS)
    np.testing.assert_allclose(balance.positives, np.mean(positives, axis=0))
    assert sum(balance.positives) + sum(balance.negatives) == 1000
    np.testing.assert_allclose(balance.negatives, [250] * 4, atol=40)


@pytest.mark.parametrize("loss_mean", ["all", "group"])
@pytest.mark.parametrize("fill", ["negatives", "repeat", "weight"])
def test_effective_samples(fill, loss_mean):
    """What counts, image by image, against the table in docs/deviations.md."""
    reading = ["MODEL.GROUP_SAMPLING.FILL", fill, "MODEL.GROUP_SAMPLING.LOSS_MEAN", loss_mean]
    samples, places = 2000, 500  # more than the 768 anchors of each scale in most images
    opts = [*STILL, *reading, "MODEL.GROUP_SAMPLING.SAMPLES_PER_GROUP", str(samples)]
    cfg = config("fpn_finest_sampling.yaml", *opts)
    balance = sample_balance(cfg, RECORDS)
    drawn, expected = [], []
    for image in RECORDS:
        labels, scales = oracle_labels(cfg, image)
        members = [[i for i, scale in enumerate(scales) if scale == size] for size in (16, 32, 64, 128)]
        counts = [oracle_counts(labels, group, samples, 0.25) for group in members]
        drawn.append(np.transpose(counts))
        if fill != "negatives":
            counts = [(places if pos else 0, min(neg, samples - places)) for pos, neg in counts]
        if loss_mean == "group":
            total = sum(map(sum, counts))
            counts = [[count * total / 4 / sum(pair) for count in pair] for pair in counts]
        expected.append(np.transpose(counts))
    np.testing.assert_allclose((balance.positives, balance.negatives), mean_counts(drawn))
    found = balance.effective_positives, balance.effective_negatives
    np.testing.assert_allclose(found, mean_counts(expected), rtol=1e-5)
    shares = balance.shares(effective=True)
    assert sum(map(sum, shares.values())) == pytest.approx(100) and list(shares) == ["16", "32", "64", "128"]
    assert shares["32"][0] == pytest.approx(100 * mean_counts(expected)[0][1] / mean_counts(expected).sum(), rel=1e-5)


def make_balance(scales, positives, negatives):
    return SampleBalance(scales, positives, negatives, positives, negatives, 1)


def test_total_variation():
    a, b = make_balance((16.0, 32.0), (1.0, 3.0), (8.0, 8.0)), make_balance((16.0, 32.0), (4.0, 4.0), (16.0, 16.0))
    # 1, 3, 8, 8 of 20 and 4, 4, 16, 16 of 40
    assert total_variation(a, b) == total_variation(b, a) == pytest.approx((0.05 + 0.05 + 0 + 0) / 2)
    assert total_variation(a, a) == 0
    assert total_variation(a, make_balance((64.0,), (1.0,), (1.0,))) == pytest.approx(1)


def test_seed_decides():
    cfg = config("fpn_finest.yaml", "INPUT.CROP.SIZE", "(64, 64)", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "64")
    assert sample_balance(cfg, RECORDS, seed=1) == sample_balance(cfg, RECORDS, seed=1)
    assert sample_balance(cfg, RECORDS, seed=1) != sample_balance(cfg, RECORDS, seed=2)


def test_ohem_is_refused():
    cfg = config("fpn_finest.yaml", "MODEL.GROUP_SAMPLING.SAMPLER", "ohem")
    with pytest.raises(ConfigError, match="GROUP_SAMPLING.SAMPLER: .* got 'ohem', which needs the network"):
        sample_balance(cfg, RECORDS)


def test_no_images():
    with pytest.raises(ValueError, match="at least one image"):
        sample_balance(config("fpn_finest.yaml"), [])


def test_size_from_the_header(tmp_path):
    upright, turned = tmp_path / "upright.png", tmp_path / "turned.jpg"
    Image.new("RGB", (40, 30)).save(upright)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(turned, exif=exif)
    assert image_size(record([], size=(None, None), file=str(upright))) == (30, 40)
    assert image_size(record([], size=(None, None), file=str(turned))) == (40, 30)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    for name in ("broken.jpg", "absent.jpg"):
        with pytest.raises(UnreadableImageError, match=name):
            image_size(record([], size=(None, None), file=str(tmp_path / name)))


def run_tool(*arguments):
    load_tool().main([str(argument) for argument in arguments])


LINE = {"file": "a.jpg", "width": 128, "height": 96, "boxes_xywh": [[4, 4, 18, 18], [5, 5, 0, 9]]}


def test_command(tmp_path, capsys):
    file = tmp_path / "faces.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(json.dumps({**LINE, "file": f"{k}.jpg"}) for k in range(3)).encode()))
    configs = [CONFIGS / "fpn_finest.yaml", CONFIGS / "fpn_finest_sampling.yaml"]
    outputs = ["--json", tmp_path / "b.json", "--plot", tmp_path / "new/b.png"]
    run_tool("--config-file", *configs, "--annotations", file, *outputs, "--images", 2, *STILL)
    printed = capsys.readouterr().out
    assert "fpn_finest_sampling" in printed and "@128" in printed and "  effective" not in printed
    assert re.search(r"total variation of fpn_finest and fpn_finest_sampling: [\d.]+ %, [\d.]+ % effective", printed)
    content = json.loads((tmp_path / "b.json").read_text())
    (pair,) = content["total_variation_in_percent"]
    assert pair["detectors"] == ["fpn_finest", "fpn_finest_sampling"] and pair["drawn"] == pair["effective"] < 50
    detectors = content["detectors"]
    assert list(detectors) == ["fpn_finest", "fpn_finest_sampling"]
    assert all(d["images"] == 2 and d["positives"][0] > 0 and d["positives"][3] == 0 for d in detectors.values())
    pixels = np.asarray(Image.open(tmp_path / "new/b.png").convert("L"))
    assert pixels.shape[1] > 600 and pixels.std() > 5
    run_tool("--config-file", configs[1], "--annotations", file, *STILL, "MODEL.GROUP_SAMPLING.FILL", "weight")
    assert re.search(r"^  effective +[\d.]+", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"faces.jsonl:2: expected an object"),
        ('{"file": "a.jpg", "width": 3, "height": 4}', r"faces.jsonl:2: .*boxes_xywh"),
        (json.dumps({**LINE, "attr": [[0] * 6]}), r"faces.jsonl:2: .*2 boxes, attributes of 1"),
        (json.dumps({**LINE, "width": 0}), r"faces.jsonl:2: .*0x96 pixels"),
    ],
)
def test_bad_annotations(tmp_path, line, message):
    file = tmp_path / "faces.jsonl"
    file.write_text(json.dumps(LINE) + "\n" + line)
    balance_report = load_tool()
    with pytest.raises(balance_report.AnnotationError, match=message):
        balance_report.read_jsonl(file)


def test_absent_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(SystemExit, match="(?s)^balance_report.py: error: .*--annotations FILE"):
        run_tool("--config-file", CONFIGS / "fpn_finest.yaml", "--dataset", "wider_face_train")
    with pytest.raises(SystemExit, match="^balance_report.py: error: --dataset: .* .did you mean 'wider_face_train'"):
        run_tool("--config-file", CONFIGS / "fpn_finest.yaml", "--dataset", "wider_trian")


def test_real_annotations_agree_with_the_official_text(reference_data):
    folder = reference_data.folder / "wider/annotations"
    merged = load_tool().read_jsonl(folder / "wider_val_merged.jsonl.gz")
    official = {r.image_id: r for r in wider_face.read_annotations(folder / "wider_face_val_bbx_gt.txt.gz", folder)}
    assert len(merged) == len(official) == reference_data.numbers["images"]["val"]
    for one in merged:
        other = official[wider_face.image_id(one.file_name)]
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.ignore, other.ignore)


def load_tool():
    sys.path.insert(0, str(TOOL.parent))
    try:
        import balance_report
    finally:
        sys.path.remove(str(TOOL.parent))
    return balance_report
