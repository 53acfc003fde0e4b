import logging
from pathlib import Path

import numpy as np
import pytest
from fvcore.common.config import CfgNode

from group_sampling.data.catalog import Catalog, MissingDatasetError

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
    catalog = Catalog()
    assert catalog.names == expected
    assert all(catalog[name].class_names == ("face",) for name in expected)


def test_wider_face_from_the_published_layout(wider_root, monkeypatch, caplog):
    source = Catalog(root=wider_root)["wider_face_val"]
    with caplog.at_level(logging.WARNING):
        records, report = source.records, source.report
    assert source.records is records and len(caplog.records) == 1  # parsed and reported once
    assert "data set wider_face_val: 4 images, 6 boxes (1 to be ignored), 2 dropped" in caplog.text
    assert len(records) == report.num_images == 4
    expected = wider_root / "WIDER_FACE" / "WIDER_val" / "images" / "0--Parade" / "0_Parade_sample_1.jpg"
    assert records[0].file_name == str(expected)
    assert len(Catalog(root=wider_root)["wider_face_test"].records) == 1
    assert source.missing_paths == ()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(wider_root))
    assert len(Catalog()["wider_face_train"].records) == 4


def test_a_missing_set_says_what_is_missing_how_to_get_it_and_what_to_do_instead(tmp_path, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingDatasetError) as error:
        _ = Catalog()["wider_face_train"].records
    message = str(error.value)
    root = tmp_path / "datasets" / "WIDER_FACE"
    assert str(root / "wider_face_split" / "wider_face_train_bbx_gt.txt") in message
    assert str(root / "WIDER_train" / "images") in message
    assert "http://shuoyang1213.me/WIDERFACE/" in message
    override = """DATASETS.TRAIN '("synthetic_faces_train",)' DATASETS.TEST '("synthetic_faces_val",)'"""
    assert override in message
    assert len(Catalog()["wider_face_train"].missing_paths) == 2
    (root / "WIDER_train" / "images").mkdir(parents=True)
    with pytest.raises(MissingDatasetError) as error:
        _ = Catalog()["wider_face_train"].records
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
    assert Catalog(config).names[6:] == ("my_faces", "w_all", "w_one")
    records = Catalog(config, tmp_path)["my_faces"].records
    assert records[0].file_name == str(tmp_path / "images" / "a" / "one.jpg")
    assert Catalog(config, tmp_path)["my_faces"].class_names == ("face", "mask")
    assert [r.image_id for r in Catalog(config, tmp_path)["w_one"].records] == ["2--Dance/2_Dance_3"]
    assert len(Catalog(config, tmp_path)["w_all"].records) == 4
    records = Catalog(config)["synthetic_faces_train"].records
    assert [(r.height, r.width) for r in records] == [(64, 96)] * 3
    assert len(Catalog(config)["synthetic_faces_val"].records) == 2
    config.SYNTHETIC.SEED = 6
    assert not np.array_equal(records[0].boxes, Catalog(config)["synthetic_faces_train"].records[0].boxes)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"COCO_FORMAT": [["a", "b"]]}, r"DATASETS\.COCO_FORMAT\[0\]: expected \[name, annotation_json, image_root\]"),
        ({"WIDER_FORMAT": [["a", "b", "c"], "abc"]}, r"DATASETS\.WIDER_FORMAT\[1\]: expected .*got 'abc'"),
        (
            {"WIDER_FORMAT": [["a", "b", 3]]},
            r"DATASETS\.WIDER_FORMAT\[0\]: .*all of them strings, got \['a', 'b', 3\]",
        ),
        (
            {"WIDER_FORMAT": [["wider_face_val", "b", "c"]]},
            r"expected a name that is not taken yet, got 'wider_face_val'",
        ),
        ({"COCO_FORMAT": [["a", "b", "c"], ["a", "b", "c"]]}, r"COCO_FORMAT\[1\]: expected a name that is not taken"),
        ({"SYNTHETIC": {"SIZE": 3}}, r"DATASETS\.SYNTHETIC: expected the keys NUM_TRAIN, .*SEED, got the unknown SIZE"),
        ({"SYNTHETIC": {"HEIGHT": 8}}, r"DATASETS\.SYNTHETIC\.HEIGHT: expected an integer >= 32, got 8"),
        ({"SYNTHETIC": {"SEED": "a"}}, r"DATASETS\.SYNTHETIC\.SEED: expected an integer >= 0, got 'a'"),
    ],
)
def test_declarations_that_make_no_sense(config, message):
    with pytest.raises(ValueError, match=message):
        Catalog(config)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"expected one of wider_face_train, .*got 'wider_face_vall' \(did you mean 'wi"
    ):
        Catalog()["wider_face_vall"]
