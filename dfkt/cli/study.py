"""``python -m dfkt study`` and the scripts in ``studies/``: search settings, then train the best beside the baselines."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dfkt.cli.boundary import EXIT_FAILED, EXIT_INTERRUPTED, Parser, guarded, say
from dfkt.cli.hardware import add_workers, read_demand, read_workers
from dfkt.cli.numbers import whole
from dfkt.cli.options import (
    add_data,
    add_dry_run,
    add_networks,
    add_training,
    data_name,
    read_placement,
    split_names,
    updated,
    with_choices,
)
from dfkt.cli.settings import add_search, add_settings, parse_setting, parse_space, with_settings
from dfkt.errors import ConfigError
from dfkt.methods.base import Method
from dfkt.methods.registry import METHODS, find_method
from dfkt.methods.space import Space
from dfkt.store.files import Storage

if TYPE_CHECKING:
    from dfkt.study.config import ArmConfig, StudyConfig

HELP = "search settings, then train the best one beside the baselines over several seeds"
SMOKE_EPOCHS, SMOKE_TRIALS, SMOKE_SEEDS, SMOKE_IMAGES = 3, 2, 2, 1000


def add_switches(parser: argparse.ArgumentParser) -> None:
    """Add the command's switches."""
    group = parser.add_argument_group("study")
    group.add_argument("--name", help="the study's name; the same name again resumes it, or extends it")
    group.add_argument(
        "--method", help=f"the one searched: {', '.join(METHODS)}, or package.module:Class (default: dfkt)"
    )
    group.add_argument(
        "--trials", type=whole, help="trials of the whole search; more than before extends it; 0: reference settings"
    )
    group.add_argument("--baselines", help="methods beside it at their reference settings, separated by commas")
    group.add_argument("--no-early-stopping", action="store_true", help="let every trial run to its end")
    add_settings(group, "the searched method, which are then not searched")
    add_search(group)
    add_common(parser, group)


def add_common(parser: argparse.ArgumentParser, group: argparse._ActionsContainer) -> None:
    """Add the switches that all scripts share."""
    group.add_argument(
        "--results", default="results", help="folder that holds studies, local or s3://… (default: results)"
    )
    group.add_argument("--seeds", type=whole, help="final runs of each arm")
    group.add_argument(
        "--confirm", type=whole, help="best trials of a search that are trained again with another seed (default: 3)"
    )
    group.add_argument("--search-seed", type=whole, help="seed of Optuna's samplers")
    group.add_argument("--max-failures", type=whole, help="restarts of a run whose process died (default: 2)")
    add_retry(group)
    add_dry_run(group)
    group.add_argument("--smoke", action="store_true", help="shrink it to a smoke run of a minute or two")
    add_data(parser)
    add_networks(parser)
    add_training(parser)
    add_workers(parser)


def add_retry(group: argparse._ActionsContainer) -> None:
    """Add the switch for runs that failed for a reason that was mended."""
    group.add_argument("--retry-failed", action="store_true", help="try the runs that failed before again")


def run_script(config: StudyConfig, description: str | None, argv: Sequence[str] | None = None) -> int:
    """Run a study script: ``config`` is what it chooses, its switches those of ``python -m dfkt study``."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_switches(parser)
    return guarded(lambda: run(parser.parse_args(argv), config), argv)


def run(a: argparse.Namespace, config: StudyConfig | None = None) -> int:
    """Run the study that the switches make of a script's, or of the default one."""
    from dfkt.study.config import StudyConfig

    return run_all([study_config(config or StudyConfig(name="study"), a)], a.results, a)


def run_all(configs: Sequence[StudyConfig], results: str, a: argparse.Namespace) -> int:
    """Run studies, print what came out and where it lies; return the exit code."""
    from dfkt.analysis.pages import folder_page
    from dfkt.study.study import check_studies, run_studies

    given: dict[str, Any] = {"placement": read_placement(a), "workers": read_workers(a), "log": say}
    given["loggers"], demand = split_names(a.log) or (), read_demand(a)
    if a.dry_run:
        check_studies(configs, results, **given)
        return 0
    given |= {"demand": demand, "address": a.address, "retry": a.retry_failed}
    folders, single = [Storage(results).sub(config.name) for config in configs], len(configs) == 1
    shown = folders[0].path if single else results
    stopped = f"interrupted; what was finished is kept; `python -m dfkt resume {shlex.quote(shown)}` goes on from there"
    try:
        outcome = run_studies(configs, results, **given)
    except KeyboardInterrupt:
        if not all(folder.exists("study.json") for folder in folders):
            raise
        say(stopped)
        return EXIT_INTERRUPTED
    if outcome.interrupted:
        say(stopped)
        return EXIT_INTERRUPTED
    pages = "\n\n\n".join(folder_page(folder.path) for folder in folders)  # what else lies beside them is not asked
    say(f"\n{pages}\n")
    files = "study.json, trials/, epochs/, finals/ (Parquet), students/"
    say(f"everything is in {shown}{'' if single else ', a folder for each study'}: {files}")
    journal = f"{shown if single else 'FOLDER'}/optuna.journal"
    dashboard = f"; optuna-dashboard {journal}" if any(config.searched for config in configs) else ""
    say(f"look further: python -m dfkt show {shown}; notebooks/study.ipynb{dashboard}")
    if failed := outcome.failures:
        say(f"{failed} run{'s' * (failed > 1)} failed; the same command with --retry-failed tries them again")
    return EXIT_FAILED if outcome.failures else 0


