"""The project's data sets in Detectron2's catalogs, Detectron2's in the project's, and the mapper."""

import functools
import io
import os
from collections.abc import Callable, Iterator, Sized

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.file_io import PathHandler, PathManager
from PIL import Image
from torch import Tensor

from ...data import synthetic
from ...data.catalog import Catalog, Source
from ...data.images import read_image
from ...data.records import ImageRecord, UnreadableImageError
from ...data.transforms import TestTransform, TrainTransform
from ..build import build_test_transform, build_train_transform

UNREADABLE = "group_sampling_unreadable"  # the key of a model's input for an image that cannot be read
_RECORD = "group_sampling_record"  # the key of a dataset dict under which its record travels


class IgnoringInstances(Instances):
    """The ground truth of an image, and the regions that are neither an object nor background.

    The regions, a ``Boxes`` of any length, are no field, since fields have one entry per object: components of
    Detectron2 see the objects alone, and this project's, in any meta-architecture, :func:`ignore_boxes_of`.
    """

    def __init__(self, image_size: tuple[int, int], ignore_boxes: Boxes, **fields):
        super().__init__(image_size, **fields)
        self._ignore_boxes = ignore_boxes

    @property
    def ignore_boxes(self) -> Boxes:
        return self._ignore_boxes

    def to(self, device: torch.device | str) -> "IgnoringInstances":
        """Moves fields and regions; from pinned memory (:meth:`pin_memory`) to a GPU without waiting for it."""
        is_async = torch.device(device).type != "cpu"  # the other way, numbers could be read before they arrive
        return self._map(lambda tensor: tensor.to(device, non_blocking=is_async))

    def pin_memory(self) -> "IgnoringInstances":
        """A copy in pinned memory; a ``DataLoader`` calls it."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "IgnoringInstances":
        def apply(value):
            if isinstance(value, Boxes):
                return Boxes(function(value.tensor))
            return function(value) if isinstance(value, Tensor) else value

        fields = {name: apply(value) for name, value in self.get_fields().items()}
        return IgnoringInstances(self.image_size, apply(self._ignore_boxes), **fields)

    def __getitem__(self, item) -> "IgnoringInstances":
        """Selects objects; the regions stay."""
        return IgnoringInstances(self.image_size, self._ignore_boxes, **super().__getitem__(item).get_fields())


def ignore_boxes_of(targets: list[Instances]) -> list[Tensor]:
    """Per image the (k, 4) ignore regions of its ground truth; of plain ``Instances`` k is 0."""
    return [x.ignore_boxes.tensor if isinstance(x, IgnoringInstances) else x.gt_boxes.tensor[:0] for x in targets]


def to_dataset_dict(record: ImageRecord) -> dict:
    """The record in Detectron2's standard format; ignore regions are annotations with ``iscrowd`` 1."""
    result = {"file_name": record.file_name, "image_id": record.image_id, _RECORD: record}
    if record.height is not None:
        result.update(height=record.height, width=record.width)
    result["annotations"] = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, "iscrowd": int(ignore)}
        for box, category, ignore in zip(record.boxes.tolist(), record.classes.tolist(), record.ignore.tolist())
    ]
    return result


def to_record(dataset_dict: dict) -> ImageRecord:
    """The record of a dict of any of Detectron2's data sets; that of :func:`to_dataset_dict` is in the dict."""
    if _RECORD in dataset_dict:
        return dataset_dict[_RECORD]
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


class RegisteredSource(Source):
    """A data set that other code has registered in Detectron2's catalog.

    Its protocol is "wider_face" if it has a single class, else "detectron2": the one of ``COCOEvaluator``.
    """

    @property
    def protocol(self) -> str:
        return "wider_face" if len(self.categories) == 1 else "detectron2"

    @property
    def categories(self) -> dict[int, str]:
        return self._parsed.categories

    def _read(self, report):
        records = [to_record(dataset_dict) for dataset_dict in DatasetCatalog.get(self.name)]
        report.num_images, report.num_boxes = len(records), sum(len(record.boxes) for record in records)
        # Asked for last: to load a data set may register its classes.
        return records, dict(enumerate(MetadataCatalog.get(self.name).get("thing_classes", ["object"])))


def find_source(cfg: CfgNode, name: str) -> Source:
    """A data set of the config or, with its images and annotations, of Detectron2's catalog.

    Raises:
        ValueError: neither has this name.
    """
    catalog = Catalog(cfg.DATASETS)
    if name in catalog.names or name not in DatasetCatalog.list():
        return catalog[name]
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") == "coco" and metadata.get("json_file"):
        paths = map(os.path.abspath, (metadata.json_file, metadata.image_root))
        return Catalog({"COCO_FORMAT": [[name, *paths]], "APPLY_EXIF": cfg.DATASETS.APPLY_EXIF})[name]
    source = RegisteredSource(name)
    source.apply_exif = cfg.DATASETS.APPLY_EXIF
    return source


