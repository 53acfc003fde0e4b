"""Scenes that several files of this folder use."""

import pytest
import torch

from group_sampling.anchors import AnchorGrid, cell_anchors


@pytest.fixture(scope="session")
def crowd():
    """(grid of FPN-finest at 400 x 480, two images with 300 and 150 faces of 6 to 200 pixels): enough for threads."""
    grid = AnchorGrid.from_cell_anchors([cell_anchors([16, 32, 64, 128], [1.0])], [4], [(100, 120)])
    generator = torch.Generator().manual_seed(11)
    images = []
    for count in (300, 150):
        side = torch.exp(torch.empty(count).uniform_(1.8, 5.3, generator=generator))
        size = torch.stack([side, side * 1.2], 1)
        corner = torch.rand(count, 2, generator=generator) * (torch.tensor([480.0, 400.0]) - size / 2)
        images.append(torch.cat([corner, corner + size], 1))
    return grid, images
