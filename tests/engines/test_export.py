"""tools/export.py as a user calls it: what its files compute, beside the detector; the oracle is GroupSamplingRCNN."""

import json
import math
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou
from tv_cases import CONFIGS, SMALL_OPTS

from group_sampling.checkpoint import convert_names
from group_sampling.config import dump_config
from group_sampling.detections import Detections
from group_sampling.engines.tv import export as module
from group_sampling.engines.tv.config import get_cfg, load_config
from group_sampling.engines.tv.exportable import ExportableDetector, suppress, suppress_in_one
from group_sampling.engines.tv.model import build_model
from group_sampling.errors import UserError

TOOL = CONFIGS.parent / "tools/export.py"
ONE_STAGE, TWO_STAGES = "fpn_finest_sampling", "table5/grouped_fast_rcnn"
MAX_DETECTIONS = 30
# Widths small enough that the exporters take seconds; as deep as the others.
TINY_OPTS = [
    *SMALL_OPTS,
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.RPN.PRE_NMS_TOPK_TEST", "150"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "80", "TEST.DETECTIONS_PER_IMAGE", str(MAX_DETECTIONS)),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.05", "TEST.SUB_DETECTORS", "False"),
]
# Batches of images, none of the size of the export; padding differs within a batch.
BATCHES = ([(70, 150)], [(96, 100), (64, 128), (90, 90)], [(161, 97)], [(50, 60)] * 3)


def make_model(config, *opts):
    """A detector that finds something in noise, and whose boxes go beyond the image."""
    cfg = load_config(str(CONFIGS / f"{config}.yaml"), [*TINY_OPTS, *opts])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for parameter in model.rpn.head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for name, parameter in model.roi_heads.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if name.startswith("box_predictor") else 0.1)
    return cfg, model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a config its model and its checkpoint."""
    folder, made = tmp_path_factory.mktemp("weights"), {}

    def get(config):
        if config not in made:
            cfg, model = make_model(config)
            path = folder / f"{config.replace('/', '_')}.pth"
            engine = "detectron2" if config == ONE_STAGE else "torchvision"  # whose files this would be
            described = {"config": dump_config(cfg, get_cfg()), "class_names": ["face"], "engine": engine}
            torch.save({"model": convert_names(model.state_dict(), engine), **described}, path)
            made[config] = model, path
        return made[config]

    return get


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(TOOL))["main"]


@pytest.fixture
def fewer_comparisons(monkeypatch):
    """The tool's own comparison on one small image and a batch of three; the tests compare more than it does."""
    monkeypatch.setattr(module, "CHECKED_SIZES", ((75, 90),))