def study_config(config: StudyConfig, a: argparse.Namespace) -> StudyConfig:
    """Return a study with the switches that were given on the command line."""
    if a.smoke:
        config = _smoke(config)
    if a.name is None and a.data and a.data != config.data.name:  # other images make another study
        config = replace(config, name=f"{config.name}-{data_name(a.data)}")
    config = with_choices(config, a)
    changed: StudyConfig = updated(
        replace(config, arms=tuple(_arms(config, a))),
        name=a.name,
        seeds=a.seeds,
        early_stopping=False if a.no_early_stopping else None,
        confirm=a.confirm,
        search_seed=a.search_seed,
        max_failures=a.max_failures,
    )
    return changed


def _smoke(config: StudyConfig) -> StudyConfig:
    """Return the same study at the size of a smoke run, under a name of its own."""
    teacher = replace(config.teacher, train=replace(config.teacher.train, epochs=SMOKE_EPOCHS))
    data = replace(config.data, limit_train=SMOKE_IMAGES, limit_test=SMOKE_IMAGES)
    train = replace(config.train, epochs=SMOKE_EPOCHS)
    arms = tuple(replace(arm, trials=min(arm.trials, SMOKE_TRIALS)) for arm in config.arms)
    return replace(
        config, name=f"{config.name}-smoke", data=data, teacher=teacher, train=train, arms=arms, seeds=SMOKE_SEEDS
    )


def _arms(config: StudyConfig, a: argparse.Namespace) -> Iterable[ArmConfig]:
    """Return the study's arms: those that stand at their reference settings, then those that are searched."""
    from dfkt.study.config import ArmConfig

    searched = list(config.searched) or [config.arms[-1]]
    others = [arm for arm in config.arms if arm not in searched]
    if a.method is not None:
        kind = find_method(a.method)
        kept = [arm for arm in searched if type(arm.method) is kind]
        searched = kept or [ArmConfig(name=kind.name, method=kind(), trials=searched[-1].trials)]
        others = [arm for arm in others if arm.name != kind.name]
    if a.baselines is not None:
        others = [ArmConfig(name=kind.name, method=kind()) for kind in map(find_method, split_names(a.baselines) or ())]
    for name in {arm.name for arm in others} & {arm.name for arm in searched}:
        raise ConfigError(f"`--baselines` leave out the method that is searched, but got {name}.")
    return [*others, *(narrowed(updated(arm, trials=a.trials), a.settings, a.search) for arm in searched)]


def narrowed(arm: ArmConfig, settings: Sequence[str], search: Sequence[str]) -> ArmConfig:
    """Return an arm whose method has some settings fixed and some searched otherwise.

    Raises:
        ConfigError: If a setting is unknown or does not fit, is both fixed and searched, or nothing is searched.
    """
    method = with_settings(arm.method, settings)
    fixed = dict(parse_setting(type(method), text) for text in settings)
    wanted = parse_space(search).changes
    if wanted and not arm.trials:
        raise ConfigError(f"`--search` says what trials draw, but {arm.name} has none. Give --trials, or --set.")
    if both := sorted(wanted.keys() & fixed.keys()):
        raise ConfigError(f"A setting is fixed by --set or searched by --search, but {', '.join(both)} is both.")
    space = dict(arm.space.changes) | {name: (value,) for name, value in fixed.items() if _is_drawn(method, name)}
    return replace(arm, method=method, space=Space({**space, **wanted}))


def _is_drawn(method: Method, name: str) -> bool:
    """Whether a search draws a setting: what it does not draw is fixed anyway."""
    from dfkt.networks.taps import StudentTaps

    known: dict[str, Any] = method.columns(StudentTaps(3, (0, 1, 2)))
    return name in known
