"""The ResNets of depth 6n+2 for small images: the networks of the method's own experiments."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from dfkt.errors import NetworkError


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them; ReLU after the addition.

    The shortcut has no parameters (option A): every ``stride``-th row and column of the input, with channels of
    zeros appended. In-place operations only touch tensors made inside the block, never its input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.added_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's activation, ``[B, out_channels, ceil(H / stride), ceil(W / stride)]``."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.added_channels:
            x = F.pad(x, (0, 0, 0, 0, 0, self.added_channels))
        out += x
        return F.relu(out, inplace=True)


class ResNet(nn.Module):
    """ResNet of depth 6n+2 for small images: a stem, three groups of n basic blocks, and a linear classifier.

    Convolutions are drawn from a normal distribution with variance ``2 / fan_out`` (MSRA, ``fan_out`` =
    9 * output channels), the classifier with variance ``1 / fan_in`` and a bias of zero.

    Args:
        depth: Number of layers with weights, 8, 14, 20, 26, 32, …
        num_classes: Number of logits.
        in_channels: Channels of the images.
        width: Multiplies the groups' channels 16, 32, 64; rounded, at least 1.

    Raises:
        NetworkError: If the depth is not 6n+2 with n >= 1.

    References:
        He et al., "Deep residual learning for image recognition", 2015, Sec. 4.2, shortcut option A.

    Example:
        >>> ResNet(8, num_classes=10).taps
        ('stem', 'layer1.0', 'layer2.0', 'layer3.0')
    """

    def __init__(self, depth: int, *, num_classes: int, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            near = max(8, 6 * round((depth - 2) / 6) + 2)
            raise NetworkError(f"`depth = 6n+2, n >= 1` must hold, but got resnet{depth}. The nearest is resnet{near}.")
        channels = [max(1, round(base * width)) for base in (16, 32, 64)]
        parts = {"conv": _conv3x3(in_channels, channels[0]), "bn": nn.BatchNorm2d(channels[0])}
        self.stem = nn.Sequential(OrderedDict(parts, relu=nn.ReLU(inplace=True)))
        self.layer1 = self._group(channels[0], channels[0], blocks, stride=1)
        self.layer2 = self._group(channels[0], channels[1], blocks, stride=2)
        self.layer3 = self._group(channels[1], channels[2], blocks, stride=2)
        self.fc = nn.Linear(channels[2], num_classes)
        self.taps: tuple[str, ...] = ("stem", *(f"layer{g}.{b}" for g in (1, 2, 3) for b in range(blocks)))
        """Behind the stem, then behind every block, from bottom to top."""
        self._initialise()

    @staticmethod
    def _group(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)))

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.kaiming_normal_(self.fc.weight, mode="fan_in", nonlinearity="linear")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, num_classes]`` of images ``[B, in_channels, H, W]``."""
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits
