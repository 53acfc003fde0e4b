"""This project's evaluation as a Detectron2 evaluator."""

import detectron2.utils.comm as comm
import numpy as np
from detectron2.evaluation import DatasetEvaluator
from torch import nn

from ...data.catalog import Catalog
from ...data.records import ImageRecord
from ...detections import Detections
from ...evaluation.run import Evaluation, evaluate_detections


class GroupSamplingEvaluator(DatasetEvaluator):
    """WIDER FACE's average precision, and COCO's for data in its format, see :func:`evaluate_detections`.

    Writes detections, results and PR curves to ``OUTPUT_DIR/inference/<data set>``. Works in several processes, each
    with its share of the images, under any of Detectron2's loops. ``Trainer.test`` calls :meth:`start` before, and an
    interrupted evaluation can then be taken up.
    """

    def __init__(self, cfg, dataset_name: str):
        self._cfg = cfg
        self._dataset_name = dataset_name
        self._evaluation: Evaluation | None = None
        self._detections: dict[str, Detections] = {}

    def start(self, model: nn.Module, *, resume: bool) -> list[ImageRecord]:
        """Begin an evaluation that can be interrupted; returns the images that this process has to look at."""
        self._evaluation = Evaluation(
            self._cfg,
            self._dataset_name,
            Catalog(self._cfg.DATASETS)[self._dataset_name].records,
            model,
            resume=resume,
            rank=comm.get_rank(),
            world_size=comm.get_world_size(),
            all_gather=comm.all_gather,
            gather=comm.gather,
        )
        return self._evaluation.share

    def reset(self) -> None:
        self._detections = {}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for image, output in zip(inputs, outputs):
            found = output["instances"].to("cpu")
            detections = Detections(
                boxes=found.pred_boxes.tensor.numpy(),
                scores=found.scores.numpy(),
                classes=found.pred_classes.numpy() if found.has("pred_classes") else np.zeros(len(found), np.int64),
                anchor_scales=found.anchor_scales.numpy() if found.has("anchor_scales") else None,
            )
            if self._evaluation is not None:
                self._evaluation.add(str(image["image_id"]), detections)
            else:
                self._detections[str(image["image_id"])] = detections

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Returns ``{"wider_face": {"AP_all": ..., "AP@16": ...}}`` in percent on the main process, None elsewhere."""
        if self._evaluation is not None:
            evaluation, self._evaluation = self._evaluation, None
            return evaluation.finish()
        gathered = comm.gather(self._detections)
        if not comm.is_main_process():
            return None
        detections = {image_id: found for share in gathered for image_id, found in share.items()}
        records = Catalog(self._cfg.DATASETS)[self._dataset_name].records
        return evaluate_detections(self._cfg, self._dataset_name, records, detections)
