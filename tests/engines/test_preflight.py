"""What would end a run late ends it before its first step, or is said and does no harm."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from test_output import ENGINES, engine_main
from tv_cases import CONFIGS, SMALL_OPTS, arguments

from group_sampling import distributed
from group_sampling.config import ConfigError
from group_sampling.data.loader import BadDataError
from group_sampling.engines import preflight
from group_sampling.errors import UserError

NO_TRAINING = "a training has begun"


@pytest.fixture
def photos(tmp_path):
    """Eight noisy pictures of 100 x 80."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    return folder


def write_wider(folder, extra=()):
    """A WIDER FACE file of all pictures: a face in each, and ``extra`` rows in the last."""
    lines = []
    for i in range(8):
        rows = ["10 10 30 30", *(extra if i == 7 else ())]
        lines += [f"{i}.jpg", str(len(rows)), *(f"{row} 0 0 0 0 0 0" for row in rows)]
    file = folder.parent / f"wider{len(extra)}.txt"
    file.write_text("\n".join(lines) + "\n")
    return [file.stem, str(file), str(folder)]


def write_coco(folder, name, categories, used=None):
    """COCO's format, with a box of every category (or those ``used``) in each picture."""
    annotations = [
        {"id": 10 * i + k, "image_id": i, "category_id": k, "bbox": [10, 10, 30, 30]}
        for i in range(8)
        for k in used or categories
    ]
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 80, "width": 100} for i in range(8)]
    named = [{"id": k, "name": class_name} for k, class_name in categories.items()]
    file = folder.parent / f"{name}.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": named}))
    return [name, str(file), str(folder)]


def sets(train, test, *, coco=(), wider=()):
    declared = ["DATASETS.COCO_FORMAT", repr(list(coco)), "DATASETS.WIDER_FORMAT", repr(list(wider))]
    return [*declared, "DATASETS.TRAIN", repr(tuple(train)), "DATASETS.TEST", repr(tuple(test))]


@pytest.fixture(params=ENGINES)
def main(request):
    return engine_main(request.param)


@pytest.fixture
def no_training(monkeypatch):
    """The loader of a training must not be built."""

    def refuse(*args, **kwargs):
        raise AssertionError(NO_TRAINING)

    monkeypatch.setattr("group_sampling.engines.build.build_train_loader", refuse)


def run(main, folder, *opts, **flags):
    return main(arguments(folder / "out", *opts, **flags))


def run_two_stage(main, folder, *opts, **flags):
    args = arguments(folder / "out", *SMALL_OPTS, *opts, **flags)
    args.config_file = str(CONFIGS / "table5/grouped_fast_rcnn.yaml")
    return main(args)


@pytest.fixture(autouse=True)
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


# -- images ------------------------------------------------------------------------------------------------------------


