"""Kept answers of a teacher: a run that reads them is the run that computes them, to the last bit."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import synthetic_images
from small_runs import METHODS, RESNET, TRAIN, records, same, start, weights

from dfkt.config import NetworkConfig
from dfkt.methods.dfkt import Dfkt
from dfkt.networks.tapped import FrozenTeacher
from dfkt.training import targets
from dfkt.training.kept import HEAD
from dfkt.training.loop import Training
from dfkt.training.targets import Keeping

PAIRS = tuple((i, j) for i in range(4) for j in range(i + 1, 4))
WIDE = replace(RESNET, width=0.5)
KEPT_BY = {  # kinds of files, by method
    "kd": {"logits"}, "dkd": {"logits"}, "fitnets": {"logits"}, "layerwise-hint": {"logits"},
    "fsp": {"flow"}, "dfkt": {"flow", "logits"}, "attention": set(), "similarity": set(), "scratch": set(),
}  # fmt: skip


@pytest.fixture
def keeping(tmp_path: Path) -> Keeping:
    return Keeping(str(tmp_path / "targets"), "study", 10**9, PAIRS)


def ended(training: Training) -> tuple[Any, dict[str, torch.Tensor]]:
    return records(training), weights(training)


def same_end(ours: Any, theirs: Any) -> bool:
    return ours[0] == theirs[0] and same(ours[1], theirs[1])


def files(keeping: Keeping) -> list[Path]:
    return sorted(keeping.folder.rglob("*.targets"))


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return a list to which every pass of a teacher adds the taps that it was asked for."""
    passes: list[tuple[int, ...]] = []
    part = FrozenTeacher.part

    def noted(self: FrozenTeacher, taps: tuple[int, ...], logits: bool) -> Any:
        passes.append(taps)
        return part(self, taps, logits)

    monkeypatch.setattr(FrozenTeacher, "part", noted)
    return passes


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_keeps_and_one_that_reads_are_the_run_without_to_the_last_bit(
    images, keeping, name, precision, monkeypatch
):
    train = replace(TRAIN, precision=precision, epochs=4)
    expected = ended(start(images, METHODS[name], train, teacher=WIDE))
    passes = watched(monkeypatch)

    assert same_end(ended(start(images, METHODS[name], train, teacher=WIDE, keeping=keeping)), expected)
    first = len(passes)
    assert same_end(ended(start(images, METHODS[name], train, teacher=WIDE, keeping=keeping)), expected)

    assert {path.name.partition("-")[0] for path in files(keeping)} == KEPT_BY[name]
    if KEPT_BY[name]:
        hinted = first // 2 if name in ("fitnets", "layerwise-hint") else 0  # hints read the activations themselves
        assert len(passes) - first == hinted


def test_trials_of_other_patterns_stages_and_weights_read_what_the_first_one_kept(images, keeping, monkeypatch):
    train = replace(TRAIN, epochs=6)
    others = [
        Dfkt(pattern="adjacent", share=0.5, order="local", rounds=2, norm="unit"),
        Dfkt(pattern="to-top", share=0.3, order="joint", weight=0.5, norm="sum"),
        Dfkt(pattern="dense-2", share=0.4, stage_lengths=(3.0, 1.0, 0.5), span_weights=(0.1, 2.0)),
    ]
    expected = [ended(start(images, method, train)) for method in others]
    records(start(images, Dfkt(share=0.55, weight=0.5), train, keeping=keeping))
    passes = watched(monkeypatch)

    found = [ended(start(images, method, train, keeping=keeping)) for method in others]

    assert all(map(same_end, found, expected))
    assert 0 < len(passes) <= 12  # soft targets of an epoch that the first one began midway or spent in flow stages


def test_the_share_of_kept_steps_is_told(images, keeping):
    train = replace(TRAIN, epochs=4)
    shares = [
        [record["kept_share"] for record in start(images, METHODS["kd"], train, keeping=keeping).run()] for _ in "ab"
    ]

    assert shares == [[0.0] * 4, [1.0] * 4]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_resumed_run_reads_and_keeps_too(images, keeping, count):
    method, train = METHODS["dfkt"], replace(TRAIN, epochs=4.5)
    expected = ended(start(images, method, train))
    for _ in range(2):
        first = start(images, method, train, keeping=keeping)
        steps = first.run()
        found = [next(steps) for _ in range(count)]
        state = first.state()
        steps.close()
        second = start(images, method, train, keeping=keeping)
        second.load(state)
        rest = records(second)
        assert [r["loss"] for r in (*found, *rest)] == [r["loss"] for r in expected[0]]
        assert same(weights(second), expected[1])
    assert not list(keeping.folder.rglob("*.part"))


