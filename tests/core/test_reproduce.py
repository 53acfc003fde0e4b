"""reproduce.py with a stand-in for train_net.py: what is run, resumed, refused and reported."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from group_sampling.config import get_value
from group_sampling.engines.tv.config import load_config
from group_sampling.experiments import jobs, reproduction
from group_sampling.experiments.claims import paper_values
from group_sampling.experiments.reproduction import COUNT_DIVISORS, scale_opts
from group_sampling.experiments.rows import EXPERIMENTS, TABLE_SAMPLES, Experiment, Row

TOOLS = Path(__file__).resolve().parents[2] / "projects/GroupSampling/tools"
sys.path.insert(0, str(TOOLS))
try:
    import reproduce
finally:
    sys.path.remove(str(TOOLS))

# Leaves what a training leaves; AP of a row is 10 + 10 * (position in "rows") + seed. Rows named in "fail" fail.
STAND_IN = """
import json, pathlib, sys
arguments = sys.argv[1:]
setup = json.loads(pathlib.Path(__file__).with_name("setup.json").read_text())
config = pathlib.Path(arguments[arguments.index("--config-file") + 1]).stem
opts = arguments[arguments.index("--config-file") + 2:]
keys = dict(zip(opts[::2], opts[1::2]))
with open(pathlib.Path(__file__).with_name("calls.txt"), "a") as calls:
    calls.write(json.dumps([config, arguments]) + "\\n")
folder = pathlib.Path(keys["OUTPUT_DIR"])
(folder / "config.yaml").write_text("SOLVER: {MAX_ITER: 20}")
(folder / "metrics.json").write_text('{"iteration": 19, "total_loss": 1.0, "health/units": 0.5}\\n')
if config in setup["fail"]:
    sys.exit("out of luck")
ap = 0.1 + 0.1 * setup["rows"].index(config) + 0.01 * int(keys["SEED"])
for shift, name in enumerate(("synthetic_faces_val", "synthetic_faces_train")):
    results = folder / f"inference/{name}/results.json"
    results.parent.mkdir(parents=True)
    results.write_text(json.dumps({"ap": {"all": ap + 0.1 * shift, "@16": ap / 2, "@128": None}}))
