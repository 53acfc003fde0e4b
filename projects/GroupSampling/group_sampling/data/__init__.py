"""Data sets as typed records, augmentation, and the loaders of both engines."""

from .catalog import MissingDatasetError, class_names, dataset_names, load_dataset, missing_paths
from .loader import Batch, TrainingStream, TrainLoader, build_test_loader, build_train_loader, filter_empty
from .records import AnnotationError, DataReport, ImageRecord, UnreadableImageError, read_image
from .transforms import Geometry, Sample, TestTransform, TrainTransform

__all__ = [
    "AnnotationError",
    "Batch",
    "DataReport",
    "Geometry",
    "ImageRecord",
    "MissingDatasetError",
    "Sample",
    "TestTransform",
    "TrainLoader",
    "TrainTransform",
    "TrainingStream",
    "UnreadableImageError",
    "build_test_loader",
    "build_train_loader",
    "class_names",
    "dataset_names",
    "filter_empty",
    "load_dataset",
    "missing_paths",
    "read_image",
]