@pytest.mark.parametrize(
    "other",
    [
        {"train": replace(TRAIN, seed=1)},
        {"train": replace(TRAIN, batch_size=16)},
        {"train": replace(TRAIN, precision="bfloat16")},
        {"teacher": WIDE},
        {"images": synthetic_images(padding=0)},
        {"images": synthetic_images(flip=True)},
    ],
    ids=["seed", "batch size", "precision", "teacher", "padding", "flips"],
)
def test_what_another_run_could_not_have_asked_for_is_not_read(images, keeping, other, monkeypatch):
    records(start(images, METHODS["kd"], keeping=keeping))
    kept = files(keeping)
    given = {"images": images, "train": TRAIN, "teacher": RESNET} | other
    expected = ended(start(given["images"], METHODS["kd"], given["train"], teacher=given["teacher"]))
    passes = watched(monkeypatch)

    run = start(given["images"], METHODS["kd"], given["train"], teacher=given["teacher"], keeping=keeping)

    assert same_end(ended(run), expected)
    assert len(passes) == run.ends[-1]
    assert len(files(keeping)) > len(kept)


def test_another_teacher_of_the_same_name_is_another(images, keeping):
    networks = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4)) for _ in range(2)]
    assert images.shape == (1, 8, 8)

    for network in networks:
        expected = ended(start(images, METHODS["kd"], teacher=network))
        assert same_end(ended(start(images, METHODS["kd"], teacher=network, keeping=keeping)), expected)

    assert len({path.parent for path in files(keeping)}) == 2


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[HEAD + (len(data) - HEAD) // 2] ^= 1  # in the second of three rows
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [damage, lambda path: os.truncate(path, path.stat().st_size - 8)])
@pytest.mark.parametrize("name", ["kd", "dfkt"])
def test_damaged_files_are_computed_again(images, keeping, name, spoil):
    train = replace(TRAIN, epochs=4)
    expected = ended(start(images, METHODS[name], train))
    records(start(images, METHODS[name], train, keeping=keeping))
    kept = files(keeping)
    for path in kept:
        spoil(path)

    assert same_end(ended(start(images, METHODS[name], train, keeping=keeping)), expected)
    assert same_end(ended(start(images, METHODS[name], train, keeping=keeping)), expected)  # whole ones again, or none


def test_a_disk_that_fills_while_targets_are_written_changes_nothing(images, keeping, monkeypatch):
    expected = ended(start(images, METHODS["dfkt"], replace(TRAIN, epochs=4)))
    add, count = targets.Writer.add, 0

    def full(self: targets.Writer, rows: Any) -> bool:
        nonlocal count
        count += 1
        if count == 2:
            self.file.close()
            self.file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
        return add(self, rows)

    monkeypatch.setattr(targets.Writer, "add", full)

    run = start(images, METHODS["dfkt"], replace(TRAIN, epochs=4), keeping=keeping)

    assert same_end(ended(run), expected)
    assert count > 2
    assert not list(keeping.folder.rglob("*.part"))


def test_an_epoch_that_ends_in_a_stage_without_a_teacher_is_not_kept_in_part(images, keeping):
    train = replace(TRAIN, epochs=3)
    run = start(images, Dfkt(share=0.5), train, keeping=keeping)  # 4 or 5 of 9 steps, 3 an epoch

    records(run)

    assert [path.name for path in files(keeping)] == ["flow-00000.targets"]
    assert not list(keeping.folder.rglob("*.part"))


def test_matrices_that_outgrow_their_worth_are_computed_and_logits_still_kept(images, keeping, monkeypatch):
    monkeypatch.setattr(targets, "MOST_NUMBERS", 10)

    records(start(images, METHODS["dfkt"], keeping=keeping))

    assert {path.name.partition("-")[0] for path in files(keeping)} == {"logits"}


def test_two_runs_at_once_do_no_harm(images, keeping):
    expected = ended(start(images, METHODS["dfkt"]))
    both = [start(images, METHODS["dfkt"], keeping=keeping) for _ in "ab"]
    steps = [training.run() for training in both]
    found: list[list[float]] = [[], []]
    for pair in zip(*steps, strict=True):
        for losses, record in zip(found, pair, strict=True):
            losses.append(record["loss"])

    assert found == [[record["loss"] for record in expected[0]]] * 2
    assert all(same(weights(training), expected[1]) for training in both)


def test_a_student_whose_channels_differ_reads_what_another_student_kept(images, keeping, monkeypatch):
    narrow, train = NetworkConfig(name="resnet8", width=0.5), replace(TRAIN, epochs=4)
    expected = ended(start(images, METHODS["fsp"], train, student=narrow))
    records(start(images, METHODS["fsp"], train, keeping=keeping))
    passes = watched(monkeypatch)

    assert same_end(ended(start(images, METHODS["fsp"], train, student=narrow, keeping=keeping)), expected)
    assert not passes
