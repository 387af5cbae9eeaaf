"""A run's key: what the result depends on, and nothing else."""

import json
import re
from dataclasses import fields, replace

import pytest
from small_runs import METHODS

from dfkt.config import DataConfig, NetworkConfig, OptimizerConfig, TeacherConfig, TrainConfig, from_dict, to_dict
from dfkt.methods.attention import Attention
from dfkt.methods.dfkt import Dfkt
from dfkt.methods.kd import Kd
from dfkt.methods.scratch import Scratch
from dfkt.training.config import RunConfig

RUN = RunConfig(method=Kd(), data=DataConfig(name="/here/pets"))


@pytest.mark.parametrize("name", METHODS)
def test_json_and_back_is_the_same_run_with_the_same_key(name):
    run = replace(RUN, method=METHODS[name])
    back = from_dict(RunConfig, json.loads(json.dumps(to_dict(run))))

    assert back == run
    assert back.key == run.key
    assert re.fullmatch("[0-9a-f]{12}", run.key)


def test_what_a_dict_leaves_out_keeps_its_default():
    assert from_dict(RunConfig, {"train": {"epochs": 3}}) == RunConfig(train=TrainConfig(epochs=3))


def test_moved_images_a_users_file_and_what_only_a_search_reads_change_no_key():
    assert replace(RUN, data=DataConfig(name="/there/pets")).key == RUN.key
    assert replace(RUN, data=DataConfig(name="pets/")).key == RUN.key
    assert replace(RUN, teacher=TeacherConfig(checkpoint="own.pt")).key == RUN.key
    assert replace(RUN, method=Dfkt(weights="pair")).key == replace(RUN, method=Dfkt()).key


def test_a_placement_is_no_part_of_a_run():
    assert {f.name for f in fields(RunConfig)} == {"method", "data", "teacher", "student", "train"}
    text = json.dumps(to_dict(RunConfig()))
    assert not any(name in text for name in ("root", "threads", "device", "checkpoint_every"))


def test_all_else_changes_the_key():
    train, teacher = RUN.train, RUN.teacher
    others = [
        RUN,
        replace(RUN, method=Kd(rate=0.2)),
        replace(RUN, method=Kd(weight=0.5)),
        replace(RUN, method=Attention()),
        replace(RUN, data=DataConfig(name="/here/dogs")),
        replace(RUN, data=replace(RUN.data, split_seed=1)),
        replace(RUN, data=replace(RUN.data, limit_train=50)),
        replace(RUN, data=replace(RUN.data, padding=2)),
        replace(RUN, student=NetworkConfig(width=0.5)),
        replace(RUN, student=NetworkConfig(taps=("stem", "layer1.0"))),
        replace(RUN, teacher=replace(teacher, network=NetworkConfig(name="resnet14"))),
        replace(RUN, teacher=replace(teacher, rate=0.2)),
        replace(RUN, teacher=replace(teacher, train=TrainConfig(seed=1))),
        replace(RUN, train=replace(train, seed=1)),
        replace(RUN, train=replace(train, epochs=61)),
        replace(RUN, train=replace(train, batch_size=64)),
        replace(RUN, train=replace(train, precision="float32")),
        replace(RUN, train=replace(train, sync_batch_norm=False)),
        replace(RUN, train=replace(train, optimizer=OptimizerConfig(momentum=0.5))),
    ]

    assert len({other.key for other in others}) == len(others)


def test_the_key_of_a_method_without_a_teacher_does_not_depend_on_one():
    teachers = (TeacherConfig(), TeacherConfig(rate=0.2), TeacherConfig(network=NetworkConfig(name="resnet14")))

    assert len({replace(RUN, method=Scratch(), teacher=teacher).key for teacher in teachers}) == 1
    assert len({replace(RUN, teacher=teacher).key for teacher in teachers}) == 3
