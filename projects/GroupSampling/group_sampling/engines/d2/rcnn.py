"""The meta-architecture, and the ROI heads of a detector that has none."""

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, GeneralizedRCNN
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from ...inference import Proposals, proposals_to_detections
from .roi_heads import GroupedROIHeads


@META_ARCH_REGISTRY.register()
class GroupSamplingRCNN(GeneralizedRCNN):
    """``GeneralizedRCNN`` that hands the ignore regions of the images to its proposal generator and grouped ROI heads.

    Inputs are those of ``GeneralizedRCNN``, and while training optionally ``ignore_boxes`` (``Boxes``) for each image.
    Every detection has ``pred_boxes``, ``scores``, ``pred_classes`` and ``anchor_scales``.
    """

    def forward(self, batched_inputs: list[dict]):
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
        ignore_boxes = [
            x["ignore_boxes"].to(self.device) if "ignore_boxes" in x else Boxes(self.pixel_mean.new_zeros((0, 4)))
            for x in batched_inputs
        ]
        features = self.backbone(images.tensor)
        proposals, losses = self.proposal_generator(images, features, gt_instances, ignore_boxes)
        more = (ignore_boxes,) if isinstance(self.roi_heads, GroupedROIHeads) else ()
        _, detector_losses = self.roi_heads(images, features, proposals, gt_instances, *more)
        return {**losses, **detector_losses}


@ROI_HEADS_REGISTRY.register()
class ProposalDetections(nn.Module):
    """ROI heads of a single-stage detector: no parameters, the proposals become the detections.

    With it an RPN gets everything that Detectron2 offers for detectors: evaluators, predictor, test-time augmentation.
    """

    @configurable
    def __init__(self, *, score_thresh: float, nms_thresh: float, max_detections: int):
        super().__init__()
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.max_detections = max_detections

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        if cfg.MODEL.ROI_HEADS.NUM_CLASSES != 1:
            raise ValueError(
                f"MODEL.ROI_HEADS.NUM_CLASSES must be 1 with ProposalDetections (an RPN knows one class), "
                f"got {cfg.MODEL.ROI_HEADS.NUM_CLASSES}"
            )
        return {
            "score_thresh": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            "nms_thresh": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        if self.training:
            return proposals, {}
        return [self._detect(image) for image in proposals], {}

    def forward_with_given_boxes(self, features: dict[str, Tensor], instances: list[Instances]) -> list[Instances]:
        """There are no outputs beyond the boxes (called by test-time augmentation)."""
        return instances

    def _detect(self, image: Instances) -> Instances:
        boxes, scores, scales = proposals_to_detections(
            Proposals(image.proposal_boxes.tensor, image.objectness_logits, image.anchor_scales),
            score_thresh=self.score_thresh,
            nms_thresh=self.nms_thresh,
            max_detections=self.max_detections,
        )
        return Instances(
            image.image_size,
            pred_boxes=Boxes(boxes),
            scores=scores,
            pred_classes=scores.new_zeros(len(scores), dtype=int),
            anchor_scales=scales,
        )
