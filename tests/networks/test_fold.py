"""A folded teacher gives what the teacher gives, without batch normalisations."""

import copy

import pytest
import torch
import torchvision
from tiny_networks import Moody, Untraceable, drawn_quickly, hooked, randomise_statistics, resnet
from torch import nn

from dfkt.networks.cut import cut
from dfkt.networks.fold import fold_batchnorm


@pytest.mark.parametrize(
    ("build", "taps"),
    [
        (lambda: resnet(8, 1.0), ("stem", "layer1.0", "layer2.0", "layer3.0")),
        (lambda: drawn_quickly(torchvision.models.resnet18), ("maxpool", "layer1.0", "layer4.1")),
        (
            lambda: drawn_quickly(torchvision.models.mobilenet_v2),
            ("features.0", "features.7", "features.18"),
        ),
    ],
    ids=["resnet8", "resnet18", "mobilenet_v2"],
)
def test_folding_changes_no_activation_and_not_the_original(build, taps):
    network = randomise_statistics(build())
    state = copy.deepcopy(network.state_dict())
    folded = fold_batchnorm(network)
    assert network.training
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert not any(module.training for module in folded.modules())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = hooked(network.eval(), taps, x)
        result = cut(folded, {name: name for name in taps}, logits=True)(x)
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, rtol=1e-3, atol=1e-4 * value.abs().max().item())


def test_a_convolution_that_is_read_or_used_elsewhere_is_not_folded():
    network = randomise_statistics(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    x = torch.randn(2, 3, 4, 4)
    folded = fold_batchnorm(network, taps=["0"])
    assert isinstance(folded[1], nn.BatchNorm2d)
    assert torch.equal(cut(folded, {"0": "tap"})(x)["tap"], network[0](x))

    class Reused(Moody):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.conv(x)
            return x + self.bn(x)

    assert isinstance(fold_batchnorm(Reused()).bn, nn.BatchNorm2d)


def test_what_cannot_be_traced_is_copied_unfolded():
    network = Untraceable()
    copied = fold_batchnorm(network)
    assert isinstance(copied.bn, nn.BatchNorm2d)
    assert not copied.training
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert network.conv.weight.requires_grad
