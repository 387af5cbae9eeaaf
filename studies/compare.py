"""Does dense flow beat what came before it?

Question    Which method gives the best student, and which one fastest, when every method is tuned with the same budget?
Data        --data cifar10,cifar100,svhn,mnist (downloaded by torchvision), or folders of images; several make one comparison
Networks    --pairs TEACHER:STUDENT, several separated by commas
Arms        scratch, kd, fitnets, attention, layerwise-hint, similarity, dkd, fsp, dfkt: each searched with --trials trials on
            val, trained again with --seeds seeds, then tested once. --parts adds dfkt with one part changed at a time;
            --same-size a student as large as its teacher with a third of the teacher's steps after the flow stages (Yim et al.)
Budget      164 epochs, 20 trials of each method, 5 seeds: that of Yim et al., for GPUs
Command     python studies/compare.py --data cifar10,cifar100 --pairs resnet26:resnet8,resnet32:resnet14 --parts --same-size
Smaller     --smoke (digits, a minute or two on two cores); --trials, --epochs, --limit-train, --methods
Again       the same command goes on where it stopped; more data, pairs, methods, trials or seeds extend it
Result      docs/results.md: smaller runs on CIFAR-10 (JPEG), MNIST and a hundred classes of Tiny-ImageNet
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dfkt.cli.main import EXIT_FAILED, EXIT_INTERRUPTED, guarded, say
from dfkt.study.compare import PARTS, Arm, ComparisonConfig, Setting, run_comparison
from dfkt.analysis.statistics import comparison_report, read_comparison, save_comparison
from dfkt.config import METHODS, NetworkConfig, RunConfig, TeacherConfig, TrainConfig
from dfkt.errors import ConfigError
from dfkt.methods.builders import baseline
from dfkt.store.files import Storage
from dfkt.cli.options import add_data, add_networks, add_training, add_workers, read_workers, split_names, with_run

BASE = RunConfig(
    teacher=TeacherConfig(network=NetworkConfig(name="resnet26"), train=TrainConfig(epochs=164)),
    student=NetworkConfig(name="resnet8"),
    train=TrainConfig(epochs=164),
)
DATA, PAIRS, TRIALS, SEEDS = "cifar10", "resnet26:resnet8", 20, 5
SMOKE = {"data": "digits", "epochs": 3, "teacher_epochs": 3, "limit_train": 600, "trials": 1, "seeds": 2}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison that the switches name; return the exit code of ``python -m dfkt``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("comparison")
    group.add_argument("--name", default="compare", help="its folder; the same name again resumes or extends it")
    group.add_argument("--results", default="results", help="folder that holds it, local or s3://… (default: results)")
    group.add_argument("--pairs", help=f"TEACHER:STUDENT, separated by commas (default: {PAIRS})")
    group.add_argument("--methods", help=f"separated by commas (default: {','.join(METHODS)})")
    group.add_argument("--trials", type=int, help=f"of each method's search (default: {TRIALS}); 0: reference settings")
    group.add_argument("--seeds", type=int, help=f"runs of each method's best settings (default: {SEEDS})")
    group.add_argument("--parts", action="store_true", help="also dfkt with one part changed at a time")
    group.add_argument(
        "--same-size",
        action="store_true",
        help="also a student as large as the teacher, in a third and two thirds of --teacher-epochs",
    )
    group.add_argument("--search-seed", type=int, default=0, help="seed of Optuna's samplers")
    group.add_argument(
        "--export", help="write the result's tables, a few small Parquet files, into this folder as well"
    )
    group.add_argument("--smoke", action="store_true", help="shrink it to a smoke run of a minute or two")
    add_data(parser)
    add_networks(parser)
    add_training(parser)
    add_workers(parser, "--workers-per-run")
    arguments = parser.parse_args(argv)
    return guarded(lambda: compare(arguments))


def compare(a: argparse.Namespace) -> int:
    """Run, print and export."""
    if a.smoke:
        a.name = f"{a.name}-smoke"
        for name, value in SMOKE.items():
            if getattr(a, name) is None:
                setattr(a, name, value)
    config = ComparisonConfig(
        name=a.name,
        settings=tuple(settings(a)),
        seeds=SEEDS if a.seeds is None else a.seeds,
        search_seed=a.search_seed,
    )
    if a.export is not None:
        Storage(a.export).check_writable()
    done, failures = run_comparison(config, a.results, workers=read_workers(a), address=a.address, log=say)
    folder = Storage(a.results).sub(a.name)
    comparison = read_comparison(folder)
    say(f"\n{comparison_report(comparison)}\n")
    if a.export is not None and done:
        save_comparison(comparison, a.export)
    if not done:
        say(f"interrupted; what was finished is kept in {folder.path}, and the same command goes on from there")
        return EXIT_INTERRUPTED
    say(f"everything is in {folder.path}; again: python -m dfkt show {folder.path}")
    return EXIT_FAILED if failures else 0


def settings(a: argparse.Namespace) -> Iterator[Setting]:
    """Yield the settings that the switches name: every image set with every pair of networks."""
    if a.teacher or a.student:
        raise ConfigError("`--pairs TEACHER:STUDENT` names the networks here, but got --teacher or --student.")
    pairs = [split_pair(pair) for pair in split_names(PAIRS if a.pairs is None else a.pairs) or ()]
    trials = TRIALS if a.trials is None else a.trials
    for data in split_names(DATA if a.data is None else a.data) or ():
        for k, (teacher, student) in enumerate(pairs):
            chosen = argparse.Namespace(**vars(a) | {"data": data, "teacher": teacher, "student": student})
            run = with_run(BASE, chosen)
            where = f"{Path(run.data.name).name}-{teacher}".replace(":", "_")
            name = f"{where}-{student}".replace(":", "_")
            yield Setting(name=name, arms=tuple(arms(run, trials, split_names(a.methods), a.parts)))
            if a.same_size and teacher not in dict(pairs[:k]):
                yield Setting(name=f"{where}-same-size", arms=tuple(same_size(run)))


def split_pair(pair: str) -> tuple[str, str]:
    """Return teacher and student; torchvision:NAME and package.module:function have a colon of their own.

    Example:
        >>> split_pair("torchvision:resnet18:resnet8")
        ('torchvision:resnet18', 'resnet8')
    """
    words = pair.split(":")
    end = 2 if words[0] == "torchvision" or "." in words[0] else 1
    teacher, student = ":".join(words[:end]), ":".join(words[end:])
    if not (all(words) and student):
        raise ConfigError(f"`--pairs` are TEACHER:STUDENT, separated by commas, but got {pair!r}.")
    return teacher, student


def arms(run: RunConfig, trials: int, methods: Sequence[str] | None, parts: bool) -> Iterator[Arm]:
    """Yield an arm for every method, and for every part of ours."""
    for method in METHODS if methods is None else methods:
        if method not in METHODS:
            raise ConfigError(f"`--methods` must be among {', '.join(METHODS)}, but got {method!r}.")
        arm = replace(run, method=method)
        yield Arm(name=method, run=arm if trials else baseline(arm, method), trials=trials)
    if parts:
        ours = baseline(run, "dfkt")
        yield from (Arm(name=f"dfkt-{part}", run=ours, trials=0, part=part) for part in PARTS)
        if trials:
            yield Arm(name="dfkt-pair-weights", run=replace(run, method="dfkt"), trials=trials, weights="pair")


def same_size(run: RunConfig) -> Iterator[Arm]:
    """Yield the arms of fast optimization: a student as large as the teacher, at reference settings.

    Yim et al. give the student a third of the teacher's iterations in flow stages and a third in the task stage.
    """
    steps = run.teacher.train.epochs
    run = replace(run, student=run.teacher.network)
    for name, method, epochs in (
        ("scratch", "scratch", steps),
        ("scratch-third", "scratch", steps / 3),
        ("dfkt", "dfkt", steps * 2 / 3),
    ):
        arm = baseline(replace(run, train=replace(run.train, epochs=epochs)), method)
        yield Arm(name=name, run=replace(arm, flow=replace(arm.flow, share=0.5)), trials=0)


if __name__ == "__main__":
    sys.exit(main())
