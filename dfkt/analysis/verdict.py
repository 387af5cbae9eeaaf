"""Who is ahead: chosen by ``val``, judged by ``test``, with how sure that is and what it costs, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from dfkt.analysis.about import main_arms
from dfkt.analysis.figures import Figures, setting_about
from dfkt.analysis.statistics import accuracy_table, best_student
from dfkt.analysis.tables import number, percent
from dfkt.store.files import Storage
from dfkt.store.study_store import Study
from dfkt.students.cost import Cost, scaled

SURE = 0.05
"""What ``p`` must be below for a difference to be called shown."""


@dataclass(frozen=True)
class Verdict:
    """An arm that is best by ``val``, beside the others on ``test``; shares, and null where something cannot be told.

    Attributes:
        best: The arm.
        test: Its mean test accuracy.
        seeds: Over how many seeds.
        most: How many seeds the arm with the most has.
        rival: The arm that is next by ``val``; ``None`` if there is none with a seed in common.
        difference: Points by which the best is ahead of the rival, over the seeds that both have, as a share.
        low, high: The interval of that.
        p: How probable it is without a difference.
        ahead: Other arms that it is ahead of, where that is shown.
        behind: Other arms that it is behind, where that is shown.
        level: Other arms to which no difference is shown.
    """

    best: str
    test: float
    seeds: int
    most: int
    rival: str | None
    difference: float
    low: float
    high: float
    p: float
    ahead: tuple[str, ...]
    behind: tuple[str, ...]
    level: tuple[str, ...]
    apart: tuple[str, ...]


def judge(figures: Figures, setting: str) -> Verdict | None:
    """Return who is ahead among a setting's arms that are no ablations; ``None`` without a complete final run."""
    table = accuracy_table(figures, setting, main_arms(setting_about(figures, setting)))
    best = table.iloc[0].against if len(table) else None
    if best is None:
        return None
    mine = table[table.arm == best].iloc[0]
    others = table[table.arm != best].sort_values("val_mean", ascending=False)
    apart, others = others[others.difference.isna()], others[others.difference.notna()]
    held = bool(len(others))
    second, rest = (others.iloc[0] if held else mine), others.iloc[1:]
    shown = rest[rest.p < SURE]
    return Verdict(
        best=str(best),
        test=float(mine.test_mean),
        seeds=int(mine.seeds),
        most=int(table.seeds.max()),
        rival=str(second.arm) if held else None,
        difference=float(second.difference),
        low=float(second.low),
        high=float(second.high),
        p=float(second.p),
        ahead=tuple(shown.arm[shown.difference > 0]),
        behind=tuple(shown.arm[shown.difference < 0]),
        level=tuple(rest.arm[~rest.arm.isin(shown.arm)]),
        apart=tuple(apart.arm),
    )


def verdict(figures: Figures, setting: str, place: Storage | None = None) -> list[str]:
    """Return which arm is best, by how much, and which of its students to take; both are chosen by ``val``.

    Args:
        figures: What was measured.
        setting: Which setting.
        place: The study's folder; without it, the student's is named as it lies there.
    """
    found = judge(figures, setting)
    if found is None:
        return []
    text = f"best by val: {found.best}, test {percent(found.test)} %"
    text += f" over {found.seeds} of {found.most} seeds" if found.seeds < found.most else ""
    if found.rival is not None:
        sure = f", p {found.p:.3f}" if pd.notna(found.p) else ""
        text += f", {100 * found.difference:+.2f} points to {found.rival}{sure}"
    return ["", f"{text}; its student that is best by val: {student_place(figures, setting, place)}"]


def student_place(figures: Figures, setting: str, place: Storage | None = None) -> str:
    """Return the folder of the student to take, as it lies in the study's; empty where there is none."""
    name = best_student(figures, setting)
    return "" if name is None else f"students/{name}" if place is None else place.sub("students", name).path


