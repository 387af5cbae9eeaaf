"""The ResNets are those of He et al., and every network is found by its name or refused in one line."""

import sys
import types

import pytest
import torch
from torch import fx, nn

from dfkt.config import NetworkConfig
from dfkt.errors import NetworkError, TapError
from dfkt.networks.build import NETWORKS, BasicBlock, ResNet, build_network, network_names, network_taps


def build(name, num_classes=10, in_channels=3, **settings):
    return build_network(NetworkConfig(name=name, **settings), num_classes=num_classes, in_channels=in_channels)


def count(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("depth", "millions"), [(20, "0.27"), (32, "0.46"), (56, "0.85"), (110, "1.73")])
def test_parameter_counts_agree_with_table_6_of_he_et_al(depth, millions):
    with torch.device("meta"):
        assert f"{count(build(f'resnet{depth}')) / 1e6:.2f}" == millions


def test_parameters_of_resnet8_counted_by_hand():
    convolutions = 9 * (3 * 16 + 2 * 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64)
    norms = 2 * (3 * 16 + 2 * 32 + 2 * 64)
    assert count(build("resnet8")) == convolutions + norms + 64 * 10 + 10


@pytest.mark.parametrize("depth", [8, 14, 20, 26, 32, 44])
def test_depth_is_the_number_of_layers_with_weights_and_taps_are_stem_and_blocks(depth):
    network = ResNet(depth, num_classes=4, width=0.1)
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in network.modules()) == depth
    assert network.taps[0] == "stem"
    assert len(network.taps) == 1 + (depth - 2) // 2
    assert all(isinstance(network.get_submodule(tap), BasicBlock) for tap in network.taps[1:])


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32), (3, 7), (3, 4)])
def test_any_small_image_gives_logits(channels, size):
    network = build("resnet8", num_classes=7, in_channels=channels, width=0.25)
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
    weight = build("resnet8").get_submodule("layer3.0.conv2").weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(("width", "channels"), [(0.01, (1, 1, 1)), (0.5, (8, 16, 32)), (2.0, (32, 64, 128))])
def test_width_multiplies_channels(width, channels):
    network = build("resnet8", width=width)
    assert tuple(network.get_submodule(f"layer{g}.0.conv2").out_channels for g in (1, 2, 3)) == channels


def test_the_trace_gives_the_same_logits():
    network, x = build("resnet14", width=0.5).eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(fx.symbolic_trace(network)(x), network(x))


def test_channels_last_stays_through_every_block():
    network = build("resnet14").to(memory_format=torch.channels_last)
    layouts = []
    for block in (module for module in network.modules() if isinstance(module, BasicBlock)):
        block.register_forward_hook(lambda m, i, out: layouts.append(out.stride(1) == 1))
    network(torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last))
    assert layouts == [True] * 6


def test_network_names_build():
    names = network_names()
    assert set(NETWORKS) < set(names)
    assert "torchvision:resnet18" in names
    assert not any("rcnn" in name or "fcn" in name or "r3d" in name for name in names)
    assert len(build("resnet38", width=0.1).taps) == 19


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_0"])
def test_torchvision_networks_take_classes_and_channels(name):
    network = build(f"torchvision:{name}", num_classes=5, in_channels=1).eval()
    with torch.no_grad():
        assert network(torch.randn(1, 1, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_auxiliary_logits_are_off(name):
    with torch.device("meta"):
        network = build(f"torchvision:{name}", num_classes=5)
    assert network.aux_logits is False


@pytest.fixture
def user_module(monkeypatch):
    module = types.ModuleType("user_networks")
    module.both = lambda num_classes, in_channels: nn.Conv2d(in_channels, num_classes, 1)
    module.classes_only = lambda num_classes: nn.Linear(4, num_classes)
    module.anything = lambda **given: nn.Conv2d(given["in_channels"], given["num_classes"], 1)
    module.needs_more = lambda num_classes, secret: nn.Linear(4, num_classes)
    module.no_network = lambda num_classes: "text"
    monkeypatch.setitem(sys.modules, "user_networks", module)


@pytest.mark.usefixtures("user_module")
def test_an_imported_function_gets_the_keywords_that_it_takes():
    assert build("user_networks:both", in_channels=2).weight.shape == (10, 2, 1, 1)
    assert build("user_networks:classes_only").out_features == 10
    assert build("user_networks:anything", in_channels=1).weight.shape == (10, 1, 1, 1)


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "resnet9"}, r"`depth = 6n\+2, n >= 1` must hold, but got resnet9. The nearest is resnet8"),
        ({"name": "resnet2"}, r"6n\+2.*nearest is resnet8"),
        ({"name": "resnet18"}, "torchvision:resnet18 exists"),
        ({"name": "resent8"}, "Did you mean resnet8"),
        ({"name": "torchvision:resnet19"}, "Did you mean .*torchvision:resnet1"),
        ({"name": "torchvision:fcn_resnet50"}, "not a classifier"),
        ({"name": "torchvision:fasterrcnn_resnet50_fpn"}, "not a classifier"),
        ({"name": "torchvision:resnet18", "width": 2.0}, "width=2.0; only resnetN has it"),
        ({"name": "no_such_package:function"}, "Cannot import .*No module named"),
        ({"name": ":function"}, "Cannot import"),
        ({"name": "user_networks:absent"}, "Cannot import .*absent"),
        ({"name": "user_networks:needs_more"}, "Cannot build .*secret"),
        ({"name": "user_networks:no_network"}, "must return a torch.nn.Module, but returned str"),
    ],
)
def test_networks_that_cannot_be_had_are_refused_in_one_line(settings, message):
    with pytest.raises(NetworkError, match=message) as caught:
        build(**settings)
    assert "\n" not in str(caught.value)


def test_taps_given_come_first_then_the_networks_own():
    network = build("resnet8", width=0.1)
    assert network_taps(network, NetworkConfig()) == ("stem", "layer1.0", "layer2.0", "layer3.0")
    assert network_taps(network, NetworkConfig(taps=("stem", "layer3"))) == ("stem", "layer3")


def test_taps_of_torchvision_resnets_are_maxpool_and_blocks():
    with torch.device("meta"):
        network = build("torchvision:resnet34")
    taps = network_taps(network, NetworkConfig())
    assert taps[:2] == ("maxpool", "layer1.0")
    assert taps[-1] == "layer4.2"
    assert len(taps) == 1 + 3 + 4 + 6 + 3


@pytest.mark.parametrize(("name", "listed"), [("mobilenet_v2", "features.18"), ("densenet121", "features.denseblock1")])
def test_other_networks_must_name_their_taps_and_are_told_candidates(name, listed):
    with torch.device("meta"):
        network = build(f"torchvision:{name}")
    with pytest.raises(TapError, match="name them, from bottom to top") as caught:
        network_taps(network, NetworkConfig())
    candidates = str(caught.value).rstrip(".").rpartition(": ")[2].split(", ")
    assert len(candidates) == 8
    assert listed in candidates
    assert all(network.get_submodule(path) is not None for path in candidates)
