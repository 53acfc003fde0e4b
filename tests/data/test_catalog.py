import logging
from pathlib import Path

import numpy as np
import pytest
from fvcore.common.config import CfgNode

from group_sampling.data import DataReport, MissingDatasetError, class_names, dataset_names, load_dataset, missing_paths

HERE = Path(__file__).parent
WIDER = HERE / "wider_face_sample_bbx_gt.txt"
COCO = HERE / "coco_sample.json"


@pytest.fixture
def wider_root(tmp_path):
    """A datasets folder as the downloads unpack."""
    split = tmp_path / "WIDER_FACE" / "wider_face_split"
    split.mkdir(parents=True)
    for part in ("train", "val"):
        (split / f"wider_face_{part}_bbx_gt.txt").write_bytes(WIDER.read_bytes())
    (split / "wider_face_test_filelist.txt").write_text("0--Parade/0_Parade_1.jpg\n")
    for part in ("train", "val", "test"):
        (tmp_path / "WIDER_FACE" / f"WIDER_{part}" / "images").mkdir(parents=True)
    return tmp_path


def test_builtin_names():
    wider, synthetic = (
        ("wider_face_train", "wider_face_val", "wider_face_test"),
        ("synthetic_faces_train", "synthetic_faces_val"),
    )
    expected = (*wider, *synthetic, "fddb")
    assert dataset_names() == expected
    assert all(class_names(name) == ("face",) for name in expected)


def test_wider_face_from_the_published_layout(wider_root, monkeypatch, caplog):
    report = DataReport()
    with caplog.at_level(logging.WARNING):
        records = load_dataset("wider_face_val", root=wider_root, report=report)
    assert "data set wider_face_val: 4 images, 6 boxes (1 to be ignored), 2 dropped" in caplog.text
    assert len(records) == report.num_images == 4
    expected = wider_root / "WIDER_FACE" / "WIDER_val" / "images" / "0--Parade" / "0_Parade_sample_1.jpg"
    assert records[0].file_name == str(expected)
    assert len(load_dataset("wider_face_test", root=wider_root)) == 1
    assert missing_paths("wider_face_val", root=wider_root) == ()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(wider_root))
    assert len(load_dataset("wider_face_train")) == 4


def test_a_missing_set_says_what_is_missing_how_to_get_it_and_what_to_do_instead(tmp_path, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingDatasetError) as error:
        load_dataset("wider_face_train")
    message = str(error.value)
    root = tmp_path / "datasets" / "WIDER_FACE"
    assert str(root / "wider_face_split" / "wider_face_train_bbx_gt.txt") in message
    assert str(root / "WIDER_train" / "images") in message
    assert "http://shuoyang1213.me/WIDERFACE/" in message
    override = """DATASETS.TRAIN '("synthetic_faces_train",)' DATASETS.TEST '("synthetic_faces_val",)'"""
    assert override in message
    assert len(missing_paths("wider_face_train")) == 2
    (root / "WIDER_train" / "images").mkdir(parents=True)
    with pytest.raises(MissingDatasetError) as error:
        load_dataset("wider_face_train")
    assert str(root / "WIDER_train" / "images") not in str(error.value)


def test_declared_sets(tmp_path):
    (tmp_path / "list.txt").write_text("2--Dance/2_Dance_3.jpg\n")
    (tmp_path / "images").mkdir()
    config = CfgNode(
        {
            "COCO_FORMAT": [["my_faces", str(COCO), "images"]],
            "WIDER_FORMAT": [
                ["w_all", str(WIDER), "images"],
                ["w_one", str(WIDER), "images", str(tmp_path / "list.txt")],
            ],
            "SYNTHETIC": {"NUM_TRAIN": 3, "NUM_VAL": 2, "HEIGHT": 64, "WIDTH": 96, "SEED": 5},
        }
    )
    assert dataset_names(config)[6:] == ("my_faces", "w_all", "w_one")
    records = load_dataset("my_faces", config, tmp_path)
    assert records[0].file_name == str(tmp_path / "images" / "a" / "one.jpg")
    assert class_names("my_faces", config, tmp_path) == ("face", "mask")
    assert [r.image_id for r in load_dataset("w_one", config, tmp_path)] == ["2--Dance/2_Dance_3"]
    assert len(load_dataset("w_all", config, tmp_path)) == 4
    records = load_dataset("synthetic_faces_train", config)
    assert [(r.height, r.width) for r in records] == [(64, 96)] * 3
    assert len(load_dataset("synthetic_faces_val", config)) == 2
    config.SYNTHETIC.SEED = 6
    assert not np.array_equal(records[0].boxes, load_dataset("synthetic_faces_train", config)[0].boxes)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"COCO_FORMAT": [["a", "b"]]}, r"DATASETS\.COCO_FORMAT\[0\]: expected \[name, annotation_json, image_root\]"),
        ({"WIDER_FORMAT": [["a", "b", "c"], "abc"]}, r"DATASETS\.WIDER_FORMAT\[1\]: expected .*found 'abc'"),
        (
            {"WIDER_FORMAT": [["a", "b", 3]]},
            r"DATASETS\.WIDER_FORMAT\[0\]: .*all of them strings, found \['a', 'b', 3\]",
        ),
        (
            {"WIDER_FORMAT": [["wider_face_val", "b", "c"]]},
            r"expected a name that is not taken yet, found 'wider_face_val'",
        ),
        ({"COCO_FORMAT": [["a", "b", "c"], ["a", "b", "c"]]}, r"COCO_FORMAT\[1\]: expected a name that is not taken"),
        ({"SYNTHETIC": {"SIZE": 3}}, r"DATASETS\.SYNTHETIC: expected the keys NUM_TRAIN, .*SEED, found 'SIZE'"),
        ({"SYNTHETIC": {"HEIGHT": 8}}, r"DATASETS\.SYNTHETIC\.HEIGHT: expected an integer >= 32, found 8"),
        ({"SYNTHETIC": {"SEED": "a"}}, r"DATASETS\.SYNTHETIC\.SEED: expected an integer >= 0, found 'a'"),
    ],
)
def test_declarations_that_make_no_sense(config, message):
    with pytest.raises(ValueError, match=message):
        dataset_names(config)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"expected one of wider_face_train, .*found 'wider_face_vall' \(did you mean 'wi"
    ):
        load_dataset("wider_face_vall")
