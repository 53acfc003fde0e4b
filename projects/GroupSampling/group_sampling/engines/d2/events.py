"""What Detectron2's trainer does to be watched, through its events."""

import functools
from collections import defaultdict
from collections.abc import Callable

import detectron2.utils.comm as comm
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from ...checkpointer import CheckpointMixin
from ...evaluation.examples import read_examples
from ..build import LOG_PERIOD
from ..monitoring import BestModel, ValidationLoss, WandbRun
from .data import GroupSamplingMapper, find_source


class EvaluationWatch:
    """What follows every evaluation of a training: validation loss, pictures of detections, best model.

    All processes have to construct and call it together.

    Attributes:
        best: the best model so far.
    """

    def __init__(self, cfg: CfgNode, checkpointer: CheckpointMixin) -> None:
        self._cfg = cfg
        self.best = BestModel(cfg, checkpointer)
        self._validation = None
        if cfg.TEST.VALIDATION_LOSS:
            records = [record for name in cfg.DATASETS.TEST for record in find_source(cfg, name).records]
            self._validation = ValidationLoss(cfg, records, GroupSamplingMapper.to_example)

    def __call__(self, iteration: int, model: nn.Module, results: dict) -> None:
        """
        Args:
            iteration: the last one of the training.
            results: of the evaluation, on the main process; "validation" is added.

        Raises:
            ConfigError: ``TEST.BEST_CHECKPOINTER.METRIC`` is not among the results.
        """
        if self._validation:
            model = getattr(model, "module", model)
            losses = self._validation(model, functools.partial(_validation_losses, model))
            results.update({"validation": losses} if comm.is_main_process() else {})
        if comm.is_main_process():
            for name, picture in read_examples(self._cfg).items():
                get_event_storage().put_image(name, picture.transpose(2, 0, 1))
        self.best.update(iteration, flatten_results_dict(results))


def _validation_losses(model: nn.Module, example: dict, draw: int) -> dict[str, Tensor]:
    """Of one image, with the samples of iteration ``draw``; what it logs is left out."""
    with EventStorage(draw):
        return model([example])


class WandbWriter(EventWriter):
    """Writes scalars, smoothed as Detectron2's writers do, and pictures to the project ``LOGGING.WANDB``.

    It has to come before the writer of TensorBoard, which removes the pictures.

    Args:
        has_resumed: whether the training has; asked for when it writes first.
    """

    def __init__(self, cfg: CfgNode, has_resumed: Callable[[], bool]) -> None:
        self._cfg = cfg
        self._has_resumed = has_resumed
        self._run: WandbRun | None = None
        self._last_write = -1

    def write(self) -> None:
        storage = get_event_storage()
        if self._run is None:
            self._run = WandbRun(self._cfg, resume=self._has_resumed())
        scalars: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in storage.latest_with_smoothing_hint(LOG_PERIOD).items():
            if iteration > self._last_write:
                scalars[iteration][name] = value
        for iteration in sorted(scalars):
            self._run.log(iteration, scalars[iteration])
            self._last_write = iteration
        for name, picture, iteration in storage._vis_data:  # as Detectron2's writer of TensorBoard reads them
            self._run.log_images(iteration, {name: picture.transpose(1, 2, 0)})

    def close(self) -> None:
        if self._run is not None:
            self._run.close()
