"""Arms side by side: test accuracies with paired differences, and how soon scratch's accuracy is reached.

Every table is one setting's of :class:`dfkt.analysis.figures.Figures`; what it looks like: :mod:`dfkt.analysis.tables`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping

import numpy as np
import pandas as pd

from dfkt.analysis.about import LEAST_GAP, SCRATCH, describe_network, main_arms
from dfkt.analysis.estimates import Array, bootstrap, crossing, holm, mean_interval, monotone, p_value
from dfkt.analysis.figures import Figures, complete_curves, complete_runs, setting_about
from dfkt.students.cost import Cost

_ACCURACY = (
    "arm seeds test_mean test_std gain gap_share against difference low high p pairs val_mean val_std "
    "device_seconds epochs"
)
_SPEED = "arm seeds end steps seconds step_ratio low high"


def accuracy_table(
    figures: Figures, setting: str, arms: Collection[str] | None = None, against: str | None = None
) -> pd.DataFrame:
    """Return the test accuracies: a row per arm that has a complete final run.

    ``seeds``; ``test_mean`` and ``test_std`` (n - 1) over them; ``gain``: mean less that of scratch; ``gap_share``:
    gain / (teacher - scratch), null where the teacher is less than a point ahead; ``difference`` of the arm ``against``
    less the row's over the ``pairs`` seeds that both have, with ``low``, ``high`` and ``p`` by
    Student's t; means of ``val``, ``device_seconds`` and ``epochs``. What cannot be told is null.

    All m differences of a table are asked about together. The intervals are at 1 - 5 % / m each (Bonferroni), so that
    all hold at once in 95 % of such tables; ``p`` is by Holm's procedure, which is a little less cautious for the same
    5 %. Intervals that belong to Holm's procedure exist, but say nothing of the differences that it finds.

    Args:
        figures: What was measured.
        setting: Which setting.
        arms: The table's; ``None`` takes all. Scratch's mean is known to every table.
        against: The arm that others are held against; ``None`` takes :func:`reference_arm`.
    """
    known, about = complete_runs(figures, setting).dropna(subset="test_accuracy"), setting_about(figures, setting)
    done = known if arms is None else known[known.arm.isin(list(arms))]
    tests = {str(arm): runs.set_index("seed").test_accuracy for arm, runs in done.groupby("arm")}
    teacher = about.get("teacher", {}).get("test_accuracy") or math.nan
    scratch = known[known.arm == SCRATCH].test_accuracy.mean()
    against = against if against in tests else reference_arm(done)
    pairs = {
        arm: (tests[str(against)] - test).dropna() if arm != against else test.iloc[:0] for arm, test in tests.items()
    }
    asked = sum(not math.isnan(p_value(found)) for found in pairs.values())
    rows = []
    for arm in (arm for arm in about["arms"] if arm in tests):
        test, runs = tests[arm], done[done.arm == arm]
        gain = math.nan if arm == SCRATCH else test.mean() - scratch
        row = {"arm": arm, "seeds": len(test), "test_mean": test.mean(), "test_std": test.std(), "gain": gain}
        row["gap_share"] = gain / (teacher - scratch) if teacher - scratch >= LEAST_GAP else math.nan
        ends = mean_interval(pairs[arm], 1 - 0.05 / max(asked, 1))
        row |= dict(zip(("difference", "low", "high"), ends, strict=True)) | {"against": against}
        row |= {"p": p_value(pairs[arm]), "pairs": len(pairs[arm]), "val_mean": runs.last_val_accuracy.mean()}
        row |= {"val_std": runs.last_val_accuracy.std(), "epochs": runs.epochs.mean()}
        rows.append(row | {"device_seconds": runs.device_seconds.mean()})
    table = pd.DataFrame(rows, columns=_ACCURACY.split())
    return table.assign(p=holm(table.p.tolist()))


def pair_table(figures: Figures, setting: str, arms: Collection[str] | None = None) -> pd.DataFrame:
    """Return the differences between any two arms: a row per pair, in the study's order.

    ``first``, ``second``; ``difference`` of their test accuracies over the ``pairs`` seeds that both have, first less
    second; ``p`` by Student's t, corrected for the number of pairs by Holm's procedure. What cannot be told is null.

    Args:
        figures: What was measured.
        setting: Which setting.
        arms: Whose pairs; ``None`` takes all.
    """
    known = complete_runs(figures, setting).dropna(subset="test_accuracy")
    tests = {str(arm): runs.set_index("seed").test_accuracy for arm, runs in known.groupby("arm")}
    order = [arm for arm in setting_about(figures, setting)["arms"] if arm in tests and (arms is None or arm in arms)]
    rows = []
    for first, second in itertools.combinations(order, 2):
        found = (tests[first] - tests[second]).dropna()
        row = {"first": first, "second": second, "difference": found.mean(), "p": p_value(found)}
        rows.append(row | {"pairs": len(found)})
    table = pd.DataFrame(rows, columns=["first", "second", "difference", "p", "pairs"])
    return table.assign(p=holm(table.p.tolist()))


def reference_arm(done: pd.DataFrame) -> str | None:
    """Return the arm that others are held against: the one with the best mean ``val`` accuracy.

    ``test`` chooses nothing: the best of several by ``test`` would look better than it is. ``None`` without runs.
    """
    means = done.groupby("arm", sort=False).last_val_accuracy.mean().dropna()
    return str(means.idxmax()) if len(means) else None


def best_student(figures: Figures, setting: str) -> str | None:
    """Return the name of the student to take, ``ARM-seedN``: of the best main arm's by ``val`` the best by ``val``.

    ``None`` where no final run is complete.
    """
    runs = _main_runs(figures, setting)
    arm = reference_arm(runs)
    if arm is None:
        return None
    ranked = runs[runs.arm == arm].sort_values(["last_val_accuracy", "seed"], ascending=[False, True])
    return f"{arm}-seed{ranked.seed.iloc[0]}"


def cost_table(figures: Figures, setting: str) -> list[Cost]:
    """Return what teacher and student cost and reach, the student as the arm that is best by ``val`` trained it.

    All arms train the same network. Empty where nothing was counted, as in studies of earlier versions.
    """
    about, runs, found = setting_about(figures, setting), _main_runs(figures, setting), []
    tests = {
        "teacher": about["teacher"].get("test_accuracy"),
        "student": runs[runs.arm == reference_arm(runs)].test_accuracy.mean(),
    }
    for role, counts in about.get("cost", {}).items():
        name = f"{role} {describe_network(about[role])}"
        found.append(Cost(name, counts["parameters"], counts["macs"], counts["bytes"], tests[role]))
    return found


def _main_runs(figures: Figures, setting: str) -> pd.DataFrame:
    """Return the complete final runs of a setting's arms that are no ablations."""
    known = complete_runs(figures, setting).dropna(subset="test_accuracy")
    return known[known.arm.isin(main_arms(setting_about(figures, setting)))]


