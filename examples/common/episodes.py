"""Seeded sampling of few-shot classification tasks ("episodes").

One task is a small classification problem of its own: ``ways`` classes, ``shots`` labelled
examples of each to learn from (the support set) and ``queries`` examples of each to be judged on
(the query set). Labels are drawn afresh for every task, so nothing but the support set tells which
class is label 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

from common.datasets import ImageClasses


@dataclass(frozen=True)
class Task:
    """One task, or a batch of tasks with a leading dimension ``tasks``.

    Examples are sorted by label: all of label 0, then all of label 1, and so on.

    Attributes:
        support_x: Images to learn from, ``[(tasks,) ways * shots, 1, height, width]``.
        support_y: Their labels, int64 ``[(tasks,) ways * shots]``.
        query_x: Images to be judged on, ``[(tasks,) ways * queries, 1, height, width]``.
        query_y: Their labels, int64 ``[(tasks,) ways * queries]``.
    """

    support_x: torch.Tensor
    support_y: torch.Tensor
    query_x: torch.Tensor
    query_y: torch.Tensor

    def to(self, device: torch.device | str) -> Task:
        """Return the task with its tensors on ``device``."""
        return Task(*(getattr(self, field.name).to(device) for field in fields(self)))


class EpisodeSampler:
    """Draws N-way K-shot tasks from image classes.

    All randomness comes from ``generator``, so a run continues exactly where it stopped if
    ``generator.get_state()`` is saved and restored. ``sample_batch(n)`` holds the same tasks as
    ``n`` calls of ``sample()``.

    Args:
        classes: The classes to draw from.
        ways: Classes per task.
        shots: Support examples per class.
        queries: Query examples per class; no image is in both sets of a task.
        generator: A CPU generator; its state advances with every task.

    Raises:
        ValueError: If a count is not positive, if ``ways`` exceeds the number of classes, or if
            ``shots + queries`` exceeds the images of some class.

    Example:
        >>> classes = ImageClasses([torch.rand(20, 1, 8, 8) for _ in range(6)], list("abcdef"))
        >>> sampler = EpisodeSampler(classes, 4, 5, 15, torch.Generator().manual_seed(0))
        >>> sampler.sample().support_x.shape
        torch.Size([20, 1, 8, 8])
        >>> sampler.sample_batch(3).query_y.shape
        torch.Size([3, 60])
    """

    def __init__(
        self,
        classes: ImageClasses,
        ways: int,
        shots: int,
        queries: int,
        generator: torch.Generator,
    ) -> None:
        _check_counts(classes, ways, shots, queries)
        self.ways, self.shots, self.queries = ways, shots, queries
        self.generator = generator
        self._counts = [len(images) for images in classes.images]
        # One tensor for all images: a batch of tasks is then a single gather.
        self._images = torch.cat(classes.images)
        self._starts = torch.tensor([0, *self._counts[:-1]]).cumsum(0)

    def sample(self) -> Task:
        """Draw one task."""
        return self._gather(self._draw())

    def sample_batch(self, tasks: int) -> Task:
        """Draw ``tasks`` tasks, stacked along a new leading dimension."""
        return self._gather(torch.stack([self._draw() for _ in range(tasks)]))

    def __iter__(self) -> Iterator[Task]:
        """Draw tasks without end."""
        while True:
            yield self.sample()

    def _draw(self) -> torch.Tensor:
        """Positions of the images of one task, int64 ``[ways, shots + queries]``."""
        chosen = torch.randperm(len(self._counts), generator=self.generator)[: self.ways]
        per_class = self.shots + self.queries
        rows = [
            torch.randperm(self._counts[index], generator=self.generator)[:per_class]
            for index in chosen.tolist()
        ]
        return torch.stack(rows) + self._starts[chosen].unsqueeze(1)

    def _gather(self, positions: torch.Tensor) -> Task:
        """Images and labels of positions ``[..., ways, shots + queries]``."""
        labels = torch.arange(self.ways).unsqueeze(1).expand_as(positions)
        # [..., ways, examples, 1, H, W] -> [..., ways * examples, 1, H, W]
        class_dim = positions.dim() - 2
        support = positions[..., : self.shots].flatten(class_dim)
        query = positions[..., self.shots :].flatten(class_dim)
        return Task(
            support_x=self._images[support],
            support_y=labels[..., : self.shots].flatten(class_dim),
            query_x=self._images[query],
            query_y=labels[..., self.shots :].flatten(class_dim),
        )


def _check_counts(classes: ImageClasses, ways: int, shots: int, queries: int) -> None:
    """Refuse a task that the classes cannot fill, with the numbers."""
    for name, value in (("ways", ways), ("shots", shots), ("queries", queries)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if ways > len(classes):
        raise ValueError(f"{ways}-way tasks need {ways} classes, but there are {len(classes)}")
    for name, images in zip(classes.names, classes.images):
        if shots + queries > len(images):
            raise ValueError(
                f"{shots} shots + {queries} queries = {shots + queries} images of each class are "
                f"needed, but class {name!r} has {len(images)}"
            )
