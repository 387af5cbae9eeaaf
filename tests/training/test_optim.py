"""Rates, the optimizer, and which precision ``auto`` is."""

import pytest
import torch
from torch import nn

from dfkt.config import OptimizerConfig
from dfkt.training.optim import autocast, build_optimizer, learning_rate, network_dtype


def test_learning_rates_fall_as_their_names_say():
    assert [learning_rate(2.0, "cosine", p) for p in (0, 0.5, 1)] == pytest.approx([2, 1, 0])
    assert [learning_rate(1.0, "step", p) for p in (0, 0.49, 0.5, 0.75)] == pytest.approx([1, 1, 0.1, 0.01])
    assert learning_rate(1.0, "constant", 0.99) == 1.0


def test_the_optimizer_is_sgd_as_configured():
    config = OptimizerConfig(momentum=0.8, nesterov=True, weight_decay=0.01)
    layer = nn.Linear(2, 1, bias=False)
    optimizer = build_optimizer(list(layer.parameters()), 0.5, config)
    expected = layer.weight.detach().clone()
    momentum = torch.zeros(1, 2)
    for _ in range(3):
        layer.weight.grad = torch.ones(1, 2)
        optimizer.step()
        gradient = 1 + 0.01 * expected
        momentum = 0.8 * momentum + gradient
        expected = expected - 0.5 * (gradient + 0.8 * momentum)

    torch.testing.assert_close(layer.weight.detach(), expected)


@pytest.mark.parametrize(
    ("precision", "device", "computes", "half"),
    [
        ("auto", "cpu", True, False),
        ("auto", "cuda", True, True),
        ("auto", "cuda", False, False),
        ("float32", "cuda", True, False),
        ("bfloat16", "cpu", False, True),
        ("bfloat16", "cuda", False, True),
        ("float64", "cuda", True, False),
    ],
)
def test_auto_is_bfloat16_where_a_gpu_computes_it_and_not_where_it_only_emulates_it(
    monkeypatch, precision, device, computes, half
):
    asked = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return computes or including_emulation

    kinds: dict[str, object] = {}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: kinds.update({kind: (dtype, enabled)}))
    autocast(precision, torch.device(device))

    assert kinds == {device: (torch.bfloat16, half)}
    assert asked == ([False] if (precision, device) == ("auto", "cuda") else [])


def test_only_float64_has_weights_of_another_type():
    assert network_dtype("float64") == torch.float64
    assert {network_dtype(precision) for precision in ("auto", "float32", "bfloat16")} == {torch.float32}
