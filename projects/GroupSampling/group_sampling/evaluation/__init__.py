"""Evaluation of detections: WIDER FACE's, FDDB's and COCO's protocols and prediction files. Torch is not imported."""

from .coco import CocoAP, CocoResult
from .fddb import FDDBResult, FDDBRoc
from .fddb_predictions import read_fddb_predictions, write_fddb_predictions
from .predictions import ImagePredictions, read_predictions, write_predictions
from .wider_face import WiderFaceAP, WiderFaceResult

__all__ = [
    "CocoAP",
    "CocoResult",
    "FDDBResult",
    "FDDBRoc",
    "ImagePredictions",
    "WiderFaceAP",
    "WiderFaceResult",
    "read_fddb_predictions",
    "read_predictions",
    "write_fddb_predictions",
    "write_predictions",
]
