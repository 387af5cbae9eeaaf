"""Does dense flow beat what came before it?

Question    Which method gives the best student, and which one fastest, when every method is tuned with the same budget?
Data        --data cifar10,cifar100,svhn,mnist (downloaded by torchvision), or folders of images; each is a study of its own
Networks    --pairs TEACHER:STUDENT, several separated by commas
Arms        scratch, kd, fitnets, attention, layerwise-hint, similarity, dkd, fsp, dfkt: each searched with --trials trials on
            val, trained again with --seeds seeds, then tested once. --ablations adds the searched dfkt with one change at a
            time; --same-size a student as large as its teacher, in a third of the teacher's steps after the flow stages
Budget      164 epochs, 20 trials of each method, 5 seeds: that of Yim et al., for GPUs
Command     python studies/compare.py --data cifar10,cifar100 --pairs resnet26:resnet8,resnet32:resnet14 --ablations --same-size
Smaller     --smoke (digits, a minute or two on two cores); --trials, --epochs, --limit-train, --methods
Again       the same command, or python -m dfkt resume FOLDER, goes on; more data, pairs, methods, trials or seeds extend it
Result      docs/results.md: smaller runs on CIFAR-10 (JPEG), MNIST and a hundred classes of Tiny-ImageNet
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from dfkt import (
    METHODS,
    ArmConfig,
    NetworkConfig,
    Space,
    StudyConfig,
    TeacherConfig,
    TrainConfig,
    ablations,
    find_method,
)
from dfkt.analysis.figures import read_figures, save_figures
from dfkt.cli.boundary import Parser, guarded
from dfkt.cli.numbers import whole
from dfkt.cli.options import as_name, data_name, split_names, updated, with_choices
from dfkt.cli.settings import add_search
from dfkt.cli.study import add_common, narrowed, run_all
from dfkt.config import check_rule
from dfkt.errors import ConfigError
from dfkt.methods.dfkt import Dfkt
from dfkt.methods.scratch import Scratch
from dfkt.networks.build import split_network_pair
from dfkt.store.files import Storage
from dfkt.study.config import is_name

BASE = StudyConfig(
    name="compare",
    teacher=TeacherConfig(network=NetworkConfig(name="resnet26"), train=TrainConfig(epochs=164)),
    train=TrainConfig(epochs=164),
    early_stopping=False,  # all methods have the same number of trials of the same length
)
DATA, PAIRS, TRIALS = "cifar10", "resnet26:resnet8", 20
SMOKE = {"data": "digits", "epochs": 3, "teacher_epochs": 3, "limit_train": 600, "limit_test": 600}
SMOKE |= {"batch_size": 32, "trials": 1, "seeds": 2}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the studies that the switches name, in one queue; return the exit code of ``python -m dfkt``."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--name", default="compare", help="folder of its studies; the same name again resumes or extends them"
    )
    group.add_argument("--pairs", help=f"TEACHER:STUDENT, separated by commas (default: {PAIRS})")
    group.add_argument(
        "--methods", help=f"separated by commas, package.module:Class among them (default: {','.join(METHODS)})"
    )
    group.add_argument(
        "--trials", type=whole, help=f"of each method's search (default: {TRIALS}); 0: reference settings"
    )
    group.add_argument("--ablations", action="store_true", help="also dfkt with one change at a time")
    group.add_argument(
        "--same-size",
        action="store_true",
        help="also a student as large as the teacher, in a third and two thirds of --teacher-epochs",
    )
    group.add_argument(
        "--export", help="write the result's figures, a few small Parquet files, into this folder as well"
    )
    add_search(group, "dfkt")
    add_common(parser, group)
    return guarded(lambda: compare(parser.parse_args(argv)), argv)


def compare(a: argparse.Namespace) -> int:
    """Run, print and export."""
    if a.smoke:
        a.name = f"{a.name}-smoke"
        for name, value in SMOKE.items():
            if getattr(a, name) is None:
                setattr(a, name, value)
    if not is_name(a.name):
        raise ConfigError(f"`--name` is that of a folder: letters, digits, '.', '_' and '-'; but got {a.name!r}.")
    if a.export is not None:
        Storage(a.export).check_writable()
    folder = Storage(a.results).sub(a.name).path
    code = run_all(list(studies(a)), folder, a)
    if a.export is not None and code == 0:
        save_figures(read_figures(folder), a.export)
    return code


def studies(a: argparse.Namespace) -> Iterator[StudyConfig]:
    """Yield the studies that the switches name: every image set with every pair of networks."""
    if a.teacher or a.student:
        raise ConfigError("`--pairs TEACHER:STUDENT` names the networks here, but got --teacher or --student.")
    pairs = [split_network_pair(pair) for pair in split_names(PAIRS if a.pairs is None else a.pairs) or ()]
    sets = split_names(DATA if a.data is None else a.data) or ()
    check_rule(bool(pairs and sets), "a comparison has images and a pair of networks", data=a.data, pairs=a.pairs)
    base = updated(BASE, seeds=a.seeds, confirm=a.confirm, search_seed=a.search_seed, max_failures=a.max_failures)
    for data in sets:
        for k, (teacher, student) in enumerate(pairs):
            chosen = argparse.Namespace(**vars(a) | {"data": data, "teacher": teacher, "student": student})
            study = with_choices(base, chosen)
            where = as_name(f"{data_name(data)}-{teacher}")
            yield replace(study, name=as_name(f"{where}-{student}"), arms=tuple(arms(a)))
            if a.same_size and teacher not in dict(pairs[:k]):
                same = replace(study, student=study.teacher.network)
                yield replace(same, name=f"{where}-same-size", arms=tuple(same_size(same.teacher.train.epochs)))


def arms(a: argparse.Namespace) -> Iterator[ArmConfig]:
    """Yield an arm for every method, and for every ablation of ours."""
    trials = TRIALS if a.trials is None else a.trials
    found: dict[str, ArmConfig] = {}
    for name in METHODS if a.methods is None else split_names(a.methods) or ():
        kind = find_method(name)
        check_rule(kind.name not in found, "methods have different names", methods=a.methods)
        found[kind.name] = ArmConfig(name=kind.name, method=kind(), trials=trials)
    if "dfkt" not in found and (a.ablations or a.search):
        raise ConfigError("`--ablations` and `--search` are about dfkt, but --methods leave it out. Add dfkt to them.")
    if "dfkt" in found:
        found["dfkt"] = narrowed(found["dfkt"], (), a.search)
    yield from found.values()
    if a.ablations:
        yield from ablations(found["dfkt"])
        if trials:
            yield pair_weights(found["dfkt"])


def pair_weights(arm: ArmConfig) -> ArmConfig:
    """Return the search of dfkt with one weight per flow pair instead of one per span."""
    space = {name: given for name, given in arm.space.changes.items() if not name.startswith("weight_span_")}
    return replace(arm, name="dfkt-pair-weights", method=Dfkt(weights="pair"), space=Space(space))


def same_size(steps: float) -> Iterator[ArmConfig]:
    """Yield the arms of fast optimization: a student as large as the teacher, at reference settings.

    Yim et al. give the student a third of the teacher's iterations in flow stages and a third in the task stage.
    """
    yield ArmConfig(name="scratch", method=Scratch(), epochs=steps)
    yield ArmConfig(name="scratch-third", method=Scratch(), epochs=steps / 3)
    yield ArmConfig(name="dfkt", method=Dfkt(share=0.5), epochs=steps * 2 / 3)


if __name__ == "__main__":
    sys.exit(main())
