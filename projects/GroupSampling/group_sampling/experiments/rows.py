"""The tables and figures of the paper (Sec. 6), and experiments of this project, as configs to train."""

from collections.abc import Iterator
from dataclasses import dataclass

FIGURE4_SAMPLES = (256, 512, 1024, 2048, 4096)
TABLE_SAMPLES = 2048


@dataclass(frozen=True)
class Row:
    """A row of a table, or a point of Figure 4.

    Attributes:
        label: as the report names it.
        config: YAML below configs/, without suffix.
    """

    label: str
    config: str


@dataclass(frozen=True)
class Experiment:
    """A table, Figure 4, or an ablation.

    Attributes:
        title: heading.
        rows: what is trained.
    """

    title: str
    rows: tuple[Row, ...]


DETECTORS = (
    Row("RPN (C4)", "rpn_c4"),
    Row("FPN", "fpn"),
    Row("FPN-finest-stride", "fpn_finest_stride"),
    Row("FPN-finest", "fpn_finest"),
    Row("FPN-finest-sampling", "fpn_finest_sampling"),
)
_FEATURES = {
    "P2-P5": ("fpn", "table2/fpn_sampling"),
    "P2": ("fpn_finest", "fpn_finest_sampling"),
    "P3": ("table2/p3", "table2/p3_sampling"),
    "P4": ("table2/p4", "table2/p4_sampling"),
    "C3": ("table2/c3", "table2/c3_sampling"),
    "C4": ("rpn_c4", "table2/c4_sampling"),
}
FIGURE4_DETECTORS = {
    row.config: row.label for row in DETECTORS if row.config in ("fpn", "fpn_finest", "fpn_finest_sampling")
}


def _figure4_config(detector: str, n: int) -> str:
    """The point N = 2,048 is the detector of Table 1: it need not be trained again."""
    return detector if n == TABLE_SAMPLES else f"figure4/{detector}_n{n}"


# Readings of group sampling that the text allows (docs/deviations.md); the first is the default.
_READINGS = {
    "negatives fill up": "",
    "positives repeated": "_repeat",
    "positives weighted": "_weight",
    "mean of each scale": "_group_mean",
}
# Where each is tried: the row without group sampling, that of the default reading, and the start of the others' names.
_READ_ON = {
    "C4": ("rpn_c4", "table2/c4_sampling", "ablations/c4_sampling"),
    "P2, N = 256": (
        "figure4/fpn_finest_n256",
        "figure4/fpn_finest_sampling_n256",
        "ablations/fpn_finest_sampling_n256",
    ),
    "P2": ("fpn_finest", "fpn_finest_sampling", "ablations/fpn_finest_sampling"),
    "P2, N = 4096": (
        "figure4/fpn_finest_n4096",
        "figure4/fpn_finest_sampling_n4096",
        "ablations/fpn_finest_sampling_n4096",
    ),
}


def _readings() -> Iterator[Row]:
    for place, (uniform, default, others) in _READ_ON.items():
        yield Row(f"{place}: uniform", uniform)
        for reading, suffix in _READINGS.items():
            yield Row(f"{place}: {reading}", others + suffix if suffix else default)


EXPERIMENTS = {
    "table1": Experiment(
        "Table 1: the five detectors",
        DETECTORS,
    ),
    "table2": Experiment(
        "Table 2: features, with and without group sampling",
        tuple(
            Row(f"{feature}, {sampler}", config)
            for feature, configs in _FEATURES.items()
            for sampler, config in zip(("uniform", "group sampling"), configs)
        ),
    ),
    "table3": Experiment(
        "Table 3: regression loss",
        (
            Row("smooth L1", "fpn_finest_sampling"),
            Row("-ln IoU", "table3/iou_log"),
            Row("‖1 - IoU‖²", "table3/iou_l2"),
        ),
    ),
    "table4": Experiment(
        "Table 4: OHEM, focal loss and group sampling",
        (
            Row("FPN-finest", "fpn_finest"),
            Row("OHEM", "table4/ohem"),
            Row("focal loss", "table4/focal"),
            Row("group sampling", "fpn_finest_sampling"),
        ),
    ),
    "table5": Experiment(
        "Table 5: the second stage",
        (
            Row("FPN-finest-sampling", "fpn_finest_sampling"),
            Row("+ Fast R-CNN", "table5/fast_rcnn"),
            Row("+ IoU loss", "table5/fast_rcnn_iou"),
            Row("+ group sampling (Grouped Fast R-CNN)", "table5/grouped_fast_rcnn"),
        ),
    ),
    "figure4": Experiment(
        "Figure 4: number of samples N of every scale",
        tuple(
            Row(f"{label}, N = {n}", _figure4_config(config, n))
            for config, label in FIGURE4_DETECTORS.items()
            for n in FIGURE4_SAMPLES
        ),
    ),
    # Not in the paper.
    "readings": Experiment("Ablation: readings of group sampling", tuple(_readings())),
    "second_stage_loss": Experiment(
        "Ablation: regression loss of Grouped Fast R-CNN",
        (
            Row("smooth L1", "ablations/fast_rcnn_smooth_l1"),
            Row("-ln IoU", "ablations/fast_rcnn_iou_log"),
            Row("‖1 - IoU‖²", "table5/grouped_fast_rcnn"),
        ),
    ),
}
ABLATIONS = ("readings", "second_stage_loss")
