"""Overlap patterns as arcs over a network: a drawing for each, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dfkt.analysis.html import escape
from dfkt.config import NetworkConfig, from_dict
from dfkt.errors import InputError, StudyError
from dfkt.methods.base import Method
from dfkt.methods.patterns import FlowPair
from dfkt.networks.build import network_taps
from dfkt.networks.taps import StudentTaps, Tap, match_taps, measure_taps
from dfkt.store.rows import row_settings
from dfkt.students.cost import fresh

WIDTH, MARGIN, ABOVE = 360, 48, 8
NAMED = 10
"""Taps up to which each is named; more are numbered."""
SPANS = ("#0072B2", "#009E73", "#E69F00", "#CC79A7", "#D55E00", "#56B4E9", "#8C6D1F")
"""Colours by span, from 1 on."""
LINE = (0.8, 5.0)
"""Pixels of an arc's width, least and most."""


@dataclass(frozen=True)
class Network:
    """A student's taps: what they are called, and what a method's schedule needs to know of them."""

    names: tuple[str, ...]
    taps: StudentTaps


def student_network(meta: Mapping[str, Any]) -> Network:
    """Return the taps of a study's student, matched with its teacher's where that can be built here; nothing is trained.

    Args:
        meta: What ``study.json`` says.

    Raises:
        InputError: If the student cannot be built here, or its taps are not known.
    """
    data, config = meta.get("data", {}), meta["config"]
    if not {"classes", "channels", "image_size"} <= data.keys():
        raise StudyError("The student's taps are not known: study.json does not say how large images are.")
    student = _taps(config["student"], data)
    try:
        matched = match_taps(student, _taps(config["teacher"]["network"], data))
    except InputError:  # without it a pattern shows the pairs that were left out, too
        matched = None
    return Network(
        tuple(tap.name for tap in student), StudentTaps(len(student), StudentTaps.of(student).group_ends, matched)
    )


def weighed_pairs(row: pd.Series[Any] | Mapping[str, Any], network: Network, epochs: float) -> dict[FlowPair, float]:
    """Return the flow pairs that a run trains with their weights; none for a method that reads no flow.

    Args:
        row: A run's, with its settings.
        network: The student's taps.
        epochs: Length of the run.

    Raises:
        InputError: If the row has no settings, or the method is not at hand.
    """
    found: dict[FlowPair, float] = {}
    for stage in Method.from_json(row_settings(row)).schedule(epochs, network.taps):
        for term in stage.terms:
            pairs = term.flow_pairs
            found |= dict(zip(pairs, getattr(term, "weights", (1.0,) * len(pairs)), strict=True))
    return found


def arcs(pairs: Mapping[FlowPair, float], names: Sequence[str]) -> str:
    """Return an overlap pattern as SVG: taps on a line, bottom first, and an arc from each flow pair's lower to its upper tap.

    Colour tells a pair's span, width its weight beside the others.

    Args:
        pairs: The flow pairs with their weights.
        names: What the taps are called.
    """
    step = (WIDTH - 2 * MARGIN) / max(len(names) - 1, 1)
    widest = max((j - i for i, j in pairs), default=1)
    base = ABOVE + min(widest * step / 2, 110)
    height = base + (58 if len(names) <= NAMED else 26)
    heaviest = max(pairs.values(), default=1.0) or 1.0
    lines = [
        _arc(
            MARGIN + i * step, MARGIN + j * step, base, j - i, math.sqrt(weight / heaviest), f"({i},{j}) x {weight:.3g}"
        )
        for (i, j), weight in sorted(pairs.items(), key=lambda pair: pair[0][0] - pair[0][1])
    ]
    dots = [_dot(MARGIN + k * step, base, k, name, len(names)) for k, name in enumerate(names)]
    ground = f'<line x1="{MARGIN}" y1="{base:.1f}" x2="{WIDTH - MARGIN}" y2="{base:.1f}" stroke="#999"/>'
    told = f"{len(pairs)} flow pairs over {len(names)} taps: {' '.join(f'({i},{j})' for i, j in sorted(pairs))}"
    size = f'viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}"'
    return f'<svg class="arcs" {size} role="img" aria-label="{escape(told)}">{"".join([ground, *lines, *dots])}</svg>'


def _arc(left: float, right: float, base: float, span: int, share: float, told: str) -> str:
    tall = min((right - left) / 2, base - ABOVE)
    path = f"M{left:.1f} {base:.1f}A{(right - left) / 2:.1f} {tall:.1f} 0 0 1 {right:.1f} {base:.1f}"
    shade, width = SPANS[(span - 1) % len(SPANS)], LINE[0] + (LINE[1] - LINE[0]) * share
    look = f'fill="none" stroke="{shade}" stroke-width="{width:.2f}" stroke-opacity="0.75"'
    return f'<path d="{path}" {look}><title>{escape(told)}</title></path>'


def _dot(x: float, y: float, number: int, name: str, count: int) -> str:
    dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#1a1a1a"><title>{escape(f"tap {number}: {name}")}</title></circle>'
    if count <= NAMED:
        place = f'transform="translate({x + 3:.1f} {y + 12:.1f}) rotate(-35)" text-anchor="end"'
        return f'{dot}<text {place} font-size="11">{escape(_short(name))}</text>'
    if number % math.ceil(count / NAMED) and number != count - 1:
        return dot
    return f'{dot}<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle" font-size="10">{number}</text>'


def _short(name: str) -> str:
    return name if len(name) <= 12 else f"…{name[-11:]}"


def _taps(network: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[Tap, ...]:
    config = from_dict(NetworkConfig, network)
    shape = (data["channels"], *data["image_size"])
    built = fresh(config, classes=data["classes"], shape=shape)
    return measure_taps(built, network_taps(built, config, shape), shape)
