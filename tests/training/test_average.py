"""The running average of a network's weights: what it is, and that the network itself is left as it was."""

import torch
from torch import nn

from dfkt.training.average import DECAY, WeightAverage


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def drift(module: nn.Module, seed: int) -> None:
    """Change every weight, as a step does, and the running statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in [*module.parameters(), module[1].running_mean, module[1].running_var]:
            value += torch.rand(value.shape, generator=generator)


def test_it_is_the_exponential_average_with_a_warmed_up_decay_of_weights_and_statistics() -> None:
    module = network()
    average = WeightAverage(module)
    expected = {n: v.clone().double() for n, v in module.state_dict().items() if v.is_floating_point()}
    for step in range(300):
        drift(module, step)
        average.update()
        decay = min(DECAY, (1 + step) / (10 + step))
        for name, value in expected.items():
            expected[name] = decay * value + (1 - decay) * module.state_dict()[name].double()

    with average.applied():
        for name, value in expected.items():
            assert torch.allclose(module.state_dict()[name].double(), value, rtol=1e-5)
    assert DECAY < (1 + 299) / (10 + 299)  # both sides of the minimum were seen


def test_the_network_has_its_own_weights_back_even_after_an_error() -> None:
    module = network()
    average = WeightAverage(module)
    drift(module, 0)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    try:
        with average.applied():
            assert not torch.equal(module[0].weight, before["0.weight"])
            raise RuntimeError
    except RuntimeError:
        pass
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_shared_weights_are_averaged_once() -> None:
    first = nn.Linear(2, 2)
    tied = nn.Sequential(first, first)
    assert len(WeightAverage(tied).ours) == 2


def test_it_goes_on_from_its_state() -> None:
    whole, module = network(), network()
    expected = WeightAverage(whole)
    halfway = WeightAverage(module)
    for step in range(10):
        drift(whole, step)
        expected.update()
    for step in range(5):
        drift(module, step)
        halfway.update()
    resumed = WeightAverage(module)
    resumed.load(halfway.state())
    for step in range(5, 10):
        drift(module, step)
        resumed.update()
    assert resumed.steps == 10
    assert all(torch.equal(a, b) for a, b in zip(resumed.ours, expected.ours, strict=True))
