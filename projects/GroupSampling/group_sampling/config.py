"""The keys this project adds to Detectron2's config, each with its source in the paper.

Keys that Detectron2 already has keep their name and meaning (``MODEL.RPN.IOU_THRESHOLDS`` are λ2 and λ1,
``MODEL.RPN.POSITIVE_FRACTION`` is the 1:3, ...); the paper's values stand in ``configs/Base-GroupSampling.yaml``.
"""

from fvcore.common.config import CfgNode


class ConfigError(ValueError):
    """The configuration asks for something that cannot be done; the message names the key."""


# Paper, Sec. 5: training images are resized by 0.25 * n, n = 1 ... 8.
SCALE_JITTER = tuple(0.25 * n for n in range(1, 9))


def add_group_sampling_config(cfg: CfgNode) -> None:
    """Add the keys of this project to ``cfg``, Detectron2's or the torchvision engine's; no other key changes."""
    node = type(cfg)  # Detectron2 checks that children are of its own CfgNode class

    gs = cfg.MODEL.GROUP_SAMPLING = node()
    # Which anchors the loss sees. "group": N of every scale (Sec. 4.2). "uniform": MODEL.RPN.BATCH_SIZE_PER_IMAGE over
    # all anchors. "ohem": the MODEL.RPN.BATCH_SIZE_PER_IMAGE with the highest losses. "focal": all, in the focal
    # loss with MODEL.RETINANET.FOCAL_LOSS_ALPHA and _GAMMA, the head starting from RETINANET.PRIOR_PROB (both Table 4).
    gs.SAMPLER = "group"
    # N of every scale, positives and negatives together (Sec. 6.2, Fig. 4: accuracy saturates at 2,048).
    gs.SAMPLES_PER_GROUP = 2048
    # Which proposals the second stage sees, with MODEL.ROI_HEADS.NAME GroupedROIHeads (Table 5). "group": N of every
    # scale, a proposal being of the anchor scale nearest to its size. "uniform": ROI_HEADS.BATCH_SIZE_PER_IMAGE of all.
    gs.ROI_SAMPLER = "uniform"
    gs.ROI_SAMPLES_PER_GROUP = 128  # of four scales: the 512 of ROI_HEADS.BATCH_SIZE_PER_IMAGE
    # Empty, or for FPN-finest-stride (Table 1): a stride in pixels for each of MODEL.ANCHOR_GENERATOR.SIZES[0], whose
    # anchors then sit on that sub-sampling of the single feature in MODEL.RPN.IN_FEATURES.
    gs.ANCHOR_STRIDES = ()
    # Which anchors the second matching pass promotes for a face without a positive (Sec. 4.1): "all", "best" or "none".
    gs.SECOND_PASS = "all"
    # A negative anchor whose area lies in one ignore region (WIDER FACE "invalid") by this share is not sampled.
    gs.IGNORE_IOA = 0.5

    # Factors of the random resize; applied together with INPUT.CROP (TYPE "absolute") and INPUT.RANDOM_FLIP.
    cfg.INPUT.SCALE_JITTER = SCALE_JITTER
    # A face of which less than this share of its area is left after the crop is dropped.
    cfg.INPUT.MIN_VISIBLE = 0.5

    # Data sets declared by a line of the config. Annotations and images are relative to $DETECTRON2_DATASETS. A list
    # (one image path a line, the set is restricted to them) belongs to the config: relative to the working directory.
    cfg.DATASETS.COCO_FORMAT = ()  # ((name, annotation json, image folder), ...)
    cfg.DATASETS.WIDER_FORMAT = ()  # ((name, annotation txt, image folder[, list]), ...)
    # The built-in procedural faces: synthetic_faces_train and synthetic_faces_val.
    synthetic = cfg.DATASETS.SYNTHETIC = node()
    synthetic.NUM_TRAIN = 2000
    synthetic.NUM_VAL = 200
    synthetic.HEIGHT = 480
    synthetic.WIDTH = 640
    synthetic.SEED = 0

    # Training stops when more than this share of the images drawn could not be read.
    cfg.DATALOADER.MAX_BAD_SHARE = 0.1

    # Folder with wider_face_val.mat and wider_{easy,medium,hard}_val.mat: adds Easy, Medium and Hard to the evaluation.
    # "auto": for wider_face_val, ground_truth or eval_tools/ground_truth in WIDER_FACE, if they are there. "": none.
    cfg.TEST.WIDER_GROUND_TRUTH = "auto"

    # Multi-scale test on an image pyramid (pyramid.py). Factors of the size that INPUT.MIN_SIZE_TEST and
    # INPUT.MAX_SIZE_TEST give; (): a single scale. Merged by NMS with MODEL.ROI_HEADS.NMS_THRESH_TEST.
    pyramid = cfg.TEST.PYRAMID = node()
    pyramid.SCALES = ()
    pyramid.FLIP = False  # every scale also mirrored
    # The paper's test has sides of at most 3,000 pixels. Larger scaled images are cut into tiles that overlap by
    # TILE_OVERLAP pixels: a face smaller than the overlap is found whole.
    pyramid.MAX_SIDE = 3000
    pyramid.TILE_OVERLAP = 256
    # Box voting over boxes of this IoU or more; 0: none. Not in the paper.
    pyramid.VOTE_THRESH = 0.0
