"""A cut network is the lower part of the whole one, and teacher taps meet student taps at the same share of a group."""

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from dfkt.networks.cut import cut, fold_batchnorm, parameters_below
from dfkt.errors import TapError
from dfkt.networks.build import ResNet
from dfkt.networks.taps import Tap, match_taps, measure_taps


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


def taps_of(depth):
    """Return what measuring a ResNet of this depth on images of 32x32 gives, without the network."""
    blocks = (depth - 2) // 6
    grids = [32] * (1 + blocks) + [16] * blocks + [8] * blocks
    return [Tap("t", 1, grid, grid) for grid in grids]


# ---------------------------------------------------------------- measuring


def test_measured_shapes_are_those_of_the_activations():
    network = resnet(8, 0.5)
    assert measure_taps(network, network.taps, (3, 28, 20)) == (
        Tap("stem", 8, 28, 20),
        Tap("layer1.0", 8, 28, 20),
        Tap("layer2.0", 16, 14, 10),
        Tap("layer3.0", 32, 7, 5),
    )


def test_measuring_leaves_modes_statistics_and_hooks_as_they_were():
    network = resnet()
    network.layer1.eval()
    before, state = modes(network), copy.deepcopy(network.state_dict())
    measure_taps(network, network.taps, (3, 8, 8))
    assert modes(network) == before
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


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


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["frist"], "Unknown tap 'frist'.*Did you mean first"),
        ([""], "Unknown tap ''"),
        (["first", "unused"], "'unused' ran 0 times"),
        (["first", "twice"], "'twice' ran 2 times"),
        (["first", "first"], "'first' ran 2 times"),
        (["widen", "first"], "from bottom to top: first, widen; but got widen, first"),
        (["first", "pair"], "'pair' gives no tensor"),
        (["first", "widen"], "must not grow.*first 6x6, widen 12x12"),
    ],
)
def test_taps_that_cannot_be_measured_are_refused(names, message):
    with pytest.raises(TapError, match=message):
        measure_taps(Odd(), names, (3, 8, 8))


def test_activations_that_are_no_maps_and_images_that_do_not_fit_are_refused():
    network = resnet()
    with pytest.raises(TapError, match=r"'fc' gives shape \[1, 5\]"):
        measure_taps(network, ["stem", "fc"], (3, 8, 8))
    with pytest.raises(TapError, match="ResNet cannot take images of 1x8x8: RuntimeError"):
        measure_taps(network, ["stem"], (1, 8, 8))
    assert not network.stem._forward_hooks


# ---------------------------------------------------------------- matching


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (8, 26, (0, 4, 8, 12)),
        (8, 32, (0, 5, 10, 15)),
        (14, 32, (0, 3, 5, 8, 10, 13, 15)),
        (20, 32, (0, 2, 4, 5, 7, 9, 10, 12, 14, 15)),
        (14, 14, (0, 1, 2, 3, 4, 5, 6)),
        (14, 8, (0, 1, 1, 2, 2, 3, 3)),
        (26, 14, (0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6)),
    ],
)
def test_each_student_tap_meets_the_teacher_tap_at_the_same_share_of_its_group(student, teacher, expected):
    assert match_taps(taps_of(student), taps_of(teacher)) == expected


def test_group_ends_meet_group_ends_for_every_pair_of_depths():
    for n_s in range(1, 8):
        for n_t in range(1, 8):
            student, teacher = ([Tap("t", 1, g, g) for g in (9, *[9] * n, *[5] * n, *[3] * n)] for n in (n_s, n_t))
            matched = match_taps(student, teacher)
            assert [matched[g * n_s] for g in range(4)] == [g * n_t for g in range(4)]
            assert list(matched) == sorted(matched)


def test_different_numbers_of_groups_are_refused_with_both_lists_of_grids():
    student, teacher = taps_of(8), [Tap("t", 1, g, g) for g in (8, 8, 4)]
    with pytest.raises(TapError, match=r"cannot be matched: teacher 8x8, 8x8, 4x4; student 32x32.*--student-taps"):
        match_taps(student, teacher)
    with pytest.raises(TapError, match="teacher none"):
        match_taps(student, [])


# ---------------------------------------------------------------- cutting


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


class Overwriting(nn.Module):
    """Overwrites activations in place, once with the result thrown away."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.add = nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)

    def forward(self, x):  # noqa: D102
        x = self.conv(x)
        self.relu(x)
        return F.relu(self.add(x), inplace=True)


def test_operations_in_place_change_no_tap_and_are_not_lost():
    network, x = Overwriting(), torch.randn(2, 3, 4, 4)
    expected = hooked(copy.deepcopy(network), ("conv", "add"), x)
    result = cut(network, {"conv": "conv", "add": "add"}, logits=True)(x)
    assert (expected["conv"] < 0).any()
    assert all(torch.equal(result[name], expected[name]) for name in expected)


class Moody(nn.Module):
    """Does something else in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):  # noqa: D102
        x = self.conv(x)
        return x if self.training else 2 * x


def test_a_forward_pass_that_depends_on_the_mode_follows_the_cut_networks_mode():
    part, x = cut(Moody(), {"conv": "tap"}, logits=True), torch.randn(1, 3, 2, 2)
    train, evaluation = part(x), part.eval()(x)
    assert torch.equal(train["logits"], train["tap"])
    assert torch.equal(evaluation["logits"], 2 * evaluation["tap"])


class Untraceable(nn.Module):
    """Has control flow that depends on the input."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):  # noqa: D102
        return self.bn(self.conv(x)) if x.sum() > 0 else self.conv(x)


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


# ---------------------------------------------------------------- folding


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
    assert not folded.training
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