def make_images(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


def preprocess(images, metadata):
    """Normalized and padded, in NumPy, from what the file says of itself."""
    mean, std, stride = (np.array(json.loads(metadata[name])) for name in ("pixel_mean", "pixel_std", "stride"))
    assert metadata["channels"] == '"RGB"'
    height, width = (math.ceil(max(image.shape[k] for image in images) / stride) * int(stride) for k in (1, 2))
    batch = np.zeros((len(images), 3, height, width), np.float32)
    for row, image in zip(batch, images):
        row[:, : image.shape[1], : image.shape[2]] = (image.numpy() - mean[:, None, None]) / std[:, None, None]
    return batch, np.array([image.shape[1:] for image in images], np.int64)


def load(path):
    """(metadata, function of NumPy arrays), with each runtime's own means."""
    if path.suffix == ".onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
        return metadata, lambda images, sizes: session.run(None, {"images": images, "image_sizes": sizes})
    files = {"metadata.json": ""}
    if path.suffix == ".pt":
        program = torch.jit.load(path, _extra_files=files)
    else:
        program = torch.export.load(path, extra_files=files).module()

    def run(images, sizes):
        with torch.no_grad():
            return [output.numpy() for output in program(torch.from_numpy(images), torch.from_numpy(sizes))]

    return json.loads(files["metadata.json"]), run


def check_agreement(model, path):
    metadata, run = load(path)
    assert json.loads(metadata["class_names"]) == ["face"]
    assert json.loads(metadata["anchor_scales"]) == [16, 32, 64, 128]
    num_found = 0
    for sizes in BATCHES:
        images = make_images(sizes)
        with torch.no_grad():
            expected = model(images)
        counts, *columns = run(*preprocess(images, metadata))
        for i, detections in enumerate(expected):
            k = counts[i]
            assert k == len(detections["boxes"])
            boxes, scores, labels, scales = (column[i] for column in columns)
            assert boxes.shape == (MAX_DETECTIONS, 4) and not boxes[k:].any() and not scores[k:].any()
            side = max(sizes[i])
            np.testing.assert_allclose(boxes[:k] / side, detections["boxes"].numpy() / side, atol=1e-4)
            np.testing.assert_allclose(scores[:k], detections["scores"].numpy(), atol=1e-4)
            assert labels[:k].tolist() == detections["labels"].tolist()
            assert scales[:k].tolist() == detections["anchor_scales"].tolist()
            num_found += k
    assert num_found > 20


def check_candidates(model, path):
    """Without NMS: torchvision's NMS and the threshold, applied here, give the detector's detections."""
    from torchvision.ops import nms

    metadata, run = load(path)
    for sizes in BATCHES[:2]:
        images = make_images(sizes)
        with torch.no_grad():
            expected = model(images)
        boxes, scores, scales = map(torch.from_numpy, run(*preprocess(images, metadata)))
        assert boxes.shape == (len(images), 80, 4) and scores.shape == (len(images), 80, 1)
        for i, detections in enumerate(expected):
            likely = scores[i, :, 0] > json.loads(metadata["score_thresh"])
            kept = nms(boxes[i][likely], scores[i, :, 0][likely], json.loads(metadata["nms_thresh"]))[:MAX_DETECTIONS]
            torch.testing.assert_close(boxes[i][likely][kept], detections["boxes"], atol=1e-2, rtol=0)
            torch.testing.assert_close(scores[i, :, 0][likely][kept], detections["scores"], atol=1e-4, rtol=0)
            assert scales[i][likely][kept].tolist() == detections["anchor_scales"].tolist()


CASES = [("torchscript", ".pt", ONE_STAGE, False)] + [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (
        ("torchscript", ".pt", TWO_STAGES, False),
        ("torchscript", ".ts", ONE_STAGE, True),
        ("torch-export", ".pt2", ONE_STAGE, False),
        ("torch-export", ".pt2", TWO_STAGES, False),
        ("torch-export", ".pt2", TWO_STAGES, True),
        ("onnx", ".onnx", ONE_STAGE, False),
        ("onnx", ".onnx", TWO_STAGES, False),
        ("onnx", ".onnx", ONE_STAGE, True),
    )
]


@pytest.mark.parametrize("kind, suffix, config, without_nms", CASES)
def test_a_file_finds_what_the_detector_finds(
    main, weights, tmp_path, capsys, fewer_comparisons, kind, suffix, config, without_nms
):
    if kind == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    model, checkpoint = weights(config)
    path = tmp_path / f"detector{suffix}"
    flags = ["--no-nms"] if without_nms else []
    main(["--weights", str(checkpoint), "--format", kind, "--output", str(path), *flags])
    assert "in 4 images: boxes agree within" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    if suffix == ".ts":
        path = path.rename(tmp_path / "detector.pt")
    (check_candidates if without_nms else check_agreement)(model, path)


@pytest.mark.parametrize(
    "config, opts",
    [
        (ONE_STAGE, ()),
        (TWO_STAGES, ()),
        (TWO_STAGES, ("MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.RPN.NMS_THRESH", "0.5")),
        ("fpn", ("MODEL.RPN.NMS_THRESH", "0.5")),
        ("fpn_finest_stride", ()),
        ("rpn_c4", ()),
        (ONE_STAGE, ("MODEL.PROPOSAL_GENERATOR.MIN_SIZE", "12")),
    ],
)
def test_the_exportable_form_is_the_detector(config, opts):
    """Eager, where all decisions fall alike: the same detections."""
    _, model = make_model(config, *opts)
    for sizes in BATCHES[:2]:
        images = make_images(sizes)
        batch, _ = model.transform(images)
        with torch.no_grad():
            expected = model(images)
            found = ExportableDetector(model)(batch.tensors, torch.tensor(batch.image_sizes))
        for detections, theirs in zip(expected, module.unpack(list(found))):
            assert len(detections["boxes"]) == len(theirs.boxes) > 0
            torch.testing.assert_close(theirs.boxes, detections["boxes"], atol=1e-3, rtol=0)
            torch.testing.assert_close(theirs.scores, detections["scores"], atol=1e-6, rtol=0)
            assert torch.equal(theirs.classes, detections["labels"])
            assert torch.equal(theirs.anchor_scales, detections["anchor_scales"])


def test_values_that_are_not_finite_are_left_out():
    _, model = make_model(TWO_STAGES)
    detector = ExportableDetector(model)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model.rpn.head.bbox_pred.bias[:4] = torch.nan
        model.rpn.head.cls_logits.bias[1] = torch.inf
        counts, boxes, scores, *_ = detector(images, torch.tensor([[64, 64], [50, 40]]))
    assert counts.min() > 0 and boxes.isfinite().all() and scores.isfinite().all()
    assert boxes[1].amax(0).tolist() <= [40, 50, 40, 50]


def greedy(boxes, scores, thresh):
    """NMS as its definition has it, one box at a time."""
    kept = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if scores[i] > -math.inf and all(float(box_iou(boxes[i : i + 1], boxes[j : j + 1])) <= thresh for j in kept):
            kept.append(i)
    return kept


def test_suppress_is_greedy_nms_in_every_list():
    generator = torch.Generator().manual_seed(0)
    corners = 3000 * torch.rand(3, 25, 2, generator=generator).round(decimals=1)
    boxes = torch.cat([corners, corners + 900 * torch.rand(3, 25, 2, generator=generator)], dim=2)
    scores = torch.randn(3, 25, generator=generator)
    scores[0, :5], scores[1] = -torch.inf, -torch.inf
    for function in (suppress, suppress_in_one):
        kept = function(boxes, scores, 0.2)
        for i in range(3):
            assert kept[i].nonzero().flatten().tolist() == sorted(greedy(boxes[i], scores[i].tolist(), 0.2))
    torch.library.opcheck(suppress_in_one, (boxes, scores, 0.2))


def test_a_file_that_computes_something_else_is_not_kept(main, weights, tmp_path, capsys, monkeypatch):
    """Planted: a detector that is a pixel off, and one that forgets every fiftieth detection."""
    _, checkpoint = weights(ONE_STAGE)
    monkeypatch.setattr(module, "CHECKED_SIZES", ((75, 90),))
    correct = ExportableDetector.forward

    def shifted(self, images, image_sizes):
        counts, boxes, *others = correct(self, images, image_sizes)
        return counts, boxes + 0.1, *others

    def forgetful(self, images, image_sizes):
        counts, *others = correct(self, images, image_sizes)
        return counts - 1, *others

    for wrong in (shifted, forgetful):
        monkeypatch.setattr(ExportableDetector, "forward", wrong)
        with pytest.raises(SystemExit, match="torchscript: the exported detector is not the same.*no partner"):
            main(["--weights", str(checkpoint), "--format", "torchscript", "--output", str(tmp_path / "x.pt")])
        assert list(tmp_path.iterdir()) == []


def test_partners_are_found_in_any_order():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10.001], [50, 50, 70, 90]])
    ours = Detections(boxes, torch.tensor([0.9, 0.9, 0.2]), torch.zeros(3), torch.tensor([16.0, 16, 32]))
    swapped = ours.select(torch.tensor([2, 1, 0]))
    one = module.match(ours, swapped, side=100)
    assert (one.num_detections, one.num_alone) == (3, 0) and one.pixels < 2e-3
    assert module.match(ours, ours.select(slice(0, 2)), side=100).num_alone == 1
    moved = ours._replace(boxes=boxes + torch.tensor([[0.0], [0.0], [0.02]]))
    assert module.match(ours, moved, side=100).num_alone == 2
    assert module.match(ours, moved, side=1000).share == pytest.approx(2e-5, rel=1e-2)
    other = ours._replace(anchor_scales=torch.tensor([16.0, 16, 16]))
    assert module.match(ours, other, side=100).num_alone == 2
    nothing = ours.select(slice(0, 0))
    assert module.match(nothing, nothing, side=100) == module.Agreement(1, 0, 0, 0.0, 0.0, 0.0)
    assert module.match(ours, nothing, side=100).num_alone == 3


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--output", "x.tflite"), r"expected a name that ends with \.onnx for --format onnx, got \.tflite"),
        (("--output", "detector"), r"expected a name that ends with \.onnx for --format onnx, got none of these"),
        (("--weights", "nowhere.pth"), r"'nowhere\.pth': no such file"),
        (("--weights", "text.pth"), r"text\.pth: not a checkpoint that torch\.load"),
        (("--output", "text.pth/x.onnx"), r"text\.pth: (File exists|Not a directory)"),
        (("--opts", "MODEL.RESNETS.DEPTH", "34"), "expected the weights of this model, got others"),
    ],
)
def test_what_cannot_be_exported(main, weights, tmp_path, monkeypatch, flags, message):
    _, checkpoint = weights(ONE_STAGE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("no checkpoint")
    before = {"--weights": str(checkpoint), "--output": "x.onnx"}
    given = [part for name, value in before.items() if name not in flags for part in (name, value)]
    with pytest.raises(SystemExit, match=message):
        main(["--format", "onnx", *given, *flags])
    assert [path.name for path in tmp_path.iterdir()] == ["text.pth"]


def test_what_onnx_needs_is_named(weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    model, _ = weights(ONE_STAGE)
    with pytest.raises(UserError, match=r"onnx: .*onnxscript.*pip install 'group-sampling\[export\]'"):
        module.export(model, "onnx", {})


def test_upstream_reasons_are_passed_on(weights, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no operator foo\nFurther information: ...")

    monkeypatch.setattr(torch.jit, "trace", refuse)
    model, _ = weights(ONE_STAGE)
    with pytest.raises(UserError, match=r"torchscript: torch [\d.+a-z]+ cannot export this detector: no operator foo$"):
        module.export(model, "torchscript", {})


def test_formats_are_listed(main, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--weights", "x.pth", "--output", "x.gif", "--format", "gif"])
    assert "--format: invalid choice: 'gif' (choose from" in capsys.readouterr().err


def test_a_file_that_does_not_run_is_refused(weights, monkeypatch):
    model, _ = weights(ONE_STAGE)
    with pytest.raises(UserError, match="torchscript: the exported detector does not run: ."):
        module.compare(model, b"no archive", "torchscript")

    def fail(images, image_sizes):
        raise RuntimeError("sizes do not fit\nat line 7")

    monkeypatch.setitem(module.FORMATS, "torchscript", module.FORMATS["torchscript"]._replace(load=lambda _: fail))
    with pytest.raises(UserError, match="torchscript: the exported detector does not run: sizes do not fit$"):
        module.compare(model, b"", "torchscript")


@pytest.mark.slow
def test_the_example_of_the_documentation(main, weights, tmp_path, fewer_comparisons):
    """docs/export.md's program, in a process that has no torch, finds what the detector finds."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    text = (CONFIGS.parent / "docs/export.md").read_text()
    (program,) = (block.split("```")[0] for block in text.split("```python\n")[1:] if "onnxruntime" in block)
    model, checkpoint = weights(ONE_STAGE)
    main(["--weights", str(checkpoint), "--format", "onnx", "--output", str(tmp_path / "detector.onnx")])
    (image,) = make_images([(123, 88)])
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    program = "import sys; sys.modules['torch'] = None\n" + program.replace("photo.jpg", "photo.png")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = [[float(value) for value in line.split()] for line in done.stdout.splitlines()]
    with torch.no_grad():
        (expected,) = model([image])
    assert len(printed) == len(expected["boxes"]) > 0
    np.testing.assert_allclose([row[1:] for row in printed], expected["boxes"].numpy(), atol=0.06)  # one decimal
    np.testing.assert_allclose([row[0] for row in printed], expected["scores"].numpy(), atol=6e-4)  # three
