"""The one loop: what it trains, what it records, and that it goes on as if it had never stopped."""

import copy
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import synthetic_images
from small_runs import (
    DROPPING,
    METHODS,
    RESNET,
    ROUNDS,
    TRAIN,
    records,
    same,
    start,
    timeless,
    weights,
)
from torch import nn

from dfkt.config import NetworkConfig, OptimizerConfig, TrainConfig
from dfkt.data.image_set import ImageSet, Split
from dfkt.errors import CheckpointError, ConfigError, NonFiniteLossError
from dfkt.methods.attention import AttentionTerm
from dfkt.methods.base import Features, Method, Ramp, Term
from dfkt.methods.dfkt import Dfkt, FlowTerm
from dfkt.methods.dkd import DecoupledTerm
from dfkt.methods.fsp import Fsp
from dfkt.methods.hints import HintTerm
from dfkt.methods.kd import Kd, SoftTerm
from dfkt.methods.scratch import Scratch
from dfkt.methods.similarity import SimilarityTerm
from dfkt.networks.tapped import TappedNetwork
from dfkt.training.loop import CHECK_STEPS
from dfkt.training.parallel import Group

RESNET_TAPS = ("stem", "layer1.0", "layer2.0", "layer3.0")
WIDE = replace(RESNET, width=0.5)
STILL = OptimizerConfig(momentum=0.0, weight_decay=0.0)


def test_records_end_at_every_epoch_and_stage_and_say_where_the_run_stands(images):
    training = start(images)
    found = records(training)

    assert [r["index"] for r in found] == list(range(len(found)))
    ends = sorted({*training.ends, *range(3, training.ends[-1], 3)})  # 3 steps an epoch
    assert [r["step"] for r in found] == ends
    assert training.ends[-1] == 14  # 4.5 epochs are 13.5 steps; halves round to even
    assert all(r["epoch"] == r["step"] / 3 for r in found)
    assert all(r["images"] == 32 * r["step"] for r in found)
    starts = [0, *training.ends[:-1]]
    for record in found:
        number = next(k for k, end in enumerate(training.ends) if record["step"] <= end)
        stage = training.schedule[number]
        assert (record["phase"], record["round"], record["stage"]) == (stage.phase, stage.round, stage.tap)
        assert record["step"] > starts[number]


def test_a_record_holds_the_stages_losses_and_val_where_the_student_can_classify(images):
    for record in records(start(images)):
        task = record["phase"] == "task"
        losses = {"task_loss", "soft_loss"} if task else {"flow_loss"}
        assert {name for name in record if name.endswith("_loss")} == losses | ({"val_loss"} if task else set())
        assert ("val_accuracy" in record) == ("train_accuracy" in record) == task
        assert (record["rung_epoch"] is not None) == task


def test_the_schedulers_clock_ends_at_the_length_of_the_run_whatever_the_flow_took(images):
    lasts = [records(start(images, replace(ROUNDS, share=share)))[-1] for share in (0.2, 0.6)]

    assert lasts[0]["rung_epoch"] == lasts[1]["rung_epoch"] == lasts[0]["epoch"] == lasts[1]["epoch"]


def looked(training: Any, rungs: Any = (0.1, 0.5, 0.9)) -> list[dict[str, Any]]:
    """Return all records of a run, those at its rungs too, in their order."""
    found: list[dict[str, Any]] = []
    found.extend(training.run(rungs, found.append))
    return sorted(map(timeless, found), key=lambda record: record["index"])


def test_a_rung_is_looked_at_as_soon_as_its_share_of_the_last_stage_is_done(images):
    training = start(images, replace(ROUNDS, share=0.5), replace(TRAIN, epochs=4))
    found = [record for record in looked(training, (1 / 6, 0.4, 0.5)) if record.get("rung")]
    first = training.ends[-2]

    assert [(r["rung"], r["step"] - first) for r in found] == [(1 / 6, 1), (0.5, 3)]  # 0.4 ends at the same step
    assert [r["rung_epoch"] for r in found] == [4 * (r["step"] - first) / 6 for r in found]
    within, at_end = found
    assert "loss" not in within
    assert "train_accuracy" not in within
    assert at_end["loss"] > 0  # its own epoch's record
    assert "val_accuracy" not in within
    assert all(0 < r["rung_accuracy"] <= 1 and r["phase"] == "task" for r in found)


