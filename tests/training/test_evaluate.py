"""Accuracy and loss over a split, held against a plain count."""

import pytest
import torch
from conftest import synthetic_test_split
from small_runs import RESNET, build
from torch import nn
from torch.nn import functional as F

from dfkt.training import evaluate as module
from dfkt.training.evaluate import evaluate


@pytest.fixture
def network(images) -> nn.Module:
    return build(RESNET, images, seed=1)


@pytest.mark.parametrize("batch", [1000, 7], ids=["one batch", "an incomplete last batch"])
def test_evaluate_agrees_with_a_plain_count(images, network, monkeypatch, batch):
    monkeypatch.setattr(module, "BATCH", batch)
    split = synthetic_test_split()
    accuracy, loss = evaluate(network, images, split, "float32")

    network.eval()
    with torch.no_grad():
        logits = network(images.normalise(split.images))
    assert accuracy == (logits.argmax(1) == split.labels).double().mean().item()
    assert loss == pytest.approx(F.cross_entropy(logits.double(), split.labels).item(), rel=1e-6)


def test_modes_are_put_back_also_where_they_differ_and_statistics_stay(images, network):
    network.train()
    network.layer1.eval()
    modes = {path: part.training for path, part in network.named_modules()}
    state = {name: value.clone() for name, value in network.state_dict().items()}

    evaluate(network, images, images.val, "float32")

    assert {path: part.training for path, part in network.named_modules()} == modes
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_precision_is_that_of_training(images, network):
    plain, half = (evaluate(network, images, images.val, precision)[1] for precision in ("float32", "bfloat16"))
    double = evaluate(network.double(), images, images.val, "float64")[1]

    assert plain != half == pytest.approx(plain, rel=0.05)
    assert plain != double == pytest.approx(plain, rel=1e-5)
    with torch.no_grad():
        logits = network.eval()(images.normalise(images.val.images).double())
    assert double == pytest.approx(F.cross_entropy(logits, images.val.labels).item(), rel=1e-14)
