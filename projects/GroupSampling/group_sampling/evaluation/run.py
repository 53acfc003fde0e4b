"""Evaluation of a detector on a data set, for both engines: in several processes, and resumable."""

import hashlib
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from fvcore.common.config import CfgNode
from torch import nn

from .. import distributed
from ..data.catalog import Source
from ..data.loader import BadDataError, list_files, too_many
from ..data.records import ImageRecord
from ..detections import Detections
from ..errors import UserError
from ..files import write_json
from ..version import __version__
from .coco import CocoAP, read_coco_detections, write_coco_detections
from .examples import write_examples
from .fddb.files import read_fddb_predictions, write_fddb_predictions
from .fddb.roc import FDDBRoc
from .results import Metric
from .resume import PartialDetections
from .wider_face.ap import WiderFaceAP
from .wider_face.files import read_predictions, write_predictions
from .wider_face.ground_truth import find_official_ground_truth

logger = logging.getLogger(__name__)

TIMES_FILE = "seconds.json"
_NUM_SLOWEST = 20


class Evaluation:
    """One pass of a detector over a data set.

    Every process detects on the images of :attr:`share` and passes what it found to :meth:`add`, or an image that
    cannot be read to :meth:`skip`; the main process
    scores all of it in :meth:`finish`. Until the results are written, finished images are kept in
    ``OUTPUT_DIR/inference/<data set>/partial``, so that any number of processes can continue an interrupted evaluation.

    All processes have to construct it and to call :meth:`finish` together.

    Args:
        source: the data set.
        model: saved detections are reused only if they were made with these weights. None: nothing is saved.
        resume: reuse what an interrupted evaluation of the same weights, configuration and images has finished.
            Otherwise its files are removed.
        images_per_file: finished images are saved when there are this many, and after a few seconds.

    Attributes:
        share: the images that this process has to look at.
    """

    def __init__(
        self,
        cfg: CfgNode,
        source: Source,
        model: nn.Module | None,
        *,
        resume: bool,
        images_per_file: int = 64,
    ) -> None:
        self._cfg = cfg
        self._source = source
        self._detections: dict[str, Detections] = {}
        self._unreadable: dict[str, str] = {}  # file -> reason
        self._seconds: dict[str, float] = {}
        self._last_end: float | None = None  # of an image
        self._partial: PartialDetections | None = None
        name, records = source.name, source.records
        if model is not None:
            self._partial = PartialDetections(
                os.path.join(_folder(cfg, name), "partial"),
                _fingerprint(cfg, name, records, model),
                max_images=images_per_file,
            )
        if self._partial and distributed.rank() == 0:
            if resume:
                self._detections = self._partial.read()
                if self._detections:
                    logger.info(
                        f"{name}: continuing an interrupted evaluation, which has finished {len(self._detections)} of "
                        f"{len(records)} images"
                    )
            elif self._partial.exist():
                logger.info(f"{name}: starting from the first image; --resume would continue an interrupted evaluation")
            if not self._detections:
                self._partial.remove()
        # Rank 0 decides and broadcasts, because ranks may see the folder at different moments; and no rank writes
        # before rank 0 has removed what is outdated.
        done = set(distributed.broadcast(list(self._detections)))
        todo = [record for record in records if record.image_id not in done]
        self.share = todo[distributed.rank() :: distributed.world_size()]

    def add(self, image_id: str, detections: Detections) -> None:
        """Note what was found in an image."""
        self._detections[image_id] = detections
        if self._last_end is not None:  # before the first image, workers start and kernels are chosen
            self._seconds[image_id] = time.perf_counter() - self._last_end
        if self._partial:
            self._partial.add(image_id, detections)
        self._last_end = time.perf_counter()

    def skip(self, file: str, reason: str) -> None:
        """Note that an image of the share cannot be read: it counts as one without detections.

        Raises:
            BadDataError: there are more than ``DATALOADER.MAX_BAD_SHARE`` of the images.
        """
        self._unreadable[file] = reason
        self._last_end = time.perf_counter()
        allowed = self._cfg.DATALOADER.MAX_BAD_SHARE
        if too_many(len(self._unreadable), len(self._source.records), allowed):
            raise BadDataError(
                f"{self._source.name}: {len(self._unreadable)} of {len(self._source.records)} images cannot be read; "
                f"expected a share of at most {allowed:g}. Got:\n{list_files(self._unreadable)}"
            )

    def finish(self) -> dict[str, dict[str, float]] | None:
        """Score the detections of all processes and write the results, see :func:`evaluate_detections`.

        Returns:
            The metrics on the main process, None elsewhere.
        """
        if self._partial:
            self._partial.write()
        unreadable = {file: reason for share in distributed.gather(self._unreadable) for file, reason in share.items()}
        gathered = distributed.gather(self._detections)
        seconds = {image_id: value for share in distributed.gather(self._seconds) for image_id, value in share.items()}
        if distributed.rank() != 0:
            return None
        found = {image_id: detections for share in gathered for image_id, detections in share.items()}
        # In the order of the data set, whoever found them: results do not depend on the number of processes.
        ids = [record.image_id for record in self._source.records]
        detections = {image_id: found[image_id] for image_id in ids if image_id in found}
        results = evaluate_detections(self._cfg, self._source, detections)
        write_json(os.path.join(_folder(self._cfg, self._source.name), TIMES_FILE), _summarize(seconds))
        if self._partial:
            self._partial.remove()
        if unreadable:
            logger.warning(
                f"{self._source.name}: {len(unreadable)} of {len(ids)} images cannot be read and count as images "
                f"without detections:\n{list_files(unreadable)}"
            )
        return results