def test_what_is_judged_at_a_rung_is_an_average_of_the_weights_since_the_last_stage_began(images):
    training = start(images, replace(ROUNDS, share=0.5), replace(TRAIN, epochs=4))
    first, seen = training.ends[-2], []
    steps: list[dict[str, torch.Tensor]] = []
    optimize = training._step

    def step(*args: Any) -> Any:
        if training.step >= first and not steps:
            steps.append(copy.deepcopy(weights(training)))
        result = optimize(*args)
        if training.step >= first:
            steps.append(copy.deepcopy(weights(training)))
        return result

    def measured() -> tuple[float, float]:
        seen.append((len(steps) - 1, copy.deepcopy(weights(training))))
        return 0.5, 1.0

    training._step, training._measure = step, measured  # type: ignore[method-assign]
    found = [record for record in looked(training, (2 / 3,)) if "rung" in record]
    assert [r["step"] - first for r in found] == [4]
    count, judged = next((n, w) for n, w in seen if n == 4)
    for name, value in judged.items():
        if value.is_floating_point():
            expected = steps[0][name]
            for n, at in enumerate(steps[1 : count + 1]):
                expected = torch.lerp(expected, at[name], 1 - (1 + n) / (10 + n))
            assert torch.allclose(value, expected, rtol=1e-5, atol=1e-7)
    assert training.average is None  # no rung is left


def test_a_resumed_run_is_judged_at_its_rungs_as_one_that_never_stopped(images):
    rungs, expected, states = (0.35, 0.7), [], []
    whole = start(images, Kd(), replace(TRAIN, epochs=6))
    for record in whole.run(rungs, expected.append):
        expected.append(record)
        states.append((len(expected), copy.deepcopy(whole.state())))
    assert sum("rung" in record for record in expected) == 2
    assert [state["average"] is not None for _, state in states] == [True, True, True, True, False, False]
    for stop, state in states:
        second = start(images, Kd(), replace(TRAIN, epochs=6))
        second.load(state)
        found = expected[:stop]
        for record in second.run(rungs, found.append):
            found.append(record)
        assert list(map(timeless, found)) == list(map(timeless, expected))


@pytest.mark.parametrize("student", [RESNET, DROPPING])
def test_a_run_that_is_looked_at_is_trained_like_one_that_is_not(images, student):
    method, train = Kd(), replace(TRAIN, epochs=2)
    plain = start(images, method, train, student=student)
    expected = records(plain)
    training = start(images, method, train, student=student)
    found = looked(training)

    assert [r["index"] for r in found] == list(range(len(found)))
    assert len(found) > len(expected)
    whole = [{n: v for n, v in r.items() if n not in ("index", "rung", "rung_accuracy")} for r in found if "loss" in r]
    assert whole == [{n: v for n, v in r.items() if n != "index"} for r in expected]
    assert same(weights(training), weights(plain))


def test_looking_counts_in_the_seconds_on_the_device_and_reporting_does_not(images):
    training = start(images, Scratch(), replace(TRAIN, epochs=1))
    seen = []

    def report(record: dict[str, Any]) -> None:
        seen.append(training.device_seconds)
        time.sleep(0.5)

    (record,) = training.run((0.4,), report)
    assert 0 < seen[0] < training.device_seconds < 0.5
    assert record["seconds"] < 0.5


def test_training_learns(images):
    training = start(images, replace(ROUNDS, share=0.2), replace(TRAIN, epochs=30))
    assert records(training)[-1]["val_accuracy"] > 0.9


