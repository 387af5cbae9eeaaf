"""Trackers of experiments see every run of their study, flow stages included, and cannot end one."""

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.logger import LoggerCallback
from study.played import Played, arm, payloads, toy

from dfkt.errors import ConfigError
from dfkt.store.files import Storage
from dfkt.study.loggers import Logger, check_loggers, make_loggers


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The lines that a user sees; levels of foreign loggers are put back."""
    levels = {name: logging.getLogger(name).level for name in ("mlflow", "alembic")}
    yield []
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def tell(loggers: list[Any], trial: Any) -> None:
    """Make Tune's calls for a run from its start to its end."""
    for logger in loggers:
        logger.on_trial_start(0, [], trial)
        for k, payload in enumerate(payloads(trial.config["run"])):
            result = payload | {"training_iteration": k + 1, "time_total_s": 1.0, "config": trial.config}
            logger.on_trial_result(
                k, [], trial, result | {"pid": 1, "done": False, "loss": payload["records"][-1]["loss"]}
            )
        logger.on_trial_complete(0, [], trial)


def play(folder: Path, name: str, said: list[str]) -> Played:
    """Tell a tracker of a whole toy study: two trials of DFKT and a run from scratch."""
    run = Played(folder, toy("s", arm("dfkt", 2), arm("scratch"), seeds=1))
    loggers = make_loggers([name], run.queue.studies, said.append)
    for logger in loggers:
        logger.setup()
    for _ in range(2):
        tell(loggers, run.ask())
    for logger in loggers:
        logger.on_experiment_end([])
    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_the_loss_of_flow_stages_and_the_accuracy_of_task_stages(
    tmp_path: Path, said: list[str]
) -> None:
    play(tmp_path, "tensorboard", said)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "s/tensorboard/dfkt-trial-00000"))
    events.Reload()
    assert [event.step for event in events.Scalars("ray/tune/loss")] == [1, 2, 3]  # the first is of a flow stage
    assert [event.step for event in events.Scalars("ray/tune/val_accuracy")] == [2, 3]
    assert said == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_a_run_for_every_run_with_what_was_drawn(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    play(tmp_path, "mlflow", said)
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/s/mlflow.db")
    experiment = client.get_experiment_by_name("s")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["dfkt-trial-00000", "dfkt-trial-00001"]
    first = runs["dfkt-trial-00000"]
    assert (first.info.status, first.data.params["pattern"], first.data.params["arm"]) == (
        "FINISHED",
        "dense-3",
        "dfkt",
    )
    assert first.data.metrics["val_accuracy"] > 0.5
    losses = client.get_metric_history(first.info.run_id, "loss")
    assert [metric.step for metric in losses] == [1, 2, 3]
    assert said == []


class Broken(LoggerCallback):
    """A tracker that takes two calls and then nothing more."""

    calls = 0

    def log_trial_start(self, trial: Any) -> None:
        """Count."""
        self.calls += 1
        if self.calls > 2:
            raise ConnectionError("the server\nis gone")


def test_a_tracker_that_fails_is_told_nothing_more_and_the_study_goes_on(tmp_path: Path) -> None:
    run, said, inner = Played(tmp_path, toy("s", arm("dfkt", 4), seeds=1)), [], Broken()
    logger = Logger("mlflow", inner, Storage(tmp_path / "s"), said.append)
    for _ in range(4):
        logger.on_trial_start(0, [], run.ask())
    assert said == ["mlflow takes nothing more (ConnectionError: the server is gone); the study goes on without it"]
    assert inner.calls == 3


def test_a_tracker_hears_of_its_own_study_alone(tmp_path: Path) -> None:
    run = Played(tmp_path, toy("one", arm("dfkt", 1), seeds=1), toy("two", arm("dfkt", 1), seeds=1))
    heard: list[str] = []
    inner = SimpleNamespace(log_trial_start=lambda seen: heard.append(f"{seen} {seen.config['arm']} {seen.trial_id}"))
    logger = Logger("mlflow", inner, Storage(tmp_path / "two"), print)  # type: ignore[arg-type]
    for _ in range(2):
        logger.on_trial_start(0, [], run.ask())
    assert heard == ["dfkt-trial-00000 dfkt two-dfkt-trial-00000"]


def test_what_cannot_be_told_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, remote = Storage(tmp_path), SimpleNamespace(is_local=False, path="s3://b")
    with pytest.raises(
        ConfigError, match="takes some of tensorboard, mlflow, wandb, separated by commas, but got 'tb'"
    ):
        check_loggers(["tb"], here)
    check_loggers([], here)
    check_loggers(["tensorboard"], here)
    with pytest.raises(ConfigError, match="`--log tensorboard` writes files, but s3://b is no local folder"):
        check_loggers(["tensorboard"], remote)  # type: ignore[arg-type]

    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ConfigError, match="`--log mlflow` needs a package that is missing: pip install mlflow"):
        check_loggers(["mlflow"], here)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_each_of_several_studies_has_its_own_runs_in_mlflow(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    runs = [Played(tmp_path, toy(name, arm("scratch"), seeds=1)) for name in ("a", "b")]
    loggers = make_loggers(["mlflow"], [study for run in runs for study in run.queue.studies], said.append)
    for logger in loggers:
        logger.setup()
    for run in runs:
        tell(loggers, run.ask())
    import mlflow

    for name in ("a", "b"):
        client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/{name}/mlflow.db")
        experiments = {one.name: client.search_runs([one.experiment_id]) for one in client.search_experiments()}
        assert {kind: len(found) for kind, found in experiments.items()} == {"Default": 0, name: 1}
    assert said == []