"""

EXPERIMENT = Experiment(
    "Table 1: two rows",
    (Row("uniform", "fpn_finest"), Row("group", "fpn_finest_sampling")),
)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(reproduce, "TRAIN_NET", script)
    monkeypatch.setitem(EXPERIMENTS, "table1", EXPERIMENT)
    monkeypatch.setitem(EXPERIMENTS, "table4", EXPERIMENT)
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(reproduction, "IMAGES_TO_COMPARE", 2)

    def set_up(fail=(), rows=("fpn_finest", "fpn_finest_sampling")):
        setup = {"rows": list(rows), "fail": list(fail)}
        (tmp_path / "setup.json").write_text(json.dumps(setup))

    set_up()
    return set_up


def run(tmp_path, *arguments, opts=()):
    output = ["--scale", "tiny", "--engine", "torchvision", "--output", str(tmp_path / "out")]
    reproduce.main([*map(str, arguments), *output, *opts])


def calls(tmp_path):
    file = tmp_path / "calls.txt"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_rows_are_run_once_and_reported(tmp_path, stand_in, capsys):
    run(tmp_path, "--table", 1, 4, "--seeds", 3, "--jobs", 2)
    done = calls(tmp_path)
    assert sorted(config for config, _ in done) == ["fpn_finest"] * 3 + ["fpn_finest_sampling"] * 3

    report = (tmp_path / "out/tiny/report.md").read_text()
    assert report.count("### Table 1: two rows") == 2  # both tables have these rows here
    # Means 11 and 21 with the seeds' deviation of 1, after the paper's value. @128 has no face and so no AP.
    uniform, group = "80.2 / 11.0 ± 1.0 | 65.6 / 5.5 ± 0.5 |", "82.8 / 21.0 ± 1.0 | 74.1 / 10.5 ± 0.5 |"
    assert f"| uniform | `fpn_finest` | 94.1 / not run | 93.0 / not run | 86.6 / not run | {uniform}" in report
    assert f"| group | `fpn_finest_sampling` | 94.7 / not run | 93.8 / not run | 88.7 / not run | {group}" in report
    (claim,) = re.findall(r"\| 1\.10 \|.*", report)
    assert "fpn_finest_sampling − fpn_finest, @16 | +8.5 | +5.0 ± 0.0 (3 seeds) | agrees (without" in claim
    assert "@16" not in claim.split("(without")[1]

    content = json.loads((tmp_path / "out/tiny/report.json").read_text())
    verdicts = {claim["id"]: claim["verdict"] for claim in content["claims"]}
    assert verdicts["1.10"] == "agrees" and verdicts["1.1"] == "not run"  # the other detectors have no results
    row = content["experiments"]["table1"]["rows"][0]
    assert row["ours"]["all"] == {"seeds": [10.0, 11.0, 12.0], "mean": 11.0, "std": 1.0} and row["runs"] == 3
    for image in re.findall(r"\]\((images/.*?)\)", report):
        pixels = np.asarray(Image.open(tmp_path / "out/tiny" / image).convert("L"))
        assert pixels.shape[1] > 600 and pixels.std() > 5

    run(tmp_path, "--table", 1, "--seeds", 3)
    assert len(calls(tmp_path)) == 6 and "6 of them complete" in capsys.readouterr().out
    run(tmp_path, "--table", 1, "--seeds", 4)
    assert len(calls(tmp_path)) == 8


def test_command_of_a_row(tmp_path, stand_in):
    run(tmp_path, "--table", 1, opts=["SOLVER.BASE_LR", "0.5"])
    (_, arguments), _ = calls(tmp_path)
    folder = tmp_path / "out/tiny/fpn_finest/seed0"
    assert "--resume" in arguments and arguments[-4:] == ["SEED", "0", "OUTPUT_DIR", str(folder)]
    opts = arguments[arguments.index("--config-file") + 2 :]
    cfg = load_config(str(reproduce.CONFIGS / "fpn_finest.yaml"), opts)  # every override is a key, of the right type
    assert cfg.SOLVER.BASE_LR == 0.5  # the command line's comes last
    assert tuple(cfg.DATASETS.TRAIN) == ("synthetic_faces_train",) and cfg.MODEL.WEIGHTS == ""
    assert cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE == 8192 // 8
    assert cfg.MODEL.GROUP_SAMPLING.SAMPLES_PER_GROUP == 2048 // 8


def test_failed_row_does_not_stop_the_others_and_is_tried_again(tmp_path, stand_in, capsys):
    stand_in(fail=["fpn_finest"])
    with pytest.raises(SystemExit, match="1 trainings failed"):
        run(tmp_path, "--table", 1)
    assert "out of luck" in capsys.readouterr().err
    report = (tmp_path / "out/tiny/report.md").read_text()
    assert "| uniform | `fpn_finest` | 94.1 / not run |" in report and "82.8 / 20.0 |" in report
    assert re.search(r"\| 1\.10 \|.*\| not run", report)
    stand_in()
    run(tmp_path, "--table", 1)
    assert [config for config, _ in calls(tmp_path)].count("fpn_finest_sampling") == 1
    assert "80.2 / 10.0 |" in (tmp_path / "out/tiny/report.md").read_text()


def test_report_of_what_is_there(tmp_path, stand_in):
    run(tmp_path, "--table", 1, "--report-only")
    assert not calls(tmp_path)
    assert (tmp_path / "out/tiny/report.md").read_text().count("not run") > 3
    assert (tmp_path / "out/tiny/images/reproduce_tiny_table1.png").exists()


def test_other_settings_are_refused(tmp_path, stand_in):
    run(tmp_path, "--table", 1)
    with pytest.raises(SystemExit, match="^reproduce.py: error: .*: expected a run with the settings"):
        run(tmp_path, "--table", 1, opts=["SOLVER.MAX_ITER", "7"])
    assert len(calls(tmp_path)) == 2


def test_known_trainings_are_not_repeated(tmp_path, stand_in):
    run(tmp_path, "--table", 1, "--seeds", 2)
    first = (tmp_path / "out/tiny/report.json").rename(tmp_path / "known.json")
    shutil.rmtree(tmp_path / "out")
    run(tmp_path, "--table", 1, "--seeds", 3, "--known", first)
    assert [arguments[-3] for _, arguments in calls(tmp_path)[4:]] == ["2", "2"]
    content = json.loads((tmp_path / "out/tiny/report.json").read_text())
    assert content["experiments"]["table1"]["rows"][0]["ours"]["all"]["seeds"] == [10.0, 11.0, 12.0]
    (training, *_) = content["trainings"]
    assert training["hardware"]["cores"] and training["torch"] and training["seconds"] >= 0
    assert training["health"] == {"units": 0.5}
    with pytest.raises(SystemExit, match="the report of known results: expected a run with the settings"):
        run(tmp_path, "--table", 1, "--seeds", 2, "--known", first, opts=["SOLVER.MAX_ITER", "7"])
    first.write_text('{"trainings": [{"config": "fpn"}]}')
    with pytest.raises(SystemExit, match=r'expected a report.json with "trainings"'):
        run(tmp_path, "--table", 1, "--known", first)


def test_every_data_set_is_reported(tmp_path, stand_in):
    run(tmp_path, "--table", 1, opts=["DATASETS.TEST", "('synthetic_faces_val', 'synthetic_faces_train')"])
    report = (tmp_path / "out/tiny/report.md").read_text()
    before, after = report.split("The same detectors on `synthetic_faces_train`:")
    assert "82.8 / 20.0 |" in before and "| – / 30.0 |" in after  # the stand-in adds 10 there


def test_missing_config_is_named(tmp_path, stand_in, monkeypatch):
    absent = Experiment("x", (Row("x", "table9/absent"),))
    monkeypatch.setitem(EXPERIMENTS, "table1", absent)
    with pytest.raises(SystemExit, match=r"(?s)^reproduce.py: error: .*table9/absent\.yaml"):
        run(tmp_path, "--table", 1)


def test_figure_2_needs_no_training(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(reproduction, "DETECTORS", EXPERIMENT.rows)
    run(tmp_path, "--figure", 2, "--seeds", 2, opts=["DATASETS.SYNTHETIC.NUM_TRAIN", "6"])
    assert not calls(tmp_path)
    report = (tmp_path / "out/tiny/report.md").read_text()
    assert "| positives / negatives in an image | @16 | @32 | @64 | @128 |" in report
    assert re.search(r"\| F2\.5 \|.*agrees", report)  # group sampling is more balanced than the uniform draw
    assert (tmp_path / "out/tiny/images/reproduce_tiny_figure2.png").exists()


def test_rows_that_draw_the_same_samples_are_named(tmp_path, stand_in, monkeypatch, capsys):
    """With N beyond the anchors there are, both samplers draw them all; another feature or loss is another training."""
    rows = ("fpn_finest", "fpn_finest_sampling", "table2/p3", "table3/iou_l2", "table4/ohem", "table4/focal")
    monkeypatch.setitem(EXPERIMENTS, "table1", Experiment("x", tuple(Row(f"row {name}", name) for name in rows)))
    everything = ["MODEL.GROUP_SAMPLING.SAMPLES_PER_GROUP", "9999", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "99999"]
    everything += ["MODEL.RPN.POSITIVE_FRACTION", "1.0", "DATASETS.SYNTHETIC.NUM_TRAIN", "2"]
    stand_in(rows=[name.split("/")[-1] for name in rows])
    run(tmp_path, "--table", 1, opts=everything)
    warning = "row fpn_finest and row fpn_finest_sampling draw the same samples (total variation 0 %)"
    printed = capsys.readouterr().err
    assert warning in printed and printed.count("draw the same samples") == 1
    assert warning in (tmp_path / "out/tiny/report.md").read_text()
    (pair,) = json.loads((tmp_path / "out/tiny/report.json").read_text())["same_samples"]
    assert pair == {"experiment": "table1", "rows": ["row fpn_finest", "row fpn_finest_sampling"], "total_variation": 0}


def test_a_reading_tells_rows_apart_that_draw_the_same(tmp_path, stand_in, capsys):
    few = ["MODEL.GROUP_SAMPLING.SAMPLES_PER_GROUP", "800", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "3200"]
    run(tmp_path, "--table", 1, opts=[*few, "MODEL.GROUP_SAMPLING.FILL", "repeat"])
    assert "draw the same samples" not in capsys.readouterr().err


def test_wider_leaves_the_configs_as_they_are():
    assert scale_opts(reproduce.CONFIGS, "fpn_finest", "wider") == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_row_exists_and_scales(name):
    for row in EXPERIMENTS[name].rows:
        file = str(reproduce.CONFIGS / f"{row.config}.yaml")
        full = load_config(file, ["MODEL.DEVICE", "cpu"])
        for scale, (of_anchors, of_rois) in COUNT_DIVISORS.items():
            small = load_config(file, scale_opts(reproduce.CONFIGS, row.config, scale))
            of_rpn = 1 if row.config == "table4/ohem" else of_anchors
            for key, divisor in (
                ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", of_rpn),
                ("MODEL.GROUP_SAMPLING.SAMPLES_PER_GROUP", of_anchors),
                ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", of_rois),
                ("MODEL.GROUP_SAMPLING.ROI_SAMPLES_PER_GROUP", of_rois),
            ):
                assert get_value(small, key) == get_value(full, key) // divisor


def test_photos_are_trained_on_with_the_config_as_with_the_tool():
    file = reproduce.CONFIGS / "quick/photos.yaml"
    opts = ["OUTPUT_DIR", "", "MODEL.DEVICE", "cpu"]
    for key in ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "MODEL.GROUP_SAMPLING.ROI_SAMPLES_PER_GROUP"):
        opts += [key, "1"]  # of a second stage, which this row has not
    row = load_config(
        str(reproduce.CONFIGS / "fpn_finest_sampling.yaml"),
        [*scale_opts(reproduce.CONFIGS, "fpn_finest_sampling", "photos"), *opts],
    )
    assert load_config(str(file), opts) == row


def test_figure_4_takes_the_rows_of_table_1_for_the_tables_number_of_samples():
    for detector in ("fpn", "fpn_finest", "fpn_finest_sampling"):
        names = (detector, f"figure4/{detector}_n{TABLE_SAMPLES}")
        cfgs = [
            load_config(str(reproduce.CONFIGS / f"{n}.yaml"), ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", ""]) for n in names
        ]
        assert cfgs[0] == cfgs[1]
        assert detector in {row.config for row in EXPERIMENTS["figure4"].rows}


def test_paper_has_a_number_for_every_row_of_a_table():
    paper = paper_values()
    for name, experiment in EXPERIMENTS.items():
        if name.startswith("table"):
            assert {row.config for row in experiment.rows} == set(paper[name])


def test_progress_of_a_half_written_file(tmp_path):
    assert jobs.progress(tmp_path) == (0.0, "starting")
    (tmp_path / "config.yaml").write_text("SOLVER: {MAX_ITER: 40}")
    lines = [json.dumps({"iteration": i, "total_loss": 0.5, "filler": "x" * 900}) for i in range(20)]
    (tmp_path / "metrics.json").write_text("\n".join(lines) + '\n{"iteration": 20, "total')
    assert jobs.progress(tmp_path) == (0.5, "loss 0.500")
    (tmp_path / "metrics.json").write_text('{"iteration": 39, "total_loss": 0.5}\n{"iteration": 39, "AP": 1}\n')
    assert jobs.progress(tmp_path) == (1.0, "evaluating")


def test_leaving_early_ends_what_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(subprocess.Popen, "terminate", terminate := _Recorder(subprocess.Popen.terminate))
    quick, slow = (
        jobs.Job(name, [sys.executable, "-c", f"import time; time.sleep({s})"], tmp_path / name)
        for name, s in (("quick", 0), ("slow", 60))
    )
    outcomes = jobs.run_jobs([quick, slow], side_by_side=2, working_directory=tmp_path)
    assert next(outcomes).job is quick
    outcomes.close()
    assert terminate.count == 1


def test_the_progress_in_a_file_is_short(tmp_path, monkeypatch, capsys):
    """Not a line for each look at the jobs, of which a night has tens of thousands."""
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)
    job = jobs.Job("job", [sys.executable, "-c", "import time; time.sleep(0.5)"], tmp_path / "job")
    (outcome,) = jobs.run_jobs([job], working_directory=tmp_path)
    assert not outcome.error and 1 <= capsys.readouterr().err.count("\r") <= 4


class _Recorder:
    def __init__(self, method):
        self.method, self.count = method, 0

    def __get__(self, instance, owner):
        def call():
            self.count += 1
            self.method(instance)

        return call


@pytest.mark.slow
def test_a_real_row(tmp_path):
    command = [sys.executable, str(TOOLS / "reproduce.py"), "--table", "4", "--scale", "tiny", "--jobs", "2"]
    command += ["--engine", "torchvision", "--output", str(tmp_path), "SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "()"]
    command += ["DATASETS.SYNTHETIC.NUM_VAL", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    report = (tmp_path / "tiny/report.md").read_text()
    rows = [line for line in report.splitlines() if re.match(r"\| [^|]+ \| `", line)]
    # Claims may still be "not run": that on OHEM's B compares rows of no table.
    assert len(rows) == 4 and not any("not run" in row for row in rows)