def scratch_level(figures: Figures, setting: str) -> float:
    """Return the ``val`` accuracy that scratch ends with, by its curve in :func:`speed_table`; NaN without one."""
    return _level(_val_curves(figures, setting))


def speed_table(figures: Figures, setting: str, arms: Collection[str] | None = None) -> pd.DataFrame:
    """Return how soon each arm's ``val`` accuracy reaches what scratch ends with, flow and hint stages counted in.

    An arm's curve is the mean over its seeds at the end of every epoch, made monotone
    (:func:`dfkt.analysis.estimates.monotone`): the first crossing of a single seed's noisy curve would come too soon, and
    sooner with more epochs. Scratch's level is the end of its own such curve, so its noise and an arm's are treated alike.

    ``seeds``; ``end``, the mean of the last epoch's accuracy; ``steps`` and ``seconds`` of training until the curve crosses
    the level, linear between epochs, infinite where it does not; ``step_ratio``: steps over scratch's own, with its 95 %
    ``low`` and ``high`` from a bootstrap over seeds that draws them for the arm, scratch and the level together
    (:func:`dfkt.analysis.estimates.bootstrap`), an end infinite where the level is not reached. Empty without scratch.
    """
    curves = _val_curves(figures, setting)
    if math.isnan(level := _level(curves)):
        return pd.DataFrame(columns=_SPEED.split())
    seconds = complete_curves(figures, setting).groupby(["arm", "step"]).seconds.mean().astype("float64")
    rows = []
    for arm in (arm for arm in setting_about(figures, setting)["arms"] if arm in curves):
        if arms is not None and arm not in arms:
            continue
        curve, spent = curves[arm], seconds[arm]
        steps = crossing(curve.columns.to_numpy(dtype=float), monotone(curve.mean().to_numpy()), level)
        passed = np.interp(steps, spent.index.to_numpy(dtype=float), spent.to_numpy()) if steps < math.inf else steps
        row = {"arm": arm, "seeds": len(curve), "end": curve.iloc[:, -1].mean(), "steps": steps, "seconds": passed}
        row |= dict(zip(("step_ratio", "low", "high"), _ratio(curve, curves[SCRATCH]), strict=True))
        rows.append(row | ({"low": math.nan, "high": math.nan} if arm == SCRATCH else {}))
    return pd.DataFrame(rows, columns=_SPEED.split())


def _val_curves(figures: Figures, setting: str) -> dict[str, pd.DataFrame]:
    """Return by arm the ``val`` accuracies, a row per seed, a column per step at which all its seeds were measured."""
    records = complete_curves(figures, setting).dropna(subset="val_accuracy")
    tables = {
        str(arm): rows.pivot(index="seed", columns="step", values="val_accuracy")
        for arm, rows in records.drop_duplicates(["arm", "seed", "step"], keep="last").groupby("arm")
    }
    whole = {arm: table.dropna(axis="columns") for arm, table in tables.items()}
    return {arm: table for arm, table in whole.items() if table.shape[1]}


def _level(curves: Mapping[str, pd.DataFrame]) -> float:
    curve = curves.get(SCRATCH)
    return math.nan if curve is None else float(monotone(curve.mean().to_numpy())[-1])


def _ratio(curve: pd.DataFrame, scratch: pd.DataFrame) -> tuple[float, float, float]:
    """Return an arm's steps over scratch's own, and both ends of their interval."""
    seeds = curve.index.union(scratch.index)
    values = [table.to_numpy(dtype=float) for table in (curve, scratch)]
    ends = [table.columns.to_numpy(dtype=float) for table in (curve, scratch)]
    places = [seeds.get_indexer(table.index) for table in (curve, scratch)]

    def estimate(weights: Array) -> float:
        held = [weights[place] for place in places]
        if not all(some.sum() for some in held):
            return math.nan
        mine, theirs = (monotone(w @ v / w.sum()) for w, v in zip(held, values, strict=True))
        return crossing(ends[0], mine, theirs[-1]) / crossing(ends[1], theirs, theirs[-1])

    return estimate(np.ones(len(seeds))), *bootstrap(estimate, len(seeds), min(len(curve), len(scratch)))
