"""tools/benchmark_model.py: what it counts; times are only there, not compared."""

import importlib.metadata
import importlib.util
import json

import pytest
from tv_cases import CONFIGS, SMALL_OPTS

from group_sampling.engines.tv.config import load_config
from group_sampling.engines.tv.model import build_model

TOOL = CONFIGS.parent / "tools/benchmark_model.py"
NEEDS_DETECTRON2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="Detectron2 is not installed"
)
ENGINES = ["torchvision", pytest.param("detectron2", marks=NEEDS_DETECTRON2)]
STAGES = {"backbone", "FPN", "head", "decode + NMS", "RoI stage", "rest"}
HEIGHT, WIDTH = 64, 96


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("benchmark_model", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(config, *flags, opts=()):
    config = str(CONFIGS / f"{config}.yaml")
    fast = ["--seconds", "0.01", "--device", "cpu"]
    return ["--config-file", config, *fast, *map(str, flags), "--opts", *SMALL_OPTS, *opts]


def measure(tool, path, config, *flags, opts=()):
    tool.main(arguments(config, "--sizes", f"{HEIGHT}x{WIDTH}", "--json", path, *flags, opts=opts))
    return json.loads(path.read_text())


def check_report(report, num_sizes=1):
    assert {"hardware", "versions", "engine", "device", "threads", "weights", "input"} <= report.keys()
    assert {"cpu", "cores"} <= report["hardware"].keys()
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    assert len(report["records"]) == num_sizes
    for record in report["records"]:
        assert record["latency_ms"] > 0 and record["runs"] >= 1
        assert record["images_per_second"] == pytest.approx(1e3 * record["batch_size"] / record["latency_ms"])
        assert record["stages_ms"].keys() == record["flops"]["stages"].keys() == STAGES
        assert sum(record["flops"]["stages"].values()) == pytest.approx(record["flops"]["total"])


@pytest.mark.parametrize("engine", ENGINES)
def test_single_stage(tool, tmp_path, capsys, engine):
    report = measure(tool, tmp_path / "speed.json", "fpn_finest_sampling", "--engine", engine)
    check_report(report)
    (record,) = report["records"]
    assert (record["height"], record["width"]) == (HEIGHT, WIDTH)
    # A 3 x 3 convolution of 32 channels, and per anchor a difference of two logits and four box deltas, on every cell.
    cells, anchors = (HEIGHT // 4) * (WIDTH // 4), 4
    assert record["flops"]["stages"]["head"] == cells * (9 * 32 * 32 + anchors * (1 + 4) * 32)
    # Lateral 1 x 1 convolutions at four strides and P2's 3 x 3; the levels are up-sampled, which fvcore counts as well.
    laterals = sum((HEIGHT // s) * (WIDTH // s) * c * 32 for s, c in ((4, 32), (8, 64), (16, 128), (32, 256)))
    assert record["flops"]["stages"]["FPN"] == pytest.approx(laterals + cells * 9 * 32 * 32, rel=0.05)
    assert record["flops"]["stages"]["RoI stage"] == 0 == report["parameters"]["stages"]["RoI stage"]

    model = build_model(load_config(str(CONFIGS / "fpn_finest_sampling.yaml"), SMALL_OPTS))
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    stages = report["parameters"]["stages"]
    assert report["parameters"]["total"] == count(model) == sum(stages.values())
    assert stages["backbone"] == count(model.backbone.body) and stages["head"] == count(model.rpn.head)
    assert stages["FPN"] == count(model.backbone.fpn)
    # The weights, and at least the finest feature of the FPN with its lateral, are there at one time.
    assert record["peak_memory_bytes"] > 4 * (count(model) + 2 * 32 * cells)
    assert record["peak_memory_bytes"] < 4 * count(model) + 100 * 4 * 64 * HEIGHT * WIDTH

    printed = capsys.readouterr().out
    assert f"| {HEIGHT} x {WIDTH} | 1 |" in printed and f"{engine} engine on cpu" in printed
    assert all(f"| {stage} |" in printed for stage in STAGES)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_stages_and_a_batch(tool, tmp_path, engine):
    flags = "--engine", engine, "--batch-size", 2
    report = measure(tool, tmp_path / "speed.json", "table5/grouped_fast_rcnn", *flags)
    check_report(report)
    assert report["records"][0]["batch_size"] == 2
    assert report["records"][0]["flops"]["stages"]["RoI stage"] > 0 < report["parameters"]["stages"]["RoI stage"]


def test_without_an_fpn(tool, tmp_path):
    report = measure(tool, tmp_path / "speed.json", "rpn_c4", "--engine", "torchvision")
    check_report(report)
    assert report["records"][0]["flops"]["stages"]["FPN"] == 0 == report["parameters"]["stages"]["FPN"]


def test_weights_and_a_picture(tool, tmp_path):
    from PIL import Image

    from group_sampling.checkpoint import Description
    from group_sampling.config import dump_config
    from group_sampling.engines.tv.config import get_cfg
    from group_sampling.engines.tv.train import GroupSamplingCheckpointer

    cfg = load_config(str(CONFIGS / "fpn_finest_sampling.yaml"), SMALL_OPTS)
    checkpointer = GroupSamplingCheckpointer(build_model(cfg), str(tmp_path))
    checkpointer.description = Description(dump_config(cfg, get_cfg()), ("face",))
    checkpointer.save("model")
    Image.new("RGB", (50, 40)).save(tmp_path / "photo.png")
    argv = ["--weights", tmp_path / "model.pth", "--engine", "torchvision", "--sizes", "64x64", "64x96"]
    argv += [
        "--seconds",
        "0.01",
        "--image",
        tmp_path / "photo.png",
        "--threads",
        "1",
        "--json",
        tmp_path / "speed.json",
    ]
    tool.main(list(map(str, argv)))
    report = json.loads((tmp_path / "speed.json").read_text())
    check_report(report, num_sizes=2)
    assert report["weights"].endswith("model.pth") and report["input"].endswith("photo.png") and report["threads"] == 1


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "expected --config-file FILE, or a checkpoint that carries its config as --weights"),
        (["--sizes", "640"], "expected HEIGHTxWIDTH in pixels, such as 480x640, got '640'"),
        (["--sizes", "0x640"], "expected HEIGHTxWIDTH"),
        (["--batch-size", "0"], "--batch-size: expected a positive number, got 0"),
        (["--weights", "nowhere.pth"], "'nowhere.pth': no such file"),
        (["--config-file", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--config-file", str(CONFIGS / "fpn.yaml"), "--device", "cpu", "--image", "nowhere.png"], "nowhere.png"),
    ],
)
def test_what_cannot_be_measured(tool, capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        tool.main([*argv, *([] if "--image" in argv else ["--engine", "torchvision"])])
    assert stopped.value.code not in (0, None)
    assert message in f"{stopped.value.code}{capsys.readouterr().err}"
