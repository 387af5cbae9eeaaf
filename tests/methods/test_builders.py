"""Every method as a schedule."""

from dataclasses import replace

import pytest

from dfkt.config import METHODS, FlowConfig, RunConfig, TaskConfig, TrainConfig
from dfkt.errors import PatternError
from dfkt.methods.builders import baseline, build_schedule, describe, needs_teacher
from dfkt.methods.terms import Ramp, weight_at

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


def test_fitnets_gives_one_hint_in_the_middle_then_kd_with_a_falling_weight():
    assert listing(baseline(RUN, "fitnets"), 7, (0, 2, 4, 6)) == [
        "hint stage 3: 10.00 epochs, 1 hint[relative] at 3, rate 0.1 cosine",
        "task stage: 20.00 epochs, 1 task + 0.444->0.111 soft[T=3], rate 0.1 cosine",
    ]


def test_layerwise_hints_are_added_one_by_one_from_the_bottom():
    assert listing(baseline(RUN, "layerwise-hint"), 7, (0, 2, 4, 6)) == [
        "hint stage 2: 3.33 epochs, 1 hint[relative] at 2, rate 0.1 cosine",
        "hint stage 4: 3.33 epochs, 1 hint[relative] at 2 4, rate 0.1 cosine",
        "hint stage 6: 3.33 epochs, 1 hint[relative] at 2 4 6, rate 0.1 cosine",
        "task stage: 20.00 epochs, 1 task + 0.444->0.111 soft[T=3], rate 0.1 cosine",
    ]


def test_attention_is_beside_the_labels_at_the_group_ends():
    assert listing(baseline(RUN, "attention"), 7, (0, 2, 4, 6)) == [
        "task stage: 30.00 epochs, 1 task + 1000 attention at 2 4 6, rate 0.1 cosine"
    ]


def test_similarity_is_beside_the_labels_at_the_group_ends():
    assert listing(baseline(RUN, "similarity"), 7, (0, 2, 4, 6)) == [
        "task stage: 30.00 epochs, 1 task + 3000 similarity at 2 4 6, rate 0.1 cosine"
    ]


def test_decoupled_soft_targets_warm_up_in_the_first_twelfth():
    assert listing(baseline(RUN, "dkd")) == [
        "task stage: 30.00 epochs, 1 task + 0->1 in 0.0833 of it decoupled[T=4, 1 target, 8 others], rate 0.1 cosine"
    ]


def test_a_ramp_goes_from_its_start_to_its_end_and_stays():
    assert [Ramp(4, 1).at(done) for done in (0, 0.5, 1)] == [4, 2.5, 1]
    assert [Ramp(0, 1, 0.25).at(done) for done in (0, 0.125, 0.25, 0.9)] == [0, 0.5, 1, 1]
    assert [weight_at(weight, 0.5) for weight in (3.0, Ramp(4, 1))] == [3.0, 2.5]


@pytest.mark.parametrize("method", METHODS)
def test_only_flow_and_hints_need_channels_to_agree(method):
    for stage in build_schedule(baseline(RUN, method), 4, (0, 1, 2, 3)):
        assert stage.adapted_taps == (stage.taps if stage.phase in ("flow", "hint") else ())


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


@pytest.mark.parametrize("method", METHODS)
def test_every_method_spends_the_same_number_of_epochs(method):
    run = RUN if method == "dfkt" else baseline(RUN, method)
    assert sum(stage.epochs for stage in build_schedule(run, 4, (0, 1, 2, 3))) == pytest.approx(30)


def test_a_stage_needs_nothing_above_its_highest_tap():
    stages = build_schedule(replace(RUN, task=TaskConfig(kd_weight=0.5)), 4, ())
    assert [max(stage.taps, default=None) for stage in stages] == [1, 2, 3, None]
    assert [stage.needs("teacher_logits") for stage in stages] == [False, False, False, True]
    assert [stage.reads_teacher for stage in stages] == [True, True, True, True]


def test_only_scratch_does_without_a_teacher():
    assert [m for m in METHODS if not needs_teacher(replace(RUN, method=m))] == ["scratch"]


def test_a_pattern_that_does_not_fit_is_refused():
    with pytest.raises(PatternError):
        build_schedule(replace(RUN, flow=FlowConfig(pattern="dense-9")), 4, ())
