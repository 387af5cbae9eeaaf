"""The command line: ``python -m dfkt study|distill|teacher|show``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dfkt.config import (
    KNOWN_SETS,
    DataConfig,
    FlowConfig,
    NetworkConfig,
    OptimizerConfig,
    RunConfig,
    StudyConfig,
    TaskConfig,
    TeacherConfig,
    TrainConfig,
)
from dfkt.errors import ConfigError, DfktError, InputError

EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 130
SMOKE_EPOCHS, SMOKE_TRIALS, SMOKE_SEEDS, SMOKE_IMAGES = 3, 2, 2, 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 something failed, 2 bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m dfkt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    helps = {
        "study": "search settings, then train the best one beside the baselines over several seeds",
        "distill": "train one student, no search",
        "teacher": "train a teacher, or find the one trained before",
        "show": "print a study's table and best trials",
    }
    for name, (add, run) in _COMMANDS.items():
        command = commands.add_parser(name, help=helps[name], description=helps[name] + ".")
        add(command)
        command.set_defaults(run=run)
    arguments = parser.parse_args(argv)
    return guarded(lambda: arguments.run(arguments))


def run_script(config: StudyConfig, description: str, argv: Sequence[str] | None = None) -> int:
    """Run a study script: ``config`` is what it chooses, its switches those of ``python -m dfkt study``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_study(parser)
    arguments = parser.parse_args(argv)
    return guarded(lambda: _study(arguments, config))


def guarded(action: Any) -> int:
    """Call an action; turn what the user can mend into one line and exit code 2, Ctrl-C into 130."""
    try:
        return int(action())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_INPUT
    except DfktError as error:
        print(f"failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, and the same command goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", help="cifar10, cifar100, mnist, svhn, digits, or a folder with one sub-folder per class"
    )
    group.add_argument("--data-root", help="where torchvision's sets are kept (default: ~/.cache/dfkt/data)")
    group.add_argument("--image-size", type=int, help="resize images to this many pixels")
    group.add_argument("--limit-train", type=int, help="use at most so many training images")
    group.add_argument("--limit-test", type=int, help="use at most so many test images")


def _add_networks(parser: argparse.ArgumentParser, *, student: bool = True) -> None:
    group = parser.add_argument_group("networks (resnetN, torchvision:NAME or package.module:function)")
    for role in ("teacher", "student") if student else ("teacher",):
        group.add_argument(f"--{role}", help=f"the {role} network")
        group.add_argument(f"--{role}-width", type=float, help=f"multiplies the {role} ResNet's channels")
        group.add_argument(f"--{role}-taps", help="module paths of its taps, bottom to top, separated by commas")
    group.add_argument("--teacher-checkpoint", help="a state dict to use instead of training a teacher")
    group.add_argument("--teacher-epochs", type=float, help="epochs of the teacher's training")
    group.add_argument("--teacher-root", help="where trained teachers are kept (default: ~/.cache/dfkt/teachers)")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--epochs", type=float, help="of a student's whole run, flow stages counted in (default: the script's, or 60)"
    )
    group.add_argument("--batch-size", type=int, help="images per step, over all workers together (default: 128)")
    group.add_argument("--precision", choices=("auto", "float32", "bfloat16"), help="mixed precision (default: auto)")
    group.add_argument("--compile", action="store_true", default=None, help="run the student through torch.compile")
    group.add_argument("--clip-norm", type=float, help="clip the gradient's norm in the task stage (flow stages: 1)")


