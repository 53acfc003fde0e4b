"""What the parts of a detector that draw samples have in common."""

import torch
from torch import Tensor, nn


class SamplingModule(nn.Module):
    """A part of a detector that draws samples while training, and counts its training passes.

    A draw is a function of the number of its pass. The count advances with every forward pass in training mode, each
    pass of accumulated gradients included, and is saved in the state dict: in any training loop the samples change from
    step to step, and a resumed training draws what the uninterrupted one would have drawn. Evaluations do not count.

    The count is a Python number saved as extra state: to read a buffer would synchronize the GPU.

    Attributes:
        iteration: number of the next training pass.
        sample_counts: of the last training pass, "rpn/num_pos@16", "rpn/num_neg@16", ... or "roi/...": 0-dimensional
            tensors with the mean number of samples drawn per image.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.iteration = 0
        self.sample_counts: dict[str, Tensor] = {}

    def _next_iteration(self) -> int:
        """The number of this training pass; the next call returns the next number."""
        self.iteration += 1
        return self.iteration - 1

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.iteration, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.iteration = int(state)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        # Checkpoints of version 0.1 and of Detectron2 have no count; the current one stays.
        missing_keys[:] = [key for key in missing_keys if key != f"{prefix}_extra_state"]
