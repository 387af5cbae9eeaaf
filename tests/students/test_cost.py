"""What is counted is what papers and libraries say; what is measured is measured in turns."""

import time
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

from dfkt.config import NetworkConfig
from dfkt.errors import NetworkError
from dfkt.networks.build import build_network
from dfkt.students import cost
from dfkt.students.cost import ROUNDS, Counts, Latency, count, count_named, measure, scaled, weight_bytes

PHOTO, TINY = (3, 224, 224), (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet20", "0.27"), ("resnet32", "0.46"), ("resnet44", "0.66"), ("resnet56", "0.85"), ("resnet110", "1.73")],
)
def test_resnets_of_cifar_have_the_parameters_of_their_paper(name: str, parameters: str) -> None:
    """He et al. 2016, Table 6: 0.27, 0.46, 0.66, 0.85 and 1.7 million."""
    found = count_named(NetworkConfig(name=name), classes=10, shape=TINY)["parameters"]
    assert found is not None
    assert f"{found / 1e6:.2f}" == parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("resnet18", 11689512, 1.814),
        ("mobilenet_v2", 3504872, 0.301),
        ("swin_t", 28288354, 4.491),
        ("vit_b_16", 86567656, 17.564),  # its attention is fused where that is not kept from it
    ],
)
def test_torchvisions_networks_have_the_counts_that_torchvision_gives(name: str, parameters: int, macs: float) -> None:
    found = count_named(NetworkConfig(name=f"torchvision:{name}"), classes=1000, shape=PHOTO)
    assert found["parameters"] == parameters
    assert found["macs"] is not None
    assert found["macs"] / 1e9 == pytest.approx(macs, abs=6e-4)


def test_counting_by_hand_gives_the_same() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 5)
    )
    macs = 4 * 4 * 8 * 3 * 9 + 8 * 16 * 5
    numbers = 8 * 3 * 9 + 8 + 16 + 8 * 16 * 5 + 5
    buffers = 2 * 8 * 4 + 8  # mean and variance, and a count of 64 bits
    assert count(network, (3, 8, 8)) == Counts(numbers, macs, 4 * numbers + buffers)


def test_counting_leaves_a_network_and_what_others_draw_as_they_were() -> None:
    network = build_network(NetworkConfig(name="resnet8"), num_classes=4, in_channels=1)
    network.train()
    network.get_submodule("layer1").eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes, state = [module.training for module in network.modules()], torch.get_rng_state()
    count(network, (1, 8, 8))
    count_named(NetworkConfig(name="resnet8"), classes=4, shape=(1, 8, 8))
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled()


class Stubborn(nn.Module):
    """It takes no image of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        raise ValueError("no")


def test_what_cannot_be_counted_is_null() -> None:
    assert count(Stubborn(), (1, 2, 2)) == Counts(10, None, 40)
    assert torch.backends.mha.get_fastpath_enabled()


def test_networks_answer_in_turns_and_their_time_is_told_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [0.0], list[tuple[str, int]]()

    def answer(name: str, seconds: float):  # type: ignore[no-untyped-def]
        def call(images: Tensor) -> None:
            asked.append((name, len(images)))
            now[0] += seconds

        return call

    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    answers = [(answer("slow", 0.5), (1, 2, 2)), (answer("fast", 0.25), (3, 4, 4))]
    slow, fast = measure(answers, 4, torch.device("cpu"), 5.0)
    assert (slow, fast) == (Latency(125, 125, 125), Latency(62.5, 62.5, 62.5))
    assert asked[:4] == [("slow", 4)] * 2 + [("fast", 4)] * 2  # warmed up
    assert asked[4:] == [("slow", 4), ("fast", 4)] * 14  # 10 s in all, at 0.75 s a turn


def test_even_without_time_every_network_answers_a_few_times() -> None:
    calls = [0]

    def answer(images: Tensor) -> None:
        calls[0] += 1
        time.sleep(0.002)

    (found,) = measure([(answer, (1, 2, 2))], 1, torch.device("cpu"), 0.0)
    assert calls[0] == 2 + ROUNDS[0]
    assert 2 <= found.low <= found.median <= found.high


def test_a_file_of_weights_holds_each_tensor_even_where_two_share_memory() -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    given = {"a": shared, "b": shared.T, "c": torch.tensor(3)}
    found = cost.safetensors.torch.load(weight_bytes(given))
    assert all(torch.equal(found[name], given[name]) for name in given)
    with pytest.raises(NetworkError, match="but d is dict"):
        weight_bytes({"d": {}})


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (99_900, "99.9 k"), (123_456, "0.123 M"), (25.6e6, "25.6 M"), (4.1e9, "4.1 G")]
)  # fmt: skip
def test_counts_are_told_in_three_digits(number: float, text: str) -> None:
    assert scaled(number) == text


def test_counts_are_json_by_their_names() -> None:
    found = count_named(NetworkConfig(name="resnet8"), classes=4, shape=(1, 8, 8))
    network = build_network(NetworkConfig(name="resnet8"), num_classes=4, in_channels=1)
    assert found == asdict(count(network, (1, 8, 8)))
    assert found.keys() == {"parameters", "macs", "bytes"}
