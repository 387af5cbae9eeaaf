"""Suggested taps are blocks, from bottom to top, and naming exactly them works."""

import pytest
import torch
from tiny_networks import Residual, modes
from torch import nn
from torch.nn import functional as F

from dfkt.config import NetworkConfig
from dfkt.networks.build import build_network
from dfkt.networks.cut import cut
from dfkt.networks.suggest import suggest_taps
from dfkt.networks.taps import measure_taps


def built(name):
    """Build without drawing weights where the constructor allows that; only shapes matter here."""
    device = "cpu" if "regnet" in name else "meta"
    with torch.device(device):
        return build_network(NetworkConfig(name=f"torchvision:{name}"), num_classes=3, in_channels=3)


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("mobilenet_v2", ("features.0", "features.3", "features.18")),
        pytest.param(
            "densenet121",
            ("features.relu0", "features.denseblock1", "features.transition1", "features.denseblock4"),
            marks=pytest.mark.slow,
        ),
        ("vgg11_bn", ("features.2", "features.6", "features.27")),
        ("efficientnet_b0", ("features.0", "features.2.0", "features.8")),
        ("shufflenet_v2_x0_5", ("conv1", "stage2.1", "conv5")),
        ("regnet_y_400mf", ("stem", "trunk_output.block3.block3-0", "trunk_output.block4.block4-5")),
        ("googlenet", ("conv1", "inception3a", "inception5b")),
        ("mnasnet0_5", ("layers.2", "layers.8.0", "layers.16")),
        ("squeezenet1_1", ("features.1", "features.3", "features.12")),
    ],
)
def test_the_suggested_taps_of_a_torchvision_network_are_blocks_that_can_be_read(name, some):
    network = built(name)
    before = modes(network)
    taps = suggest_taps(network)
    assert modes(network) == before
    assert len(taps) == 8
    assert set(some) <= set(taps)
    assert not any(isinstance(network.get_submodule(tap), nn.Conv2d) for tap in taps)
    assert tuple(tap.name for tap in measure_taps(network, taps, (3, 96, 96))) == taps
    part = cut(network, {tap: tap for tap in taps}).eval()
    device = next(network.parameters()).device
    assert tuple(part(torch.zeros(1, 3, 64, 64, device=device))) == taps


class Own(nn.Module):
    """A network that someone wrote: a stem of loose layers, and blocks in a container."""

    def __init__(self, blocks, stem=True):
        super().__init__()
        self.act, self.norm = nn.ReLU(), nn.BatchNorm2d(4)  # in another order than they run
        self.conv = nn.Conv2d(3, 4, 3)
        self.blocks = blocks
        self.fc = nn.Linear(8, 2)

    def forward(self, x):  # noqa: D102
        x = self.act(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class Called(Own):
    """Calls its container."""

    def forward(self, x):  # noqa: D102
        return self.fc(self.blocks(F.relu(self.norm(self.conv(x)))).mean((2, 3)))


class Wrapped(nn.Module):
    """Holds the whole network in one module."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(2, 2)

    def forward(self, x):  # noqa: D102
        return self.head(self.backbone(x))


def plain(inside, outside):
    return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1), nn.GroupNorm(1, outside), nn.ReLU())


def deep(inside, outside):
    return nn.Sequential(*plain(inside, outside), *plain(outside, outside), nn.MaxPool2d(2))


@pytest.mark.parametrize(
    ("network", "taps"),
    [
        (Own(nn.ModuleList([Residual(4, 8), Residual(8, 8)])), ("act", "blocks.0", "blocks.1")),
        (Called(nn.Sequential(Residual(4, 8), Residual(8, 8))), ("norm", "blocks.0", "blocks.1")),
        (Wrapped(Own(nn.ModuleList([Residual(4, 8)]))), ("backbone.act", "backbone.blocks.0")),
        (nn.Sequential(plain(3, 4), plain(4, 8), nn.MaxPool2d(2), plain(8, 8)), ("0", "1", "3")),
        (nn.Sequential(deep(3, 4), deep(4, 8)), ("0", "1")),
        (nn.Sequential(*plain(3, 4), nn.MaxPool2d(2), *plain(4, 4)), ("2", "6")),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), ("0", "1")),
        (nn.Sequential(Residual(3, 4), nn.Sequential(Residual(4, 4), Residual(4, 4))), ("0", "1.0", "1.1")),
        (nn.Sequential(Residual(3, 4), Residual(4, 4), nn.Upsample(scale_factor=2), Residual(4, 4)), ("0", "1")),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), ()),
        (nn.Sequential(nn.Flatten(), nn.Linear(3, 3)), ()),
    ],
)
def test_the_suggested_taps_of_an_own_network_are_its_blocks(network, taps):
    assert suggest_taps(network) == taps
    measure_taps(network, taps, (3, 16, 16))
    if taps:
        assert tuple(cut(network, {tap: tap for tap in taps})(torch.zeros(2, 3, 16, 16))) == taps


def test_suggestions_are_evenly_spread_from_the_lowest_to_the_highest_block():
    network = nn.Sequential(*[plain(3, 3) for _ in range(22)])
    assert suggest_taps(network) == ("0", "3", "6", "9", "12", "15", "18", "21")
    assert suggest_taps(network, limit=3) == ("0", "10", "21")


def test_a_network_of_one_size_is_tried_on_the_images_it_is_for():
    network = nn.Sequential(plain(1, 2), plain(2, 2), nn.Flatten(), nn.Linear(2 * 20 * 20, 3))
    assert suggest_taps(network) == ()
    assert suggest_taps(network, (1, 20, 20)) == ("0", "1")
