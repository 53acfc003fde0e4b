"""Evaluation of detections: the WIDER FACE protocol and its prediction files. NumPy only; torch is not imported."""

from .predictions import ImagePredictions, read_predictions, write_predictions
from .wider_face import WiderFaceAP, WiderFaceResult

__all__ = ["ImagePredictions", "WiderFaceAP", "WiderFaceResult", "read_predictions", "write_predictions"]
