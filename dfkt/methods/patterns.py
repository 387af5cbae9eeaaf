"""Overlap patterns: a name by family and span -> the flow pairs it stands for.

A flow pair is ``(lower tap, upper tap)``; taps count from 0, behind the stem, to the last one, L.

=============  ==========================  ==============================================
name           pairs                       remark
=============  ==========================  ==============================================
adjacent       (0,1) (1,2) (2,3) …         no overlap
group-ends     adjacent, but only between  Yim et al., CVPR 2017: tap 0 and the last tap
               the ends of groups          of every group
sliding-S      (0,S) (1,S+1) …             overlaps when S > 1
from-bottom    (0,1) (0,2) (0,3) …         nested, all start at the stem
to-top         (0,L) (1,L) …               nested, all end at the last tap
dense-S        every (i,j), 1 <= j-i <= S  ``dense`` alone is every pair: the densest
=============  ==========================  ==============================================

Where a student is deeper than its teacher, several of its taps meet one tap of the teacher. A pair of two such taps has no
flow of the teacher's to learn from, and is left out. The stem meets the stem alone, so every pattern keeps a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from dfkt.errors import PatternError

FlowPair = tuple[int, int]

FAMILIES = ("adjacent", "group-ends", "sliding", "from-bottom", "to-top", "dense")
SPANNED = ("sliding", "dense")


def pattern_name(family: str, span: int | None = None) -> str:
    """Name a pattern by family and span.

    Example:
        >>> pattern_name("sliding", 2), pattern_name("to-top")
        ('sliding-2', 'to-top')
    """
    return f"{family}-{span}" if family in SPANNED and span is not None else family


def pattern_names(num_taps: int) -> tuple[str, ...]:
    """Return every name that :func:`flow_pairs` knows for so many taps.

    Example:
        >>> pattern_names(3)
        ('adjacent', 'group-ends', 'from-bottom', 'to-top', 'dense', 'dense-1', 'dense-2', 'sliding-1', 'sliding-2')
    """
    whole = [family for family in FAMILIES if family != "sliding"]
    spans = [pattern_name(family, span) for family in ("dense", "sliding") for span in range(1, num_taps)]
    return (*whole, *spans)


def flow_pairs(
    pattern: str, num_taps: int, group_ends: Sequence[int] = (), matched: Sequence[int] | None = None
) -> tuple[FlowPair, ...]:
    """Return a pattern's flow pairs, ordered by upper, then lower tap.

    Args:
        pattern: Name of the pattern, such as ``dense-2``.
        num_taps: How many taps the student has.
        group_ends: Taps at the ends of groups, tap 0 among them; only ``group-ends`` reads it.
        matched: The teacher tap that each tap meets; pairs whose two taps meet one and the same are left out.

    Raises:
        PatternError: If the family is unknown, or the span is missing or larger than the taps allow.

    Example:
        >>> flow_pairs("dense-2", 4)
        ((0, 1), (0, 2), (1, 2), (1, 3), (2, 3))
        >>> flow_pairs("dense-2", 4, matched=(0, 1, 1, 2))
        ((0, 1), (0, 2), (1, 3), (2, 3))
    """
    family, span = _parse(pattern, num_taps)
    top, meets = num_taps - 1, range(num_taps) if matched is None else matched
    if family == "group-ends":
        return tuple(pairwise(group_ends))  # group ends meet group ends
    every = [(i, j) for j in range(1, num_taps) for i in range(j) if meets[i] != meets[j]]
    keep = {
        "adjacent": lambda i, j: j - i == 1,
        "sliding": lambda i, j: j - i == span,
        "from-bottom": lambda i, j: i == 0,
        "to-top": lambda i, j: j == top,
        "dense": lambda i, j: j - i <= span,
    }[family]
    return tuple(pair for pair in every if keep(*pair))


def _parse(pattern: str, num_taps: int) -> tuple[str, int]:
    top = num_taps - 1
    family, _, digits = pattern.rpartition("-")
    if family not in SPANNED or not digits.isdecimal():
        family, digits = pattern, ""
    if family not in FAMILIES:
        spanned = ", ".join(pattern_name(f, 2) for f in SPANNED)
        raise PatternError(
            f"Unknown overlap pattern {pattern!r}; known: {', '.join(FAMILIES)} (with a span: {spanned})."
        )
    if family == "sliding" and not digits:
        raise PatternError("Overlap pattern 'sliding' needs a span, such as 'sliding-2'.")
    span = int(digits) if digits else top
    if not 1 <= span <= top:
        raise PatternError(
            f"`1 <= span <= {top}` must hold for {num_taps} taps, but got span={span} in overlap pattern {pattern!r}."
        )
    return family, span
