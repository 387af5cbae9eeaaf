"""Every method as a schedule."""

from dataclasses import replace

import pytest

from dfkt.config import FlowConfig, RunConfig, TaskConfig, TrainConfig
from dfkt.errors import PatternError
from dfkt.methods import baseline, build_schedule, describe, needs_teacher

RUN = RunConfig(train=TrainConfig(epochs=30))


def listing(config: RunConfig, num_taps: int = 4, ends: tuple[int, ...] = (0, 1, 2, 3)) -> list[str]:
    return describe(build_schedule(config, num_taps, ends)).splitlines()


def test_scratch_is_one_task_stage():
    assert listing(baseline(RUN, "scratch")) == ["task stage: 30.00 epochs, 1 task, rate 0.1 cosine"]


def test_kd_mixes_soft_targets_and_labels_from_the_first_epoch():
    assert listing(baseline(RUN, "kd")) == ["task stage: 30.00 epochs, 0.1 task + 0.9 soft[T=4], rate 0.1 cosine"]


def test_fsp_is_one_joint_stage_of_the_group_ends_then_the_task():
    assert listing(baseline(RUN, "fsp"), 7, (0, 2, 4, 6)) == [
        "round 1, stage 6: 10.00 epochs, 1 flow[relative] (0,2)x1 (2,4)x1 (4,6)x1, rate 0.1 cosine",
        "task stage: 20.00 epochs, 1 task, rate 0.1 cosine",
    ]


def test_dfkt_goes_from_bottom_to_top_in_every_round():
    flow = FlowConfig(
        pattern="dense-2", order="local", rounds=2, share=0.5, span_weights=(1, 0.5), stage_lengths=(2, 1)
    )
    assert listing(replace(RUN, flow=flow)) == [
        "round 1, stage 1: 3.75 epochs, 1 flow[relative] (0,1)x1, rate 0.1 cosine",
        "round 1, stage 2: 1.88 epochs, 1 flow[relative] (0,2)x0.5 (1,2)x1, rate 0.1 cosine",
        "round 1, stage 3: 1.88 epochs, 1 flow[relative] (1,3)x0.5 (2,3)x1, rate 0.1 cosine",
        "round 2, stage 1: 3.75 epochs, 1 flow[relative] (0,1)x1, rate 0.1 cosine",
        "round 2, stage 2: 1.88 epochs, 1 flow[relative] (0,2)x0.5 (1,2)x1, rate 0.1 cosine",
        "round 2, stage 3: 1.88 epochs, 1 flow[relative] (1,3)x0.5 (2,3)x1, rate 0.1 cosine",
        "task stage: 15.00 epochs, 1 task, rate 0.1 cosine",
    ]


def test_cumulative_stages_keep_the_pairs_below():
    stages = build_schedule(replace(RUN, flow=FlowConfig(pattern="adjacent")), 4, ())
    assert [stage.terms[0].pairs for stage in stages[:-1]] == [
        ((0, 1),),
        ((0, 1), (1, 2)),
        ((0, 1), (1, 2), (2, 3)),
    ]


def test_freezing_spares_the_stem_since_no_pair_ends_there():
    flow = FlowConfig(pattern="adjacent", order="local", freeze_below=True)
    assert [stage.frozen_below for stage in build_schedule(replace(RUN, flow=flow), 4, ())] == [None, 1, 2, None]


def test_a_pair_weight_overrides_its_spans_weight():
    flow = FlowConfig(pattern="dense", order="joint", span_weights=(2.0,), pair_weights=((1, 2, 5.0), (0, 3, 7.0)))
    term = build_schedule(replace(RUN, flow=flow), 4, ())[0].terms[0]
    assert dict(zip(term.pairs, term.weights, strict=True)) == {
        (0, 1): 2.0,
        (0, 2): 1.0,
        (1, 2): 5.0,
        (0, 3): 7.0,
        (1, 3): 1.0,
        (2, 3): 2.0,
    }


@pytest.mark.parametrize("method", ["scratch", "kd", "fsp", "dfkt"])
def test_every_method_spends_the_same_number_of_epochs(method):
    run = RUN if method == "dfkt" else baseline(RUN, method)
    assert sum(stage.epochs for stage in build_schedule(run, 4, (0, 1, 2, 3))) == pytest.approx(30)


def test_a_stage_needs_nothing_above_its_highest_tap():
    stages = build_schedule(replace(RUN, task=TaskConfig(kd_weight=0.5)), 4, ())
    assert [max(stage.taps, default=None) for stage in stages] == [1, 2, 3, None]
    assert [stage.needs("teacher_logits") for stage in stages] == [False, False, False, True]
    assert [stage.reads_teacher for stage in stages] == [True, True, True, True]


def test_only_scratch_does_without_a_teacher():
    assert [needs_teacher(replace(RUN, method=m)) for m in ("scratch", "kd", "fsp", "dfkt")] == [
        False,
        True,
        True,
        True,
    ]


def test_a_pattern_that_does_not_fit_is_refused():
    with pytest.raises(PatternError):
        build_schedule(replace(RUN, flow=FlowConfig(pattern="dense-9")), 4, ())
