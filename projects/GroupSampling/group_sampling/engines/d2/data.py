"""The project's data sets in Detectron2's catalogs, and its mapper."""

import functools

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from ...data.catalog import Catalog, Source
from ...data.images import read_image
from ...data.records import ImageRecord
from ...data.transforms import TestTransform, TrainTransform
from ..build import build_test_transform, build_train_transform


def to_dataset_dict(record: ImageRecord) -> dict:
    """The record in Detectron2's standard format; ignore regions are annotations with ``iscrowd`` 1."""
    result = {"file_name": record.file_name, "image_id": record.image_id}
    if record.height is not None:
        result.update(height=record.height, width=record.width)
    result["annotations"] = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, "iscrowd": int(ignore)}
        for box, category, ignore in zip(record.boxes.tolist(), record.classes.tolist(), record.ignore.tolist())
    ]
    return result


def to_record(dataset_dict: dict) -> ImageRecord:
    """The inverse of :func:`to_dataset_dict`; takes the dicts of any Detectron2 data set."""
    annotations = dataset_dict.get("annotations", [])
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    return ImageRecord(
        file_name=dataset_dict["file_name"],
        image_id=str(dataset_dict["image_id"]),
        height=dataset_dict.get("height"),
        width=dataset_dict.get("width"),
        boxes=np.asarray(boxes, dtype=np.float32).reshape(-1, 4),
        classes=np.asarray([a["category_id"] for a in annotations], dtype=np.int64),
        ignore=np.asarray([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool),
    )


def _load_dicts(source: Source) -> list[dict]:
    MetadataCatalog.get(source.name).thing_classes = list(source.class_names)
    return [to_dataset_dict(record) for record in source.records]


def register_datasets(cfg=None) -> None:
    """Register the built-in data sets, and those that ``cfg.DATASETS`` declares, in Detectron2's catalogs.

    Reads no file: a data set and its class names are read when it is used. Registering again replaces what this project
    registered before.
    """
    catalog = Catalog(None if cfg is None else cfg.DATASETS)
    for name in catalog.names:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        DatasetCatalog.register(name, functools.partial(_load_dicts, catalog[name]))
        MetadataCatalog.get(name).set(evaluator_type="wider_face")


class GroupSamplingMapper:
    """Dataset dict to model input: scale jitter, crop and flip of the paper (Sec. 5), or the resize of the test.

    Faces of which too little is left after the crop are dropped; ``iscrowd`` annotations become ``ignore_boxes``.
    """

    @configurable
    def __init__(self, *, transform: TrainTransform | TestTransform, is_train: bool):
        self.transform = transform
        self.is_train = is_train

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        return {"transform": (build_train_transform if is_train else build_test_transform)(cfg), "is_train": is_train}

    def __call__(self, dataset_dict: dict) -> dict:
        """The random draw comes from numpy's global generator, which Detectron2 seeds in every worker."""
        record = to_record(dataset_dict)
        image = read_image(record)
        if not self.is_train:
            return self.to_test_example(self.transform.apply_image(image), image.shape[:2], record)
        rng = np.random.default_rng(np.random.randint(2**31))
        out = self.transform(image, record.boxes, record.ignore, record.classes, rng)
        return self.to_example(out.image, out.boxes, out.classes, out.ignore_boxes, record)

    @staticmethod
    def to_example(image, boxes, classes, ignore_boxes, record: ImageRecord, draw: int | None = None) -> dict:
        """The input of a training step from what the core's loader gives."""
        height, width = image.shape[:2]
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.as_tensor(boxes))
        instances.gt_classes = torch.as_tensor(classes)
        return {
            "image": _to_tensor(image),
            "instances": instances,
            "ignore_boxes": Boxes(torch.as_tensor(ignore_boxes)),
            "height": height,
            "width": width,
            "file_name": record.file_name,
            "image_id": record.image_id,
        }

    @staticmethod
    def to_test_example(image, original_size, record: ImageRecord) -> dict:
        """``original_size`` is (height, width) before the resize: detections are returned in its pixels."""
        return {
            "image": _to_tensor(image),
            "height": original_size[0],
            "width": original_size[1],
            "file_name": record.file_name,
            "image_id": record.image_id,
        }


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
