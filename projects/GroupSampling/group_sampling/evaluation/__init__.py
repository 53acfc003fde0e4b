"""The protocols of WIDER FACE, FDDB and COCO, and their files of detections. Importing this package loads no torch."""

from .coco import CocoAP, CocoResult, read_coco_detections
from .fddb.files import read_fddb_predictions, write_fddb_predictions
from .fddb.result import FDDBResult
from .fddb.roc import FDDBRoc
from .wider_face.ap import WiderFaceAP
from .wider_face.files import read_predictions, write_predictions
from .wider_face.result import WiderFaceResult

__all__ = [
    "CocoAP",
    "CocoResult",
    "FDDBResult",
    "FDDBRoc",
    "WiderFaceAP",
    "WiderFaceResult",
    "read_coco_detections",
    "read_fddb_predictions",
    "read_predictions",
    "write_fddb_predictions",
    "write_predictions",
]
