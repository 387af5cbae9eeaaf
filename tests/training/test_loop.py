"""The one loop."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import synthetic_images
from torch import nn

from dfkt.config import METHODS, FlowConfig, NetworkConfig, OptimizerConfig, RunConfig, TaskConfig, TrainConfig
from dfkt.data.load import ImageSet
from dfkt.errors import CheckpointError, NonFiniteLossError
from dfkt.methods.builders import baseline, build_schedule
from dfkt.networks.build import ResNet, build_network
from dfkt.training.optim import learning_rate
from dfkt.networks.tapped import FrozenTeacher, TappedNetwork
from dfkt.networks.taps import group_ends
from dfkt.training.loop import Training, evaluate

RUN = RunConfig(
    flow=FlowConfig(pattern="dense-2", order="local", rounds=2, share=0.5, freeze_below=True),
    task=TaskConfig(kd_weight=0.5),
    train=TrainConfig(epochs=4.5, batch_size=32),
)


def start(images: ImageSet, run: RunConfig = RUN, *, student_width: float = 0.25, rank=0, world=1) -> Training:
    shape = (images.channels, *images.image_size)

    def network(width: float, seed: int) -> ResNet:
        torch.manual_seed(seed)
        built = build_network(NetworkConfig(name="resnet8", width=width), num_classes=4, in_channels=images.channels)
        assert isinstance(built, ResNet)
        return built.to(memory_format=torch.channels_last)

    student = network(student_width, seed=1)
    teacher = network(0.25, seed=2)
    with torch.no_grad():
        for _ in range(20):  # its running statistics fit the images, as a trained teacher's do
            teacher.train()(images.normalise(images.train.images))
    tapped = TappedNetwork(student, student.taps, shape)
    schedule = build_schedule(run, 4, group_ends(tapped.taps))
    return Training(
        schedule, tapped, FrozenTeacher(teacher, teacher.taps, shape), images, run.train, rank=rank, world=world
    )


def weights(training: Training) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in training.student.network.state_dict().items()}


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("seconds", "images_per_second")}


def test_records_end_at_every_epoch_and_stage_and_say_where_the_run_stands(images):
    records = list(start(images).run())

    assert [r["index"] for r in records] == list(range(len(records)))
    assert records[-1]["epoch"] == pytest.approx(
        14 / 3
    )  # 4.5 epochs are 13.5 steps of 3 an epoch; halves round to even
    assert (records[0]["round"], records[0]["stage"]) == (1, 1)
    assert all("val_accuracy" in r for r in records if r["phase"] == "task")
    assert all("val_accuracy" not in r for r in records if r["phase"] == "flow")


def test_the_schedulers_clock_ends_at_the_length_of_the_run_whatever_the_flow_took(images):
    lasts = []
    for share in (0.2, 0.6):
        run = replace(RUN, flow=replace(RUN.flow, share=share))
        lasts.append(list(start(images, run).run())[-1])

    assert lasts[0]["rung_epoch"] == lasts[1]["rung_epoch"] == lasts[0]["epoch"] == lasts[1]["epoch"]


def test_training_learns(images):
    run = replace(RUN, train=replace(RUN.train, epochs=30), flow=replace(RUN.flow, share=0.2))
    assert list(start(images, run).run())[-1]["val_accuracy"] > 0.9


@pytest.mark.parametrize("student_width", [0.25, 0.5], ids=["equal channels", "adapted channels"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(images, student_width):
    whole = start(images, student_width=student_width)
    expected = [timeless(record) for record in whole.run()]

    for stop in range(1, len(expected)):
        first = start(images, student_width=student_width)
        records = []
        for record in first.run():
            records.append(timeless(record))
            if len(records) == stop:
                break
        state = first.state()
        torch.manual_seed(99)
        second = start(images, student_width=student_width)
        second.load(state)
        records += [timeless(record) for record in second.run()]

        assert records == expected
        for name, value in weights(second).items():
            assert torch.equal(value, weights(whole)[name]), name


def test_a_checkpoint_of_another_schedule_is_refused(images):
    training = start(images)
    next(training.run())
    other = start(images, replace(RUN, train=replace(RUN.train, epochs=9)))

    with pytest.raises(CheckpointError, match="Stages must end at steps"):
        other.load(training.state())


def test_the_same_seed_gives_the_same_run_and_another_seed_another(images):
    def last_loss(seed: int) -> float:
        run = replace(RUN, train=replace(RUN.train, seed=seed))
        return float(list(start(images, run).run())[-1]["loss"])

    assert last_loss(0) == last_loss(0) != last_loss(1)


def test_a_flow_stage_changes_nothing_above_its_highest_tap_nor_below_a_frozen_one(images):
    run = replace(RUN, flow=FlowConfig(pattern="sliding-2", order="local", freeze_below=True, share=0.9))
    training = start(images, run)
    before = weights(training)
    stages: list[dict[str, torch.Tensor]] = []
    for record in training.run():
        if record["phase"] == "task":
            break
        stages.append(weights(training))
    changed = {name.split(".")[0] for name, value in stages[0].items() if not torch.equal(value, before[name])}

    assert changed == {"stem", "layer1", "layer2"}  # stage 2: pair (0, 2)
    first_of_stage_3 = next(
        k for k, w in enumerate(stages) if not torch.equal(w["layer3.0.conv1.weight"], before["layer3.0.conv1.weight"])
    )
    below = {name: v for name, v in stages[first_of_stage_3 - 1].items() if name.startswith(("stem", "layer1"))}
    assert all(torch.equal(stages[-1][name], value) for name, value in below.items())  # stage 3: pair (1, 3)


def test_the_teacher_never_changes(images):
    training = start(images)
    assert training.teacher is not None
    before = {name: value.clone() for name, value in training.teacher.network.state_dict().items()}

    list(training.run())

    assert not any(p.requires_grad for p in training.teacher.network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in training.teacher.network.state_dict().items())


def test_adapters_are_trained_where_channels_differ_and_are_no_part_of_the_student(images):
    training = start(images, student_width=0.5)
    before = {name: value.clone() for name, value in training.adapters.state_dict().items()}

    list(training.run())

    assert sorted(training.adapters) == ["0", "1", "2", "3"]
    assert not any(torch.equal(value, before[name]) for name, value in training.adapters.state_dict().items())
    assert not any("adapter" in name for name in training.student.network.state_dict())


@pytest.mark.parametrize("share", [0.1, 0.9], ids=["task", "flow"])
def test_a_loss_that_is_not_finite_names_stage_epoch_and_step(images, share):
    wild = OptimizerConfig(lr=1e30)
    run = replace(RUN, flow=FlowConfig(share=share, norm="sum", optimizer=wild), task=TaskConfig(optimizer=wild))

    with pytest.raises(NonFiniteLossError, match=r"became nan or inf in .*stage.*, epoch \d+, step \d+ \("):
        list(start(images, run).run())


def test_clipping_keeps_a_wild_rate_from_exploding(images):
    wild = OptimizerConfig(lr=3.0, momentum=0.0, weight_decay=0.0)
    run = replace(RUN, task=TaskConfig(optimizer=wild), train=replace(RUN.train, clip_norm=1e-6))
    training = start(images, replace(run, method="scratch"))
    before = weights(training)["fc.weight"]

    list(training.run())

    torch.testing.assert_close(weights(training)["fc.weight"], before, atol=1e-4, rtol=0)


def test_a_bfloat16_run_ends_near_the_plain_one(images):
    plain = list(start(images).run())[-1]["loss"]
    half = list(start(images, replace(RUN, train=replace(RUN.train, precision="bfloat16"))).run())[-1]["loss"]
    assert half == pytest.approx(plain, rel=0.3)


def test_evaluate_agrees_with_a_plain_count_and_puts_the_mode_back(images):
    training = start(images)
    network = training.student.network.train()

    accuracy, loss = evaluate(network, images, images.val, RUN.train)

    assert network.training
    network.eval()
    with torch.no_grad():
        logits = network(images.normalise(images.val.images))
    assert accuracy == (logits.argmax(1) == images.val.labels).double().mean().item()
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, images.val.labels).item())


def test_learning_rates_fall_as_their_names_say():
    cosine, step, flat = (OptimizerConfig(lr=1.0, schedule=name) for name in ("cosine", "step", "constant"))

    assert [learning_rate(cosine, p) for p in (0, 0.5)] == pytest.approx([1, 0.5])
    assert [learning_rate(step, p) for p in (0, 0.49, 0.5, 0.75)] == pytest.approx([1, 1, 0.1, 0.01])
    assert learning_rate(flat, 0.99) == 1.0


def _run_as_worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    training = start(synthetic_images(), rank=rank, world=world)
    records = [timeless(record) for record in training.run()]
    torch.save({"records": records, "weights": weights(training)}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_data_parallel_workers_end_with_the_same_student_and_report_the_same(tmp_path):
    torch.multiprocessing.spawn(_run_as_worker, (2, str(tmp_path)), nprocs=2)

    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    alone = [timeless(record) for record in start(synthetic_images()).run()]

    assert first["records"] == second["records"]
    for name, value in first["weights"].items():
        torch.testing.assert_close(second["weights"][name], value)
    assert [r["step"] for r in first["records"]] == [r["step"] for r in alone]
    assert first["records"][-1]["loss"] == pytest.approx(alone[-1]["loss"], rel=0.5)  # norms see half a batch each


def test_flow_stages_clip_by_themselves(images):
    still = OptimizerConfig(lr=1.0, momentum=0.0, weight_decay=0.0)
    training = start(images, replace(RUN, flow=FlowConfig(clip_norm=1e-6, share=0.9, order="joint", optimizer=still)))
    before = weights(training)["layer3.0.conv1.weight"]

    next(training.run())

    torch.testing.assert_close(weights(training)["layer3.0.conv1.weight"], before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_where_channels_differ(images, method):
    run = baseline(replace(RUN, train=replace(RUN.train, epochs=24)), method)
    training = start(images, run, student_width=0.5)
    records = list(training.run())

    assert records[-1]["val_accuracy"] > 0.6  # a guess is right in 0.25
    for stage in training.schedule:
        last = [r for r in records if r["phase"] == stage.phase and r["stage"] == stage.tap][-1]
        assert {f"{term.name}_loss" for term in stage.terms} <= last.keys()
    adapted = {tap for stage in training.schedule for tap in stage.adapted_taps}
    assert {int(tap) for tap in training.adapters} == adapted


def test_a_changing_weight_is_followed_step_by_step(images):
    run = baseline(replace(RUN, train=replace(RUN.train, epochs=3)), "fitnets")
    records = [r for r in start(images, run).run() if r["phase"] == "task"]
    parts = [(r["loss"] - r["task_loss"]) / r["soft_loss"] for r in records]  # the soft targets' weight, about

    # from 4/9 to 1/9 in six steps, three an epoch: on average 7/18 in the first epoch and 4/18 in the last
    assert parts == pytest.approx([7 / 18, 4 / 18], rel=0.15)


@pytest.mark.parametrize("method", ["fitnets", "dkd"])
def test_a_resumed_run_goes_on_at_the_weight_it_had(images, method):
    run = baseline(replace(RUN, train=replace(RUN.train, epochs=3)), method)
    expected = [timeless(record) for record in start(images, run).run()]
    first = start(images, run)
    records = [timeless(next(first.run()))]
    second = start(images, run)
    second.load(first.state())

    assert records + [timeless(record) for record in second.run()] == expected
