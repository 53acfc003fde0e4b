"""The report from files of made-up runs, in a browser as well, and the demo from end to end."""

import html
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import browser
import numpy as np
import pytest
import yaml
from PIL import Image

from group_sampling.data.catalog import Catalog
from group_sampling.data.records import ImageRecord
from group_sampling.detections import Detections
from group_sampling.engines.tv.config import load_config
from group_sampling.errors import UserError
from group_sampling.evaluation import WiderFaceAP, write_predictions
from group_sampling.experiments import mistakes
from group_sampling.experiments.report import BASE_CONFIG, find_row, write_report
from group_sampling.experiments.runs import Run
from group_sampling.files import write_json

DATASET = "synthetic_faces_val"
CONFIGS = Path(__file__).resolve().parents[2] / "projects/GroupSampling/configs"
SMALL = [*("MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "('synthetic_faces_train',)", "DATASETS.TEST", f"('{DATASET}',)")]
SMALL += ["DATASETS.SYNTHETIC.NUM_VAL", "4", "DATASETS.SYNTHETIC.HEIGHT", "96", "DATASETS.SYNTHETIC.WIDTH", "128"]
OF_SCALE = {"health/logit_std@16": 1.0, "health/score_pos@16": 0.75, "health/score_neg@16": 0.25}
HEALTH = {"health/units": 0.9, "grad_norm": 0.3, "health/grad_norm_max": 30.0, **OF_SCALE}


def make_run(folder, name, shift, health, config="fpn_finest"):
    """A run whose detections are the faces moved by ``shift`` pixels."""
    cfg = load_config(str(CONFIGS / f"{config}.yaml"), [*SMALL, "OUTPUT_DIR", str(folder / name)])
    records = Catalog(cfg.DATASETS)[DATASET].records
    run = Run(name, folder / name)
    metric = WiderFaceAP.from_records(records)
    inference = run.folder / "inference" / DATASET
    for record in records:
        scores = np.linspace(0.9, 0.6, len(record.boxes))
        write_predictions(inference / "predictions", record.image_id, record.boxes + shift, scores)
        found = Detections(record.boxes + shift, scores)
        metric.update(record.image_id, found._replace(sub_detectors={16.0: found}))
    result = metric.compute()
    write_json(inference / "results.json", result.to_dict())
    result.plot(inference / "pr_curves.png")
    slowest = {record.image_id: 0.25 for record in records}
    write_json(inference / "seconds.json", {"images": 4, "median": 0.125, "slowest": slowest})
    (run.folder / "config.yaml").write_text(cfg.dump())
    rows = [
        {
            "iteration": i,
            "loss_rpn_cls": 1 / (i + 1),
            "loss_rpn_loc": 0.5,
            "total_loss": 0.5 + 1 / (i + 1),
            "lr": 0.01,
            "rpn/num_pos@16": i,
            "rpn/num_neg@16": 10,
            "rpn/num_pos@128": 5,
            "rpn/num_neg@128": 3,
            **health,
        }
        for i in range(8)
    ]
    rows += [{"iteration": i, "validation/total_loss": 1.5, "wider_face/AP_all": 10.0 * i} for i in (3, 7)]
    (run.folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)) + '\n{"iteration": 8, "loss')
    return run


def pictures_of(path):
    """Relative to the page; all are there, and every picture has something on it."""
    found = [unquote(html.unescape(name)) for name in re.findall(r'<img src="([^"]*)"', path.read_text())]
    for name in found:
        pixels = np.asarray(Image.open(path.parent / name).convert("L"))
        assert pixels.std() > 5, f"{name} is blank"
    return found