def test_slips_of_the_test_set_do_not_end_the_run(main, tmp_path, photos, out):
    """One absurd box and one unreadable image, known before the first step; the run ends with its results."""
    train = write_wider(photos)
    test = write_wider(photos, ["10 10 1000000000 20", "10 10 1000000 20"])
    (photos / "3.jpg").write_text("no image")
    opts = sets([train[0]], [test[0]], wider=[train, test])
    run(main, tmp_path, *opts, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()", "DATALOADER.MAX_BAD_SHARE", 0.5)
    before = (out / "log.txt").read_text().partition("iter: 0")[0]
    assert "dropped, nearly all of it outside the image: 1" in before
    assert f"{test[0]}: 1 boxes of 1 images are outside of them, or nearly" in before
    for what, consequence in (
        ("DATASETS.TRAIN", "are replaced by others"),
        (test[0], "count as images without detections"),
    ):
        assert f"{what}: 1 of 8 images cannot be read and {consequence}:\n  {photos}/3.jpg: expected an image" in before
    results = json.loads((out / f"inference/{test[0]}/results.json").read_text())
    assert results["counts"]["images"] == 8
    assert len(json.loads((out / "image_headers.json").read_text())["files"]) == 7


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_a_share_above_the_limit_is_listed_before_the_first_step(main, tmp_path, photos, no_training, key):
    """Also where the folder is the wrong one altogether."""
    (tmp_path / "few").mkdir()
    good, bad = write_wider(photos), write_wider(photos, ["1 1 9 9"])
    bad[2] = str(tmp_path / "few")
    for i in range(3):
        os.link(photos / f"{i}.jpg", tmp_path / f"few/{i}.jpg")
    train, test = (bad, good) if key == "TRAIN" else (good, bad)
    opts = sets([train[0]], [test[0]], wider=[good, bad])
    what = "DATASETS.TRAIN" if key == "TRAIN" else bad[0]
    expected = rf"^{what}: 5 of 8 images cannot be read; expected a share of at most 0.1 \(DATALOADER.MAX_BAD_SHARE\)"
    with pytest.raises(BadDataError, match=expected + r"\. Got:\n  .*few/3\.jpg: no such file") as error:
        run(main, tmp_path, *opts)
    assert len(str(error.value).splitlines()) == 6
    with pytest.raises(AssertionError, match=NO_TRAINING):
        run(main, tmp_path, *opts, "DATASETS.CHECK_IMAGES", False)


def test_a_set_without_a_readable_image_is_refused_however_small(main, tmp_path, photos, no_training):
    declared = write_coco(photos, "mine", {1: "face"})
    content = json.loads((tmp_path / "mine.json").read_text())
    content["images"], content["annotations"] = content["images"][:1], content["annotations"][:1]
    (tmp_path / "mine.json").write_text(json.dumps(content))
    (photos / "0.jpg").unlink()
    opts = sets(["synthetic_faces_train"], ["mine"], coco=[declared])
    with pytest.raises(BadDataError, match=r"^mine: 1 of 1 images cannot be read"):
        run(main, tmp_path, *opts, "DATALOADER.MAX_BAD_SHARE", 1.0)


def test_annotations_of_the_test_set_are_parsed_before_the_training(main, tmp_path, photos, no_training):
    test = write_wider(photos, ["10 10 x 20"])
    with pytest.raises(UserError, match=r"wider1\.txt:\d+: expected"):
        run(main, tmp_path, *sets(["synthetic_faces_train"], [test[0]], wider=[test]))


def test_the_ground_truth_is_built_before_the_training(main, tmp_path, photos, no_training, repository):
    test = write_wider(photos)
    opts = sets(["synthetic_faces_train"], [test[0]], wider=[test])
    with pytest.raises((UserError, FileNotFoundError), match=r"wider_face_val\.mat"):
        run(main, tmp_path, *opts, "TEST.WIDER_GROUND_TRUTH", str(tmp_path))
    official = repository / "tests/tiny_data/wider/ground_truth_mat"
    with pytest.raises(UserError, match=r"^wider0: 8 of its 8 images are not in the ground truth \('0', \.\.\.\)"):
        run(main, tmp_path, *opts, "TEST.WIDER_GROUND_TRUTH", str(official))


def _fail_on_the_main_process(rank, folder, queue):
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", world_size=2, rank=rank)

    def find_source(name):
        assert distributed.rank() == 0, "only the main process looks"
        raise UserError("seen by the main process")

    from group_sampling.engines.tv.config import get_cfg

    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("mine",)
    try:
        preflight.check_data(cfg, find_source, eval_only=False)
    except UserError as error:
        queue.put(str(error))
    torch.distributed.destroy_process_group()


def test_the_verdict_reaches_all_processes(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_fail_on_the_main_process, args=(rank, tmp_path, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == ["seen by the main process"] * 2
    for process in processes:
        process.join()


# -- classes -----------------------------------------------------------------------------------------------------------

MASKS = {1: "mask", 2: "no_mask"}


@pytest.mark.parametrize(
    "train, test, count, message",
    [
        ((MASKS, {1: "no_mask"}), (), 2, r"^DATASETS.TRAIN: expected the classes of 't0' \(mask, no_mask\).* in 't1'"),
        ((MASKS, {1: "no_mask", 2: "mask"}), (), 2, r"^DATASETS.TRAIN: .*got \(no_mask, mask\) in 't1'"),
        ((MASKS,), ({2: "no_mask"},), 2, r"^DATASETS.TEST: expected the classes of the training \(mask, no_mask\)"),
        ((MASKS,), ({1: "no_mask", 2: "mask"},), 2, r"^DATASETS.TEST: .*got \(no_mask, mask\) in 'v0'"),
        ((MASKS,), (MASKS,), 80, r"^MODEL.ROI_HEADS.NUM_CLASSES: expected the number of classes .*'v0', 2 .*got 80$"),
        ((MASKS,), (MASKS,), 1, r"^MODEL.ROI_HEADS.NUM_CLASSES: expected the number of classes .*'v0', 2 .*got 1$"),
        ((MASKS, {7: "mask"}), (MASKS, {3: "mask", 4: "no_mask"}), 2, None),  # ids are a matter of each file
        (({1: "face"}, {1: "head"}), ({0: "person"},), 1, None),
    ],
    ids=["one missing", "permuted", "test: one missing", "test: permuted", "too many", "too few", "ids", "one class"],
)
def test_classes_that_do_not_fit(main, tmp_path, photos, no_training, train, test, count, message):
    coco = [write_coco(photos, f"t{i}", names) for i, names in enumerate(train)]
    coco += [write_coco(photos, f"v{i}", names) for i, names in enumerate(test)]
    opts = sets([f"t{i}" for i in range(len(train))], [f"v{i}" for i in range(len(test))], coco=coco)
    with pytest.raises(ConfigError if message else AssertionError, match=message or NO_TRAINING):
        run_two_stage(main, tmp_path, *opts, "MODEL.ROI_HEADS.NUM_CLASSES", count)


def test_a_single_stage_detector_says_that_classes_are_one(main, tmp_path, photos, no_training, out):
    coco = [write_coco(photos, "t", MASKS), write_coco(photos, "v", MASKS)]
    with pytest.raises(AssertionError, match=NO_TRAINING):
        run(main, tmp_path, *sets(["t"], ["v"], coco=coco))
    said = "'v' has the classes mask, no_mask; this single-stage detector does not tell classes apart"
    assert said in (out / "log.txt").read_text()


def test_weights_to_evaluate(main, tmp_path, photos, out):
    """Random ones are refused, and those that know other classes."""
    coco = [write_coco(photos, "t", MASKS), write_coco(photos, "v", {1: "no_mask", 2: "mask"})]
    opts = [*sets(["t"], [], coco=coco), "MODEL.ROI_HEADS.NUM_CLASSES", 2, "SOLVER.MAX_ITER", 1]
    opts += ["SOLVER.STEPS", "()"]
    run_two_stage(main, tmp_path, *opts)
    before = sorted(path.name for path in out.iterdir())
    for resume, folder in ((False, out), (True, tmp_path / "empty")):
        with pytest.raises(ConfigError, match=r"^--eval-only: expected a checkpoint in MODEL.WEIGHTS, or --resume"):
            test = [*opts, "DATASETS.TEST", "('t',)", "OUTPUT_DIR", folder]
            run_two_stage(main, tmp_path, *test, eval_only=True, resume=resume)
    with pytest.raises(ConfigError, match=r"^DATASETS.TEST: expected a data set to evaluate"):
        run_two_stage(main, tmp_path, *opts, eval_only=True, resume=True)
    assert sorted(path.name for path in out.iterdir()) == before
    with pytest.raises(ConfigError, match=r"^DATASETS.TEST: expected the classes of the training \(mask, no_mask\)"):
        run_two_stage(main, tmp_path, *opts, "DATASETS.TEST", "('v',)", eval_only=True, resume=True)
    assert run_two_stage(main, tmp_path, *opts, "DATASETS.TEST", "('t',)", eval_only=True, resume=True)
