"""Every network is found by its name or refused in one line, and so are its taps."""

import sys
import types

import pytest
import torch
from tiny_networks import Residual
from torch import nn

from dfkt.config import NetworkConfig
from dfkt.errors import ConfigError, NetworkError, TapError
from dfkt.networks.build import NETWORKS, build_network, network_names, network_taps, split_network_pair
from dfkt.networks.tapped import FrozenTeacher


def build(name, num_classes=10, in_channels=3, **settings):
    return build_network(NetworkConfig(name=name, **settings), num_classes=num_classes, in_channels=in_channels)


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


@pytest.mark.parametrize(
    ("name", "taps"),
    [
        ("resnet10t", ("act1", "layer1", "layer2", "layer3", "layer4")),
        ("mobilenetv3_small_050.lamb_in1k", ("bn1", "blocks.0", "blocks.1", "blocks.3", "blocks.5")),
        ("regnetx_002", ("stem", "s1", "s2", "s3", "s4")),
    ],
)
def test_timm_networks_take_classes_and_channels_and_are_read_where_timm_reads_them(name, taps):
    network = build(f"timm:{name}", num_classes=5, in_channels=1).eval()
    assert network_taps(network, NetworkConfig()) == taps
    frozen = FrozenTeacher(network, taps, (1, 64, 64))
    assert [tap.grid for tap in frozen.taps] == sorted((tap.grid for tap in frozen.taps), reverse=True)
    with torch.no_grad():
        assert network(torch.randn(1, 1, 64, 64)).shape == (1, 5)


def test_without_timm_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(NetworkError, match=r"timm:resnet18 needs timm \(pip install 'dfkt\[timm\]'\), but it cannot"):
        build("timm:resnet18")


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
        ({"name": "timm:resnet19"}, "Unknown network 'timm:resnet19'. Did you mean timm:resnet18"),
        (
            {"name": "timm:resnet18.nope"},
            r"Cannot build network 'timm:resnet18.nope': .*Invalid pretrained tag \(nope\)",
        ),
        ({"name": "torchvision:fasterrcnn_resnet50_fpn"}, "not a classifier"),
        ({"name": "torchvision:resnet18", "width": 2.0}, "width=2.0; only resnetN has it"),
        ({"name": "no_such_package:function"}, "Cannot import .*No module named"),
        ({"name": ":function"}, "`package.module:name` must hold, but got ':function'"),
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


class Unreadable(nn.Module):
    """Has no place to be read at, and does not run."""

    def __init__(self):
        super().__init__()
        self.layer1, self.fc = nn.Linear(3, 3), nn.Linear(3, 3)


def test_other_networks_must_name_their_taps_and_are_told_blocks():
    network = nn.Sequential(Residual(3, 4), nn.MaxPool2d(2), Residual(4, 8), nn.Flatten(), nn.Linear(8 * 36, 2))
    with pytest.raises(TapError, match=r"Sequential does not know its taps; name them.*: 0, 2\.$"):
        network_taps(network, NetworkConfig(), (3, 12, 12))
    with pytest.raises(TapError, match="none was found"):
        network_taps(Unreadable(), NetworkConfig())


@pytest.mark.parametrize(
    ("pair", "names"),
    [
        ("resnet26:resnet8", ("resnet26", "resnet8")),
        ("resnet26:mynet:f", ("resnet26", "mynet:f")),
        ("mynet:f:resnet8", ("mynet:f", "resnet8")),
        ("mynet:f:mynet:f", ("mynet:f", "mynet:f")),
        ("mynet:f:mynet:g", ("mynet:f", "mynet:g")),
        ("a.b:f:resnet8", ("a.b:f", "resnet8")),
        ("a.b:f:c:g", ("a.b:f", "c:g")),
        ("mynet:f:g:resnet8", ("mynet:f", "g:resnet8")),
        ("mynet:resnet26:resnet8", ("mynet:resnet26", "resnet8")),
        ("resnet26:mynet:resnet8", ("resnet26", "mynet:resnet8")),
        ("resnet26:torchvision:resnet18", ("resnet26", "torchvision:resnet18")),
        ("torchvision:resnet18:resnet8", ("torchvision:resnet18", "resnet8")),
        ("torchvision:resnet18:torchvision:resnet18", ("torchvision:resnet18", "torchvision:resnet18")),
        ("timm:resnet18.a1_in1k:mynet:f", ("timm:resnet18.a1_in1k", "mynet:f")),
    ],
)
def test_a_pair_is_split_between_its_two_names(pair, names):
    assert split_network_pair(pair) == names


@pytest.mark.parametrize(
    "pair",
    [
        *(
            "",
            ":",
            "resnet8",
            "resnet8:",
            ":resnet8",
            "mynet:f",
            "mynet:f:",
            "mynet:f:mynet",
            "resnet8:resnet8:resnet8",
        ),
        *("resent26:resnet8", "mynet::resnet8", "mynet:torchvision:resnet18", "torchvision:timm", "a..b:f:resnet8"),
        *("mynet:f:resnet8:g:h", "mynet:f: resnet8", "a/b:f:resnet8", "torchvision::resnet8"),
    ],
)
def test_what_is_not_two_names_is_refused(pair):
    with pytest.raises(ConfigError, match=r"`TEACHER:STUDENT` must be two of .*, but got ") as caught:
        split_network_pair(pair)
    assert repr(pair) in str(caught.value)
