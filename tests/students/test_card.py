"""A card is one that the hub takes, and what it says can be run."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import synthetic_images

from dfkt.config import DataConfig, NetworkConfig
from dfkt.data.image_set import ImageSet
from dfkt.methods.kd import Kd
from dfkt.methods.scratch import Scratch
from dfkt.networks.build import build_network
from dfkt.store.files import Storage
from dfkt.students.keep import keep_student
from dfkt.training.config import RunConfig
from dfkt.training.run import Trained

SMALL = NetworkConfig(name="resnet8", width=0.25)
TEACHER = {
    "key": "abc",
    "val_accuracy": 0.91,
    "test_accuracy": 0.9,
    "parameters": 369_000,
    "macs": 55.6e6,
    "bytes": 2**20,
}


def carded(folder: Path, run: RunConfig, data: ImageSet, test: float | None = 0.8125) -> str:
    """Keep a student and return its card."""
    network = build_network(run.student, num_classes=data.num_classes, in_channels=data.channels)
    keep_student(Storage(folder), Trained(run, network, data, 0.75, test), TEACHER)
    return (folder / "README.md").read_text()


def front_of(card: str) -> dict[str, Any]:
    """Return a card's front matter."""
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_a_card_tells_accuracy_and_cost_of_teacher_and_student(tmp_path: Path) -> None:
    card = carded(tmp_path, RunConfig(method=Kd(), student=SMALL), synthetic_images())
    assert "| teacher resnet26 | 91.00 | 90.00 | 0.369 M | 55.6 M | 1 |" in card
    assert re.search(
        r"\| student resnet8 at 0\.25 of its width \| 75\.00 \| 81\.25 \| 4\.83 k \| 48\.4 k \| 0\.\d+ \|", card
    )
    assert "taught by a resnet26" in card
    assert "Method `kd` (rate 0.1, weight 0.9, temperature 4)" in card
    assert "author  = {Bae, Ji-Hoon and" in card


def test_a_student_without_a_teacher_has_none_on_its_card(tmp_path: Path) -> None:
    card = carded(tmp_path, RunConfig(method=Scratch(), student=SMALL), synthetic_images(), None)
    assert "trained without a teacher" in card
    assert "| teacher" not in card
    assert "model-index" not in front_of(card)


def test_the_hubs_own_reader_takes_the_card_and_finds_the_test_accuracy(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    run = RunConfig(method=Kd(), student=SMALL, data=DataConfig(name="cifar10"))
    carded(tmp_path, run, replace(synthetic_images(), title='a "set": of 10 % — images'))
    found = hub.ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
    (result,) = found.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", 0.8125, "uoft-cs/cifar10")
    assert (found.data.pipeline_tag, found.data.library_name) == ("image-classification", "dfkt")
    assert result.dataset_name == 'a "set": of 10 % — images'


def test_the_lines_of_a_card_load_its_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = carded(tmp_path / "FOLDER", RunConfig(method=Kd(), student=SMALL), synthetic_images(8, 3))
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["logits"].shape == (16, 4)
    assert set(found["names"]) <= set("0123")


def test_many_classes_are_not_all_listed_and_a_network_of_ones_own_is_named(tmp_path: Path) -> None:
    data = replace(synthetic_images(8, 1, 30), classes=tuple(f"k{n}" for n in range(30)))
    card = carded(tmp_path, RunConfig(method=Scratch(), student=NetworkConfig(name="small_runs:usual_norms")), data)
    assert "k19, …" in card
    assert "k20" not in card
    assert "Its network is `small_runs:usual_norms`, which must be importable." in card