def sentence(figures: Figures, setting: str, costs: Sequence[Cost] = (), spent: pd.DataFrame | None = None) -> str:
    """Return who is ahead, by how much, how sure that is, and at what cost, in one sentence.

    Args:
        figures: What was measured.
        setting: Which setting.
        costs: Of teacher and student, as :func:`dfkt.analysis.statistics.cost_table` gives them, perhaps with latencies.
        spent: Device seconds by arm, as :func:`device_seconds` gives them.
    """
    found = judge(figures, setting)
    if found is None:
        return "No verdict yet: no final run is complete."
    told = f"has {percent(found.test)} % on test over {found.seeds} seed{'' if found.seeds == 1 else 's'}"
    parts = [f"{_outcome(found, told)}{_others(found)}", _cost(costs, None if spent is None else spent.get(found.best))]
    if spent is not None and (seconds := setting_about(figures, setting)["teacher"].get("seconds")):
        parts.append(f"the teacher's training took {number(seconds, '.0f')} s")
    return "; ".join(filter(None, parts)) + "."


def device_seconds(study: Study) -> pd.DataFrame:
    """Return the device seconds that each arm took: a column per arm, rows ``search`` (confirmations too) and ``finals``."""
    tables = {"search": [study.trials, study.confirmations], "finals": [study.finals]}
    found = {kind: pd.concat(rows).groupby("arm").device_seconds.sum() for kind, rows in tables.items()}
    return pd.DataFrame(found).fillna(0.0).T


def _outcome(found: Verdict, told: str) -> str:
    """Return the first clause: what is shown of the best arm and the next by ``val``."""
    who = f"{found.best}, the best by val, {told}"
    if found.rival is None:
        return f"Nothing stands beside {found.best}, which {told}"
    by = f"{100 * found.difference:+.2f} points"
    if pd.notna(found.low):
        by += f" [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
    by += f" to {found.rival}, the next by val"
    if pd.isna(found.p):
        return f"Such runs can show no difference: {who}, {by}"
    sure = "p < 0.001" if found.p < 0.001 else f"p {found.p:.3f}"
    if found.p >= SURE:
        return f"No difference shown: {who}, {by}, {sure}"
    if found.difference > 0:
        return f"{found.best} is ahead: the best by val, it {told}, {by}, {sure}"
    return f"{found.rival} is ahead: {who}, {by}, {sure}"


def _others(found: Verdict) -> str:
    """Return what is shown of the best arm and those behind the next one."""
    words = (
        ("it is ahead of", found.ahead),
        ("it is behind", found.behind),
        ("no difference is shown to", found.level),
        ("it has no seed in common with", found.apart),
    )
    return "".join(f"; {word} {', '.join(arms)}" for word, arms in words if arms)


def _cost(costs: Sequence[Cost], spent: Mapping[str, float] | pd.Series[float] | None) -> str:
    """Return what the student costs beside its teacher, and what was spent on it."""
    known = {cost.name.partition(" ")[0]: cost for cost in costs}
    parts, student, teacher = [], known.get("student"), known.get("teacher")
    if student is not None and student.parameters is not None:
        of = "" if teacher is None or teacher.parameters is None else f" (teacher: {scaled(teacher.parameters)})"
        parts.append(f"{scaled(student.parameters)} parameters{of}")
    for batch, each in {} if student is None else dict(list(student.latencies.items())[-1:]).items():
        theirs = None if teacher is None else teacher.latencies.get(batch)
        of = "" if theirs is None else f" (teacher: {theirs.median:.3g})"
        parts.append(f"{each.median:.3g} ms an image in batches of {batch}{of}")
    if spent is not None:
        total, search = spent["search"] + spent["finals"], spent["search"]
        parts.append(
            f"{number(total, '.0f')} device seconds, {number(search, '.0f') if search else 'none'} of them for a search"
        )
    return f"it costs {', '.join(parts)}" if parts else ""