RESUMED: dict[str, tuple[Method, TrainConfig, NetworkConfig]] = {
    "rounds of frozen stages": (ROUNDS, replace(TRAIN, epochs=3), RESNET),
    "adapted channels": (replace(ROUNDS, order="joint"), replace(TRAIN, epochs=3), WIDE),
    "a falling weight": (METHODS["fitnets"], replace(TRAIN, epochs=3), RESNET),
    "a growing weight": (METHODS["dkd"], replace(TRAIN, epochs=3), RESNET),
    "dropout": (METHODS["kd"], replace(TRAIN, epochs=3), DROPPING),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(images, case):
    method, train, student = RESUMED[case]
    whole = start(images, method, train, student=student)
    expected, states = [], []
    for record in whole.run():
        expected.append(timeless(record))
        states.append(copy.deepcopy(whole.state()))
    assert len(expected) >= 3

    for stop, state in enumerate(states[:-1], 1):
        torch.manual_seed(stop)
        second = start(images, method, train, student=student)
        second.load(state)

        assert expected[:stop] + records(second) == expected
        assert same(weights(second), weights(whole))
        assert same(second.adapters.state_dict(), whole.adapters.state_dict())


def test_what_the_process_drew_before_changes_nothing_and_what_it_draws_next_is_not_changed(images):
    def run() -> list[dict[str, Any]]:
        return records(start(images, Kd(), replace(TRAIN, epochs=2), student=DROPPING))

    expected = run()
    torch.manual_seed(5)
    torch.rand(7)
    before = torch.get_rng_state()

    assert run() == expected
    assert torch.equal(torch.get_rng_state(), before)


def test_every_epoch_drops_other_activations(images):
    training = start(images, Scratch(rate=1e-9), replace(TRAIN, epochs=2, batch_size=96), student=DROPPING)
    training.student.network.eval()  # only the loop's own mode counts
    first, second = records(training)

    assert first["loss"] != second["loss"]
    plain = start(images, Scratch(rate=1e-9), replace(TRAIN, epochs=1, batch_size=96), student=DROPPING)
    for module in plain.student.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert records(plain)[0]["loss"] != first["loss"]


def test_a_checkpoint_of_another_schedule_is_refused(images):
    training = start(images)
    next(training.run())
    other = start(images, train=replace(TRAIN, epochs=9))

    with pytest.raises(CheckpointError, match="Stages must end at steps"):
        other.load(training.state())


def test_the_same_seed_gives_the_same_run_and_another_seed_another(images):
    def last_loss(seed: int) -> float:
        return float(records(start(images, train=replace(TRAIN, seed=seed)))[-1]["loss"])

    assert last_loss(0) == last_loss(0) != last_loss(1)


def test_more_workers_than_images_in_a_batch_are_refused(images):
    with pytest.raises(ConfigError, match="`workers <= batch_size` must hold, but got workers=33, batch_size=32"):
        start(images, group=Group(0, 33))
    with pytest.raises(ConfigError, match="batch_size=96"):  # a batch is never larger than the split
        start(images, train=replace(TRAIN, batch_size=500), group=Group(0, 97))


def test_a_flow_stage_changes_nothing_above_its_highest_tap_nor_below_a_frozen_one(images):
    method = Dfkt(pattern="sliding-2", order="local", freeze_below=True, share=0.9)
    training = start(images, method)
    before = weights(training)
    stages = [weights(training) for record in training.run() if record["phase"] == "flow"]
    changed = {name.split(".")[0] for name, value in stages[0].items() if not torch.equal(value, before[name])}

    assert changed == {"stem", "layer1", "layer2"}  # stage 2: pair (0, 2)
    first_of_stage_3 = next(
        k for k, w in enumerate(stages) if not torch.equal(w["layer3.0.conv1.weight"], before["layer3.0.conv1.weight"])
    )
    assert first_of_stage_3 < len(stages)
    below = {name: v for name, v in stages[first_of_stage_3 - 1].items() if name.startswith(("stem", "layer1"))}
    assert any("running_mean" in name for name in below)
    assert all(torch.equal(stages[-1][name], value) for name, value in below.items())  # stage 3: pair (1, 3)


def test_batch_norms_without_parameters_are_frozen_as_the_layers_around_them_are(images):
    bare = NetworkConfig(name="small_runs:bare_norms")
    method = Dfkt(pattern="sliding-2", order="local", freeze_below=True, share=0.9, rounds=1)
    training = start(images, method, replace(TRAIN, epochs=3), student=bare, teacher=bare)
    frozen_at = next(k for k, stage in enumerate(training.schedule) if stage.frozen_below is not None)
    assert training.schedule[frozen_at].frozen_below == 1
    seen = {}
    for record in training.run():
        seen[record["step"]] = weights(training)
    before, after = seen[training.ends[frozen_at - 1]], seen[training.ends[frozen_at]]
    below = [name for name in before if name.startswith(("low", "plain", "mid", "own"))]

    assert {"plain.running_mean", "plain.running_var", "plain.num_batches_tracked"} <= set(below)
    assert all(torch.equal(before[name], after[name]) for name in below)
    assert not torch.equal(before["mean.running_mean"], after["mean.running_mean"])
    assert not torch.equal(before["high.weight"], after["high.weight"])


def test_the_teacher_never_changes(images):
    training = start(images)
    assert training.teacher is not None
    before = copy.deepcopy(training.teacher.network.state_dict())

    records(training)

    assert not any(p.requires_grad for p in training.teacher.network.parameters())
    assert same(training.teacher.network.state_dict(), before)


def test_adapters_are_trained_where_channels_differ_and_are_no_part_of_the_student(images):
    training = start(images, student=WIDE)
    before = copy.deepcopy(training.adapters.state_dict())

    records(training)

    assert sorted(training.adapters) == ["0", "1", "2", "3"]
    assert not any(torch.equal(value, before[name]) for name, value in training.adapters.state_dict().items())
    assert not any("adapter" in name for name in training.student.network.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_only_what_must_agree_is_adapted(images, method):
    training = start(images, METHODS[method], student=WIDE)

    assert {int(tap) for tap in training.adapters} == {t for stage in training.schedule for t in stage.adapted_taps}


@pytest.mark.parametrize("share", [0.1, 0.9], ids=["task", "flow"])
def test_a_loss_that_is_not_finite_names_stage_epoch_and_step(images, share):
    method = Fsp(share=share, norm="sum", flow_rate=1e30 if share > 0.5 else 1e-9, rate=1e30, clip_norm=None)

    with pytest.raises(NonFiniteLossError, match=r"became nan or inf in .*stage.*, epoch \d+, step \d+ \(") as error:
        records(start(images, method))
    assert ("task stage" in str(error.value)) == (share == 0.1)
    assert "Lower the learning rate (1e+30)" in str(error.value)


class Breaking(Term):
    """Adds nan to the loss of one step, in a way that no weight feels."""

    name = "task"
    student_logits = True
    at: int = 0
    calls: int = 0

    def __call__(self, teacher, student, labels):  # noqa: D102
        Breaking.calls += 1
        loss = nn.functional.cross_entropy(student.logits, labels)
        return loss + (torch.nan if Breaking.calls == Breaking.at else 0.0)


@pytest.mark.parametrize("at", [1, 7, CHECK_STEPS, CHECK_STEPS + 3])
def test_the_first_step_that_went_wrong_is_named_though_losses_are_looked_at_rarely(images, monkeypatch, at):
    training = start(images, Scratch(), TrainConfig(epochs=2, batch_size=1))
    training.schedule = (replace(training.schedule[0], terms=(Breaking(),)),)
    monkeypatch.setattr(Breaking, "at", at)
    monkeypatch.setattr(Breaking, "calls", 0)

    with pytest.raises(NonFiniteLossError, match=rf"epoch 1, step {at} \(task nan\)"):
        records(training)
    assert at <= Breaking.calls <= at + CHECK_STEPS


def test_clipping_keeps_a_wild_rate_from_exploding(images):
    train = replace(TRAIN, clip_norm=1e-6, optimizer=STILL)
    training = start(images, Scratch(rate=3.0), train)
    before = weights(training)["fc.weight"]

    records(training)

    torch.testing.assert_close(weights(training)["fc.weight"], before, atol=1e-4, rtol=0)
    assert not torch.equal(weights(training)["fc.weight"], before)


@pytest.mark.parametrize(
    ("own", "run", "kept"),
    [(1e-6, None, True), (1e-6, 1e9, True), (None, 1e-6, True), (None, None, False), (1e9, 1e-6, False)],
)
def test_a_stage_clips_by_its_own_limit_and_without_one_by_the_runs(images, own, run, kept):
    method = Fsp(clip_norm=own, flow_rate=1.0, share=0.9)
    training = start(images, method, replace(TRAIN, clip_norm=run, optimizer=STILL))
    before = weights(training)["layer3.0.conv1.weight"]

    next(training.run())

    moved = (weights(training)["layer3.0.conv1.weight"] - before).abs().max()
    assert moved > 0
    assert (moved < 1e-4) == kept


def test_a_bfloat16_step_is_a_rounded_float32_step(images):
    first = [
        next(start(images, Fsp(), replace(TRAIN, precision=precision, batch_size=96)).run())["loss"]
        for precision in ("float32", "bfloat16", "float64")
    ]

    assert first[0] != first[1] == pytest.approx(first[0], rel=0.02)
    assert first[2] != first[0] == pytest.approx(first[2], rel=1e-5)


def test_float64_is_double_precision_throughout(images):
    training = start(images, METHODS["dfkt"], replace(TRAIN, precision="float64"), student=WIDE)
    found = records(training)

    tensors = [*training.student.network.parameters(), *training.adapters.parameters()]
    assert all(tensor.dtype == torch.float64 for tensor in tensors)
    for name in ("loss", "task_loss", "val_loss"):
        assert torch.tensor(found[-1][name], dtype=torch.float64).float().double() != found[-1][name]


@pytest.mark.parametrize("method", ["fitnets", "dkd"])
def test_a_changing_weight_is_followed_step_by_step(images, method):
    training = start(images, METHODS[method], TrainConfig(epochs=8, batch_size=96))  # a record a step
    stage = training.schedule[-1]
    ramp = stage.terms[1].weight
    assert isinstance(ramp, Ramp)
    task = [r for r in records(training) if r["phase"] == "task"]
    found = [(r["loss"] - r["task_loss"]) / r[f"{stage.terms[1].name}_loss"] for r in task]

    assert len(found) == {"fitnets": 4, "dkd": 8}[method]
    assert found == pytest.approx([ramp.at(k / len(found)) for k in range(len(found))], abs=1e-5)
    assert len({round(value, 6) for value in found}) > 2


def test_the_learning_rate_starts_anew_with_every_stage(images):
    method = Fsp(share=0.5, flow_rate=0.5, rate=0.25)
    found = records(start(images, method, TrainConfig(epochs=4, batch_size=96)))

    assert [r["lr"] for r in found] == pytest.approx([0.5, 0.25, 0.25, 0.125])


def test_a_network_whose_taps_cannot_be_told_learns_where_none_are_read(images):
    secretive = NetworkConfig(name="small_runs:Secretive")
    for method in ("scratch", "kd", "dkd"):
        training = start(images, METHODS[method], student=secretive, teacher=secretive)
        assert all(r["loss"] > 0 for r in records(training))


# What a method adds must pull the student towards the teacher. The labels are drawn, so they cannot.
PULLS: dict[str, tuple[str, type[Term]]] = {
    "kd": ("kd", SoftTerm),
    "fitnets, hint": ("fitnets", HintTerm),
    "fitnets, soft targets": ("fitnets", SoftTerm),
    "attention": ("attention", AttentionTerm),
    "layerwise-hint": ("layerwise-hint", HintTerm),
    "similarity": ("similarity", SimilarityTerm),
    "dkd": ("dkd", DecoupledTerm),
    "fsp": ("fsp", FlowTerm),
    "dfkt, flow": ("dfkt", FlowTerm),
    "dfkt, soft targets": ("dfkt", SoftTerm),
}
PULLED = replace(TRAIN, epochs=12)


@pytest.fixture(scope="module")
def drawn() -> ImageSet:
    data = synthetic_images(padding=0)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(3))
    return replace(data, padded=Split(data.padded.images, data.padded.labels[order]))


@pytest.fixture(scope="module")
def taught() -> nn.Module:
    """A teacher that knows the classes."""
    training = start(synthetic_images(), Scratch(), replace(TRAIN, epochs=20))
    assert records(training)[-1]["val_accuracy"] > 0.8
    return training.student.network


@pytest.fixture(scope="module")
def alone(drawn: ImageSet) -> dict[int, nn.Module]:
    """What training from scratch has made of the student after so many steps."""
    training = start(drawn, Scratch(), PULLED)
    return {record["step"]: copy.deepcopy(training.student.network) for record in training.run()}


def distance(student: nn.Module, teacher: nn.Module, term: Term, data: ImageSet) -> float:
    """Return a term's value on all training images, batch norms as in training."""
    images, features = data.normalise(data.train.images), []
    for network in (copy.deepcopy(student).train(), copy.deepcopy(teacher).eval()):
        part = TappedNetwork(network, RESNET_TAPS, (1, 8, 8)).part(term.taps, True)
        with torch.no_grad():
            outputs = part(images)
        features.append(Features({tap: outputs[str(tap)] for tap in term.taps}, outputs["logits"]))
    return float(term(features[1], features[0], data.train.labels))


def left_of_the_distance(
    case: str, data: ImageSet, teacher: nn.Module, alone: dict[int, nn.Module], *, broken: bool
) -> float:
    """Return what a term leaves of the distance to the teacher where training from scratch leaves 1."""
    method, kind = PULLS[case]
    training = start(data, METHODS[method], PULLED, teacher=teacher)
    number = max(k for k, stage in enumerate(training.schedule) if any(isinstance(t, kind) for t in stage.terms))
    with pytest.MonkeyPatch.context() as patch:
        if broken:
            call = kind.__call__
            patch.setattr(kind, "__call__", lambda *a: call(*a) * 0)
        for _ in training.run():
            if training.step == training.ends[number]:
                break
    term = next(term for term in training.schedule[number].terms if isinstance(term, kind))
    other = next(network for step, network in alone.items() if step >= training.step)
    return distance(training.student.network, teacher, term, data) / distance(other, teacher, term, data)


@pytest.mark.slow
@pytest.mark.parametrize("case", PULLS)
def test_every_term_of_every_method_pulls_the_student_towards_the_teacher(drawn, taught, alone, case):
    assert left_of_the_distance(case, drawn, taught, alone, broken=False) < 0.75


@pytest.mark.slow
@pytest.mark.parametrize("case", ["kd", "fitnets, soft targets", "attention", "fsp"])
def test_a_term_without_effect_would_be_noticed(drawn, taught, alone, case):
    assert left_of_the_distance(case, drawn, taught, alone, broken=True) > 0.8
