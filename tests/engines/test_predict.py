"""FaceDetector and predict.py, on both engines, with a detector that the test makes."""

import csv
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from tv_cases import write_tiny_config

from group_sampling import FaceDetector
from group_sampling.config import ConfigError, dump_config
from group_sampling.data.coco import read_annotations
from group_sampling.engines.tv.config import get_cfg, load_config
from group_sampling.engines.tv.model import build_model
from group_sampling.evaluation.wider_face.files import read_predictions

NEEDS_DETECTRON2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="Detectron2 is not installed"
)
BOTH = pytest.mark.parametrize("engine", ["torchvision", pytest.param("detectron2", marks=NEEDS_DETECTRON2)])
THRESHOLD = 0.5


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file that describes itself; its random detector finds something anywhere."""
    folder = tmp_path_factory.mktemp("weights")
    cfg = load_config(write_tiny_config(folder), ["TEST.DETECTIONS_PER_IMAGE", "20"])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for parameter in model.rpn.head.parameters():  # a fresh head scores all boxes alike
        torch.nn.init.normal_(parameter, std=0.05)
    content = {"model": model.state_dict(), "engine": "torchvision", "class_names": ["face"]}
    torch.save(content, folder / "old.pth")
    torch.save({**content, "config": dump_config(cfg, get_cfg())}, folder / "model.pth")
    return folder / "model.pth"


def make_image(seed: int, height: int = 96, width: int = 128) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for index, name in enumerate(("a.png", "event/b.png", "event/deep/c.jpg", "event/b.jpg")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_image(index)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def predict(repository, weights, tmp_path, capsys):
    """Runs the tool; returns exit code, what it printed and what it printed as errors."""
    main = runpy.run_path(str(repository / "projects/GroupSampling/tools/predict.py"))["main"]

    def run(*args, engine="torchvision", model=weights):
        command = ["--weights", model, "--output", tmp_path / "out", "--device", "cpu", "--engine", engine, *args]
        with pytest.raises(SystemExit) as exit:
            main([str(arg) for arg in command])
        printed = capsys.readouterr()
        return exit.value.code, printed.out, printed.err

    return run


def write_video(path, frames, **options):
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=Fraction(10))
        stream.height, stream.width = frames[0].shape[:2]
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def read_video(path) -> list[np.ndarray]:
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@BOTH
def test_detector_finds_what_the_model_finds(weights, engine):
    """The engines agree; the model itself, called without any of this, is the oracle."""
    detector = FaceDetector.from_checkpoint(weights, engine=engine, device="cpu", score_thresh=THRESHOLD)
    image = make_image(1)
    cfg = load_config(write_tiny_config(weights.parent), ["TEST.DETECTIONS_PER_IMAGE", "20"])
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(weights, weights_only=True)["model"])
    height, width = image.shape[:2]
    scale = min(cfg.INPUT.MIN_SIZE_TEST / height, cfg.INPUT.MAX_SIZE_TEST / width) if cfg.INPUT.MIN_SIZE_TEST else 1
    assert scale == 1  # the tiny test does not resize
    with torch.no_grad():
        expected = model([torch.tensor(image).permute(2, 0, 1).float()])[0]
    keep = expected["scores"] >= THRESHOLD
    faces = detector(image)
    assert 0 < len(faces) == keep.sum() and faces.image_size == (96, 128)
    np.testing.assert_allclose(faces.boxes, expected["boxes"][keep].numpy(), atol=1e-3)
    np.testing.assert_allclose(faces.scores, expected["scores"][keep].numpy(), atol=1e-5)
    assert faces.anchor_scales.tolist() == expected["anchor_scales"][keep].tolist()
    assert detector.engine == engine and {face.class_name for face in faces} == {"face"}


@BOTH
def test_batches_of_mixed_sizes_are_the_single_images(weights, engine):
    images = [make_image(0), make_image(1, 64, 64), make_image(2), torch.tensor(make_image(3)).permute(2, 0, 1)]
    single, batched = (
        FaceDetector.from_checkpoint(weights, engine=engine, device="cpu", batch_size=size) for size in (1, 3)
    )
    found = batched(images)
    assert isinstance(found, list) and len(found) == 4
    for image, faces in zip(images, found):
        alone = single(image)
        assert faces.image_size == alone.image_size
        np.testing.assert_allclose(faces.boxes, alone.boxes, atol=1e-3)
        np.testing.assert_allclose(faces.scores, alone.scores, atol=1e-5)
    assert len(batched(torch.zeros(2, 3, 64, 64))) == 2 and batched([]) == []


@BOTH
def test_scales_resize_and_threshold(weights, engine):
    detector = FaceDetector.from_checkpoint(weights, engine=engine, device="cpu", score_thresh=0)
    image = make_image(1)
    all_faces = detector(image)
    pyramid = detector.with_scales((1.0, 2.0))
    assert len(pyramid(image)) > 0 and detector.cfg.TEST.PYRAMID.SCALES == ()
    np.testing.assert_allclose(detector.with_scales((1.0,))(image).boxes, all_faces.boxes, atol=1e-3)
    resized = FaceDetector.from_checkpoint(
        weights, engine=engine, device="cpu", score_thresh=0, opts=("INPUT.MIN_SIZE_TEST", "192")
    )
    boxes = resized(image).boxes
    assert len(boxes) and boxes.max() <= 128 and boxes[:, 3].max() <= 96
    some = FaceDetector.from_checkpoint(weights, engine=engine, device="cpu", score_thresh=0.6)(image)
    assert some.scores.tolist() == [score for score in all_faces.scores.tolist() if score >= np.float32(0.6)]


def test_arguments_of_a_detector(weights, tmp_path):
    old = weights.with_name("old.pth")
    with pytest.raises(ConfigError, match=r"old\.pth: the file does not carry the config.*--config-file"):
        FaceDetector.from_checkpoint(old, engine="torchvision", device="cpu")
    config = write_tiny_config(tmp_path)
    assert FaceDetector.from_checkpoint(old, engine="torchvision", device="cpu", config_file=config)(make_image(0))
    with pytest.raises(ConfigError, match="expected a checkpoint of a training, got no such file"):
        FaceDetector.from_checkpoint(tmp_path / "nowhere.pth")
    for options, expected in (
        ({"score_thresh": 2}, "score_thresh: expected a score in"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"flip": True}, "flip: expected scales as well"),
        ({"scales": (-1.0,)}, "TEST.PYRAMID: scales: expected distinct positive factors"),
        ({"opts": ("MODEL.RESNETS.DEPTH", "34")}, "expected the weights of this model, got others"),
    ):
        with pytest.raises(ValueError, match=expected):
            FaceDetector.from_checkpoint(weights, engine="torchvision", device="cpu", **options)


def test_the_model_itself_takes_uint8_and_refuses_the_wrong_range(weights):
    model = build_model(load_config(write_tiny_config(weights.parent))).eval()
    image = torch.tensor(make_image(0)).permute(2, 0, 1)
    with torch.no_grad():
        expected, found = model([image.float()])[0], model([image])[0]
        assert len(expected["boxes"]) and torch.equal(found["boxes"], expected["boxes"])
        with pytest.raises(ValueError, match=r"expected values in \[0, 255\], got fractions in \[0, 1\]"):
            model([image / 255])
        with pytest.raises(TypeError, match="expected uint8 or float .*, got torch.int64"):
            model([image.long()])
        model([torch.zeros(3, 64, 64)])  # black is black in either range


@pytest.mark.slow
def test_the_package_loads_torch_only_when_it_is_needed():
    script = (
        "import sys, group_sampling; assert 'torch' not in sys.modules; "
        "from group_sampling import FaceDetector; assert 'torch' in sys.modules; "
        "assert 'detectron2' not in sys.modules; assert not hasattr(group_sampling, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize(
    "engine", ["torchvision", pytest.param("detectron2", marks=[NEEDS_DETECTRON2, pytest.mark.slow])]
)
def test_command_line_writes_every_format(repository, weights, photos, tmp_path, engine):
    """As typed, in a process of its own."""
    output = tmp_path / "out"
    tool = repository / "projects/GroupSampling/tools/predict.py"
    command = [sys.executable, tool, "--weights", weights, "--input", photos, "--output", output, "--engine", engine]
    command += ["--device", "cpu", "--crop-faces", "--format", "images", "json", "csv", "coco", "wider"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many threads as here: sums of more round differently
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"engine: {engine}, device: cpu; 4 inputs" in done.stdout and "images/s" in done.stdout

    names = {
        "a": "a.png",
        "event/b_png": "event/b.png",
        "event/b_jpg": "event/b.jpg",
        "event/deep/c": "event/deep/c.jpg",
    }
    detector = FaceDetector.from_checkpoint(weights, engine=engine, device="cpu")
    expected = {name: detector(photos / file) for name, file in names.items()}
    assert sum(map(len, expected.values())) > 0
    for name, file in names.items():
        faces = expected[name]
        content = json.loads((output / "json" / f"{name}.json").read_text())
        assert content.pop("image") == str(photos / file) and content == faces.to_dict()
        with Image.open(output / "images" / f"{name}{file[-4:]}") as picture:
            assert picture.width == 128 and picture.height > 96
        assert len(list((output / "crops" / name).glob("*.jpg"))) == len(faces)
    rows = list(csv.DictReader((output / "faces.csv").read_text().splitlines()))
    assert len(rows) == sum(map(len, expected.values())) and {row["class"] for row in rows} == {"face"}
    first = next(row for row in rows if row["image"] == str(photos / "a.png"))
    assert np.float32(first["score"]) == expected["a"].scores[0]

    records, categories = read_annotations(str(output / "coco.json"), str(photos))
    assert categories == {1: "face"} and [len(record.boxes) for record in records] == [
        len(expected[name]) for name in ("a", "event/b_jpg", "event/b_png", "event/deep/c")
    ]
    assert [record.file_name for record in records][:2] == [str(photos / "a.png"), str(photos / "event/b.jpg")]
    wider = dict(read_predictions(output / "wider"))
    assert set(wider) == {"a", "event/b_png", "event/b_jpg", "event_deep/c"}
    np.testing.assert_allclose(wider["a"].boxes, expected["a"].boxes, atol=1e-4)


def test_a_run_goes_on_where_it_stopped(predict, photos, tmp_path):
    output = tmp_path / "out"
    code, _, _ = predict("--input", photos, "--format", "images", "csv")
    assert code == 0
    table = (output / "faces.csv").read_bytes()
    files = {path: path.stat().st_mtime_ns for path in (output / "images").rglob("*.*")}
    assert len(files) == 4
    state = (output / "predict.jsonl").read_bytes().splitlines(keepends=True)
    (output / "predict.jsonl").write_bytes(b"".join(state[:2]) + state[2][:50])  # killed while it wrote the third

    _, printed, _ = predict("--input", photos, "--format", "images", "csv")
    assert "4 inputs, 2 of them finished before" in printed and (output / "faces.csv").read_bytes() == table
    assert sum(path.stat().st_mtime_ns != time for path, time in files.items()) == 2

    os.utime(photos / "a.png", (1, 1))  # another picture under the same name
    assert "3 of them finished before" in predict("--input", photos, "--format", "images", "csv")[1]
    assert "finished before" not in predict("--input", photos, "--format", "images", "csv", "--threshold", "0.7")[1]
    assert "finished before" not in predict("--input", photos, "--format", "images", "csv", "--fresh")[1]
    predict("--input", photos, "--output", photos / "found", "--format", "images")
    assert "4 of them finished" in predict("--input", photos, "--output", photos / "found", "--format", "images")[1]


def test_unreadable_files_are_listed_and_told_by_the_exit_code(predict, photos, tmp_path):
    (photos / "event/broken.jpg").write_bytes((photos / "event/b.jpg").read_bytes()[:500])
    (photos / "text.png").write_text("no image")
    code, printed, errors = predict("--input", photos, "--batch-size", "2")
    assert code == 1 and " in 4 inputs" in printed
    assert "2 of 6 inputs could not be read:" in errors
    for name in ("event/broken.jpg", "text.png"):
        assert f"  {photos / name}: " in errors
    assert len(list((tmp_path / "out/json").rglob("*.json"))) == 4
    Image.fromarray(make_image(9)).save(photos / "text.png")
    assert "6 inputs, 4 of them finished" in predict("--input", photos, "--batch-size", "2")[1]


def test_inputs_that_name_nothing(predict, tmp_path):
    (tmp_path / "empty").mkdir()
    for value, expected in (
        (tmp_path / "nowhere.jpg", "expected a file, folder, pattern or index of a camera, got nothing"),
        (tmp_path / "*.jpg", "the pattern matches no file"),
        (tmp_path / "empty", "expected a folder with images or videos"),
    ):
        code, _, errors = predict("--input", value)
        assert code == 2 and f"predict.py: error: --input {value}: {expected}" in errors
    assert not (tmp_path / "out").exists()


def test_patterns_files_and_repetitions(predict, photos, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(make_image(5)).save(other / "a.png")
    _, printed, _ = predict("--input", photos / "**/*.png", other / "a.png", photos / "a.png", "--format", "json")
    assert "3 inputs" in printed
    names = sorted(str(path.relative_to(tmp_path / "out/json")) for path in (tmp_path / "out/json").rglob("*.json"))
    assert names == ["a_png.json", "a_png_2.json", "event/b.json"]


def test_weights_that_do_not_fit(predict, photos, tmp_path, weights):
    torch.save({"encoder.weight": torch.zeros(2)}, tmp_path / "foreign.pth")
    for model, options, expected in (
        (tmp_path / "nowhere.pth", (), "expected a checkpoint of a training, got no such file"),
        (tmp_path / "foreign.pth", (), "does not carry the config of its training"),
        (
            tmp_path / "foreign.pth",
            ("--config-file", weights.with_name("tiny.yaml")),
            "none of its 1 parameters (the first is 'encoder.weight', nearest to ",
        ),
        (weights.with_name("tiny.yaml"), (), "not a checkpoint that torch.load"),
    ):
        code, _, errors = predict("--input", photos, *options, model=model)
        assert code == 2 and expected in errors


@BOTH
def test_video(predict, weights, tmp_path, engine):
    """Every frame is looked at; the output has as many, of odd sizes too, and its pictures are those of the frames."""
    blurred = Image.fromarray(make_image(0, 8, 8)).resize((256, 260), Image.Resampling.BICUBIC)
    frames = [np.roll(np.asarray(blurred), 9 * index, axis=1) for index in range(6)]
    write_video(tmp_path / "walk.mp4", frames)
    decoded = read_video(tmp_path / "walk.mp4")
    code, printed, _ = predict(
        "--input", tmp_path / "walk.mp4", "--format", "images", "json", "coco", "--batch-size", "4", engine=engine
    )
    assert code == 0 and " in 1 inputs" in printed
    content = json.loads((tmp_path / "out/json/walk.json").read_text())
    assert content["frame_rate"] == 10 and [frame["frame"] for frame in content["frames"]] == [1, 2, 3, 4, 5, 6]
    detector = FaceDetector.from_checkpoint(weights, engine=engine, device="cpu")
    for frame, image in zip(content["frames"], decoded):
        expected = detector(image).to_dict()
        assert len(frame["faces"]) == len(expected["faces"])
    assert sum(len(frame["faces"]) for frame in content["frames"]) > 0
    written = read_video(tmp_path / "out/images/walk.mp4")
    assert len(written) == 6 and written[0].shape[1] == 256
    drawn = [np.asarray(detector(image).draw(image)) for image in decoded]
    assert written[0].shape[0] == drawn[0].shape[0] + drawn[0].shape[0] % 2
    for index, frame in enumerate(written):  # nearer to its own picture than to any other, or to one without boxes
        distances = [np.abs(frame[:260] - picture[:260].astype(float)).mean() for picture in (*drawn, *decoded)]
        assert np.argmin(distances) == index
    assert len(json.loads((tmp_path / "out/coco.json").read_text())["images"]) == 6
    assert (
        "1 of them finished"
        in predict(
            "--input", tmp_path / "walk.mp4", "--format", "images", "json", "coco", "--batch-size", "4", engine=engine
        )[1]
    )


def test_damaged_videos(predict, photos, tmp_path):
    """Cut in its frames, cut before its index, and no video at all; the images beside them are done all the same."""
    frames = [make_image(index) for index in range(20)]
    write_video(tmp_path / "whole.mp4", frames, movflags="faststart")
    content = (tmp_path / "whole.mp4").read_bytes()
    (photos / "cut.mp4").write_bytes(content[: len(content) * 6 // 10])
    (photos / "start.mp4").write_bytes(content[:100])
    (photos / "text.avi").write_text("no video")
    code, printed, errors = predict("--input", photos)
    assert code == 1 and " in 4 inputs" in printed and "3 of 7 inputs could not be read" in errors
    for name in ("cut", "start", "text"):
        assert f"{photos / name}." in errors
    assert "damaged after" in errors or "cut short: expected 20 frames, got" in errors
    kept = json.loads((tmp_path / "out/json/cut.json").read_text())["frames"]
    assert 5 < len(kept) < 20 and len(read_video(tmp_path / "out/images/cut.mp4")) == len(kept)
    assert not (tmp_path / "out/images/start.mp4").exists()


@pytest.mark.skipif(os.path.exists("/dev/video77"), reason="there is such a camera")
def test_missing_camera_and_missing_reader(predict, photos, monkeypatch):
    pytest.importorskip("av")
    code, _, errors = predict("--input", "77")
    assert code == 1 and "camera 77: " in errors
    monkeypatch.setitem(sys.modules, "av", None)
    (photos / "walk.mp4").write_bytes(b"")
    code, printed, errors = predict("--input", photos)
    assert code == 1 and " in 4 inputs" in printed and "pip install 'group-sampling[predict]'" in errors
