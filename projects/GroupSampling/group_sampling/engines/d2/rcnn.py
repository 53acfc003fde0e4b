"""The meta-architecture, and the ROI heads of a single-stage detector."""

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, GeneralizedRCNN
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from ...checkpoint import convert_in_place, refuse_partial_weights
from ...config import ConfigError
from ...detections import Detections
from ...inference import Proposals, proposals_to_detections
from .rpn import GroupSamplingRPN


@META_ARCH_REGISTRY.register()
class GroupSamplingRCNN(GeneralizedRCNN):
    """``GeneralizedRCNN`` that loads the weights of either engine.

    It converts weights of the torchvision engine itself, so that ``DefaultPredictor`` and other tools can load them. In
    eval mode it refuses weights that do not fit it entirely, since it would detect with random ones.

    With ``TEST.SUB_DETECTORS`` (Sec. 6.1) an output has, beside its "instances", "sub_detectors": scale in pixels ->
    the ``Instances`` that the anchors of that scale find by themselves.
    """

    @configurable
    def __init__(self, *, sub_detectors: bool = False, **kwargs):
        """
        Args:
            sub_detectors: return what they find.
            kwargs: as for ``GeneralizedRCNN``.
        """
        super().__init__(**kwargs)
        if sub_detectors and not isinstance(self.proposal_generator, GroupSamplingRPN):
            raise ConfigError(
                "TEST.SUB_DETECTORS: expected MODEL.PROPOSAL_GENERATOR.NAME GroupSamplingRPN with it, got "
                f"{type(self.proposal_generator).__name__}; with False there is no AP@16, ..."
            )
        self.sub_detectors = sub_detectors
        self.register_load_state_dict_pre_hook(_prepare_weights)

    @classmethod
    def from_config(cls, cfg) -> dict:
        return {**super().from_config(cfg), "sub_detectors": cfg.TEST.SUB_DETECTORS}

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """As ``GeneralizedRCNN.preprocess_image``; images in pinned memory move to a GPU without waiting for it."""
        return super().preprocess_image(
            [{"image": x["image"].to(self.device, non_blocking=self.device.type != "cpu")} for x in batched_inputs]
        )

    def inference(
        self,
        batched_inputs: list[dict],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[dict] | list[Instances]:
        """As ``GeneralizedRCNN.inference``; backbone and head run once for all sub-detectors.

        Without ``do_postprocess``, with ``detected_instances``, or traced, there are no sub-detectors: Detectron2's
        tracing takes no dict by scale.
        """
        plain = detected_instances is not None or not do_postprocess or torch.jit.is_tracing()
        if not self.sub_detectors or plain:
            return super().inference(batched_inputs, detected_instances, do_postprocess)
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)

        def finish(proposals: list[Instances]) -> list[dict]:
            instances, _ = self.roi_heads(images, features, proposals, None)
            return self._postprocess(instances, batched_inputs, images.image_sizes)

        proposals, by_scale = self.proposal_generator.propose_by_scale(images, features)
        found = finish(proposals)
        for scale, proposals in by_scale.items():
            for output, alone in zip(found, finish(proposals)):
                output.setdefault("sub_detectors", {})[scale] = alone["instances"]
        return found


def to_detections(output: dict) -> Detections:
    """One of the outputs of a detector in eval mode, Detectron2's own or a :class:`GroupSamplingRCNN`."""

    def convert(found: Instances) -> Detections:
        classes = found.pred_classes if found.has("pred_classes") else found.scores.new_zeros(len(found), dtype=int)
        scales = found.anchor_scales if found.has("anchor_scales") else None
        return Detections(found.pred_boxes.tensor, found.scores, classes, scales)

    joint, by_scale = convert(output["instances"]), output.get("sub_detectors")
    return joint._replace(sub_detectors=by_scale and {scale: convert(alone) for scale, alone in by_scale.items()})


def _prepare_weights(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
    if not prefix:  # not as a part of another model
        # It changes the shape of the second stage's outputs, and Detectron2's checkpointer leaves out what has another
        # shape before the model is asked.
        predictor = "roi_heads.box_predictor."
        is_torchvision = any(name.startswith(("rpn.head.", "backbone.body.")) for name in state_dict)
        names = {f"{predictor}{layer}.weight" for layer in ("cls_score", "bbox_pred")}
        if is_torchvision and len(names & state_dict.keys()) == 1:
            raise ConfigError(
                "MODEL.WEIGHTS: the torchvision engine's weights of a second stage cannot be converted by Detectron2's "
                "checkpointer. Load them with GroupSamplingCheckpointer, or convert the file first: "
                "python -m group_sampling.checkpoint SOURCE TARGET --engine detectron2"
            )
        convert_in_place(state_dict, "detectron2", model)
        refuse_partial_weights(state_dict, model)


@ROI_HEADS_REGISTRY.register()
class ProposalDetections(nn.Module):
    """ROI heads of a single-stage detector: no parameters, the proposals become the detections.

    With them, an RPN is a detector for all of Detectron2: evaluators, predictor, test-time augmentation.
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
            raise ConfigError(
                "MODEL.ROI_HEADS.NUM_CLASSES: expected 1 with ProposalDetections, since an RPN has one class, got "
                f"{cfg.MODEL.ROI_HEADS.NUM_CLASSES}"
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
        """Per image ``pred_boxes``, ``scores``, ``pred_classes`` and, if the proposals have them, ``anchor_scales``."""
        if self.training:
            return proposals, {}
        return [self._detect(image) for image in proposals], {}

    def forward_with_given_boxes(self, features: dict[str, Tensor], instances: list[Instances]) -> list[Instances]:
        """There are no outputs beyond the boxes (called by test-time augmentation)."""
        return instances

    def _detect(self, image: Instances) -> Instances:
        has_scales = image.has("anchor_scales")  # those of Detectron2's RPN have none
        boxes, scores, scales = proposals_to_detections(
            Proposals(
                image.proposal_boxes.tensor,
                image.objectness_logits,
                image.anchor_scales if has_scales else torch.zeros_like(image.objectness_logits),
            ),
            score_thresh=self.score_thresh,
            nms_thresh=self.nms_thresh,
            max_detections=self.max_detections,
        )
        found = Instances(image.image_size, pred_boxes=Boxes(boxes), scores=scores)
        found.pred_classes = scores.new_zeros(len(scores), dtype=int)
        if has_scales:
            found.anchor_scales = scales
        return found
