"""This project's evaluation as a Detectron2 evaluator."""

from detectron2.evaluation import DatasetEvaluator
from torch import nn

from ...data.records import ImageRecord
from ...evaluation.run import Evaluation
from .data import UNREADABLE, find_source
from .rcnn import to_detections


class GroupSamplingEvaluator(DatasetEvaluator):
    """The protocols of :class:`~group_sampling.evaluation.run.Evaluation`: WIDER FACE's, COCO's or FDDB's.

    Writes detections, results and curves to ``OUTPUT_DIR/inference/<data set>``. Works in several processes, each with
    its share of the images, under any of Detectron2's loops.

    Under ``Trainer.test`` an interrupted evaluation can be continued.

    Args:
        dataset_name: one of the config's or of Detectron2's catalog.
    """

    def __init__(self, cfg, dataset_name: str):
        self._cfg = cfg
        self._source = find_source(cfg, dataset_name)
        self._evaluation: Evaluation | None = None

    def start(self, model: nn.Module | None, *, resume: bool) -> list[ImageRecord]:
        """Begin an evaluation; returns the images that this process has to look at.

        Args:
            model: finished images are kept on disk, to be reused with the same weights; None: they are not.
            resume: continue an interrupted evaluation.
        """
        self._evaluation = Evaluation(self._cfg, self._source, model, resume=resume)
        return self._evaluation.share

    def reset(self) -> None:
        """Called by Detectron2's loop before the first image."""
        if self._evaluation is None:
            self.start(None, resume=False)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for image, output in zip(inputs, outputs):
            if UNREADABLE in image:
                self._evaluation.skip(image["file_name"], image[UNREADABLE])
                continue
            self._evaluation.add(str(image["image_id"]), to_detections(output).numpy())

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Returns ``{"wider_face": {"AP_all": ..., "AP@16": ...}}`` in percent on the main process, None elsewhere."""
        evaluation, self._evaluation = self._evaluation, None
        return evaluation.finish()
