"""Every shell block of the documentation that is marked as runnable is run, in order, in a folder of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from group_sampling.data.catalog import Catalog
from group_sampling.data.images import read_image

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "projects/GroupSampling/docs"


def runnable_blocks(text):
    return re.findall(r"^```bash runnable\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def draw_pictures(folder, train, val):
    """Pictures of the built-in faces, as someone would have them who labeled with a YOLO tool."""
    size = {"NUM_TRAIN": train, "NUM_VAL": val, "HEIGHT": 240, "WIDTH": 320}
    for split in ("train", "val"):
        images, labels = folder / "images" / split, folder / "labels" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for index, record in enumerate(Catalog({"SYNTHETIC": size})[f"synthetic_faces_{split}"].records):
            Image.fromarray(read_image(record)).save(images / f"{index:02}.jpg")
            lines = [
                f"0 {(x1 + x2) / 2 / 320:.6f} {(y1 + y2) / 2 / 240:.6f} {(x2 - x1) / 320:.6f} {(y2 - y1) / 240:.6f}\n"
                for x1, y1, x2, y2 in record.boxes.tolist()
            ]
            if lines:
                (labels / f"{index:02}.txt").write_text("".join(lines))


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like the repository's root, and takes what the commands write."""
    for name in ("projects", "train_net.py"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    bin_folder = tmp_path / ".bin"
    bin_folder.mkdir()
    (bin_folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (bin_folder / "python").chmod(0o755)
    return tmp_path


def run_block(block, checkout):
    environment = {**os.environ, "PATH": f"{checkout / '.bin'}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(REPOSITORY / "projects/GroupSampling")
    command = ["bash", "-euo", "pipefail", "-c", block]
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{block}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_custom_data_as_it_stands(checkout):
    """The promise of the page: every command works as it stands, and the detector has learnt its pictures."""
    draw_pictures(checkout / "my_faces", train=16, val=4)
    convert, look, train, show = runnable_blocks((DOCS / "custom_data.md").read_text())
    assert "16 images" in run_block(convert, checkout)
    assert "every image file can be opened" in run_block(look, checkout)
    assert (checkout / "output/my_faces/look/sizes.png").exists()
    run_block(train, checkout)
    assert (checkout / "output/my_faces/run/inference/my_val/results.json").exists()
    output = run_block(show, checkout)
    assert Image.open(checkout / "output/my_faces/found.png").size[0] > 100
    known = show.replace("my_faces/images/val", "my_faces/images/train")
    assert known != show
    found = re.search(r"(\d+) detections", run_block(known, checkout))
    assert found and int(found[1]) > 0, output
