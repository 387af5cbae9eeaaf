"""Densely distilled flow: its schedule, and what a search draws of it."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import optuna
import pytest
import torch

from dfkt.config import from_dict, to_dict
from dfkt.errors import ConfigError, PatternError
from dfkt.methods.base import Features, Method
from dfkt.methods.dfkt import FAMILIES, MOST_ROUNDS, ORDERS, Dfkt, FlowTerm, describe_left_out, left_out
from dfkt.methods.flow import flow_loss
from dfkt.methods.patterns import flow_pairs
from dfkt.methods.space import Draw, Range, Space
from dfkt.networks.taps import StudentTaps

optuna.logging.set_verbosity(optuna.logging.ERROR)
TAPS = StudentTaps(4, (0, 1, 2, 3))
PLACES = [
    StudentTaps(2, (0, 1)),
    StudentTaps(3, (0, 2)),
    StudentTaps(4, (0, 1, 3)),
    StudentTaps(6, (0, 2, 3, 5)),
    StudentTaps(9, (0, 8)),
    StudentTaps(7, (0, 2, 4, 6), (0, 1, 1, 2, 2, 3, 3)),
]
every_search = pytest.mark.parametrize("weights", ["span", "pair"])
every_place = pytest.mark.parametrize(
    "taps", PLACES, ids=lambda taps: f"{taps.count} taps{', deeper' if taps.matched else ''}"
)


def listing(method: Dfkt, taps: StudentTaps = TAPS) -> list[str]:
    return [stage.describe() for stage in method.schedule(30, taps)]


def random_draws(method: Dfkt, taps: StudentTaps, count: int, space: Mapping[str, Any] | None = None):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=taps.count))
    for _ in range(count):
        trial = study.ask()
        draw = Draw(trial, Space(space or {}))
        yield method.sample(draw, taps), draw.params, trial.params


def weights_of(method: Dfkt, taps: StudentTaps) -> dict[tuple[int, int], float]:
    terms = [t for stage in method.schedule(60, taps) for t in stage.terms if isinstance(t, FlowTerm)]
    return {pair: weight for term in terms for pair, weight in zip(term.pairs, term.weights, strict=True)}


def test_dfkt_goes_from_bottom_to_top_in_every_round():
    method = Dfkt(
        pattern="dense-2", order="local", rounds=2, share=0.5, span_weights=(1.0, 0.5), stage_lengths=(2.0, 1.0)
    )
    assert listing(method) == [
        "round 1, stage 1: 3.75 epochs at 0.1: 1 flow[relative] (0,1)x1",
        "round 1, stage 2: 1.88 epochs at 0.1: 1 flow[relative] (0,2)x0.5 (1,2)x1",
        "round 1, stage 3: 1.88 epochs at 0.1: 1 flow[relative] (1,3)x0.5 (2,3)x1",
        "round 2, stage 1: 3.75 epochs at 0.1: 1 flow[relative] (0,1)x1",
        "round 2, stage 2: 1.88 epochs at 0.1: 1 flow[relative] (0,2)x0.5 (1,2)x1",
        "round 2, stage 3: 1.88 epochs at 0.1: 1 flow[relative] (1,3)x0.5 (2,3)x1",
        "task stage: 15 epochs at 0.1: 1 task",
    ]


def test_rates_clipping_norm_and_soft_targets_end_up_in_their_stages():
    stages = Dfkt(flow_rate=0.3, rate=0.02, clip_norm=2.0, norm="mean", weight=0.25, temperature=2.0).schedule(30, TAPS)

    assert [stage.rate for stage in stages] == [0.3] * 3 + [0.02]
    assert [stage.clip_norm for stage in stages] == [2.0] * 3 + [None]
    assert {stage.terms[0].norm for stage in stages[:-1]} == {"mean"}
    assert stages[-1].describe() == "task stage: 20 epochs at 0.02: 0.75 task + 0.25 soft[T=2]"


def test_cumulative_stages_keep_the_pairs_below():
    stages = Dfkt(pattern="adjacent").schedule(30, TAPS)
    assert [stage.terms[0].pairs for stage in stages[:-1]] == [
        ((0, 1),),
        ((0, 1), (1, 2)),
        ((0, 1), (1, 2), (2, 3)),
    ]


def test_a_joint_stage_holds_every_pair():
    assert listing(Dfkt(pattern="adjacent", order="joint")) == [
        "round 1, stage 3: 10 epochs at 0.1: 1 flow[relative] (0,1)x1 (1,2)x1 (2,3)x1",
        "task stage: 20 epochs at 0.1: 1 task",
    ]


def test_without_rounds_the_task_stage_alone_is_left_and_no_longer_than_before():
    """The ablation that says what the flow stages themselves do: they and their epochs are gone."""
    assert listing(Dfkt(rounds=0)) == ["task stage: 20 epochs at 0.1: 1 task"]


def test_freezing_spares_the_stem_since_no_pair_ends_there():
    method = Dfkt(pattern="adjacent", order="local", freeze_below=True)
    assert [stage.frozen_below for stage in method.schedule(30, TAPS)] == [None, 1, 2, None]


def test_a_pair_weight_overrides_its_spans_weight():
    method = Dfkt(order="joint", span_weights=(2.0,), pair_weights=((1, 2, 5.0), (0, 3, 7.0)))
    assert weights_of(method, TAPS) == {
        (0, 1): 2.0,
        (0, 2): 1.0,
        (1, 2): 5.0,
        (0, 3): 7.0,
        (1, 3): 1.0,
        (2, 3): 2.0,
    }


def test_a_stage_needs_nothing_above_its_highest_tap():
    stages = Dfkt(weight=0.5).schedule(30, TAPS)

    assert [max(stage.taps, default=None) for stage in stages] == [1, 2, 3, None]
    assert [stage.needs("teacher_logits") for stage in stages] == [False, False, False, True]
    assert [stage.reads_teacher for stage in stages] == [True, True, True, True]
    assert not stages[-1].taps


def test_a_term_is_the_flow_loss_of_its_taps():
    term = FlowTerm(pairs=((0, 2), (1, 2)), weights=(1.0, 2.0), norm="mean")
    maps = [
        {k: torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(k + n)) for k in range(3)} for n in (0, 9)
    ]

    found = term(Features(maps[0]), Features(maps[1]), torch.zeros(2))

    assert term.taps == (0, 1, 2)
    assert found.item() == flow_loss(maps[0], maps[1], term.pairs, term.weights, "mean").item()
    assert term == FlowTerm(pairs=((0, 2), (1, 2)), weights=(1.0, 2.0), norm="mean")


def test_a_pattern_that_does_not_fit_is_refused():
    with pytest.raises(PatternError):
        Dfkt(pattern="dense-9").schedule(30, TAPS)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"share": 1.0}, "`0 < share < 1`"),
        ({"norm": "literal"}, "`norm` must be one of"),
        ({"order": "sideways"}, "`order` must be one of cumulative, local, joint"),
        ({"rounds": 1.5}, "rounds is a whole number"),
        ({"rounds": -1}, "rounds"),
        ({"weight": 1.5}, "`weight <= 1`"),
        ({"temperature": 0.0}, "`temperature > 0`"),
        ({"clip_norm": 0.0}, "`clip_norm > 0`"),
        ({"stage_lengths": (1.0, 0.0)}, "0 < stage_lengths <= 1e6"),
        ({"span_weights": (1.0, float("nan"))}, "span_weights is finite"),
        ({"pair_weights": ((0, 1, float("inf")),)}, "pair_weights are finite"),
        ({"weights": "tap"}, "`weights` must be one of span, pair"),
    ],
)
def test_settings_outside_their_rules_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        Dfkt(**setting)


def test_dfkt_is_described_by_pattern_order_rounds_flow_and_task():
    assert Dfkt().describe() == "dense cumulative x1, flow 0.33 at 0.1, task at 0.1"
    told = Dfkt(pattern="sliding-2", order="local", freeze_below=True, rounds=3, weight=0.9, temperature=2.5).describe()
    assert told == "sliding-2 local frozen x3, flow 0.33 at 0.1, task at 0.1, kd 0.90 at T=2.5"


def test_a_student_deeper_than_its_teacher_learns_no_flow_between_a_teacher_tap_and_itself() -> None:
    deep = StudentTaps(5, (0, 2, 4), (0, 1, 1, 2, 2))
    method = Dfkt(pattern="adjacent", order="local", stage_lengths=(1.0, 1.0, 2.0), share=0.5)
    assert listing(method, deep) == [
        "round 1, stage 1: 5 epochs at 0.1: 1 flow[relative] (0,1)x1",
        "round 1, stage 3: 10 epochs at 0.1: 1 flow[relative] (2,3)x1",
        "task stage: 15 epochs at 0.1: 1 task",
    ]
    assert left_out(method, 30, deep) == {(1, 2), (3, 4)}
    assert left_out(replace(method, rounds=0), 30, deep) == set()
    assert left_out(Dfkt(pattern="sliding-2"), 30, deep) == set()


def test_a_student_that_is_not_deeper_has_the_schedule_that_it_has_without_a_teacher() -> None:
    for matched in ((0, 1, 2, 3), (0, 4, 8, 12)):
        told = replace(TAPS, matched=matched)
        assert Dfkt().schedule(30, told) == Dfkt().schedule(30, TAPS)
        assert left_out(Dfkt(), 30, told) == set()


def test_many_pairs_that_are_left_out_are_counted() -> None:
    line = describe_left_out({(1, j) for j in range(2, 40)})
    assert "(1,2) (1,3) " in line
    assert "(1,21) … (38 in all) are left out" in line


# What a search draws.


@every_place
@every_search
def test_every_sample_is_a_method_that_can_be_trained_and_stored(taps, weights):
    base = Dfkt(weights=weights, norm="mean", clip_norm=2.0)
    columns = base.columns(taps)
    for method, params, asked in random_draws(base, taps, 100):
        schedule = method.schedule(60, taps)

        assert sum(stage.epochs for stage in schedule) == pytest.approx(60)
        assert [stage.phase for stage in schedule] == ["flow"] * (len(schedule) - 1) + ["task"]
        assert len(schedule) > 1
        assert {term.name for stage in schedule for term in stage.terms} <= set(Dfkt.losses)
        assert set(weights_of(method, taps)) == set(
            flow_pairs(method.pattern, taps.count, taps.group_ends, taps.matched)
        )
        assert {name: type(value) for name, value in params.items()} == {name: columns[name] for name in params}
        unasked = {"pattern"} | ({"family"} if taps.count == 2 else set())  # named after others; the only one
        assert asked == {name: value for name, value in params.items() if name not in unasked}
        assert (method.norm, method.clip_norm, method.weights) == ("mean", 2.0, weights)
        assert from_dict(Method, json.loads(json.dumps(to_dict(method)))) == method
        assert base.sample(Draw(optuna.trial.FixedTrial(params)), taps) == method


@every_place
@every_search
def test_a_search_starts_from_reference_settings_which_are_all_that_it_asks_for(taps, weights):
    base = Dfkt(weights=weights)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    found = []
    for start in base.starts(taps):
        study.enqueue_trial(start)
        draw = Draw(study.ask())
        found.append(base.sample(draw, taps))  # Optuna's warning of a value outside its range would be an error
        assert {name: value for name, value in draw.params.items() if name != "pattern"} == start

    labels, soft = found
    assert set(weights_of(labels, taps)) == set(flow_pairs("dense", taps.count, matched=taps.matched))
    assert {*weights_of(labels, taps).values()} == {1.0}
    assert labels.schedule(60, taps) == Dfkt().schedule(60, taps)
    assert soft == replace(labels, weight=0.9, temperature=4.0)


def conditions(params: Mapping[str, Any], taps: StudentTaps, weights: str) -> dict[str, bool]:
    """Say of every conditional parameter whether it must be there."""
    pairs = flow_pairs(params["pattern"], taps.count, matched=taps.matched)
    tops = {j for _, j in pairs}
    spans = {j - i for i, j in pairs}
    frozen = any(min(i for i, j in pairs if j == top) > 0 for top in tops)
    several = len(tops) > 1
    there = {
        "dense_span": params["family"] == "dense",
        "sliding_span": params["family"] == "sliding",
        "order": several,
        "rounds": several,
        "freeze_below": several and params.get("order") == "local" and frozen,
        "weight": params["soft_targets"],
        "temperature": params["soft_targets"],
    }
    there |= {f"length_{k}": several and k in tops for k in range(1, taps.count)}
    if weights == "span":
        return there | {f"weight_span_{s}": len(spans) > 1 and s in spans for s in range(1, taps.count)}
    every = [(i, j) for j in range(taps.count) for i in range(j)]
    return there | {f"weight_{i}_{j}": len(pairs) > 1 and (i, j) in pairs for i, j in every}


@every_place
@every_search
def test_a_parameter_is_there_exactly_where_it_has_a_meaning(taps, weights):
    for _, params, _ in random_draws(Dfkt(weights=weights), taps, 100):
        for name, there in conditions(params, taps, weights).items():
            assert (name in params) == there, (name, params)


@every_place
@every_search
def test_sampled_weights_lengths_rates_and_targets_end_up_in_their_stages(taps, weights):
    for method, params, _ in random_draws(Dfkt(weights=weights), taps, 60):
        for (i, j), weight in weights_of(method, taps).items():
            name = f"weight_span_{j - i}" if weights == "span" else f"weight_{i}_{j}"
            assert weight == params.get(name, 1.0)
        *flow, task = method.schedule(60, taps)
        lengths = [params.get(f"length_{stage.tap}", 1.0) for stage in flow]
        expected = [params["share"] * 60 * n / sum(lengths) for n in lengths]
        assert [stage.epochs for stage in flow] == pytest.approx(expected)
        assert len(flow) % params.get("rounds", 1) == 0
        assert {stage.rate for stage in flow} == {params["flow_rate"]}
        assert task.rate == params["rate"]
        assert method.weight == params.get("weight", 0.0)
        assert len(task.terms) == 1 + params["soft_targets"]


def test_every_choice_is_reached():
    drawn = [params for _, params, _ in random_draws(Dfkt(), TAPS, 300)]

    patterns = {"adjacent", "from-bottom", "to-top", "dense-2", "dense-3", "sliding-2", "sliding-3"}
    assert {params["pattern"] for params in drawn} == patterns
    assert {params["family"] for params in drawn} == set(FAMILIES)
    assert {params.get("order") for params in drawn} == {*ORDERS, None}
    assert {params.get("rounds") for params in drawn} == {*range(1, MOST_ROUNDS + 1), None}
    assert {params.get("freeze_below") for params in drawn} == {True, False, None}
    assert {name for params in drawn for name in params} == set(Dfkt().columns(TAPS))


def test_names_of_many_taps_are_read_whole():
    taps = StudentTaps(12, (0, 11))
    params: dict[str, Any] = {"pattern": "dense-2", "order": "local", "rounds": 1, "freeze_below": False}
    params |= {f"length_{k}": 0.5 if k == 11 else 1.0 for k in range(1, 12)}
    params |= {f"weight_{i}_{j}": 1.0 for i, j in flow_pairs("dense-2", 12)} | {"weight_1_2": 2.0, "weight_10_11": 3.0}
    params |= {"share": 0.3, "flow_rate": 0.1, "rate": 0.1, "soft_targets": False}
    draw = Draw(optuna.trial.FixedTrial(params), Space({"pattern": ("dense-2",)}))

    method = Dfkt(weights="pair").sample(draw, taps)

    assert weights_of(method, taps)[1, 2] == 2.0
    assert weights_of(method, taps)[10, 11] == 3.0
    assert method.stage_lengths == (*[1.0] * 10, 0.5)


# What a study narrows.


def test_a_space_may_name_whole_patterns_also_those_that_a_search_leaves_out():
    wanted = ("dense-1", "group-ends", "dense")
    drawn = list(random_draws(Dfkt(), TAPS, 60, {"pattern": wanted}))

    assert {method.pattern for method, _, _ in drawn} == set(wanted)
    assert all("family" not in params and params["pattern"] == method.pattern for method, params, _ in drawn)


def test_a_space_may_take_one_family_and_some_of_its_spans():
    drawn = list(random_draws(Dfkt(), TAPS, 40, {"family": ("dense",), "dense_span": Range(2, 3)}))

    assert {method.pattern for method, _, _ in drawn} == {"dense-2", "dense-3"}


@pytest.mark.parametrize(
    ("space", "held"),
    [
        ({"rounds": (5,)}, {"rounds": {5}}),
        ({"rounds": (0,)}, {"rounds": {0}}),
        ({"order": ("joint",)}, {"order": {"joint"}, "rounds": {1}, "stage_lengths": {()}}),
        ({"order": ("local",), "freeze_below": (True,)}, {"order": {"local"}, "freeze_below": {True}}),
        ({"soft_targets": (False,)}, {"weight": {0.0}}),
        ({"weight": (0.5,)}, {"weight": {0.5}}),
        ({"weight": (0.0,)}, {"weight": {0.0}}),
        ({"share": (0.2,), "flow_rate": (0.3,)}, {"share": {0.2}, "flow_rate": {0.3}}),
    ],
)
def test_what_a_space_fixes_holds_in_every_sample(space, held):
    for method, params, _ in random_draws(Dfkt(), TAPS, 60, {"family": ("sliding",), "sliding_span": (2,)} | space):
        for name, values in held.items():
            assert getattr(method, name) in values, params
        assert {name: type(value) for name, value in params.items()}.items() <= Dfkt().columns(TAPS).items()
        assert params["soft_targets"] == (method.weight > 0)


def test_weights_and_lengths_that_the_settings_give_stay_and_are_not_searched():
    base = Dfkt(span_weights=(1.0, 0.5), pair_weights=((0, 3, 2.0),), stage_lengths=(1.0, 2.0, 3.0))
    for method, params, _ in random_draws(base, TAPS, 60):
        given = (method.span_weights, method.pair_weights, method.stage_lengths)
        assert given == (base.span_weights, base.pair_weights, base.stage_lengths)
        assert params.keys() <= base.columns(TAPS).keys()
    names = {*base.columns(TAPS), *base.starts(TAPS)[0]}
    assert not [name for name in names if name.startswith(("weight_", "length_"))]
