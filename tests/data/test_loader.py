import itertools
import logging

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from group_sampling.data.images import read_image, read_reduced
from group_sampling.data.loader import SkippedImage, TrainingStream, build_test_loader, build_train_loader, filter_empty
from group_sampling.data.records import ImageRecord
from group_sampling.data.synthetic import records
from group_sampling.data.synthetic_scene import Settings
from group_sampling.data.transforms import TestTransform, TrainTransform

SYNTHETIC = records("train", Settings(num_train=7, num_val=0, height=64, width=96, seed=0))
TRANSFORM = TrainTransform([0.25 * n for n in range(1, 9)], crop_size=(48, 48))


def to_example(image, boxes, classes, ignore_boxes, record, draw):
    return draw, record.image_id, record.height, record.width, image.tobytes(), boxes.tobytes(), len(ignore_boxes)


def id_and_draw(image, boxes, classes, ignore_boxes, record, draw):
    return draw, record.image_id


def tuple_of(*arguments):
    return arguments


def train_batches(count, images=SYNTHETIC, convert=to_example, **arguments):
    arguments = {"seed": 3, "images_per_batch": 2, "num_workers": 0, "max_bad_share": 0.1} | arguments
    loader = build_train_loader(images, TRANSFORM, convert, **arguments)
    return [list(batch) for batch in itertools.islice(loader, count)]


def make_record(file_name, image_id="x", boxes=(), ignore=None):
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    ignore = np.zeros(len(boxes), bool) if ignore is None else np.array(ignore, bool)
    return ImageRecord(str(file_name), image_id, None, None, boxes, np.zeros(len(boxes), np.int64), ignore)


@pytest.fixture
def files(tmp_path):
    """100 images, of which the 7 with a number divisible by 15 are broken."""
    found = []
    for index in range(100):
        path = tmp_path / f"{index}.png"
        if index % 15 == 0:
            path.write_text("broken")
        else:
            Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(path)
        found.append(make_record(path, str(index)))
    return found


BROKEN = {str(index) for index in range(0, 100, 15)}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(num_workers):
    assert train_batches(9, num_workers=num_workers) == train_batches(9)


def test_ranks_share_the_stream():
    whole = train_batches(6, images_per_batch=4)
    shares = [train_batches(6, rank=rank, world_size=2) for rank in range(2)]
    assert [first + second for first, second in zip(*shares)] == whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_stream_continues_where_it_stopped(num_workers):
    whole = train_batches(10, rank=1, world_size=3)
    assert train_batches(5, rank=1, world_size=3, start_batch=5, num_workers=num_workers) == whole[5:]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loaders_leave_the_global_generators_alone(num_workers):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    train_batches(2, num_workers=num_workers)
    list(build_test_loader(SYNTHETIC, TestTransform(0, 0), id_and_draw, num_workers=num_workers))
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_draws_are_numbered_and_depend_on_the_seed():
    batches = train_batches(4)
    assert [example[0] for batch in batches for example in batch] == list(range(8))
    assert train_batches(4, seed=4) != batches


def test_an_epoch_shows_every_image_once_in_its_own_order():
    ids = [image_id for ((_, image_id),) in train_batches(21, convert=id_and_draw, images_per_batch=1)]
    epochs = [ids[:7], ids[7:14], ids[14:]]
    assert all(set(epoch) == {record.image_id for record in SYNTHETIC} for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_examples_are_the_transform_of_what_was_read():
    ((example,),) = train_batches(1, images_per_batch=1)
    (record,) = [record for record in SYNTHETIC if record.image_id == example[1]]
    stream = TrainingStream(SYNTHETIC, TRANSFORM, tuple_of, seed=3, images_per_batch=1, max_bad_share=0)
    image, boxes, classes, ignore_boxes, seen, draw = next(iter(stream))[0]
    assert draw == 0 and seen.file_name == record.file_name and seen.boxes is record.boxes
    assert (seen.height, seen.width) == read_image(record).shape[:2]
    assert image.dtype == np.uint8 and image.shape[0] <= 48 and image.shape[1] <= 48
    assert boxes.dtype == np.float32 and len(boxes) == len(classes) and ignore_boxes.shape == (0, 4)


def test_images_without_faces_and_with_2000_faces():
    empty = make_record(SYNTHETIC[0].file_name)
    corner = np.random.default_rng(0).uniform(0, 50, (2000, 2))
    crowd = make_record(SYNTHETIC[0].file_name, boxes=np.concatenate([corner, corner + 12], axis=1))

    def counts(image, boxes, classes, ignore_boxes, record, draw):
        return len(boxes)

    assert train_batches(3, [empty], counts) == [[0, 0]] * 3
    assert min(itertools.chain(*train_batches(3, [crowd], counts))) > 200  # all 2,000, but for what the crop cuts off
    assert list(build_test_loader([crowd], TestTransform(0, 0), counts, num_workers=0)) == [2000]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_replaced_counted_and_warned_about_once(files, caplog, num_workers):
    arguments = {"seed": 0, "images_per_batch": 5, "max_bad_share": 0.1}
    loader = build_train_loader(files, TRANSFORM, id_and_draw, num_workers=num_workers, **arguments)
    with caplog.at_level(logging.WARNING):
        batches = list(itertools.islice(loader, 60))  # three epochs
    assert all(len(batch) == 5 for batch in batches)
    assert not BROKEN & {image_id for batch in batches for _, image_id in batch}
    assert set(loader.skipped_files) == {record.file_name for record in files if record.image_id in BROKEN}
    assert loader.num_skipped == sum(len(batch.skipped) for batch in batches) >= 21
    assert loader.num_draws == 300 + loader.num_skipped
    assert len(caplog.records) == 7
    for file, reason in loader.skipped_files.items():
        (message,) = [r.getMessage() for r in caplog.records if file in r.getMessage()]
        assert reason in message and "expected an image (BMP, GIF, " in reason
    expected = train_batches(60, files, id_and_draw, **arguments)
    assert [list(batch) for batch in batches] == expected


def test_skipped_draws_change_no_other_draw(files):
    """Only the draws of broken images differ from those of a set where all can be read."""
    whole = [files[1]] * 100
    mixed = [whole[i] if record.image_id not in BROKEN else record for i, record in enumerate(files)]
    expected = train_batches(100, whole, images_per_batch=1)
    got = train_batches(100, mixed, images_per_batch=1, max_bad_share=1.0)
    order = np.random.default_rng([3, 0, 0]).permutation(100)  # epoch 0 of seed 3
    for draw, (first, second) in enumerate(zip(got, expected)):
        if str(order[draw]) not in BROKEN:
            assert first == second


def test_above_the_share_training_stops_and_lists_the_files(files):
    with pytest.raises(RuntimeError, match=r"images drawn cannot be read; expected a share of at most 0\.02") as error:
        train_batches(1000, files, id_and_draw, max_bad_share=0.02)
    assert ".png: expected an image (" in str(error.value)


def test_a_few_bad_images_at_the_start_do_not_stop_a_run(files):
    first = [record for record in files if record.image_id in BROKEN][:4] + files[1:14]
    assert len(train_batches(3, first, id_and_draw, max_bad_share=0.0)) == 3


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_set_of_unreadable_images_is_an_error(tmp_path, num_workers):
    missing = [make_record(tmp_path / f"{index}.jpg") for index in range(30)]
    with pytest.raises(RuntimeError, match=r"20 images in a row cannot be read(.|\n)*\.jpg: no such file"):
        train_batches(1, missing, num_workers=num_workers, max_bad_share=1.0)


def test_a_long_list_of_files_is_cut(files, tmp_path):
    missing = [make_record(tmp_path / f"{index}.jpg") for index in range(300)] + files[1:14] * 20
    with pytest.raises(RuntimeError, match=r"\.\.\. and \d+ more"):
        train_batches(400, missing, id_and_draw, max_bad_share=0.3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_visits_each_image_once_in_order(num_workers):
    loader = build_test_loader(SYNTHETIC, TestTransform(0, 0), id_and_draw, num_workers=num_workers)
    assert list(loader) == [(index, record.image_id) for index, record in enumerate(SYNTHETIC)]
    assert len(loader) == len(SYNTHETIC)


def test_evaluation_gives_resized_boxes_and_the_original_record(tmp_path):
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "a.png")
    record = make_record(tmp_path / "a.png", boxes=[[0, 4, 30, 20], [6, 6, 12, 12]], ignore=[False, True])
    loader = build_test_loader([record], TestTransform(80, 1000), tuple_of, num_workers=0)
    ((image, boxes, classes, ignore_boxes, seen, draw),) = loader
    assert image.shape == (80, 120, 3)
    assert boxes.tolist() == [[0, 8, 60, 40]] and ignore_boxes.tolist() == [[12, 12, 24, 24]] and len(classes) == 1
    assert (seen.height, seen.width) == (40, 60) and seen.boxes is record.boxes and draw == 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_has_its_place_in_an_evaluation(files, num_workers):
    loader = build_test_loader(files[:3], TestTransform(0, 0), id_and_draw, num_workers=num_workers)
    first, *others = loader
    assert isinstance(first, SkippedImage) and first.file == files[0].file_name and first.reason
    assert others == [(1, "1"), (2, "2")]


def test_filter_empty_keeps_images_with_a_face():
    images = [
        make_record("a"),
        make_record("b", boxes=[[0, 0, 1, 1]]),
        make_record("c", boxes=[[0, 0, 1, 1]], ignore=[True]),
        make_record("d", boxes=[[0, 0, 1, 1]] * 2, ignore=[True, False]),
    ]
    assert [record.file_name for record in filter_empty(images)] == ["b", "d"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"images": []}, "records: expected at least one image"),
        ({"images_per_batch": 0}, "images_per_batch: expected at least 1"),
        ({"rank": 2, "world_size": 2}, "expected 0 <= rank < world_size, got rank 2 of 2"),
        ({"start_batch": -1}, "expected start_batch >= 0"),
        ({"max_bad_share": 2}, "max_bad_share: expected a share"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_batches(1, **arguments)


# -- JPEGs decoded at a fraction of their size ------------------------------------------------------------------------


def photograph(path, orientation=1, **options):
    """A smooth picture of 160 x 242 pixels, as stored."""
    rows, columns = np.mgrid[0:160, 0:242]
    waves = [np.sin(rows / 17 + k) + np.cos(columns / (11 + k)) + 0.2 * np.sin(rows * columns / 900) for k in range(3)]
    pixels = (128 + 50 * np.stack(waves, axis=2)).clip(0, 255).astype(np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **options)


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("scale, divisor", [(0.2, 4), (0.25, 4), (0.3, 2), (0.5, 2), (0.6, 1), (1.0, 1), (2.0, 1)])
def test_a_jpeg_is_decoded_as_small_as_it_may_be(scale, divisor, orientation, tmp_path):
    photograph(tmp_path / "a.jpg", orientation, quality=95)
    entry = make_record(tmp_path / "a.jpg")
    whole, (image, size) = read_image(entry), read_reduced(entry, scale)
    assert size == whole.shape[:2] == ((242, 160) if orientation == 6 else (160, 242))
    assert image.shape[:2] == tuple(-(-side // divisor) for side in size)
    if divisor == 1:
        assert np.array_equal(image, whole)


@pytest.mark.parametrize("options, tolerance", [({"quality": 95}, 3.0), ({"format": "PNG"}, 0.0)], ids=["jpeg", "png"])
def test_a_reduced_stream_has_the_geometry_of_the_whole_one(options, tolerance, tmp_path):
    """Boxes, sizes and records are equal. So are pixels that were not shrunk to a half or less; of a JPEG the others
    differ by three levels on average at most: it is averaged in blocks of 2 x 2 or 4 x 4 first."""
    photograph(tmp_path / "a.jpg", **options)
    entry = make_record(tmp_path / "a.jpg", boxes=[[20, 30, 90, 100], [100, 20, 180, 90]])
    transform = TrainTransform((0.2, 0.25, 0.4, 0.5, 1.0, 1.5), crop_size=(60, 60))
    differences = {}
    for draw in range(24):
        whole, reduced = (
            TrainingStream(
                [entry], transform, tuple_of, seed=5, images_per_batch=1, max_bad_share=0, reduce_jpeg=reduce_jpeg
            ).batch(draw)[0]
            for reduce_jpeg in (False, True)
        )
        scale = transform.draw_scale(np.random.default_rng([5, 1, draw]))
        for a, b in zip(whole[1:4], reduced[1:4]):
            assert np.array_equal(a, b)
        assert (whole[4].height, whole[4].width) == (reduced[4].height, reduced[4].width) == (160, 242)
        assert whole[0].shape == reduced[0].shape
        difference = np.abs(whole[0].astype(int) - reduced[0]).mean()
        differences[scale] = max(differences.get(scale, 0), difference)
    assert differences.keys() == set(transform.scales)
    assert all(value <= (tolerance if scale <= 0.5 else 0) for scale, value in differences.items()), differences
    assert tolerance == 0 or max(differences.values()) > 0