def check_ground_truth(cfg: CfgNode, source: Source) -> None:
    """Build what detections will be scored against, so that its errors come before the detections.

    Raises:
        UserError: the ground truth cannot be used, or it lacks images of the data set.
    """
    for name in _protocols(cfg, source):
        try:
            metric = PROTOCOLS[name].build(cfg, source)
        except ValueError as error:
            raise UserError(f"{source.name}: {error}") from error
        known = metric.image_ids if isinstance(metric, WiderFaceAP) else ()  # may be files of their own
        missing = [record.image_id for record in source.records if known and record.image_id not in known]
        if missing:
            raise UserError(
                f"{source.name}: {len(missing)} of its {len(source.records)} images are not in the ground truth "
                f'({missing[0]!r}, ...); TEST.WIDER_GROUND_TRUTH "" takes the annotations of the data set'
            )


def _protocols(cfg: CfgNode, source: Source) -> list[str]:
    if source.protocol not in PROTOCOLS:  # Detectron2 evaluates it
        return []
    is_single = source.protocol == "coco" and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1
    return [source.protocol, "wider_face"] if is_single else [source.protocol]


def evaluate_detections(cfg: CfgNode, source: Source, detections: dict[str, Detections]) -> dict[str, dict[str, float]]:
    """Score a data set's detections and write results, detections and PR curves under ``OUTPUT_DIR/inference``.

    A data set in COCO's format gets COCO's average precision, and with a single class that of WIDER FACE as well; FDDB
    gets its ROC; every other one the average precision of WIDER FACE.

    Args:
        detections: by image id; images without an entry count as empty.

    Returns:
        Metrics in percent by protocol. "wider_face": ``AP_all``; with the official files also ``AP_easy``,
        ``AP_medium`` and ``AP_hard``; with detections of sub-detectors ``AP@16``, ... "coco": ``AP``, ``AP50``,
        ``AP75``, ``APs``, ``APm``, ``APl``, ``AR``, and ``AP-<class>`` where there are several classes. "fddb":
        ``discrete@n`` and ``continuous@n``, the true positive rates at n = 200, 500 and 1,000 false positives, and with
        ``_fitted`` those of ellipses.
    """
    folder = _folder(cfg, source.name)
    missing = len(source.records) - len(detections)
    if missing:
        logger.warning(
            f"{source.name}: {missing} of {len(source.records)} images have no detections of this model and count as "
            "empty"
        )
    metrics = {}
    for name in _protocols(cfg, source):
        protocol = PROTOCOLS[name]
        metric = protocol.build(cfg, source)
        for image_id, found in detections.items():
            metric.update(image_id, found)
        result = metric.compute()
        protocol.write_detections(folder, source, detections)
        write_json(os.path.join(folder, protocol.results), result.to_dict())
        result.plot(os.path.join(folder, protocol.plot))
        logger.info(f"{source.name}: {len(detections)} images; results in {folder}\n{result.table()}")
        metrics[name] = result.metrics()
    write_examples(cfg, source, detections)
    return metrics


def _summarize(seconds: Mapping[str, float]) -> dict[str, Any]:
    """For JSON: from one image to the next of a process, reading included."""
    slowest = sorted(seconds, key=lambda image_id: -seconds[image_id])[:_NUM_SLOWEST]
    return {
        "images": len(seconds),
        "median": statistics.median(seconds.values()) if seconds else None,
        "slowest": {image_id: seconds[image_id] for image_id in slowest},
    }


