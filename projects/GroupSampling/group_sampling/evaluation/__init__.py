"""Evaluation of detections: WIDER FACE's, FDDB's and COCO's protocols and prediction files. Torch is not imported."""

from .coco import CocoAP, CocoResult
from .fddb.files import read_fddb_predictions, write_fddb_predictions
from .fddb.roc import FDDBResult, FDDBRoc
from .wider_face.ap import WiderFaceAP, WiderFaceResult
from .wider_face.files import read_predictions, write_predictions

__all__ = [
    "CocoAP",
    "CocoResult",
    "FDDBResult",
    "FDDBRoc",
    "WiderFaceAP",
    "WiderFaceResult",
    "read_fddb_predictions",
    "read_predictions",
    "write_fddb_predictions",
    "write_predictions",
]
