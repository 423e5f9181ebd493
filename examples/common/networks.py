"""The convolutional network of the few-shot example."""

from __future__ import annotations

import torch
from torch import nn


class BatchStatistics(nn.Module):
    """Batch normalisation by the statistics of the images in the batch, in training and in testing.

    Few-shot learners adapt to a task from its own images, so there are no running statistics to
    keep. It is written in plain operations: they can be differentiated as often as needed and
    mapped over tasks.

    Args:
        channels: Channels of the input ``[count, channels, height, width]``.
        eps: Added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise each channel over images and pixels, then scale and shift it."""
        centered = x - x.mean((0, 2, 3), keepdim=True)
        variance = centered.square().mean((0, 2, 3), keepdim=True)
        scale = self.weight.view(1, -1, 1, 1) * (variance + self.eps).rsqrt()
        return centered * scale + self.bias.view(1, -1, 1, 1)


class ConvNet(nn.Module):
    """Blocks of 3x3 convolution, batch statistics, ReLU and 2x2 max pooling; then a linear head.

    On images of more than 16 pixels the first block has a stride of 2 instead of the pooling: at
    the full size it would cost as much as all others together.

    Args:
        classes: Outputs of the head.
        image_size: Height and width of the input images.
        channels: Channels of every block.
        blocks: Number of blocks; each halves height and width, rounding down, while they are > 1.
    """

    def __init__(self, classes: int, image_size: int, channels: int, blocks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        size = image_size
        for block in range(blocks):
            inputs = channels if block else 1
            # no bias: the normalisation that follows would subtract it again
            stride = 2 if block == 0 and image_size > 16 else 1
            layers += [nn.Conv2d(inputs, channels, 3, stride=stride, padding=1, bias=False)]
            layers += [BatchStatistics(channels), nn.ReLU()]
            if stride == 2:
                size = (size + 1) // 2
            elif size > 1:
                layers += [nn.MaxPool2d(2)]
                size //= 2
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(channels * size * size, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits ``[count, classes]`` of images ``[count, 1, height, width]``."""
        return self.head(self.body(x))
