"""Overlap patterns -> flow pairs."""

import pytest

from dfkt.errors import PatternError
from dfkt.methods.patterns import FAMILIES, SPANNED, flow_pairs, pattern_name, pattern_names


@pytest.mark.parametrize(
    ("pattern", "pairs"),
    [
        ("adjacent", [(0, 1), (1, 2), (2, 3)]),
        ("group-ends", [(0, 2), (2, 3)]),
        ("sliding-2", [(0, 2), (1, 3)]),
        ("sliding-3", [(0, 3)]),
        ("from-bottom", [(0, 1), (0, 2), (0, 3)]),
        ("to-top", [(0, 3), (1, 3), (2, 3)]),
        ("dense-1", [(0, 1), (1, 2), (2, 3)]),
        ("dense-2", [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)]),
        ("dense", [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]),
    ],
)
def test_pattern_stands_for_its_pairs_in_order_of_their_upper_tap(pattern, pairs):
    assert list(flow_pairs(pattern, 4, (0, 2, 3))) == pairs


@pytest.mark.parametrize("num_taps", [2, 3, 10, 28])
def test_every_pattern_holds_each_pair_once_with_lower_below_upper(num_taps):
    for family in FAMILIES:
        for span in range(1, num_taps) if family in SPANNED else [None]:
            pairs = flow_pairs(pattern_name(family, span), num_taps, range(num_taps))
            assert pairs
            assert len(set(pairs)) == len(pairs)
            assert all(0 <= lower < upper < num_taps for lower, upper in pairs)


@pytest.mark.parametrize("pattern", ["", "dens", "adjacent-2", "sliding", "sliding-0", "dense-4", "dense-", "dense--1"])
def test_unknown_patterns_and_spans_that_do_not_fit_are_refused(pattern):
    with pytest.raises(PatternError):
        flow_pairs(pattern, 4)


def test_a_span_that_is_too_large_is_named_with_what_the_taps_allow():
    with pytest.raises(PatternError, match=r"`1 <= span <= 3` must hold for 4 taps, but got span=5"):
        flow_pairs("sliding-5", 4)


@pytest.mark.parametrize("num_taps", [2, 3, 6])
def test_every_name_that_is_listed_is_a_pattern_and_no_name_that_fits_is_missing(num_taps):
    ends = range(num_taps)
    named = [flow_pairs(name, num_taps, ends) for name in pattern_names(num_taps)]

    assert all(named)
    assert len(set(pattern_names(num_taps))) == len(pattern_names(num_taps))
    for family in FAMILIES:
        assert all(pattern_name(family, s) in pattern_names(num_taps) for s in range(1, num_taps))
    assert flow_pairs("dense", num_taps) == flow_pairs(f"dense-{num_taps - 1}", num_taps)


DEEP = [(0, 1, 1, 2, 2), (0, 1, 1, 1), (0, 1, 2, 2, 3, 4), (0, 1, 1, 2, 3, 3, 3)]
"""What teacher taps the taps of a student meet that is deeper than its teacher, somewhere or everywhere."""


@pytest.mark.parametrize("matched", DEEP)
def test_a_pair_whose_two_taps_meet_one_teacher_tap_is_left_out_and_no_other(matched):
    count, ends = len(matched), [0, *(k for k in range(1, len(matched)) if matched[k] != (*matched, None)[k + 1])]
    for name in pattern_names(count):
        kept = flow_pairs(name, count, ends, matched)
        assert kept
        assert list(kept) == [(i, j) for i, j in flow_pairs(name, count, ends) if matched[i] != matched[j]]


@pytest.mark.parametrize("matched", [(0, 1, 2, 3), (0, 2, 5, 7)])
def test_a_student_that_is_not_deeper_keeps_every_pair(matched):
    for name in pattern_names(4):
        assert flow_pairs(name, 4, (0, 2, 3), matched) == flow_pairs(name, 4, (0, 2, 3))
