"""The report from files of made-up runs, and the demo from end to end."""

import json
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from group_sampling.data.catalog import Catalog
from group_sampling.detections import Detections
from group_sampling.evaluation import WiderFaceAP, write_predictions
from group_sampling.experiments.report import write_report
from group_sampling.experiments.runs import Run
from group_sampling.files import write_json

SYNTHETIC = {"SYNTHETIC": {"NUM_VAL": 4, "HEIGHT": 96, "WIDTH": 128}}


def make_run(folder, name, records, shift, health):
    """A run whose detections are the faces moved by ``shift`` pixels."""
    run = Run(name, folder / name)
    metric = WiderFaceAP.from_records(records)
    for record in records:
        scores = np.linspace(0.9, 0.6, len(record.boxes))
        write_predictions(run.folder / "inference/val/predictions", record.image_id, record.boxes + shift, scores)
        found = Detections(record.boxes + shift, scores)
        metric.update(record.image_id, found._replace(sub_detectors={16.0: found}))
    write_json(run.folder / "inference/val/results.json", metric.compute().to_dict())
    rows = [
        {
            "iteration": i,
            "loss_rpn_cls": 1 / (i + 1),
            "loss_rpn_loc": 0.5,
            "rpn/num_pos@16": i,
            "rpn/num_neg@16": 10,
            "rpn/num_pos@128": 5,
            "rpn/num_neg@128": 3,
            **health,
        }
        for i in range(8)
    ]
    (run.folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)) + '\n{"iteration": 8, "loss')
    return run


def test_report(tmp_path):
    records = Catalog(SYNTHETIC)["synthetic_faces_val"].records
    of_scale = {"health/logit_std@16": 1.0, "health/score_pos@16": 0.75, "health/score_neg@16": 0.25}
    health = {"health/units": 0.9, "grad_norm": 0.3, "health/grad_norm_max": 30.0, **of_scale}
    runs = [make_run(tmp_path, "exact", records, 0, health), make_run(tmp_path, "a <b> off", records, 40, {})]
    assert runs[0].health_scales() == ["16"] and runs[0].score_gaps("16") == (list(range(8)), [0.5] * 8)
    assert runs[1].health_scales() == [] and runs[1].score_gaps("16") == ([], [])
    assert runs[0].samples_per_scale() == {"16": (3.5, 10.0), "128": (5.0, 3.0)}
    page = write_report(runs, "val", records, tmp_path / "out", title="A & B", notes=["note <1>"]).read_text()
    assert "A &amp; B" in page and "note &lt;1&gt;" in page and "a &lt;b&gt; off" in page
    assert "<td><b>100.0</b></td>" in page
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == [
        *("detections_large.png", "detections_many.png", "detections_tiny.png"),
        *("health.png", "pr_curves.png", "samples_per_scale.png", "training_curves.png"),
    ]
    for name in pictures:
        assert f'src="{name}"' in page
        pixels = np.asarray(Image.open(tmp_path / "out" / name).convert("L"))
        assert pixels.shape[1] >= 600 and pixels.std() > 5, f"{name} is blank"


def test_demo_does_not_report_a_run_of_other_settings(tmp_path, repository, capsys):
    """Trainings that leave their results; a scale has no faces."""
    tool = runpy.run_path(str(repository / "projects/GroupSampling/tools/demo.py"))
    started = []

    def train(jobs, working_directory):
        for job in jobs:
            started.append(job.folder.name)
            write_json(job.folder / "inference/synthetic_faces_val/results.json", {"ap": {"all": 0.5, "@16": None}})
            (job.folder / "config.yaml").write_text("SOLVER: {MAX_ITER: 3, IMS_PER_BATCH: 1}\nDATASETS: {}\n")
        return []

    def report(runs, dataset, records, output, **options):
        return output / "report.html"

    class Records:
        def __init__(self, config):
            self.records = []

        def __getitem__(self, name):
            return self

    tool["demo"].__globals__.update(run_jobs=train, write_report=report, Catalog=Records)

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
