"""Random distortions of the images of a task."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from common.episodes import Task


@dataclass
class RandomAffine:
    """Turn, stretch, shear and shift images a little, each class of a task in its own way as well.

    A distortion shared by a class makes a new class of it; one for each image makes another
    drawing. All randomness comes from ``generator``.

    Attributes:
        strength: 1 turns by up to 22 degrees and stretches by up to 28 %, shears by up to 0.25 and
            shifts by up to a tenth of the width; 0 does nothing.
        generator: A CPU generator; its state advances with every batch.
    """

    strength: float
    generator: torch.Generator

    def __call__(self, batch: Task) -> Task:
        """Return a batch of tasks with distorted images."""
        if self.strength == 0:
            return batch
        tasks, supports = batch.support_y.shape
        images = torch.cat([batch.support_x, batch.query_x], dim=1)
        labels = torch.cat([batch.support_y, batch.query_y], dim=1)
        ways = int(labels.max()) + 1
        of_class = self._matrices(tasks * ways).view(tasks, ways, 3, 3)
        of_image = self._matrices(labels.numel()).view(*labels.shape, 3, 3)
        chosen = of_class[torch.arange(tasks).unsqueeze(1), labels]
        matrices = (chosen @ of_image).flatten(0, 1)[:, :2]
        flat = images.flatten(0, 1)
        grid = F.affine_grid(matrices, list(flat.shape), align_corners=False)
        moved = F.grid_sample(flat, grid, align_corners=False).view_as(images)
        return replace(batch, support_x=moved[:, :supports], query_x=moved[:, supports:])

    def _matrices(self, count: int) -> Tensor:
        """Return random affine maps in homogeneous coordinates, ``[count, 3, 3]``."""

        def uniform(bound: float) -> Tensor:
            return self.strength * bound * (2 * torch.rand(count, generator=self.generator) - 1)

        angle, shear = uniform(math.pi / 8), uniform(0.25)
        width, height = uniform(0.25).exp(), uniform(0.25).exp()
        matrix = torch.zeros(count, 3, 3)
        matrix[:, 0, 0], matrix[:, 0, 1] = angle.cos() * width, shear - angle.sin() * height
        matrix[:, 1, 0], matrix[:, 1, 1] = angle.sin() * width, angle.cos() * height
        matrix[:, 0, 2], matrix[:, 1, 2] = uniform(0.2), uniform(0.2)
        matrix[:, 2, 2] = 1.0
        return matrix
