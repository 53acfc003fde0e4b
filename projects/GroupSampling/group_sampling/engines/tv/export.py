"""Detectors as files for other runtimes: ONNX, TorchScript and ``torch.export``; each is compared before it is kept."""

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from fvcore.common.config import CfgNode
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import Tensor
from torch.export import Dim

from ...config import anchor_scales
from ...data.catalog import Catalog
from ...data.images import read_image
from ...detections import Detections
from ...errors import UserError
from ...version import __version__
from .exportable import ExportableDetector, OnnxDetector
from .model import GroupSamplingRCNN, to_detections

OPSET = 18  # of ONNX
TOLERANCE = 1e-4  # of scores, and of coordinates in units of the longer side of the image
# Share of the detections that may lack a partner. A comparison of two numbers that differ in the last bits alone can
# turn out the other way in another runtime: whether an IoU exceeds the threshold of NMS, or which box is the k-th best.
MAX_ALONE = 0.01
_LOWEST = torch.finfo(torch.float32).min
METADATA_FILE = "metadata.json"  # in TorchScript's and torch.export's archives

# Heights and widths at which a file is compared, none of them a multiple of a stride; the first of a batch has this
# size and the others less.
CHECKED_SIZES = ((157, 213), (301, 195), (250, 331))
CHECKED_BATCHES = (1, 3)
_EXAMPLE = 2, 128, 96  # images, height, width of the export itself

# From (B, 3, H, W) and (B, 2) to the outputs of ExportableDetector.
Run = Callable[[Tensor, Tensor], list[Tensor]]


class Agreement(NamedTuple):
    """How the detections of a file compare with those of the detector."""

    num_images: int
    num_detections: int  # of the detector
    num_alone: int  # of either, without a partner within the tolerance
    pixels: float  # greatest difference of a coordinate between partners
    share: float  # the same in units of the image's longer side
    score: float  # greatest difference of a score between partners

    def __str__(self) -> str:
        text = (
            f"{self.num_detections} detections in {self.num_images} images: boxes agree within {self.pixels:.1e} "
            f"pixels ({self.share:.1e} of the image's longer side), scores within {self.score:.1e}"
        )
        if self.num_alone:
            text += f"; {self.num_alone} have no partner: last bits can turn what NMS, a top-k or the threshold decides"
        if not self.num_detections:
            text += " (nothing was found in them: a lower MODEL.ROI_HEADS.SCORE_THRESH_TEST would show more)"
        return text


def describe(cfg: CfgNode, model: GroupSamplingRCNN, class_names: tuple[str, ...]) -> dict[str, str]:
    """What whoever runs the file must know, each value as JSON."""
    heads = cfg.MODEL.ROI_HEADS
    values = {
        "class_names": list(class_names),
        "anchor_scales": anchor_scales(cfg),
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
        "channels": cfg.INPUT.FORMAT,
        "stride": model.transform.size_divisible,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "score_thresh": heads.SCORE_THRESH_TEST,
        "nms_thresh": heads.NMS_THRESH_TEST,
        "group_sampling": __version__,
    }
    return {name: json.dumps(value) for name, value in values.items()}


