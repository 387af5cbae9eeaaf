"""When stages end, and what of a student trains in one."""

import pytest
import torch
from conftest import synthetic_images
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import METHODS, RESNET, ROUNDS, build, fitted
from torch import nn

from dfkt.config import NetworkConfig, TrainConfig
from dfkt.errors import ConfigError
from dfkt.methods.base import task_stage
from dfkt.networks.build import network_taps
from dfkt.networks.tapped import TappedNetwork
from dfkt.networks.taps import StudentTaps
from dfkt.training.parallel import Group
from dfkt.training.stages import RunningStage, build_adapters, stage_ends

BARE = NetworkConfig(name="small_runs:bare_norms")


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=6), st.integers(1, 40))
@settings(deadline=None)
def test_every_stage_has_a_step_and_all_together_have_the_runs(lengths, epoch_steps):
    schedule = tuple(task_stage(epochs, 0.1) for epochs in lengths)
    total = round(sum(lengths) * epoch_steps)
    if total < len(lengths):
        with pytest.raises(ConfigError, match="Every stage needs a step"):
            stage_ends(schedule, epoch_steps)
        return
    ends = stage_ends(schedule, epoch_steps)

    assert abs(ends[-1] - total) <= 1  # a sum of lengths is rounded in another order
    assert all(low < high for low, high in zip([0, *ends], ends, strict=False))


def test_ends_are_those_of_the_lengths_where_there_is_room():
    assert stage_ends([task_stage(epochs, 0.1) for epochs in (1.5, 2.5, 4)], 10) == [15, 40, 80]
    assert stage_ends([task_stage(epochs, 0.1) for epochs in (0.01, 0.01, 0.98)], 10) == [1, 2, 10]
    assert stage_ends([task_stage(epochs, 0.1) for epochs in (0.98, 0.01, 0.01)], 10) == [8, 9, 10]


def tapped(config: NetworkConfig) -> TappedNetwork:
    images = synthetic_images()
    network = fitted(build(config, images, seed=1), images)
    return TappedNetwork(network, network_taps(network, config), (1, 8, 8))


def test_adapters_stand_where_channels_must_agree_and_do_not_and_follow_the_seed_alone():
    student, teacher = tapped(RESNET), tapped(NetworkConfig(name="resnet8", width=0.5))
    schedule = METHODS["layerwise-hint"].schedule(3, StudentTaps.of(student.taps))
    found = []
    for noise, seed in ((1, 3), (2, 3), (2, 4)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        found.append(build_adapters(schedule, student, teacher, (0, 1, 2, 3), seed))
        assert torch.equal(torch.get_rng_state(), before)

    assert sorted(found[0]) == ["1", "2", "3"]
    for tap, adapter in found[0].items():
        assert isinstance(adapter, nn.Conv2d)
        ours, theirs = student.taps[int(tap)].channels, teacher.taps[int(tap)].channels
        assert (adapter.in_channels, adapter.out_channels, adapter.bias) == (ours, theirs, None)
        assert torch.equal(adapter.weight, found[1][tap].weight)
        assert not torch.equal(adapter.weight, found[2][tap].weight)
    assert len(build_adapters(schedule, student, student, (0, 1, 2, 3), 0)) == 0
    soft = METHODS["kd"].schedule(3, StudentTaps.of(()))
    assert len(build_adapters(soft, student, teacher, (0, 1, 2, 3), 0)) == 0


@pytest.mark.parametrize("config", [RESNET, BARE], ids=["resnet", "norms without parameters"])
def test_below_a_frozen_tap_nothing_trains_and_every_batch_norm_stays_in_evaluation(config):
    student = tapped(config)
    stage = next(s for s in ROUNDS.schedule(9, StudentTaps.of(student.taps)) if s.frozen_below == 1)
    running = RunningStage.prepare(stage, 4, 8, student, nn.ModuleDict(), TrainConfig(), Group())
    running.train_mode()
    below = ("stem", "layer1") if config is RESNET else ("low", "plain", "mid", "own")

    for name, parameter in student.network.named_parameters():
        assert parameter.requires_grad != name.startswith(below), name
    norms = {path: m for path, m in student.network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    part = {id(module) for module in running.model.modules()}
    assert {path: m.training for path, m in norms.items() if id(m) in part} == {
        path: not path.startswith(below) for path, m in norms.items() if id(m) in part
    }
    assert {id(m) for m in running.frozen_norms} == {id(m) for path, m in norms.items() if path.startswith(below)}
    trained = {id(p) for p in running.trainable}
    assert trained == {id(p) for p in running.model.parameters() if p.requires_grad}
    assert trained == {id(p) for group in running.optimizer.param_groups for p in group["params"]}


def test_the_next_stage_trains_what_was_frozen():
    student = tapped(RESNET)
    schedule = ROUNDS.schedule(9, StudentTaps.of(student.taps))
    for stage in (next(s for s in schedule if s.frozen_below), schedule[-1]):
        running = RunningStage.prepare(stage, 0, 9, student, nn.ModuleDict(), TrainConfig(), Group())
        running.train_mode()

    assert all(parameter.requires_grad for parameter in student.network.parameters())
    assert all(module.training for module in student.network.modules() if isinstance(module, nn.BatchNorm2d))


def test_a_stage_knows_what_share_of_it_is_done():
    student = tapped(RESNET)
    stage = task_stage(1, 0.1)
    running = RunningStage.prepare(stage, 4, 12, student, nn.ModuleDict(), TrainConfig(), Group())

    assert [running.done(step) for step in (4, 8, 12)] == [0, 0.5, 1]
