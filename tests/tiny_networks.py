"""Small networks with every oddity that taps, cuts and folds must bear, and what is read of them."""

import torch
from torch import nn
from torch.nn import functional as F

from dfkt.networks.resnet import ResNet


def resnet(depth=14, width=0.25, in_channels=3):
    torch.manual_seed(depth)
    return ResNet(depth, num_classes=5, in_channels=in_channels, width=width)


def randomise_statistics(network):
    """Give every batch normalisation statistics and weights that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
            ):
                tensor.uniform_(low, high, generator=generator)
    return network


def drawn_quickly(build):
    """Build a large network without the time that its own initialisation takes."""
    with torch.device("meta"):
        network = build(num_classes=5)
    network.to_empty(device="cpu")
    for tensor in network.state_dict().values():
        tensor.zero_()
    for parameter in network.parameters():
        bound = (3 / max(1, parameter[0].numel())) ** 0.5
        nn.init.uniform_(parameter, -bound, bound)
    return network


def hooked(network, names, x):
    """Return what the named modules return in a forward pass of the whole network, and the logits."""
    seen = {}
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: seen.update({name: out.clone()}))
        for name in names
    ]
    logits = network(x)
    for hook in hooks:
        hook.remove()
    return seen | {"logits": logits}


def modes(network):
    return {name: module.training for name, module in network.named_modules()}


class Odd(nn.Module):
    """Has a module that is never run, one that runs twice, one that widens the grid and one that gives a pair."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 1)
        self.unused, self.widen, self.pair = nn.ReLU(), nn.Upsample(scale_factor=2), Pair()

    def forward(self, x):  # noqa: D102
        x = self.widen(self.twice(self.twice(self.first(x))))
        return self.pair(x)[0].flatten(1)


class Pair(nn.Module):
    """Returns two tensors."""

    def forward(self, x):  # noqa: D102
        return x, x


class Overwriting(nn.Module):
    """Overwrites activations in place: once with the result thrown away, and once through a module that copies none."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.add = nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)
        self.last, self.same = nn.Conv2d(4, 4, 1), nn.Identity()

    def forward(self, x):  # noqa: D102
        x = self.conv(x)
        self.relu(x)
        x = self.last(F.relu(self.add(x), inplace=True))
        torch.relu_(self.same(x).flatten(1))
        return x


class Moody(nn.Module):
    """Does something else in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):  # noqa: D102
        x = self.conv(x)
        return x if self.training else 2 * x


class Untraceable(nn.Module):
    """Has control flow that depends on the input."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):  # noqa: D102
        return self.bn(self.conv(x)) if x.sum() > 0 else self.conv(x)


class Residual(nn.Module):
    """A block of bare convolutions, one normalisation and functions."""

    def __init__(self, inside, outside):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside)
        self.conv2, self.shortcut = nn.Conv2d(outside, outside, 3, padding=1), nn.Conv2d(inside, outside, 1)

    def forward(self, x):  # noqa: D102
        return F.relu(self.conv2(F.relu(self.bn(self.conv1(x)))) + self.shortcut(x))
