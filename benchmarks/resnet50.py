"""ResNet-50 as a model, with the weights of ``shapes.RESNET50``, for peers that follow its connections."""

from __future__ import annotations

from torch import Tensor, nn

# Blocks, and the channels within one, of the four stages; a block's output has four times as many.
_STAGES = [(3, 64), (4, 128), (6, 256), (3, 512)]
_EXPANSION = 4


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class _Block(nn.Module):
    """Three convolutions around which the input is passed."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = _EXPANSION * channels
        self.convolutions = nn.Sequential(
            _convolution(inputs, channels, 1),
            nn.ReLU(),
            _convolution(channels, channels, 3, stride),
            nn.ReLU(),
            _convolution(channels, outputs, 1),
        )
        changes = inputs != outputs or stride != 1
        self.shortcut = _convolution(inputs, outputs, 1, stride) if changes else nn.Identity()
        self.activation = nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        return self.activation(self.convolutions(input) + self.shortcut(input))


def resnet50() -> nn.Module:
    """The model with the weights it starts training from, for inference."""
    layers: list[nn.Module] = [_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, (blocks, channels) in enumerate(_STAGES):
        for block in range(blocks):
            layers.append(_Block(inputs, channels, 2 if stage > 0 and block == 0 else 1))
            inputs = _EXPANSION * channels
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)]
    return nn.Sequential(*layers, *head).eval()
