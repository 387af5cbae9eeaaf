"""A study's one teacher: made once, left in the study's folder, named by its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from dfkt.config import DataConfig, Placement, TeacherConfig
from dfkt.errors import CheckpointError, StudyError
from dfkt.store.files import Storage
from dfkt.study.opened import OpenStudy
from dfkt.training.cached import images_for, test_images_for
from dfkt.training.evaluate import evaluate
from dfkt.training.normalisation import with_normalisation
from dfkt.training.state import hash_weights, load_state, save_state
from dfkt.training.teacher import WEIGHTS_FILE, find_teacher, warn_of_chance
from dfkt.training.threads import threads

Log = Callable[[str], None]


def keep_teacher(study: OpenStudy, log: Log) -> None:
    """Leave the teacher where every worker finds it; it is trained on a GPU if runs are.

    Its test accuracy is measured with it; nothing is chosen by that.

    Raises:
        StudyError: If the teacher that the study began with is gone or damaged, and another one was found.
        CheckpointError: If a user's teacher is not the one that the study began with.
    """
    if not any(arm.method.taught for arm in study.config.arms):
        return
    known = study.store.meta.get("teacher", {})
    config, storage = study.config.teacher, study.store.storage
    if "test_accuracy" in known and config.checkpoint is None and _key_in(storage) == known["key"]:
        log(f"teacher {known['network']}: val {100 * known['val_accuracy']:.2f} %, the study's own")
        if warning := warn_of_chance(config, known["val_accuracy"], study.store.meta["data"]["classes"]):
            log(warning)
        return
    given = (config, study.config.data, study.placement, storage.path, known.get("key"))
    if study.placement.device == "cuda":
        about = ray.get(ray.remote(num_gpus=1)(teach).remote(*given, print))
    else:
        about = teach(*given, log)
    study.store.update_meta(teacher=about if about["seconds"] else about | {"seconds": known.get("seconds")})


def teach(
    config: TeacherConfig, data: DataConfig, placement: Placement, folder: str, key: str | None, log: Log
) -> dict[str, Any]:
    """Find or train a teacher in this process, leave it in a folder; return what tells it from others, as JSON values.

    Raises:
        StudyError: If it has another key than the study's; it is not left in the folder then.
    """
    images, storage = images_for(data, placement), Storage(folder)
    there = _key_in(storage)
    lost = "is damaged" if storage.exists(WEIGHTS_FILE) else "is gone"
    if there is None and key is not None:
        log(f"the study's {WEIGHTS_FILE} {lost}; the same one is looked for, or made again")
    teacher = find_teacher(config, images, placement, log, storage if there else None)
    if key not in (None, teacher.key):
        raise StudyError(
            f"The study's teacher must stay {key}, but {WEIGHTS_FILE} {'holds' if there else f'{lost}, and there is'} "
            f"{teacher.key}. Put the file back, or take another --name."
        )
    if not there:
        save_state(storage, teacher.network.state_dict(), WEIGHTS_FILE)
    network = with_normalisation(config, images, teacher.network)
    with threads(placement.threads):
        accuracy, _ = evaluate(network, images, test_images_for(data, placement), config.train.precision)
    return {
        "key": teacher.key,
        "network": config.network.name,
        "width": config.network.width,
        "val_accuracy": teacher.val_accuracy,
        "test_accuracy": accuracy,
        "seconds": teacher.seconds,
    }


def _key_in(folder: Storage) -> str | None:
    """Return what names the weights in a study's folder; ``None`` if there are none, or they are damaged."""
    try:
        weights = load_state(folder, WEIGHTS_FILE)
        return None if weights is None else hash_weights(weights)
    except (AttributeError, CheckpointError, RuntimeError, TypeError):
        return None
