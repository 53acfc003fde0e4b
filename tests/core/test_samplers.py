"""The registry of samplers: names from a config, ranks, and CONTRIBUTING's example of a sampler of one's own."""

import ast
import re

import pytest
import torch
import torch.distributed as dist
from fvcore.common.config import CfgNode

from group_sampling import samplers
from group_sampling.anchors import AnchorGrid, cell_anchors
from group_sampling.config import ConfigError, add_group_sampling_config
from group_sampling.criterion import AnchorCriterion
from group_sampling.head import SoftmaxRPNHead
from group_sampling.monitor import count_anchors, name_counts
from group_sampling.ops import AssignResult, MatchResult
from group_sampling.roi_sampling import ROI_SAMPLERS
from group_sampling.samplers import (
    SAMPLERS,
    FocalSampler,
    GroupSampler,
    OHEMSampler,
    UniformSampler,
    build_anchor_sampler,
    take_matches,
)

GRID = AnchorGrid.from_cell_anchors([cell_anchors([16, 32], [1.0])], [4], [(16, 16)])
FACES = torch.tensor([[8.0, 8, 24, 24], [20, 20, 52, 52]])


def make_cfg(sampler="group"):
    sections = {"INPUT": {}, "DATASETS": {}, "DATALOADER": {}, "TEST": {}, "SEED": 7}
    cfg = CfgNode({"MODEL": {"BACKBONE": {}}, "SOLVER": {"AMP": {}}, **sections})
    add_group_sampling_config(cfg)
    cfg.MODEL.GROUP_SAMPLING.SAMPLER = sampler
    cfg.MODEL.GROUP_SAMPLING.SAMPLES_PER_GROUP = 24
    cfg.MODEL.GROUP_SAMPLING.SECOND_PASS = "best"
    cfg.MODEL.GROUP_SAMPLING.IGNORE_IOA = 0.3
    cfg.MODEL.RPN = CfgNode({"IOU_THRESHOLDS": [0.35, 0.65], "BATCH_SIZE_PER_IMAGE": 40, "POSITIVE_FRACTION": 0.5})
    cfg.MODEL.RETINANET = CfgNode({"FOCAL_LOSS_ALPHA": 0.3, "FOCAL_LOSS_GAMMA": 1.5, "PRIOR_PROB": 0.02})
    return cfg


@pytest.mark.parametrize(
    "name, kind, num_samples, max_positives, face_prior, needs_logits",
    [
        ("group", GroupSampler, 24, 12, None, False),
        ("uniform", UniformSampler, 40, 20, None, False),
        ("ohem", OHEMSampler, 40, None, None, True),
        ("focal", FocalSampler, None, None, 0.02, False),
    ],
)
def test_samplers_of_a_config(name, kind, num_samples, max_positives, face_prior, needs_logits):
    sampler = build_anchor_sampler(make_cfg(name))
    assert type(sampler) is kind
    assert (sampler.num_samples, sampler.max_positives, sampler.seed) == (num_samples, max_positives, 7)
    assert (sampler.face_prior, sampler.needs_logits) == (face_prior, needs_logits)
    assert sampler.match_options == {"pos_iou": 0.65, "neg_iou": 0.35, "second_pass": "best", "ignore_ioa": 0.3}


def test_readings_of_a_config():
    cfg = make_cfg("group")
    cfg.MODEL.GROUP_SAMPLING.FILL, cfg.MODEL.GROUP_SAMPLING.LOSS_MEAN = "repeat", "group"
    sampler = build_anchor_sampler(cfg)
    assert (sampler.fill, sampler.loss_mean) == ("repeat", "group")
    cfg.MODEL.GROUP_SAMPLING.SAMPLER = "uniform"  # a baseline, whatever the reading
    assert not hasattr(build_anchor_sampler(cfg), "fill")


def test_numbers_of_the_papers():
    """Sec. 4.1 and 5; the focal loss of RetinaNet."""
    sampler = FocalSampler()
    assert sampler.match_options == {"pos_iou": 0.6, "neg_iou": 0.4, "second_pass": "all", "ignore_ioa": 0.5}
    assert (sampler.alpha, sampler.gamma, sampler.face_prior, sampler.seed) == (0.25, 2.0, 0.01, 0)
    assert GroupSampler(256).positive_fraction == UniformSampler(256).positive_fraction == 0.25


def test_focal_loss_of_a_config():
    sampler = build_anchor_sampler(make_cfg("focal"))
    assert (sampler.alpha, sampler.gamma) == (0.3, 1.5)


def test_unknown_sampler_names_the_key_and_what_is_known():
    message = "MODEL.GROUP_SAMPLING.SAMPLER: expected one of 'group', 'uniform', 'ohem', 'focal', got 'groups'"
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_anchor_sampler(make_cfg("groups"))


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.count_key is not None])
def test_count_is_read_from_its_key_which_errors_name(name):
    cfg, key = make_cfg(name), SAMPLERS[name].count_key
    cfg.merge_from_list([key, "1"])
    assert build_anchor_sampler(cfg).num_samples == 1
    cfg.merge_from_list([key, "0"])
    with pytest.raises(ConfigError, match=f"^{re.escape(key)}: expected at least 1, got 0$"):
        build_anchor_sampler(cfg)