def export(model: GroupSamplingRCNN, kind: str, metadata: dict[str, str], *, with_nms: bool = True) -> bytes:
    """The content of a file of a detector.

    Args:
        kind: a key of :data:`FORMATS`.
        metadata: of :func:`describe`.
        with_nms: as for :class:`~.exportable.ExportableDetector`.

    Raises:
        UserError: what the format needs is not installed, or cannot do this; with its reason.
    """
    detector = FORMATS[kind].detector(model, with_nms=with_nms)
    batch, height, width = _EXAMPLE
    stride = model.transform.size_divisible
    images = torch.zeros(batch, 3, -(-height // stride) * stride, -(-width // stride) * stride)
    example = images, torch.tensor([[height, width]] * batch)
    try:
        with torch.no_grad(), _silent():
            return FORMATS[kind].write(detector, example, stride, metadata)
    except ImportError as error:
        raise UserError(f"{kind}: {error}; pip install 'group-sampling[export]' installs what it needs") from error
    except RuntimeError as error:  # of torch's exporters
        reason = _first_line(error)
        raise UserError(f"{kind}: torch {torch.__version__} cannot export this detector: {reason}") from error


def compare(model: GroupSamplingRCNN, content: bytes, kind: str, *, with_nms: bool = True) -> Agreement:
    """Run a file on images with drawn faces, of several sizes and in several batches, and the detector itself as well.

    Without NMS in the file, NMS follows here.

    Raises:
        UserError: more than :data:`MAX_ALONE` of the detections have no partner within :data:`TOLERANCE`.
    """
    run = _load(content, kind)
    finish = ExportableDetector(model).select
    total = Agreement(0, 0, 0, 0.0, 0.0, 0.0)
    for height, width in CHECKED_SIZES:
        for batch in CHECKED_BATCHES:
            images = _draw_images(height, width, batch)
            padded, _ = model.transform(images)
            with torch.no_grad(), _silent():
                expected = [to_detections(output) for output in model(images)]
                outputs = run(padded.tensors, torch.tensor(padded.image_sizes))
                outputs = outputs if with_nms else list(finish(*outputs))
            for image, ours, theirs in zip(images, expected, unpack(outputs)):
                one = match(ours, theirs, side=max(image.shape[1:]))
                counts = (a + b for a, b in zip(total[:3], one[:3]))
                total = Agreement(*counts, *map(max, total[3:], one[3:]))
    if total.num_alone > MAX_ALONE * total.num_detections:
        raise UserError(
            f"{kind}: the exported detector is not the same: of its and the original's detections, "
            f"{total.num_alone} have no partner whose box agrees within {TOLERANCE} of the image's longer side and "
            f"whose score within {TOLERANCE}; the original has {total.num_detections}"
        )
    return total


def _load(content: bytes, kind: str) -> Run:
    """The function that a file is, whose errors say so."""

    def say(error: Exception) -> UserError:
        return UserError(f"{kind}: the exported detector does not run: {_first_line(error)}")

    try:
        with _silent():
            run = FORMATS[kind].load(content)
    except Exception as error:  # whatever the runtime has for it
        raise say(error) from error

    def run_or_say(images: Tensor, image_sizes: Tensor) -> list[Tensor]:
        try:
            return run(images, image_sizes)
        except Exception as error:
            raise say(error) from error

    return run_or_say


def _first_line(error: Exception) -> str:
    """What an exporter or a runtime says, of many lines the one that says it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def match(ours: Detections, theirs: Detections, side: float) -> Agreement:
    """Find partners among two lists of detections of an image, whatever their order.

    Args:
        side: the image's longer side in pixels.
    """

    def rows(found: Detections) -> Tensor:
        columns = found.scores, found.classes, found.anchor_scales
        return torch.cat([found.boxes / side, torch.stack([column.float() for column in columns], dim=1)], dim=1)

    ours, theirs = rows(ours), rows(theirs)
    is_near = (ours[:, None] - theirs).abs().amax(dim=2) <= TOLERANCE
    partner = torch.from_numpy(maximum_bipartite_matching(csr_array(is_near.numpy()), perm_type="column"))
    has_partner = partner >= 0
    difference = (ours[has_partner] - theirs[partner[has_partner].long()]).abs()
    share, score = (float(part.max()) if part.numel() else 0.0 for part in (difference[:, :4], difference[:, 4]))
    num_alone = len(ours) + len(theirs) - 2 * int(has_partner.sum())
    return Agreement(1, len(ours), num_alone, share * side, share, score)


def unpack(outputs: Sequence[Tensor]) -> list[Detections]:
    """Per image, the entries that mean something in the outputs of a file with NMS."""
    counts, *columns = outputs
    return [Detections(*(column[:count] for column in image)) for count, *image in zip(counts.tolist(), *columns)]


def _draw_images(height: int, width: int, count: int) -> list[Tensor]:
    """(3, h, w) uint8: the first of the size given, each of the others smaller."""
    settings = {"NUM_TRAIN": 0, "NUM_VAL": count, "HEIGHT": height, "WIDTH": width}
    records = Catalog({"SYNTHETIC": settings})["synthetic_faces_val"].records
    images = [torch.from_numpy(read_image(record).copy()).permute(2, 0, 1) for record in records]
    return [image[:, : height - 11 * index, : width - 7 * index] for index, image in enumerate(images)]


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the exporters say of themselves; whether a file is right shows when it is compared."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _dynamic_shapes(stride: int) -> dict[str, dict[int, Dim]]:
    batch = Dim("batch", min=1)
    sides = (Dim(name, min=1) for name in ("rows", "columns"))
    height, width = (side if stride == 1 else stride * side for side in sides)
    return {"images": {0: batch, 2: height, 3: width}, "image_sizes": {0: batch}}


def _write_onnx(detector: ExportableDetector, example: tuple[Tensor, Tensor], stride: int, metadata: dict) -> bytes:
    import onnxruntime  # noqa: F401 (compares the file: if it is missing, that is said first)
    from onnxscript import opset18 as op

    def write_suppress(boxes, scores, iou_thresh: float):
        everything, lowest = op.Constant(value_ints=[2**31 - 1]), op.Constant(value_floats=[_LOWEST])
        threshold = op.Constant(value_floats=[iou_thresh])
        chosen = op.NonMaxSuppression(boxes, op.Unsqueeze(scores, [1]), everything, threshold, lowest)
        place = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)  # list, box; 1 is the class, of which is one
        ones = op.Expand(op.Constant(value_floats=[1.0]), op.Slice(op.Shape(place), [0], [1]))
        zeros = op.ConstantOfShape(op.Shape(scores))
        return op.Cast(op.ScatterND(zeros, place, ones), to=9)  # BOOL

    program = torch.onnx.export(
        detector,
        example,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(detector.input_names),
        output_names=list(detector.output_names),
        dynamic_shapes=_dynamic_shapes(stride),
        custom_translation_table={torch.ops.group_sampling.suppress.default: write_suppress},
        verbose=False,
    )
    program.model.metadata_props.update(metadata)
    return program.model_proto.SerializeToString()


def _load_onnx(content: bytes) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor, image_sizes: Tensor) -> list[Tensor]:
        outputs = session.run(None, {"images": images.numpy(), "image_sizes": image_sizes.numpy()})
        return [torch.from_numpy(output) for output in outputs]

    return run


def _write_torchscript(detector: ExportableDetector, example: tuple[Tensor, Tensor], stride: int, metadata: dict):
    content = io.BytesIO()
    traced = torch.jit.trace(detector, example, check_trace=False)  # it is compared below, at other sizes
    torch.jit.save(traced, content, _extra_files={METADATA_FILE: json.dumps(metadata)})
    return content.getvalue()


def _write_torch_export(detector: ExportableDetector, example: tuple[Tensor, Tensor], stride: int, metadata: dict):
    content = io.BytesIO()
    program = torch.export.export(detector, example, dynamic_shapes=_dynamic_shapes(stride))
    torch.export.save(program, content, extra_files={METADATA_FILE: json.dumps(metadata)})
    return content.getvalue()


class Format(NamedTuple):
    """A kind of file."""

    suffixes: tuple[str, ...]
    write: Callable[[ExportableDetector, tuple[Tensor, Tensor], int, dict[str, str]], bytes]
    load: Callable[[bytes], Run]
    detector: type[ExportableDetector] = ExportableDetector


FORMATS = {
    "onnx": Format((".onnx",), _write_onnx, _load_onnx, OnnxDetector),
    "torchscript": Format((".pt", ".ts"), _write_torchscript, lambda content: torch.jit.load(io.BytesIO(content))),
    "torch-export": Format(
        (".pt2",), _write_torch_export, lambda content: torch.export.load(io.BytesIO(content)).module()
    ),
}
