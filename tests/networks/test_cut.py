"""A cut network is the lower part of the whole one."""

import copy
import pickle

import pytest
import torch
from tiny_networks import Moody, Odd, Overwriting, Pair, Untraceable, hooked, modes, randomise_statistics, resnet
from torch import nn

from dfkt.errors import TapError
from dfkt.networks.cut import cut, parameters_below
from dfkt.networks.trace import trace


@pytest.mark.parametrize("training", [True, False])
def test_a_network_cut_off_at_a_tap_gives_the_activations_and_statistics_of_the_whole_one(training):
    network = randomise_statistics(resnet()).train(training)
    whole = copy.deepcopy(network)
    x = torch.randn(4, 3, 12, 12)
    names = ("stem", "layer1.1", "layer2.0")
    expected = hooked(whole, names, x)
    part = cut(network, {name: f"at {name}" for name in names})
    result = part(x)
    assert list(result) == [f"at {name}" for name in names]
    for name in names:
        assert torch.equal(result[f"at {name}"], expected[name])
    for name, value in part.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name])
        assert value.data_ptr() == network.state_dict()[name].data_ptr()


@pytest.mark.parametrize("training", [True, False])
def test_with_logits_nothing_is_cut_off(training):
    network = resnet().train(training)
    x = torch.randn(4, 3, 8, 8)
    expected = hooked(copy.deepcopy(network), network.taps, x)
    part = cut(network, {name: name for name in network.taps}, logits=True)
    result = part(x)
    assert list(result) == list(expected)
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    assert set(part.state_dict()) == set(network.state_dict())


@pytest.mark.parametrize("tap", ["stem", "layer1.0", "layer2.1", "layer3.1"])
def test_only_parameters_below_the_tap_get_gradients_and_only_they_are_in_the_cut(tap):
    network = resnet()
    part = cut(network, {tap: "tap"})
    part(torch.randn(4, 3, 8, 8))["tap"].square().sum().backward()
    reached = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert parameters_below(network, tap) == reached == {name for name, _ in part.named_parameters()}


def test_parameters_below_a_tap_of_a_network_with_branches():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.top = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1, bias=False)

        def forward(self, x):
            return self.top(self.left(x) + self.right(x))

    assert parameters_below(Branches(), "right") == {"right.weight", "right.bias"}
    assert len(parameters_below(Branches(), "top")) == 5


def test_modes_of_the_cut_act_on_the_shared_layers_and_cutting_changes_none():
    network = resnet()
    network.layer1.eval()
    before = modes(network)
    part = cut(network, {"layer2.0": "tap"})
    assert modes(network) == before
    part.eval()
    assert not network.stem.bn.training
    assert not network.layer2[0].bn1.training
    assert network.layer3[0].bn1.training
    part.train()
    assert network.layer1[0].bn1.training


def test_a_step_on_the_cut_moves_the_whole_network():
    network = resnet()
    before = network.stem.conv.weight.detach().clone()
    part = cut(network, {"layer1.0": "tap"})
    part(torch.randn(4, 3, 8, 8))["tap"].sum().backward()
    torch.optim.SGD(part.parameters(), lr=0.1).step()
    assert not torch.equal(network.stem.conv.weight, before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))])
def test_a_cut_network_can_be_copied_and_pickled(duplicate):
    part = cut(resnet(), {"layer1.0": "tap"}).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(duplicate(part).eval()(x)["tap"], part(x)["tap"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("names", [("conv", "add", "last"), ("last",), ("add", "same")])
def test_operations_in_place_change_no_tap_and_are_not_lost(names, training):
    torch.manual_seed(0)
    network, x = Overwriting().train(training), torch.randn(8, 3, 4, 4)
    expected = hooked(copy.deepcopy(network), names, x)
    result = cut(network, {name: name for name in names}, logits=True)(x)
    assert all((expected[name] < 0).any() for name in names)
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    assert (result["logits"] >= 0).all()


def test_what_is_overwritten_above_the_highest_tap_is_not_computed():
    part = cut(Overwriting(), {"add": "tap"})
    assert {name.split(".")[0] for name, _ in part.named_parameters()} == {"conv", "add"}


class OwnNorm(nn.modules.batchnorm._BatchNorm):
    """A user's batch normalisation; torch.fx would look into it, and lose the counting of batches."""

    def _check_input_dim(self, input):
        pass


def test_every_batch_normalisation_is_a_leaf_and_works_as_in_the_whole_network():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), OwnNorm(4, momentum=None), nn.ReLU(), nn.SyncBatchNorm(4))
    before = copy.deepcopy(network.state_dict())
    part = cut(network, {"2": "tap"})
    assert isinstance(part.get_submodule("1"), OwnNorm)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    whole, x = copy.deepcopy(network[:3]), torch.randn(4, 3, 5, 5)
    for _ in range(2):
        assert torch.equal(part(x)["tap"], whole(x))
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in part.state_dict().items())
    assert network[1].num_batches_tracked == 2


def test_torchs_own_modules_stay_leaves_and_containers_do_not():
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)), nn.Hardswish(), nn.MaxPool2d(2))
    graph, _ = trace(network)
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    assert called == ["0.0", "0.1", "1", "2"]


def test_a_forward_pass_that_depends_on_the_mode_follows_the_cut_networks_mode():
    part, x = cut(Moody(), {"conv": "tap"}, logits=True), torch.randn(1, 3, 2, 2)
    train, evaluation = part(x), part.eval()(x)
    assert torch.equal(train["logits"], train["tap"])
    assert torch.equal(evaluation["logits"], 2 * evaluation["tap"])


@pytest.mark.parametrize(
    ("network", "names", "logits", "message"),
    [
        (resnet(), {"layer1.9": "tap"}, False, "Unknown tap 'layer1.9': ResNet.*Did you mean layer1"),
        (resnet(), {}, False, "must return something"),
        (resnet(), {"stem": "a", "layer1": "a"}, False, "keys that differ"),
        (resnet(), {"stem": "logits"}, True, "keys that differ"),
        (Untraceable(), {"conv": "tap"}, False, "Untraceable cannot be traced by torch.fx.*Write its forward pass"),
        (Odd(), {"twice": "tap"}, False, "'twice' ran 2 times"),
        (Odd(), {"unused": "tap"}, False, "'unused' ran 0 times"),
        (Odd(), {"pair": "tap"}, False, "'pair' gives no tensor"),
        (Pair(), {}, True, "Pair must return logits, but returns several values"),
    ],
)
def test_cuts_that_cannot_be_made_are_refused(network, names, logits, message):
    before = modes(network)
    with pytest.raises(TapError, match=message):
        cut(network, names, logits=logits)
    assert modes(network) == before