def _load_dicts(source: Source) -> list[dict]:
    MetadataCatalog.get(source.name).thing_classes = list(source.class_names)
    return [to_dataset_dict(record) for record in source.records]


def register_datasets(cfg: CfgNode | None = None) -> None:
    """Register the built-in data sets, and those that ``cfg.DATASETS`` declares, in Detectron2's catalogs.

    Reads no file: a data set is read when it is used, and so are the class names of one in COCO's format. Those of the
    others are set at once. With ``cfg`` a name that is registered already is replaced.
    """
    catalog = Catalog(None if cfg is None else cfg.DATASETS)
    for name in catalog.names:
        if name in DatasetCatalog.list():
            if cfg is None:
                continue
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name, None)
        source = catalog[name]
        DatasetCatalog.register(name, functools.partial(_load_dicts, source))
        MetadataCatalog.get(name).evaluator_type = "coco"  # what Detectron2's own scripts evaluate it by
        if source.protocol != "coco":
            MetadataCatalog.get(name).thing_classes = list(source.class_names)


class SyntheticHandler(PathHandler):
    """Lets Detectron2's ``PathManager`` open a procedural image by its address, as a PNG file."""

    def _get_supported_prefixes(self) -> list[str]:
        return ["synthetic://"]

    def _isfile(self, path: str, **kwargs) -> bool:
        return True

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs) -> io.BytesIO:
        if mode != "rb":
            raise ValueError(f'{path}: expected mode "rb", got {mode!r}')
        file = io.BytesIO()
        Image.fromarray(synthetic.render(path)).save(file, "PNG")
        file.seek(0)
        return file


PathManager.register_handler(SyntheticHandler(), allow_override=True)
register_datasets()


class GroupSamplingMapper:
    """Dataset dict to model input: scale jitter, crop and flip of the paper (Sec. 5), or the resize of the test.

    Faces that the crop leaves too little of are dropped; ``iscrowd`` annotations become ignore regions
    (:class:`IgnoringInstances`).
    """

    @configurable
    def __init__(self, *, transform: TrainTransform | TestTransform, is_train: bool, skip_unreadable: bool = False):
        """
        Args:
            skip_unreadable: give a black image with the reason under :data:`UNREADABLE` instead of raising, since
                Detectron2's loop has to be given an image.
        """
        self.transform = transform
        self.skip_unreadable = skip_unreadable
        self.is_train = is_train

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        return {"transform": (build_train_transform if is_train else build_test_transform)(cfg), "is_train": is_train}

    def __call__(self, dataset_dict: dict) -> dict:
        """The random draw comes from numpy's global generator, which Detectron2 seeds in every worker."""
        record = to_record(dataset_dict)
        try:
            image = read_image(record)
        except UnreadableImageError as error:
            if not self.skip_unreadable:
                raise
            black = np.zeros((64, 64, 3), dtype=np.uint8)
            example = self.to_test_example(black, black.shape[:2], record)
            return {**example, "image_id": dataset_dict["image_id"], UNREADABLE: error.reason}
        if self.is_train:
            rng = np.random.default_rng(np.random.randint(2**31))
            out = self.transform(image, record.boxes, record.ignore, record.classes, rng)
            example = self.to_example(out.image, out.boxes, out.classes, out.ignore_boxes, record)
        else:
            example = self.to_test_example(self.transform.apply_image(image), image.shape[:2], record)
        return {**example, "image_id": dataset_dict["image_id"]}  # of the type that Detectron2's evaluators expect

    @staticmethod
    def to_example(image, boxes, classes, ignore_boxes, record: ImageRecord, draw: int | None = None) -> dict:
        """The input of a training step from what the core's loader gives."""
        instances = IgnoringInstances(
            image.shape[:2],
            Boxes(torch.as_tensor(ignore_boxes)),
            gt_boxes=Boxes(torch.as_tensor(boxes)),
            gt_classes=torch.as_tensor(classes),
        )
        return {**GroupSamplingMapper.to_test_example(image, image.shape[:2], record), "instances": instances}

    @staticmethod
    def to_test_example(image, original_size, record: ImageRecord) -> dict:
        """``original_size`` is (height, width) before the resize: detections are returned in its pixels."""
        return {
            "image": torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1))),
            "height": original_size[0],
            "width": original_size[1],
            "file_name": record.file_name,
            "image_id": record.image_id,
        }


class SingleImages:
    """The images of a loader of batches of one."""

    def __init__(self, loader: Sized):
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict]:
        for (image,) in self._loader:
            yield image