class Protocol(NamedTuple):
    """How detections are evaluated, and the files that an evaluation leaves in its folder."""

    build: Callable[[CfgNode, Source], Metric]
    write_detections: Callable[[str, Source, Mapping[str, Detections]], None]
    read_detections: Callable[[str, Source], dict[str, Detections]]  # classes are unknown but for COCO's
    results: str
    plot: str


def _build_wider_face(cfg: CfgNode, source: Source) -> WiderFaceAP:
    ground_truth = _official_ground_truth(cfg, source)
    return WiderFaceAP.from_official(ground_truth) if ground_truth else WiderFaceAP.from_records(source.records)


def _build_coco(cfg: CfgNode, source: Source) -> CocoAP:
    return CocoAP(source.records, source.categories, max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE)


def _build_fddb(cfg: CfgNode, source: Source) -> FDDBRoc:
    return FDDBRoc.from_records(source.records)


def _write_wider_face(folder: str, source: Source, detections: Mapping[str, Detections]) -> None:
    """A result set in ``predictions``, and of each sub-detector in ``predictions@<scale>``."""
    for image_id, found in detections.items():
        write_predictions(os.path.join(folder, "predictions"), image_id, found.boxes, found.scores, is_stem=True)
        for scale, alone in (found.sub_detectors or {}).items():
            folder_of_scale = os.path.join(folder, f"predictions@{scale:g}")
            write_predictions(folder_of_scale, image_id, alone.boxes, alone.scores, is_stem=True)


def _read_wider_face(folder: str, source: Source) -> dict[str, Detections]:
    ids = {record.image_id for record in source.records}
    return dict(read_predictions(os.path.join(folder, "predictions"), images=ids))


def _official_ground_truth(cfg: CfgNode, source: Source) -> str | os.PathLike | None:
    """The folder that ``TEST.WIDER_GROUND_TRUTH`` names or, with "auto", that lies with the data set; else nothing."""
    if cfg.TEST.WIDER_GROUND_TRUTH != "auto":
        return cfg.TEST.WIDER_GROUND_TRUTH
    if source.name != "wider_face_val":  # Easy, Medium and Hard are of the whole validation set
        return None
    annotations = source.paths[0]  # WIDER_FACE/wider_face_split/...
    dataset = os.path.dirname(os.path.dirname(annotations))
    folder = find_official_ground_truth(dataset)
    if folder is None:
        logger.info(f"{source.name}: no Easy, Medium and Hard, since {dataset}/ground_truth has no official files")
    return folder


def _write_coco(folder: str, source: Source, detections: Mapping[str, Detections]) -> None:
    write_coco_detections(os.path.join(folder, "coco_instances_results.json"), source.categories, detections)


def _read_coco(folder: str, source: Source) -> dict[str, Detections]:
    return read_coco_detections(os.path.join(folder, "coco_instances_results.json"), source.categories)


def _read_fddb(folder: str, source: Source) -> dict[str, Detections]:
    return dict(read_fddb_predictions(os.path.join(folder, "predictions")))


def _write_fddb(folder: str, source: Source, detections: Mapping[str, Detections]) -> None:
    images = [record.annotation for record in source.records]
    write_fddb_predictions(os.path.join(folder, "predictions"), images, detections)


PROTOCOLS = {
    "wider_face": Protocol(_build_wider_face, _write_wider_face, _read_wider_face, "results.json", "pr_curves.png"),
    "coco": Protocol(_build_coco, _write_coco, _read_coco, "coco_results.json", "coco_pr_curves.png"),
    "fddb": Protocol(_build_fddb, _write_fddb, _read_fddb, "results.json", "roc.png"),
}


def _folder(cfg: CfgNode, dataset_name: str) -> str:
    return os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)


def _fingerprint(cfg: CfgNode, dataset_name: str, records: Sequence[ImageRecord], model: nn.Module) -> str:
    """Digest of all that detections depend on: weights, configuration, images, and the versions of the code."""
    module = getattr(model, "module", model)  # within DistributedDataParallel
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        digest.update(json.dumps(value).encode())

    add([__version__, torch.__version__, f"{type(module).__module__}.{type(module).__qualname__}", dataset_name])
    config = cfg.clone()
    config.defrost()
    config.MODEL.WEIGHTS = ""  # a name; the weights themselves follow
    add([config.MODEL.dump(), config.INPUT.dump(), config.TEST.dump()])
    for record in records:
        add([record.image_id, record.file_name, record.height, record.width, record.is_raw])
        add(_file_state(record.file_name))
    for name, value in module.state_dict().items():
        add([name, str(value.dtype), list(value.shape)])
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _file_state(file_name: str) -> tuple[int, int] | None:
    """Size and time of the last change; None for an image that is not a file."""
    try:
        state = os.stat(file_name)
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns
