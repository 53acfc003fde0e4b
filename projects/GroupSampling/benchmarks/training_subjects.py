"""The detectors that bench_training.py compares: this project's on both engines, and the frameworks' own."""

import argparse
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_matcher import make_faces, version_of
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import group_sampling.engines.tv.train as tv_train
from group_sampling.data.records import ImageRecord
from group_sampling.engines.step import TrainingStep
from group_sampling.engines.tv.config import load_config
from group_sampling.engines.tv.model import NormalizeAndPad, build_model

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NOTHING = np.zeros(0)
RECORD = ImageRecord("a.jpg", "a", 0, 0, boxes=NOTHING, classes=NOTHING, ignore=NOTHING)
KEYS = {
    "plain": [],
    "AMP bfloat16": ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "bfloat16"],
    "CHANNELS_LAST": ["MODEL.CHANNELS_LAST", "True"],
    "AMP bfloat16, CHANNELS_LAST": [
        *("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "bfloat16", "MODEL.CHANNELS_LAST", "True")
    ],
    "BACKBONE.COMPILE": ["MODEL.BACKBONE.COMPILE", "True"],
    "BACKBONE.RECOMPUTE": ["MODEL.BACKBONE.RECOMPUTE", "True"],
    "ACCUMULATE_STEPS": ["SOLVER.ACCUMULATE_STEPS", "{images}"],
    "EMA": ["SOLVER.EMA.ENABLED", "True"],
}


class Subject:
    """A detector in training.

    Args:
        model: in training mode.
        step: one training step.
        limit: forward and backward pass of the backbone alone; None: not asked for.
        parts: per stage, (object, name of a method that is this stage's share of the forward pass).
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        step: Callable[[], Any],
        limit: Callable[[], Any] | None,
        parts: dict[str, list[tuple[Any, str]]],
    ):
        self.name, self.model, self.step, self.limit, self.parts = name, model, step, limit, parts
        self.seconds: list[float] = []
        self.limit_seconds: list[float] = []
        self.stages: dict[str, list[float]] = defaultdict(list)


def our_options(options: argparse.Namespace, more: list[str]) -> list[str]:
    precision = [] if options.precision == "float32" else ["SOLVER.AMP.ENABLED", "True"]
    return [
        *("MODEL.DEVICE", options.device, "MODEL.WEIGHTS", "", "SOLVER.BASE_LR", "0.0", "SEED", "0"),
        *("SOLVER.IMS_PER_BATCH", str(options.images), "SOLVER.WARMUP_ITERS", "0"),
        *(precision and [*precision, "SOLVER.AMP.PRECISION", options.precision]),
        *(part.format(images=options.images) for part in more),
    ]


def backbone_alone(backbone: nn.Module, images: Tensor, autocast: Callable) -> Callable[[], None]:
    """Forward and backward pass of a backbone with its FPN, from gradients of ones."""

    def run() -> None:
        backbone.zero_grad()
        with autocast():
            features = list(backbone(images).values())
        torch.autograd.backward(features, [torch.ones_like(feature) for feature in features])

    return run


def on_torchvision(config: str, name: str, options: argparse.Namespace, more: list[str] = ()) -> Subject:
    """One of this project's detectors on the torchvision engine."""
    cfg = load_config(str(CONFIGS / config), our_options(options, list(more)))
    device = torch.device(cfg.MODEL.DEVICE)
    model = build_model(cfg).train().to(device)
    tv_train.prepare_network(cfg, model, (tv_train.BasicBlock, tv_train.Bottleneck))
    update = TrainingStep(cfg, model, tv_train.build_optimizer(cfg, model))
    batch = [
        tv_train.to_example(pixels, boxes, np.zeros(len(boxes), np.int64), boxes[:0], RECORD, 0)
        for pixels, boxes in make_batch(options)
    ]
    images = torch.stack([example.image for example in batch]).float().to(device)
    parts = {
        "backbone": [(model.backbone, "forward")],
        "head": [(model.rpn.head, "forward"), (model.rpn.head, "predictor")],
        "assign and sample": [(model.rpn.criterion.sampler, "choose")],
        "second stage": [(model.roi_heads, "forward")] if hasattr(model.roi_heads, "sampler") else [],
    }
    step = functools.partial(tv_train.train_step, model, update, batch, device, 0)
    return Subject(name, model, step, backbone_alone(model.backbone, images, update.autocast), parts)


def on_detectron2(config: str, name: str, options: argparse.Namespace, more: list[str] = ()) -> Subject:
    """One of this project's detectors on the Detectron2 engine."""
    import group_sampling.engines.d2.train as d2_train

    cfg = d2_train.load_config(str(CONFIGS / config), our_options(options, list(more)))
    model = d2_train.Trainer.build_model(cfg).train()
    blocks = (d2_train.BasicBlock, d2_train.BottleneckBlock)
    d2_train.prepare_network(cfg, model, blocks)
    update = TrainingStep(cfg, model, d2_train.Trainer.build_optimizer(cfg, model))
    batch, images = detectron2_batch(options)
    rpn = model.proposal_generator
    parts = {
        "backbone": [(model.backbone, "forward")],
        "head": [(rpn.rpn_head, "forward"), (rpn.rpn_head, "predictor")],
        "assign and sample": [(rpn.criterion.sampler, "choose")],
        "second stage": [(model.roi_heads, "forward")] if hasattr(model.roi_heads, "sampler") else [],
    }
    step = in_storage(functools.partial(update, 0, batch, model, ["a.jpg"] * len(batch)))
    return Subject(name, model, step, backbone_alone(model.backbone, images, update.autocast), parts)


def detectron2_batch(options: argparse.Namespace) -> tuple[list[dict], Tensor]:
    from detectron2.structures import Boxes, Instances

    batch = []
    for pixels, boxes in make_batch(options):
        targets = Instances(pixels.shape[:2], gt_boxes=Boxes(torch.as_tensor(boxes)))
        targets.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
        batch.append({"image": torch.as_tensor(pixels.transpose(2, 0, 1).copy()), "instances": targets})
    return batch, torch.stack([example["image"] for example in batch]).float().to(options.device)


def in_storage(step: Callable[[], Any]) -> Callable[[], Any]:
    """Detectron2's models log; iteration 5 is not one that is written."""
    from detectron2.utils.events import EventStorage

    def run() -> Any:
        with EventStorage(5):
            return step()

    return run


def plain_step(
    model: nn.Module, forward: Callable[[], dict[str, Tensor]], optimizer: torch.optim.Optimizer, autocast: Callable
) -> Callable[[], None]:
    """The step of both frameworks' own training scripts."""

    def step() -> None:
        with autocast():
            losses = sum(forward().values())
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()

    return step


def autocast_of(options: argparse.Namespace) -> Callable:
    dtype = getattr(torch, options.precision)
    return functools.partial(torch.autocast, options.device, dtype, enabled=dtype != torch.float32)


def stock_detectron2(zoo: str, name: str, options: argparse.Namespace) -> Subject:
    import detectron2
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model as build
    from detectron2.solver import build_optimizer

    cfg = get_cfg()  # detectron2.model_zoo, which would find the file, needs a setuptools before 81
    cfg.merge_from_file(str(Path(detectron2.__file__).parent / "model_zoo/configs" / zoo))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.SOLVER.BASE_LR = options.device, "", 0.0
    model = build(cfg).train()
    batch, _ = detectron2_batch(options)
    rpn = model.proposal_generator
    parts = {
        "backbone": [(model.backbone, "forward")],
        "head": [(rpn.rpn_head, "forward")],
        "assign and sample": [(rpn, "label_and_sample_anchors")],
        "second stage": [(model.roi_heads, "forward")] if hasattr(model, "roi_heads") else [],
    }
    step = plain_step(model, lambda: model(batch), build_optimizer(cfg, model), autocast_of(options))
    return Subject(name, model, in_storage(step), None, parts)


def stock_torchvision(name: str, options: argparse.Namespace, *, second_stage: bool) -> Subject:
    """``fasterrcnn_resnet50_fpn`` as it is fine-tuned: frozen norms, three stages in training; or its RPN alone."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    model = FasterRCNN(backbone, num_classes=81)
    model.transform = NormalizeAndPad([123.675, 116.28, 103.53], [58.395, 57.12, 57.375], 32)  # no resize, as for all
    model.train().to(options.device)
    examples = [(torch.as_tensor(pixels.transpose(2, 0, 1).copy()), boxes) for pixels, boxes in make_batch(options)]

    def forward() -> dict[str, Tensor]:
        images = [image.to(options.device, non_blocking=True).float() for image, _ in examples]
        boxes = [torch.as_tensor(boxes).to(options.device, non_blocking=True) for _, boxes in examples]
        targets = [{"boxes": b, "labels": torch.ones(len(b), dtype=torch.int64, device=b.device)} for b in boxes]
        if second_stage:
            return model(images, targets)
        batch, targets = model.transform(images, targets)
        return model.rpn(batch, model.backbone(batch.tensors), targets)[1]

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = plain_step(model, forward, torch.optim.SGD(trained, lr=0.0, momentum=0.9), autocast_of(options))
    parts = {
        "backbone": [(model.backbone, "forward")],
        "head": [(model.rpn.head, "forward")],
        "assign and sample": [(model.rpn, "assign_targets_to_anchors"), (model.rpn, "fg_bg_sampler")],
        "second stage": [(model.roi_heads, "forward")],
    }
    return Subject(name, model, step, None, parts)


@functools.lru_cache
def _batch(images: int, side: int, faces: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    boxes = make_faces(faces, side).numpy()
    return [(rng.integers(0, 256, (side, side, 3), dtype=np.uint8), boxes) for _ in range(images)]


def make_batch(options: argparse.Namespace) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images (side, side, 3) of noise, and faces (m, 4) with the sizes of WIDER FACE's."""
    return _batch(options.images, options.side, options.faces)


def subjects(kind: str, options: argparse.Namespace) -> Iterator[Callable[[], Subject]]:
    """The detectors of a comparison, the one that the others are compared with first."""
    has_detectron2 = version_of("detectron2") is not None
    if kind.startswith("keys"):
        on_engine = on_detectron2 if kind == "keys_detectron2" else on_torchvision
        for name, keys in KEYS.items():
            if name in options.keys and (name != "ACCUMULATE_STEPS" or options.images > 1):
                yield functools.partial(on_engine, "fpn_finest_sampling.yaml", name, options, keys)
        return
    config = {"rpn": "fpn_finest_sampling.yaml", "rcnn": "table5/grouped_fast_rcnn.yaml"}[kind]
    ours = {"rpn": "FPN-finest-sampling", "rcnn": "Grouped Fast R-CNN"}[kind]
    yield functools.partial(on_torchvision, config, f"{ours}, torchvision engine", options)
    if has_detectron2:
        zoo = {"rpn": "rpn_R_50_FPN_1x", "rcnn": "faster_rcnn_R_50_FPN_1x"}[kind]
        yield functools.partial(on_detectron2, config, f"{ours}, Detectron2 engine", options)
        stock = {"rpn": "Detectron2's RPN-R50-FPN", "rcnn": "Detectron2's Faster R-CNN R50-FPN"}[kind]
        yield functools.partial(stock_detectron2, f"COCO-Detection/{zoo}.yaml", stock, options)
    stock = {"rpn": "torchvision's RPN R50-FPN", "rcnn": "torchvision's Faster R-CNN R50-FPN"}[kind]
    yield functools.partial(stock_torchvision, stock, options, second_stage=kind == "rcnn")
