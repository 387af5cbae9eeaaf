"""The ResNets are those of He et al."""

import pytest
import torch
from torch import fx, nn

from dfkt.networks.resnet import BasicBlock, ResNet


def count(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("depth", "millions"), [(20, "0.27"), (32, "0.46"), (56, "0.85"), (110, "1.73")])
def test_parameter_counts_agree_with_table_6_of_he_et_al(depth, millions):
    with torch.device("meta"):
        assert f"{count(ResNet(depth, num_classes=10)) / 1e6:.2f}" == millions


def test_parameters_of_resnet8_counted_by_hand():
    convolutions = 9 * (3 * 16 + 2 * 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64)
    norms = 2 * (3 * 16 + 2 * 32 + 2 * 64)
    assert count(ResNet(8, num_classes=10)) == convolutions + norms + 64 * 10 + 10


@pytest.mark.parametrize("depth", [8, 14, 20, 26, 32, 44])
def test_depth_is_the_number_of_layers_with_weights_and_taps_are_stem_and_blocks(depth):
    network = ResNet(depth, num_classes=4, width=0.1)
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in network.modules()) == depth
    assert network.taps[0] == "stem"
    assert len(network.taps) == 1 + (depth - 2) // 2
    assert all(isinstance(network.get_submodule(tap), BasicBlock) for tap in network.taps[1:])


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32), (3, 7), (3, 4)])
def test_any_small_image_gives_logits(channels, size):
    network = ResNet(8, num_classes=7, in_channels=channels, width=0.25)
    assert network(torch.randn(2, channels, size, size)).shape == (2, 7)


def test_shortcut_slices_the_grid_and_appends_channels_of_zeros():
    block = BasicBlock(2, 5, stride=2)
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    x = torch.rand(3, 2, 7, 7)
    expected = torch.cat([x[:, :, ::2, ::2], torch.zeros(3, 3, 4, 4)], dim=1)
    torch.testing.assert_close(block(x), expected)
    assert {name.split(".")[0] for name, _ in block.named_parameters()} == {"conv1", "bn1", "conv2", "bn2"}


def test_a_block_does_not_modify_its_input():
    x = torch.randn(2, 4, 6, 6)
    before = x.clone()
    BasicBlock(4, 4)(x)
    assert torch.equal(x, before)


def test_convolutions_have_msra_variance():
    torch.manual_seed(0)
    weight = ResNet(8, num_classes=10).get_submodule("layer3.0.conv2").weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(("width", "channels"), [(0.01, (1, 1, 1)), (0.5, (8, 16, 32)), (2.0, (32, 64, 128))])
def test_width_multiplies_channels(width, channels):
    network = ResNet(8, num_classes=10, width=width)
    assert tuple(network.get_submodule(f"layer{g}.0.conv2").out_channels for g in (1, 2, 3)) == channels


def test_the_trace_gives_the_same_logits():
    network, x = ResNet(14, num_classes=10, width=0.5).eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(fx.symbolic_trace(network)(x), network(x))


def test_channels_last_stays_through_every_block():
    network = ResNet(14, num_classes=10).to(memory_format=torch.channels_last)
    layouts = []
    for block in (module for module in network.modules() if isinstance(module, BasicBlock)):
        block.register_forward_hook(lambda m, i, out: layouts.append(out.stride(1) == 1))
    network(torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last))
    assert layouts == [True] * 6
