"""docs/detectron2.md: every block of it, and Detectron2's own scripts where its wheel has installed them."""

import importlib.util
import json
import logging
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import detectron2.data
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm
from test_configs import write_coco_set

from group_sampling.engines import d2

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "projects/GroupSampling/docs/detectron2.md").read_text()
SCRIPTS = Path(importlib.util.find_spec("detectron2").submodule_search_locations[0]).parent / "tools"
NEEDS_SCRIPTS = pytest.mark.skipif(
    not (SCRIPTS / "plain_train_net.py").is_file(), reason="Detectron2's scripts are not installed with it"
)
SMALL = [
    *("DATASETS.SYNTHETIC.NUM_TRAIN", "4", "DATASETS.SYNTHETIC.NUM_VAL", "2", "DATALOADER.NUM_WORKERS", "0"),
    *("DATASETS.SYNTHETIC.HEIGHT", "96", "DATASETS.SYNTHETIC.WIDTH", "128", "INPUT.MIN_SIZE_TRAIN", "(96,)"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "()", "MODEL.RPN.PRE_NMS_TOPK_TEST", "100"),
]
CONFIG = "projects/GroupSampling/configs/quick/demo_fpn_finest_sampling.yaml"


def blocks(kind):
    found = re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert found
    return found


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The working directory looks like the repository's root, and takes what the blocks write."""
    (tmp_path / "projects").symlink_to(REPOSITORY / "projects")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my_faces"
    folder.mkdir()
    write_coco_set(folder)
    content = json.loads((folder / "annotations.json").read_text())
    for annotation in content["annotations"]:
        annotation["category_id"] = 1
    content["categories"] = content["categories"][:1]
    (folder / "annotations.json").write_text(json.dumps(content))
    cfg = get_cfg()
    d2.add_group_sampling_config(cfg)
    cfg.merge_from_list(SMALL)
    d2.register_datasets(cfg)
    yield tmp_path
    for name in ("my_faces", "synthetic_faces_train", "synthetic_faces_val"):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name)
    d2.register_datasets()


def test_every_block_of_python(checkout, capsys):
    names = {}
    first, *others = blocks("python runnable")
    merge = f'cfg.merge_from_file("{CONFIG}")\n'
    assert merge in first
    for block in (first.replace(merge, f"{merge}cfg.merge_from_list({SMALL})\n"), *others):
        exec(compile(block, "detectron2.md", "exec"), names)
    assert Image.open("found.png").size == (320, 256) and Image.open("annotated.png").size == (128, 96)
    printed = capsys.readouterr().out
    assert "backbone" in printed and "billion multiply-adds" in printed and "seconds for an iteration" in printed
    assert names["losses"].keys() == {"loss_rpn_cls", "loss_rpn_loc"}
    assert (checkout / "output/my_faces/inference/my_faces/results.json").exists()
    assert names["storage"].iter == 3
    assert 0 <= d2.Trainer.test(names["cfg"], names["trainer"].model)["coco"]["AP50"] <= 100


@pytest.fixture
def scripts(checkout):
    """The copies that the page makes."""
    (block,) = blocks("bash runnable")
    interpreter = checkout / "bin/python"
    interpreter.parent.mkdir()
    interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    interpreter.chmod(0o755)
    environment = {"PATH": f"{interpreter.parent}:/usr/bin:/bin"}
    subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=checkout, env=environment, check=True)
    return checkout / "with_group_sampling"


def run_script(line, monkeypatch, *opts):
    python, *argv = shlex.split(line)
    assert python == "python"
    monkeypatch.setattr(sys, "argv", [*argv, *opts])
    runpy.run_path(argv[0], run_name="__main__")


def lines_of(script):
    (block,) = blocks("bash scripts")
    found = [line for line in block.splitlines() if f"/{script}.py" in line]
    assert found
    return found


@NEEDS_SCRIPTS
def test_copies_have_the_two_lines(scripts):
    for script in ("visualize_data", "analyze_model", "benchmark", "plain_train_net"):
        source = (scripts / f"{script}.py").read_text()
        compile(source, script, "exec")
        added = set(source.splitlines()) - set((SCRIPTS / f"{script}.py").read_text().splitlines())
        expected = ["from group_sampling.engines import d2", "d2.add_group_sampling_config(cfg)"]
        assert sorted(line.strip() for line in added) == sorted(expected)
        assert lines_of(script)


@NEEDS_SCRIPTS
def test_visualize_data(scripts, checkout, monkeypatch):
    register_coco_instances("my_faces", {}, "my_faces/annotations.json", "my_faces")
    annotations, batches = lines_of("visualize_data")
    run_script(annotations, monkeypatch, "DATASETS.TRAIN", "('my_faces',)")
    assert len(list((checkout / "output/annotations").iterdir())) == 4
    loader = detectron2.data.build_detection_train_loader  # without an end
    monkeypatch.setattr(detectron2.data, "build_detection_train_loader", lambda cfg: [next(iter(loader(cfg)))])
    run_script(batches, monkeypatch, *SMALL, "DATASETS.TRAIN", "('my_faces',)")
    assert len(list((checkout / "output/batches").iterdir())) == 2


@NEEDS_SCRIPTS
def test_analyze_model(scripts, monkeypatch):
    logged = []
    monkeypatch.setattr(logging.getLogger("detectron2"), "info", logged.append)
    (line,) = lines_of("analyze_model")
    run_script(line, monkeypatch)
    text = "\n".join(map(str, logged))
    assert "Parameter Count" in text and "Model Structure" in text and "GroupSamplingRPN" in text
    assert re.search(r"Total GFlops: 0\.[0-9]*", text) and "Activations" in text


@NEEDS_SCRIPTS
def test_plain_train_net(scripts, checkout, monkeypatch):
    """Trains on the built-in faces and on a registered set, and evaluates either by Detectron2's evaluator."""
    register_coco_instances("my_faces", {}, "my_faces/annotations.json", "my_faces")
    (line,) = lines_of("plain_train_net")
    for name in ("synthetic_faces_val", "my_faces"):
        sets = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)"]
        run_script(line, monkeypatch, *SMALL, *sets)
        assert (checkout / f"output/plain/inference/{name}/coco_instances_results.json").exists()
    assert (checkout / "output/plain/model_final.pth").exists() and comm.get_world_size() == 1
