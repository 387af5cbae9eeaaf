"""A tapped network computes what is asked of it, and nothing is demanded of one that is read at its logits only."""

import copy

import pytest
import torch
from tiny_networks import Moody, Odd, Untraceable, hooked, modes, randomise_statistics, resnet
from torch import nn

from dfkt.config import NetworkConfig
from dfkt.errors import TapError
from dfkt.networks.build import network_taps
from dfkt.networks.tapped import AdaptedNetwork, FrozenTeacher, Renormalise, TappedNetwork

SHAPE = (3, 8, 8)


def test_parts_give_the_activations_of_the_whole_network_and_are_cut_once():
    network = resnet().eval()
    tapped, x = TappedNetwork(network, network.taps, SHAPE), torch.randn(2, *SHAPE)
    part = tapped.part((1, 3), logits=True)
    expected = hooked(network, network.taps, x)
    result = part(x)
    assert list(result) == ["1", "3", "logits"]
    assert torch.equal(result["1"], expected["layer1.0"])
    assert torch.equal(result["3"], expected["layer2.0"])
    assert torch.equal(result["logits"], expected["logits"])
    assert tapped.part((1, 3), logits=True) is part
    assert set(tapped.part((1,), logits=False)(x)) == {"1"}
    assert tapped.below(0) == {"stem.conv.weight", "stem.bn.weight", "stem.bn.bias"}


@pytest.mark.parametrize("build", [Untraceable, Moody, Odd], ids=lambda build: build.__name__)
@pytest.mark.parametrize("kind", [TappedNetwork, FrozenTeacher])
def test_without_taps_any_network_gives_its_logits(kind, build):
    network, x = build(), torch.randn(2, *SHAPE)
    with pytest.raises(TapError):
        network_taps(network, NetworkConfig())
    expected = copy.deepcopy(network).eval()(x)
    tapped = kind(network, (), SHAPE)
    assert tapped.taps == ()
    result = tapped.part((), logits=True).eval()(x)
    assert list(result) == ["logits"]
    torch.testing.assert_close(result["logits"], expected)


def test_without_taps_the_network_is_not_run_when_it_is_wrapped():
    network = nn.Sequential(nn.Linear(3, 3))
    network.register_forward_hook(lambda *_: pytest.fail("was run"))
    TappedNetwork(network, (), SHAPE)


def test_a_whole_network_shares_parameters_and_modes():
    network = resnet()
    part = TappedNetwork(network, (), SHAPE).part((), logits=True)
    assert {id(p) for p in part.parameters()} == {id(p) for p in network.parameters()}
    part.eval()
    assert not network.stem.bn.training


def test_nothing_cannot_be_asked_for():
    with pytest.raises(TapError, match="must return something"):
        TappedNetwork(resnet(), (), SHAPE).part((), logits=False)


def test_a_frozen_teacher_is_a_folded_copy_without_gradient():
    network = randomise_statistics(resnet())
    before, state = modes(network), copy.deepcopy(network.state_dict())
    teacher, x = FrozenTeacher(network, network.taps, SHAPE), torch.randn(2, *SHAPE)
    assert modes(network) == before
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in teacher.network.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in teacher.network.modules())
    expected = hooked(network.eval(), network.taps, x)
    result = teacher.part((0, 6), logits=True)(x)
    assert not any(value.requires_grad for value in result.values())
    for key, name in (("0", "stem"), ("6", "layer3.1"), ("logits", "logits")):
        torch.testing.assert_close(result[key], expected[name], rtol=1e-3, atol=1e-3)


def test_what_stands_before_a_teacher_stands_before_each_of_its_parts_and_is_not_folded_away():
    network = randomise_statistics(resnet()).eval()
    first = Renormalise(torch.rand(3), torch.rand(3) + 0.5, torch.rand(3), torch.rand(3) + 0.5).float()
    teacher = FrozenTeacher(network, network.taps, SHAPE, first)
    x = torch.randn(2, *SHAPE)
    for taps, logits in (((0, 3), False), ((), True), ((6,), True)):
        part = teacher.part(taps, logits)
        result, expected = part(x), hooked(network, network.taps, first(x))
        assert teacher.part(taps, logits) is part
        for key, value in result.items():  # with the borders, where zeros are padded to what the teacher is given
            name = "logits" if key == "logits" else network.taps[int(key)]
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-3)
    assert teacher.taps == FrozenTeacher(network, network.taps, SHAPE).taps


def test_adapters_stand_behind_their_taps_only():
    network, x = resnet(8), torch.randn(2, *SHAPE)
    part = TappedNetwork(network.eval(), network.taps, SHAPE).part((0, 1), logits=True)
    adapter = nn.Conv2d(4, 7, 1)
    result, plain = AdaptedNetwork(part, nn.ModuleDict({"1": adapter}))(x), part(x)
    assert torch.equal(result["1"], adapter(plain["1"]))
    assert torch.equal(result["0"], plain["0"])
    assert torch.equal(result["logits"], plain["logits"])
