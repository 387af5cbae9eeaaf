"""Of few trials proposals are Optuna's own; of many, the best and the newest decide."""

import random
from typing import Any

import optuna
import pytest
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState
from study.played import TAPS

from dfkt.methods.dfkt import Dfkt
from dfkt.methods.space import Draw
from dfkt.study import sampler as module
from dfkt.study.sampler import BEST, NEWEST, NewestTpe, newest
from dfkt.study.search import silence_optuna

SETTINGS: dict[str, Any] = {"multivariate": True, "group": True, "constant_liar": True}
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def asked(study: optuna.Study) -> dict[str, Any]:
    draw = Draw(study.ask())
    Dfkt().sample(draw, TAPS)
    return draw.params


def search(sampler: TPESampler, count: int, at_once: int = 12) -> list[dict[str, Any]]:
    """Return the proposals of a search of a conditional space, some trials on their way, some pruned, some failed."""
    silence_optuna()
    study = optuna.create_study(sampler=sampler, direction="maximize")
    draws, live, proposed = random.Random(0), list[int](), []
    for number in range(count):
        proposed.append(asked(study))
        live.append(number)
        if len(live) == at_once:
            ended = live.pop(draws.randrange(at_once))
            how = draws.choice((TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
            study.tell(ended, draws.random() + proposed[ended]["rate"] if how == TrialState.COMPLETE else None, how)
    return proposed


def test_few_trials_make_the_proposals_that_optunas_own_tpe_makes() -> None:
    assert search(NewestTpe(seed=3, **SETTINGS), 50) == search(TPESampler(seed=3, **SETTINGS), 50)


def test_the_first_proposals_beyond_the_limit_differ_and_none_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NEWEST", 30)
    monkeypatch.setattr(module, "BEST", 3)
    few, all_of_them = search(NewestTpe(seed=3, **SETTINGS), 90), search(TPESampler(seed=3, **SETTINGS), 90)
    first = next(k for k in range(90) if few[k] != all_of_them[k])
    assert 30 < first < 70


def trial(number: int, state: TrialState = TrialState.COMPLETE, value: float | None = 0.0) -> FrozenTrial:
    made = optuna.trial.create_trial(state=state, value=value if state.is_finished() else None)
    made.number = number
    return made


def test_the_best_of_all_stay_and_of_the_others_the_newest() -> None:
    trials = [trial(n, value=-float(n)) for n in range(800)]
    trials[40:100] = [trial(n, TrialState.FAIL, None) for n in range(40, 60)] + [
        trial(n, TrialState.PRUNED, 9.0) for n in range(60, 100)
    ]
    trials += [trial(n, TrialState.RUNNING) for n in range(800, 1500)]
    shown = [t.number for t in newest(trials)]
    assert shown == [*range(BEST), *range(800 - NEWEST, 800), *range(1500 - NEWEST, 1500)]


def test_all_are_shown_of_as_many_as_are_shown_at_most() -> None:
    trials = [trial(n) for n in range(NEWEST)] + [trial(n, TrialState.RUNNING) for n in range(NEWEST, 2 * NEWEST)]
    assert newest(trials) == trials


def test_what_is_not_shown_changes_no_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NEWEST", 30)
    monkeypatch.setattr(module, "BEST", 3)
    proposals = []
    for forgotten in (0.02, 0.3):
        study = optuna.create_study(sampler=NewestTpe(seed=1, **SETTINGS), direction="maximize")
        kind = optuna.distributions.FloatDistribution(0.0, 1.0)
        for number in range(100):
            at, value = (forgotten, 0.0) if 10 <= number < 60 else (number / 100, 1 + number % 7)
            study.add_trial(optuna.trial.create_trial(params={"x": at}, distributions={"x": kind}, value=value))
        proposals.append([study.ask().suggest_float("x", 0, 1) for _ in range(20)])
    assert proposals[0] == proposals[1]
