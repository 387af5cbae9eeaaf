"""Trackers of experiments that are told how runs go on, besides the study's own tables: TensorBoard, MLflow, Weights & Biases.

Tune's own callbacks write to them. What they see of a run is told here: the settings that its search drew, or those of its
method, and the newest record's numbers (:func:`dfkt.training.run.run_job` reports them), flow stages included.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.logger import LoggerCallback

from dfkt.config import flatten, key_dict
from dfkt.errors import ConfigError, one_line
from dfkt.store.files import Storage
from dfkt.study.driver import Run
from dfkt.study.opened import OpenStudy

LOGGERS = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
"""By name, the package that each needs."""


@dataclass(frozen=True, eq=False)
class Seen:
    """A run as Tune's callbacks are shown it, in place of Tune's own trial.

    Attributes:
        run: The run.
        trial_id: Its identifier, the same whenever it is taken up again.
        local_path: A folder for files of its own.
    """

    run: Run
    trial_id: str
    local_path: str
    checkpoint: None = None

    def init_local_path(self) -> None:
        """Make the folder."""
        Path(self.local_path).mkdir(parents=True, exist_ok=True)

    @property
    def config(self) -> dict[str, Any]:
        """Arm, seed, and what was drawn; the method's settings where nothing was."""
        config = self.run.job.config
        params = self.run.params or flatten(key_dict(config.method))
        return {"arm": self.run.arm, "kind": self.run.kind, "seed": config.train.seed, **params}

    evaluated_params = config

    @property
    def experiment_dir_name(self) -> str:
        """What the run belongs to."""
        return self.run.arm

    def __str__(self) -> str:
        return self.run.folder_name


class Logger(tune.Callback):
    """Tells one of Tune's callbacks of one study's runs; where it fails, a line says so, and it is told nothing more.

    Args:
        name: The tracker's.
        inner: Tune's callback.
        study: Folder of the study.
        log: Receives the line.
    """

    def __init__(self, name: str, inner: LoggerCallback, study: Storage, log: Callable[[str], None]) -> None:
        self.name, self.inner, self.study, self.log = name, inner, study, log
        self.seen: dict[Any, Seen] = {}
        self.failed = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything out: Tune pickles its callbacks."""
        return {}

    def setup(self, **info: Any) -> None:
        """Begin."""
        self._tell(self.inner.setup, **info)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell of a run that starts, or starts again."""
        if self.name == "wandb":  # its callback wants the folder to be there
            self._tell_of(trial, Seen.init_local_path)
        self._tell_of(trial, self.inner.log_trial_start)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        """Tell of the numbers that it reports."""
        numbers = {name: value for name, value in result.items() if _is_number(value)}
        self._tell_of(trial, lambda seen: self.inner.log_trial_result(iteration, seen, numbers))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell of its end."""
        self._tell_of(trial, self.inner.log_trial_end)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell of its failure."""
        self._tell_of(trial, lambda seen: self.inner.log_trial_end(seen, failed=True))

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """End."""
        self._tell(self.inner.on_experiment_end, trials=list(self.seen.values()), **info)

    def _tell_of(self, trial: Any, call: Callable[[Any], None]) -> None:
        run: Run = trial.config["run"]
        if run.study == self.study.path:
            if run.id not in self.seen:
                name, own = (
                    f"{self.study.split()[1]}-{run.folder_name}",
                    _files(self.name, self.study) / run.folder_name,
                )
                self.seen[run.id] = Seen(run, name, str(own))
            self._tell(call, self.seen[run.id])

    def _tell(self, call: Callable[..., None], *given: Any, **named: Any) -> None:
        if self.failed:
            return
        try:
            if (uri := getattr(self.inner, "tracking_uri", None)) is not None:
                importlib.import_module("mlflow").set_tracking_uri(uri)  # one for the process; every study has its own
            call(*given, **named)
        except Exception as error:  # a tracker is no reason to end a study
            self.failed = True
            self.log(f"{self.name} takes nothing more ({one_line(error)}); the study goes on without it")


def check_loggers(names: Sequence[str], results: Storage) -> None:
    """Refuse trackers that are unknown, not installed, or cannot write where results lie.

    Raises:
        ConfigError: If so.
    """
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(f"`--log` takes some of {', '.join(LOGGERS)}, separated by commas, but got {name!r}.")
        try:
            importlib.import_module(LOGGERS[name])
        except ImportError as error:
            raise ConfigError(
                f"`--log {name}` needs a package that is missing: pip install {LOGGERS[name]}."
            ) from error
        if not results.is_local and (name == "tensorboard" or (name == "mlflow" and not _mlflow_server())):
            remedy = " Set MLFLOW_TRACKING_URI." if name == "mlflow" else ""
            raise ConfigError(f"`--log {name}` writes files, but {results.path} is no local folder.{remedy}")


def make_loggers(names: Sequence[str], studies: Sequence[OpenStudy], log: Callable[[str], None]) -> list[tune.Callback]:
    """Return what Tune is to call, for each tracker and study.

    Args:
        names: Of the trackers.
        studies: Whose runs they are told of.
        log: Receives a line where one fails.
    """
    return [_logger(name, study.config.name, study.store.storage, log) for name in names for study in studies]


def _logger(name: str, study: str, storage: Storage, log: Callable[[str], None]) -> Logger:
    return Logger(name, _inner(name, study, storage), storage, log)


def _inner(name: str, study: str, storage: Storage) -> LoggerCallback:
    if name == "tensorboard":
        from ray.tune.logger import TBXLoggerCallback

        return TBXLoggerCallback()
    if name == "mlflow":
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        own = f"sqlite:///{storage.path}/mlflow.db"
        return MLflowLoggerCallback(tracking_uri=_mlflow_server() or own, experiment_name=study)
    from ray.air.integrations.wandb import WandbLoggerCallback

    folder = _files(name, storage)
    folder.mkdir(parents=True, exist_ok=True)
    return WandbLoggerCallback(project=os.environ.get("WANDB_PROJECT") or study, dir=str(folder))


def _files(name: str, study: Storage) -> Path:
    """Return where a tracker keeps files of its own: in the study's folder, or, where that is remote, on this machine."""
    return Path(study.path) / name if study.is_local else Path.home() / ".cache/dfkt" / name / study.split()[1]


def _mlflow_server() -> str | None:
    return os.environ.get("MLFLOW_TRACKING_URI")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
