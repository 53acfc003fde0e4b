"""WIDER FACE average precision as a Detectron2 evaluator."""

import detectron2.utils.comm as comm
from detectron2.evaluation import DatasetEvaluator

from ...data.catalog import load_dataset
from ..common import evaluate_detections


class WiderFaceEvaluator(DatasetEvaluator):
    """AP of All and of every anchor scale (Sec. 6.1), with ``TEST.WIDER_GROUND_TRUTH`` also Easy, Medium and Hard.

    Writes the detections in the official text format, ``results.json`` and ``pr_curves.png`` to
    ``OUTPUT_DIR/inference/<data set>``. Works in several processes: each evaluates its share.
    """

    def __init__(self, cfg, dataset_name: str):
        self._cfg = cfg
        self._dataset_name = dataset_name
        self._detections = {}

    def reset(self) -> None:
        self._detections = {}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for image, output in zip(inputs, outputs):
            instances = output["instances"].to("cpu")
            scales = instances.anchor_scales.numpy() if instances.has("anchor_scales") else None
            self._detections[image["image_id"]] = (
                instances.pred_boxes.tensor.numpy(),
                instances.scores.numpy(),
                scales,
            )

    def evaluate(self) -> dict | None:
        """Returns ``{"wider_face": {"AP_all": ..., "AP@16": ...}}`` in percent on the main process, None elsewhere."""
        gathered = comm.gather(self._detections)
        if not comm.is_main_process():
            return None
        detections = {image_id: found for share in gathered for image_id, found in share.items()}
        records = load_dataset(self._dataset_name, self._cfg.DATASETS)
        return {"wider_face": evaluate_detections(self._cfg, self._dataset_name, records, detections)}