@pytest.mark.parametrize("name", ["group", "uniform"])
def test_ranks_draw_what_one_process_would(name, monkeypatch):
    """Images 2 and 3 of a batch of four are the images of rank 1 of two."""
    sampler, faces = SAMPLERS[name](16, seed=1), [FACES] * 4
    alone = sampler(GRID, faces, iteration=3)
    assert not torch.equal(alone.indices[0], alone.indices[2])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    second_rank = sampler(GRID, faces[:2], iteration=3)
    for ours, theirs in zip(second_rank, alone):
        assert torch.equal(ours, theirs[2:])


def test_what_was_assigned_to_chosen_anchors():
    """Two images, three groups of four: positives and negatives of any place, ignored anchors, and none at all."""
    match = MatchResult(
        labels=torch.tensor([[1, 0, -1, 1, 0], [0, 0, 1, -1, 1]], dtype=torch.int8),
        matched_gt=torch.tensor([[3, 0, 1, 2, -1], [-1, 4, 5, 6, 7]]),
        best_iou=torch.zeros(2, 5),
    )
    index = torch.tensor(
        [[[0, 1, 2, 3], [4, 3, -1, -1], [-1, -1, -1, -1]], [[0, 1, -1, -1], [2, 4, 3, -1], [0, 0, 0, 2]]]
    )
    taken = take_matches(match, index)
    assert taken.indices.tolist() == [
        [[0, 1, -1, 3], [4, 3, -1, -1], [-1, -1, -1, -1]],
        [[0, 1, -1, -1], [2, 4, -1, -1], [0, 0, 0, 2]],
    ]
    assert taken.labels.tolist() == [
        [[1, 0, -1, 1], [0, 1, -1, -1], [-1, -1, -1, -1]],
        [[0, 0, -1, -1], [1, 1, -1, -1], [0, 0, 0, 1]],
    ]
    assert taken.matched_gt.tolist() == [
        [[3, -1, -1, 2], [-1, 2, -1, -1], [-1, -1, -1, -1]],
        [[-1, -1, -1, -1], [5, 7, -1, -1], [-1, -1, -1, 5]],
    ]
    assert taken.num_pos.tolist() == [[2, 1, 0], [0, 2, 1]] and taken.num_neg.tolist() == [[1, 1, 0], [2, 0, 3]]


def test_counts_of_chosen_anchors():
    grid = AnchorGrid.from_cell_anchors([cell_anchors([16, 32, 64], [1.0])], [4], [(1, 1)])  # three anchors
    indices, labels = torch.tensor([[[0, 1, -1]], [[2, 0, 0]]]), torch.tensor([[[1, 0, -1]], [[1, 0, 0]]])
    chosen = AssignResult(indices, labels.to(torch.int8), indices, indices, indices)
    assert count_anchors(grid, chosen, chosen.labels >= 0).tolist() == [[1, 0, 1], [2, 1, 0]]
    weights = torch.tensor([[[0.5, 2.0, 7.0]], [[4.0, 1.0, 0.25]]])
    assert count_anchors(grid, chosen, weights).tolist() == [[0.5, 0, 4], [1.25, 2, 0]]


def test_names_of_counts():
    counts = name_counts("rpn", (16.0, 22.5), torch.tensor([1.0, 2.0]), [3.0, 4.0])
    assert counts == {"rpn/num_pos@16": 1, "rpn/num_pos@22.5": 2, "rpn/num_neg@16": 3, "rpn/num_neg@22.5": 4}


def test_no_code_compares_the_names_of_samplers(repository):
    """What depends on the sampler is asked of the object, so that a new one is a class and a line."""
    names = {*SAMPLERS, *ROI_SAMPLERS}
    project = repository / "projects/GroupSampling"
    files = [*repository.glob("*.py"), *project.rglob("*.py")]
    assert project / "group_sampling/samplers.py" in files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare):
                constants = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                assert not constants & names, f"{file}:{node.lineno} compares the name of a sampler"


def test_the_example_of_contributing_trains(repository, monkeypatch):
    text = (repository / "CONTRIBUTING.md").read_text()
    section = text.split("## Adding a sampler\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.setattr(samplers, "SAMPLERS", dict(SAMPLERS))
    exec(code, {})
    (name,) = samplers.SAMPLERS.keys() - SAMPLERS.keys()
    sampler = build_anchor_sampler(make_cfg(name))
    assert sampler.num_samples == 24

    torch.manual_seed(0)
    head, feature = SoftmaxRPNHead(8, 2, face_prior=0.1), torch.randn(2, 8, 16, 16)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01)
    losses = []
    for iteration in range(2):
        result = AnchorCriterion(sampler)(
            GRID, head.predictor([feature], GRID), [FACES, FACES[:0]], [FACES[:0], FACES], iteration=iteration
        )
        # The head starts by expecting no face, so faces are hardest. Both scales have 24 usable anchors.
        assert ((result.num_pos + result.num_neg) == 24).all() and (result.num_pos > 0).all()
        loss = result.classification + result.localization
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]