NAMES = "a_detector_with_a_long_name_<b>", "another_detector_with_a_name_that_is_even_longer"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The first one finds all and nothing else, the other one nothing."""
    folder = tmp_path_factory.mktemp("runs")
    first = make_run(folder, NAMES[0], 0, HEALTH)
    return [first, make_run(folder, NAMES[1], 40, {}, "fpn_finest_sampling")]


@pytest.fixture(scope="module")
def side_by_side(runs):
    return write_report(runs, runs[0].folder.parent, title="A & B", configs=CONFIGS, notes=["note <1>"])


@pytest.fixture(scope="module")
def single(runs):
    environment = [("torch", "9.9"), ("GPU", "none")]
    write_json(runs[1].folder / "report/misses_old_1.jpg", {})  # of an earlier report
    return write_report(runs[1:], runs[1].folder, title="mine", configs=CONFIGS, environment=environment)


def test_runs_side_by_side(runs, side_by_side):
    assert runs[0].health_scales() == ["16"] and runs[0].score_gaps("16") == (list(range(8)), [0.5] * 8)
    assert runs[1].health_scales() == [] and runs[1].score_gaps("16") == ([], [])
    assert runs[0].samples_per_scale() == {"16": (3.5, 10.0), "128": (5.0, 3.0)}
    page = side_by_side.read_text()
    assert "A &amp; B" in page and "note &lt;1&gt;" in page and "<b>\n" not in page and "name_<b>" not in page
    # All of ours, and of the paper's rows; @128 is in no evaluation of ours.
    heads = [NAMES[0], "paper, Table 1: FPN-finest", NAMES[1], "paper, Table 1: FPN-finest-sampling"]
    assert "".join(f"<th>{html.escape(head)}</th>" for head in ["", *heads]) in page and "8 GPUs" in page
    assert re.search(r"<td>All</td><td><b>100\.0</b></td><td>80\.2</td><td>[\d.]+</td><td>82\.8</td>", page)
    assert "<td>@128</td>" not in page
    names = [Path(name).stem for name in pictures_of(side_by_side)]
    assert names[:4] == ["samples_per_scale", "training_curves", "health", f"pr_curves_{DATASET}"]
    assert names[4:7] == [f"detections_{kind}_{DATASET}" for kind in ("large", "tiny", "many")]
    kinds = [f"{kind}_2_{DATASET}_{n}" for kind in ("misses", "false_positives") for n in range(1, 5)]
    assert names[7:] == kinds and page.count("The largest faces that are missed: none.") == 1


def test_a_single_run(runs, single):
    """It names what it was run in, what differs from the base, and how long images took."""
    assert not (runs[1].folder / "report/misses_old_1.jpg").exists()
    assert single == runs[1].folder / "report.html"
    page = single.read_text()
    text = html.unescape(re.sub(r"<[^>]*>", " ", page))
    assert f"{NAMES[1]}: trained on synthetic_faces_train, 8 of 161000 iterations of 8 images, torchvision e" in text
    assert re.search(r"DATASETS\.SYNTHETIC\.NUM_VAL\s+200\s+4", text) and "OUTPUT_DIR" not in text
    assert re.search(r'DATASETS\.TEST\s+\["wider_face_val"\]\s+\["synthetic_faces_val"\]', text)
    assert "median 0.125" in text and text.count("0.250") == 4 and re.search(r"torch\s+9\.9", text)
    assert f"inference/{DATASET}/pr_curves.png" in pictures_of(single)
    assert "<h2>Health of the head" not in page  # an older run, without


def test_what_is_not_there_is_left_out_or_said(tmp_path, monkeypatch):
    run = make_run(tmp_path, "mine", 40, {})
    (run.folder / "metrics.json").unlink()  # an evaluation alone

    def read_image(record):
        raise mistakes.UnreadableImageError(record.file_name, "is gone")

    for module in ("mistakes", "report"):
        monkeypatch.setattr(f"group_sampling.experiments.{module}.read_image", read_image)
    page = write_report([run], run.folder, title="mine", configs=tmp_path).read_text()
    assert "mine: evaluated, torchvision engine" in page and "Training" not in page
    assert page.count("is gone") == 3 + 2 and "4 more cannot be shown, the first: cannot read image" in page
    assert f"{BASE_CONFIG} is not there" in page and "does not say its own" in page and "paper, " not in page

    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    config["DATASETS"]["TEST"] = ["elsewhere"]
    (run.folder / "config.yaml").write_text(yaml.safe_dump(config))
    (run.folder / "inference" / DATASET).rename(run.folder / "inference/elsewhere")
    page = write_report([Run("mine", run.folder)], run.folder, title="mine", configs=tmp_path).read_text()
    assert "Detections on elsewhere" in page and "data set: expected one of" in page
    (run.folder / "inference/elsewhere/results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json: expected JSON"):
        write_report([Run("mine", run.folder)], run.folder, title="mine", configs=tmp_path)


def test_figures_of_all_protocols(tmp_path):
    """In percent; None stays."""
    folder = tmp_path / "inference/mine"
    coco = {"protocol": "COCO", "metrics": {"AP": 0.5, "APs": None}, "by_score": {"best_f1": {"score": 0.3}}}
    fddb = {"discrete": {"500": 0.9}, "continuous": {"500": 0.7}, "by_score": {"best_f1": {"score": 0.4}}}
    write_json(folder / "coco_results.json", coco)
    write_json(folder / "results.json", {"protocol": "WIDER FACE", "ap": {"all": 0.25, "@16": None}})
    assert Run("a", tmp_path).figures("mine") == {"All": 25.0, "@16": None, "COCO AP": 50.0, "COCO APs": None}
    assert Run("a", tmp_path).best_score("mine") == 0.3
    write_json(folder / "results.json", {"protocol": "FDDB", "results": {"rectangles": fddb}})
    (folder / "coco_results.json").unlink()
    names = [f"{kind} at 500 false positives, rectangles" for kind in ("discrete", "continuous")]
    assert Run("a", tmp_path).figures("mine") == dict(zip(names, (90.0, 70.0)))
    assert Run("a", tmp_path).best_score("mine") == 0.4
    write_json(folder / "results.json", {"protocol": "FDDB", "results": {"rectangles": {}}})
    with pytest.raises(UserError, match=r"results\.json: expected the results of an evaluation"):
        Run("a", tmp_path).figures("mine")


@pytest.mark.parametrize(
    "config, opts, expected",
    [
        ("table5/grouped_fast_rcnn", ["SOLVER.MAX_ITER", "5", "SOLVER.STEPS", "()"], ("Table 5", 85.7)),
        ("table3/iou_l2", [], ("Table 3", 83.7)),
        ("fpn_finest", ["MODEL.RPN.NMS_THRESH", "0.5"], None),
        ("quick/demo_fpn_finest", [], None),
    ],
)
def test_rows_of_the_paper(config, opts, expected):
    cfg = load_config(str(CONFIGS / f"{config}.yaml"), ["MODEL.DEVICE", "cpu", *opts])
    found = find_row(yaml.safe_load(cfg.dump()), CONFIGS)
    assert (found and (found[0].split(":")[0], found[1]["All"])) == expected


def test_mistakes_by_hand():
    """Image a: a face found, a large one missed, one found below the score, one to ignore; b: nothing annotated."""
    faces = [[0, 0, 10, 10], [20, 0, 60, 40], [70, 0, 80, 10], [0, 50, 40, 90]]
    nothing = np.zeros(0, dtype=bool)
    a = ImageRecord("a", "a", 100, 100, np.float32(faces), np.zeros(4, int), np.array([False, False, False, True]))
    b = ImageRecord("b", "b", 100, 100, np.zeros((0, 4), np.float32), np.zeros(0, int), nothing)
    found_a = [[0, 0, 10, 9], [70, 0, 80, 9], [5, 60, 15, 70], [90, 90, 99, 99]]
    found = {
        "a": Detections(np.array(found_a, dtype=float), np.array([0.9, 0.2, 0.8, 0.6])),
        "b": Detections(np.array([[1.0, 1, 9, 9], [1, 1, 5, 5]]), np.array([0.7, 0.95])),
    }

    def find(predictions, **options):
        kinds = mistakes.find_mistakes([a, b], predictions, **{"min_score": 0.5, "count": 5, **options})
        return [[(m.record.image_id, m.box.tolist(), m.score) for m in kind] for kind in kinds]

    assert find(found) == [[("a", faces[1], 0.0)], [("b", [1, 1, 5, 5], 0.95), ("a", [90, 90, 99, 99], 0.6)]]
    assert find(found, count=1) == [[("a", faces[1], 0.0)], [("b", [1, 1, 5, 5], 0.95)]]
    assert find({}) == [[("a", faces[1], 0.0)], []]
    exact = {"a": Detections(np.array(faces, dtype=float), np.array([0.9, 0.9, 0.2, 0.9]))}
    assert find(exact) == [[("a", faces[2], 0.2)], []]
    other_class = {"a": exact["a"]._replace(classes=np.ones(4, int), scores=np.full(4, 0.9))}
    assert [len(kind) for kind in find(other_class)] == [1, 1]


@pytest.mark.parametrize("box", [(40, 40, 60, 60), (0, 0, 8, 8), (100, 70, 130, 96), (0, 0, 128, 96), (10, 10, 12, 12)])
def test_thumbnails_show_the_box(box):
    """A white box on gray, in its green frame, wherever it is."""
    image = np.full((96, 128, 3), 90, dtype=np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = 255
    nothing = np.zeros(1, dtype=bool)
    record = ImageRecord("a", "a", 96, 128, np.float32([box]), np.zeros(1, int), nothing)
    picture = mistakes._thumbnail(image, mistakes.Mistake(record, np.array(box, dtype=float), 0.0), np.zeros((0, 4)))
    pixels = np.asarray(picture)
    assert pixels.shape == (160, 160, 3) and (pixels == 255).all(axis=2).sum() >= 9
    assert (pixels == (0, 255, 0)).all(axis=2).sum() >= 50


@pytest.mark.skipif(not browser.find_chromium(), reason="Chromium is not installed")
def test_reports_in_a_browser(tmp_path, runs, side_by_side, single):
    """On a phone nothing is wider than the screen; nothing is loaded but files of the folder; nothing goes wrong."""
    folder = runs[0].folder.parent.as_uri()
    with browser.open_page() as page:
        for path in (side_by_side, single):
            page.requests.clear()
            page.open(path.as_uri(), width=400)
            assert page.evaluate("innerWidth") == 400
            assert page.evaluate("document.documentElement.scrollWidth") <= 400
            # No part of it has to be scrolled either.
            assert page.evaluate("[...document.querySelectorAll('*')].every(e => e.scrollWidth <= 400)")
            assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
            assert len(page.requests) == 1 + page.evaluate("document.images.length")
            assert all(address.startswith(folder) for address in page.requests)
        assert page.errors == []
        # What the checks above would see.
        bad = tmp_path / "bad.html"
        bad.write_text("<meta name=viewport content='width=device-width'><img src=no.png><p style='width:500px'>wide")
        page.open(bad.as_uri(), width=400)
        assert page.evaluate("document.documentElement.scrollWidth") > 400
        assert any("no.png" in error for error in page.errors) and page.requests[-1].endswith("no.png")


def test_the_report_of_a_folder(tmp_path, repository, capsys):
    main = runpy.run_path(str(repository / "projects/GroupSampling/tools/report.py"))["main"]
    written = []

    def write(runs, folder, *, title, configs):
        written.append(([run.name for run in runs], folder, title, configs == CONFIGS))
        return folder / "report.html"

    main.__globals__["write_report"] = write
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c/a"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
    first, second, third = map(str, folders)
    main([first])
    assert capsys.readouterr().out == f"report: {folders[0] / 'report.html'}\n"
    main([first, second, "--output", str(tmp_path)])
    main([first, third, "--output", str(tmp_path)])
    assert written == [
        (["a"], folders[0], "a", True),
        (["a", "b"], tmp_path, "a and b", True),
        ([first, third], tmp_path, f"{first} and {third}", True),
    ]
    for arguments, message in (
        ([str(tmp_path)], "expected the folder of a run, got none with a config.yaml"),
        ([first, second], "--output: expected a folder"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(arguments)


def test_a_report_that_fails_is_a_warning(tmp_path, repository, caplog, capsys):
    tool = runpy.run_path(str(repository / "train_net.py"))
    cfg = load_config(str(CONFIGS / BASE_CONFIG), [*SMALL, "OUTPUT_DIR", str(tmp_path)])
    tool["report"](cfg)
    assert "no report.html" in caplog.text and "config.yaml: No such file" in caplog.text
    assert "Traceback" not in caplog.text and not capsys.readouterr().out
    tool["report"].__globals__["write_report"] = lambda *args, **options: 1 / 0
    tool["report"](cfg)
    assert "ZeroDivisionError" in caplog.text and "Traceback" in caplog.text


def test_demo_does_not_report_a_run_of_other_settings(tmp_path, repository, capsys):
    """Trainings that leave their results; a scale has no faces."""
    tool = runpy.run_path(str(repository / "projects/GroupSampling/tools/demo.py"))
    started = []

    def train(jobs, working_directory):
        for job in jobs:
            started.append(job.folder.name)
            write_json(job.folder / "inference/synthetic_faces_val/results.json", {"ap": {"all": 0.5, "@16": None}})
            (job.folder / "config.yaml").write_text(
                "SEED: 0\nSOLVER: {MAX_ITER: 3, IMS_PER_BATCH: 1}\nDATASETS: {TRAIN: [], TEST: []}\n"
            )
        return []

    def report(runs, output, **options):
        return output / "report.html"

    tool["demo"].__globals__.update(run_jobs=train, write_report=report)

    def run(*args):
        tool["main"](["--engine", "torchvision", "--output", str(tmp_path), *args])
        return capsys.readouterr().out

    assert re.search(r"^FPN-finest  +All  50\.0  @16   n/a$", run("SOLVER.MAX_ITER", "3"), flags=re.MULTILINE)
    assert len(started) == 2
    assert run("SOLVER.MAX_ITER", "3").count("complete in") == 2 and len(started) == 2
    with pytest.raises(
        SystemExit, match=r"expected a run with the settings .*'4'.*, got one with .*'3'.*; --fresh rep"
    ):
        run("SOLVER.MAX_ITER", "4")
    run("--fresh", "SOLVER.MAX_ITER", "4")
    assert len(started) == 4
    (tmp_path / "seed0/demo_fpn_finest/inference/synthetic_faces_val/results.json").unlink()  # interrupted
    run("SOLVER.MAX_ITER", "4")
    assert started[4:] == ["demo_fpn_finest"]
    assert json.loads((tmp_path / "summary.json").read_text())["ap_percent"]["FPN-finest"]["@16"]["mean"] is None


@pytest.mark.slow
def test_demo_from_end_to_end(tmp_path, repository):
    command = [
        sys.executable,
        str(repository / "projects/GroupSampling/tools/demo.py"),
        "--output",
        str(tmp_path),
        "--seeds",
        "0",
        "1",
    ]
    command += [
        "--json",
        str(tmp_path / "seeds.json"),
        "SOLVER.MAX_ITER",
        "40",
        "SOLVER.STEPS",
        "()",
        "DATASETS.SYNTHETIC.NUM_VAL",
        "4",
    ]
    first = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == f"report: {tmp_path / 'report.html'}"
    summary = json.loads((tmp_path / "seeds.json").read_text())
    assert set(summary["ap_percent"]) == {"FPN-finest", "FPN-finest-sampling"}
    assert len(summary["ap_percent"]["FPN-finest"]["all"]["seeds"]) == 2
    second = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert second.returncode == 0 and second.stdout.count("complete in") == 4
