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
    METHODS,
    DataConfig,
    FlowConfig,
    OptimizerConfig,
    RunConfig,
    StudyConfig,
    TaskConfig,
    TrainConfig,
)
from dfkt.errors import DfktError, InputError
from dfkt.cli.options import (
    add_data,
    add_networks,
    add_training,
    add_workers,
    read_workers,
    split_names,
    updated,
    with_data,
    with_run,
    with_teacher,
)

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
        "show": "print the tables of a study or a comparison",
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


def _add_study(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("study")
    group.add_argument("--name", help="the study's name; the same name again resumes it, or extends it")
    group.add_argument(
        "--results", default="results", help="folder that holds studies, local or s3://… (default: results)"
    )
    group.add_argument("--method", choices=METHODS, help="the method that is searched (default: dfkt)")
    group.add_argument(
        "--trials", type=int, help="trials of the whole study; more than before extends it; 0: reference settings"
    )
    group.add_argument("--seeds", type=int, help="repetitions of each final run")
    group.add_argument("--baselines", help="methods beside the winner, separated by commas, such as scratch,kd,fsp")
    group.add_argument("--weights", choices=("span", "pair"), help="search one flow weight per span, or per pair")
    group.add_argument("--no-early-stopping", action="store_true", help="let every trial run to its end")
    group.add_argument("--max-failures", type=int, help="restarts of a trial whose process died (default: 2)")
    group.add_argument("--search-seed", type=int, help="seed of Optuna's sampler")
    group.add_argument("--smoke", action="store_true", help="shrink the study to a smoke run of a minute")
    add_data(parser)
    add_networks(parser)
    add_training(parser)
    add_workers(parser, "--workers-per-trial")


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
    if a.method:
        others = tuple(method for method in config.baselines if method != a.method)
        config = replace(config, base=replace(config.base, method=a.method), baselines=others)
    changed = updated(
        replace(config, base=with_run(config.base, a)),
        name=a.name,
        trials=a.trials,
        seeds=a.seeds,
        baselines=split_names(a.baselines),
        weights=a.weights,
        early_stopping=False if a.no_early_stopping else None,
        search_seed=a.search_seed,
        max_failures=a.max_failures,
    )
    assert isinstance(changed, StudyConfig)
    return changed if changed.trials else replace(changed, base=_reference(changed.base))


def _reference(run: RunConfig) -> RunConfig:
    from dfkt.methods.builders import baseline

    return baseline(run, run.method)


def _study(a: argparse.Namespace, config: StudyConfig | None = None) -> int:
    from dfkt.store.rows import study_report
    from dfkt.study.study import run_study

    if config is None:
        config = StudyConfig(name="study")
    config = study_config(config, a)
    result = run_study(config, a.results, workers=read_workers(a), address=a.address, log=say)
    folder = Path(a.results) / config.name if "://" not in a.results else f"{a.results}/{config.name}"
    if result.interrupted:
        say(
            f"interrupted; {len(result.study.trials)} trials are kept in {folder}, and the same command goes on from there"
        )
        return EXIT_INTERRUPTED
    say(f"\n{study_report(result.study)}\n")
    say(
        f"everything is in {folder}: study.json, trials/, epochs/, finals/ (Parquet), optuna.journal, students in finals_runs/"
    )
    say(f"look further: python -m dfkt show {folder}; notebooks/study.ipynb; optuna-dashboard {folder}/optuna.journal")
    return EXIT_FAILED if result.failures else 0


def say(line: str) -> None:
    """Print a line at once."""
    try:
        print(line, flush=True)
    except BrokenPipeError:  # the reader is gone (`… | head`); the work goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _add_distill(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    group.add_argument("--trial", help="start from a study's best trial, or from one: results/NAME, or results/NAME:12")
    group.add_argument("--method", default="dfkt", choices=METHODS)
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
        choices=("relative", "unit", "mean", "sum"),
        help="a pair's distance: over the teacher's norm (default), of unit matrices, per entry, as it is",
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
    add_data(parser)
    add_networks(parser)
    add_training(parser)


def _start(trial: str | None) -> RunConfig:
    """Return the configuration that ``--trial`` names: a study's best trial, or the one behind the colon."""
    from dfkt.store.rows import trial_config
    from dfkt.store.study_store import read_study

    if trial is None:
        return RunConfig()
    folder, _, number = trial.rpartition(":")
    if folder and number.isdecimal():
        return trial_config(read_study(folder), int(number))
    return trial_config(read_study(trial))


def _distill_config(a: argparse.Namespace) -> RunConfig:
    from dfkt.methods.builders import baseline

    config = with_run(_start(a.trial), a)
    if a.method != "dfkt":
        config = baseline(config, a.method)
    optimizer = None if a.flow_lr is None else OptimizerConfig(lr=a.flow_lr)
    flow: FlowConfig = updated(
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
    task: TaskConfig = updated(config.task, kd_weight=a.kd_weight, temperature=a.temperature, optimizer=rate)
    train: TrainConfig = updated(config.train, seed=a.seed)
    return replace(config, flow=flow, task=task, train=train)


def _distill(a: argparse.Namespace) -> int:
    from dfkt.cli.distill import run_distill

    payload = run_distill(_distill_config(a), a.out, say)
    return EXIT_FAILED if "failure" in payload else 0


def _add_teacher(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    add_networks(parser, student=False)
    add_training(parser)


def _teacher(a: argparse.Namespace) -> int:
    from dfkt.data.load import load_data
    from dfkt.training.teacher import find_teacher
    from dfkt.training.run import pick_device

    config = with_teacher(RunConfig().teacher, a)
    if a.epochs is not None:
        config = replace(config, train=replace(config.train, epochs=a.epochs))
    find_teacher(config, load_data(with_data(DataConfig(), a)).to(pick_device()), say)
    return 0


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", help="folder of a study or of a comparison, local or s3://…")
    parser.add_argument("--best", type=int, default=5, help="how many of the best trials to list (default: 5)")


def _show(a: argparse.Namespace) -> int:
    from dfkt.analysis.statistics import comparison_report, is_comparison, read_comparison
    from dfkt.store.rows import study_report
    from dfkt.store.study_store import read_study

    if is_comparison(a.study):
        say(comparison_report(read_comparison(a.study)))
    else:
        say(study_report(read_study(a.study), a.best))
    return 0


_COMMANDS: dict[str, tuple[Any, Any]] = {
    "study": (_add_study, _study),
    "distill": (_add_distill, _distill),
    "teacher": (_add_teacher, _teacher),
    "show": (_add_show, _show),
}

if __name__ == "__main__":
    sys.exit(main())