def _add_study(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("study")
    group.add_argument("--name", help="the study's name; the same name again resumes it, or extends it")
    group.add_argument(
        "--results", default="results", help="folder that holds studies, local or s3://… (default: results)"
    )
    group.add_argument("--trials", type=int, help="trials of the whole study; more than before extends it")
    group.add_argument("--seeds", type=int, help="repetitions of each final run")
    group.add_argument("--baselines", help="methods beside the winner, separated by commas: scratch, kd, fsp")
    group.add_argument("--weights", choices=("span", "pair"), help="search one flow weight per span, or per pair")
    group.add_argument("--no-early-stopping", action="store_true", help="let every trial run to its end")
    group.add_argument("--max-failures", type=int, help="restarts of a trial whose process died (default: 2)")
    group.add_argument("--search-seed", type=int, help="seed of Optuna's sampler")
    group.add_argument("--smoke", action="store_true", help="shrink the study to a smoke run of a minute")
    _add_data(parser)
    _add_networks(parser)
    _add_training(parser)
    _add_workers(parser, "--workers-per-trial")


def _add_workers(parser: argparse.ArgumentParser, name: str) -> None:
    group = parser.add_argument_group("hardware")
    group.add_argument(name, type=int, dest="workers", help="data-parallel workers of one run (default: 1)")
    group.add_argument("--cpus-per-worker", type=int, help="CPUs of a worker (default: 1)")
    group.add_argument(
        "--gpus-per-worker", type=float, help="GPUs of a worker; a fraction shares one (default: 1 if there are any)"
    )
    group.add_argument("--address", help="Ray cluster to use (default: RAY_ADDRESS, or this machine)")


def _changed(config: Any, **values: Any) -> Any:
    """Return a configuration with the values that were given."""
    given = {name: value for name, value in values.items() if value is not None}
    return replace(config, **given) if given else config


def _split(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _absolute(path: str | None) -> str | None:
    """Return a path that means the same in every process on this machine; workers have working directories of their own."""
    if path == "":
        raise ConfigError("A path must not be empty.")
    return None if path is None else str(Path(path).expanduser().absolute())


def _with_data(config: DataConfig, a: argparse.Namespace) -> DataConfig:
    folder = bool(a.data) and Path(a.data).expanduser().is_dir() and a.data not in KNOWN_SETS
    changed = _changed(
        config,
        name=_absolute(a.data) if folder else a.data,
        root=_absolute(a.data_root),
        image_size=a.image_size,
        limit_train=a.limit_train,
        limit_test=a.limit_test,
    )
    assert isinstance(changed, DataConfig)
    return changed


def _with_network(config: NetworkConfig, a: argparse.Namespace, role: str) -> NetworkConfig:
    name, width, taps = (getattr(a, f"{role}{suffix}") for suffix in ("", "_width", "_taps"))
    changed = _changed(config, name=name, width=width, taps=_split(taps))
    assert isinstance(changed, NetworkConfig)
    return changed


def _with_teacher(config: TeacherConfig, a: argparse.Namespace) -> TeacherConfig:
    train = _changed(config.train, epochs=a.teacher_epochs, batch_size=a.batch_size, precision=a.precision)
    network = _with_network(config.network, a, "teacher")
    changed = _changed(
        config, network=network, train=train, checkpoint=_absolute(a.teacher_checkpoint), root=_absolute(a.teacher_root)
    )
    assert isinstance(changed, TeacherConfig)
    return changed


def _with_run(config: RunConfig, a: argparse.Namespace) -> RunConfig:
    train = _changed(
        config.train,
        epochs=a.epochs,
        batch_size=a.batch_size,
        precision=a.precision,
        compile=a.compile,
        clip_norm=a.clip_norm,
    )
    return replace(
        config,
        data=_with_data(config.data, a),
        teacher=_with_teacher(config.teacher, a),
        student=_with_network(config.student, a, "student"),
        train=train,
    )


def _smoke(config: StudyConfig) -> StudyConfig:
    """Return the same study at the size of a smoke run, under a name of its own."""
    base = config.base
    teacher = replace(base.teacher, train=replace(base.teacher.train, epochs=SMOKE_EPOCHS))
    data = replace(base.data, limit_train=SMOKE_IMAGES, limit_test=SMOKE_IMAGES)
    base = replace(base, data=data, teacher=teacher, train=replace(base.train, epochs=SMOKE_EPOCHS))
    return replace(config, name=f"{config.name}-smoke", base=base, trials=SMOKE_TRIALS, seeds=SMOKE_SEEDS)


def study_config(config: StudyConfig, a: argparse.Namespace) -> StudyConfig:
    """Return a study with the switches that were given on the command line."""
    if a.smoke:
        config = _smoke(config)
    if a.name is None and a.data and a.data != config.base.data.name:  # other images make another study
        config = replace(config, name=f"{config.name}-{Path(a.data).name}")
    changed = _changed(
        replace(config, base=_with_run(config.base, a)),
        name=a.name,
        trials=a.trials,
        seeds=a.seeds,
        baselines=_split(a.baselines),
        weights=a.weights,
        early_stopping=False if a.no_early_stopping else None,
        search_seed=a.search_seed,
        max_failures=a.max_failures,
    )
    assert isinstance(changed, StudyConfig)
    return changed


def _workers(a: argparse.Namespace) -> Any:
    """Return what one run spans."""
    from dfkt.trial import Workers

    for name in ("workers", "cpus_per_worker", "gpus_per_worker"):
        value = getattr(a, name)
        if value is not None and not value > 0 and not (name == "gpus_per_worker" and value == 0):
            raise ConfigError(f"`{name} > 0` must hold, but got {name}={value!r}.")
    return Workers(count=a.workers or 1, cpus=a.cpus_per_worker or 1, gpus=a.gpus_per_worker)


def _study(a: argparse.Namespace, config: StudyConfig | None = None) -> int:
    from dfkt.report import study_report
    from dfkt.study import run_study

    if config is None:
        config = StudyConfig(name="study")
    config = study_config(config, a)
    result = run_study(config, a.results, workers=_workers(a), address=a.address, log=_say)
    folder = Path(a.results) / config.name if "://" not in a.results else f"{a.results}/{config.name}"
    if result.interrupted:
        _say(
            f"interrupted; {len(result.study.trials)} trials are kept in {folder}, and the same command goes on from there"
        )
        return EXIT_INTERRUPTED
    _say(f"\n{study_report(result.study)}\n")
    _say(
        f"everything is in {folder}: study.json, trials/, epochs/, finals/ (Parquet), optuna.journal, students in finals_runs/"
    )
    _say(f"look further: python -m dfkt show {folder}; notebooks/study.ipynb; optuna-dashboard {folder}/optuna.journal")
    return EXIT_FAILED if result.failures else 0


def _say(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:  # the reader is gone (`… | head`); the work goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _add_distill(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    group.add_argument("--trial", help="start from a study's best trial, or from one: results/NAME, or results/NAME:12")
    group.add_argument("--method", default="dfkt", choices=("scratch", "kd", "fsp", "dfkt"))
    group.add_argument(
        "--pattern",
        help="adjacent, group-ends, sliding-S, from-bottom, to-top or dense-S, S the span (default: dense-3)",
    )
    group.add_argument(
        "--order",
        choices=("cumulative", "local", "joint"),
        help="pairs of stage k: local (upper tap k), cumulative (<= k; default), joint (all)",
    )
    group.add_argument(
        "--norm",
        choices=("relative", "mean", "sum"),
        help="of a pair's distance: to the teacher's norm (default), per entry, not at all",
    )
    group.add_argument("--rounds", type=int, help="passes through the flow stages (default: 1)")
    group.add_argument("--flow-share", type=float, help="share of the epochs spent in flow stages (default: 1/3)")
    group.add_argument("--flow-lr", type=float, help="learning rate of the flow stages (default: 0.1)")
    group.add_argument(
        "--freeze-below", action="store_true", default=None, help="freeze the layers below a stage's lowest tap"
    )
    group.add_argument("--lr", type=float, help="learning rate of the task stage (default: 0.1)")
    group.add_argument("--kd-weight", type=float, help="weight of soft targets in the task stage")
    group.add_argument("--temperature", type=float, help="temperature of soft targets")
    group.add_argument("--seed", type=int, help="initial weights, order of images, augmentation")
    group.add_argument("--out", default="results/distill", help="folder of the run (default: results/distill)")
    _add_data(parser)
    _add_networks(parser)
    _add_training(parser)


def _start(trial: str | None) -> RunConfig:
    """Return the configuration that ``--trial`` names: a study's best trial, or the one behind the colon."""
    from dfkt.report import trial_config
    from dfkt.results import read_study

    if trial is None:
        return RunConfig()
    folder, _, number = trial.rpartition(":")
    if folder and number.isdecimal():
        return trial_config(read_study(folder), int(number))
    return trial_config(read_study(trial))


def _distill_config(a: argparse.Namespace) -> RunConfig:
    from dfkt.methods import baseline

    config = _with_run(_start(a.trial), a)
    if a.method != "dfkt":
        config = baseline(config, a.method)
    optimizer = None if a.flow_lr is None else OptimizerConfig(lr=a.flow_lr)
    flow: FlowConfig = _changed(
        config.flow,
        pattern=a.pattern,
        order=a.order,
        norm=a.norm,
        rounds=a.rounds,
        share=a.flow_share,
        freeze_below=a.freeze_below,
        optimizer=optimizer,
    )
    rate = None if a.lr is None else OptimizerConfig(lr=a.lr)
    task: TaskConfig = _changed(config.task, kd_weight=a.kd_weight, temperature=a.temperature, optimizer=rate)
    train: TrainConfig = _changed(config.train, seed=a.seed)
    return replace(config, flow=flow, task=task, train=train)


def _distill(a: argparse.Namespace) -> int:
    from dfkt.distill import run_distill

    payload = run_distill(_distill_config(a), a.out, _say)
    return EXIT_FAILED if "failure" in payload else 0


def _add_teacher(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    _add_networks(parser, student=False)
    _add_training(parser)


def _teacher(a: argparse.Namespace) -> int:
    from dfkt.data import load_data
    from dfkt.teacher import find_teacher
    from dfkt.worker import pick_device

    config = _changed(_with_teacher(RunConfig().teacher, a))
    if a.epochs is not None:
        config = replace(config, train=replace(config.train, epochs=a.epochs))
    find_teacher(config, load_data(_with_data(DataConfig(), a)).to(pick_device()), _say)
    return 0


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", help="folder of a study, local or s3://…")
    parser.add_argument("--best", type=int, default=5, help="how many of the best trials to list (default: 5)")


def _show(a: argparse.Namespace) -> int:
    from dfkt.report import study_report
    from dfkt.results import read_study

    _say(study_report(read_study(a.study), a.best))
    return 0


_COMMANDS: dict[str, tuple[Any, Any]] = {
    "study": (_add_study, _study),
    "distill": (_add_distill, _distill),
    "teacher": (_add_teacher, _teacher),
    "show": (_add_show, _show),
}

if __name__ == "__main__":
    sys.exit(main())
