"""A student's card: its ``config.json`` for readers, as the Hugging Face hub takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from dfkt.students.cost import scaled

HUB_SETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "mnist": "ylecun/mnist",
    "svhn": "ufldl-stanford/svhn",
}
"""The hub's names of image sets that have one there."""
MOST_CLASSES = 20
"""Names of classes that the card lists; ``config.json`` has all."""
CITATION = """```bibtex
@article{bae2020densely,
  title   = {Densely Distilled Flow-Based Knowledge Transfer in Teacher-Student Framework for Image Classification},
  author  = {Bae, Ji-Hoon and Yeo, Doyeob and Yim, Junho and Kim, Nae-Soo and Pyo, Cheol-Sig and Kim, Junmo},
  journal = {IEEE Transactions on Image Processing},
  volume  = {29},
  pages   = {5698--5710},
  year    = {2020}
}
```"""


def described(name: str, width: float) -> str:
    """Return a network's name and, unless it is 1, its width."""
    return name + (f" at {width:g} of its width" if width != 1 else "")


def card(config: Mapping[str, Any]) -> str:
    """Return the card of what a package's ``config.json`` says: front matter, accuracy and cost, use, training, citation."""
    own = config["dfkt"]
    title = f"{config['architecture']} for {own['data']['title']}"
    front = yaml.safe_dump(_front(config, title), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{front}---\n\n# {title}", _summary(config), _table(config), _use(config), _training(config)]
    return "\n\n".join([*parts, f"## Citation\n\n{CITATION}"]) + "\n"


def _front(config: Mapping[str, Any], title: str) -> dict[str, Any]:
    own = config["dfkt"]
    name = own["data"]["name"]
    front: dict[str, Any] = {
        "library_name": "dfkt",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "knowledge-distillation", "model-compression"],
        "metrics": ["accuracy"],
    }
    if name in HUB_SETS:
        front["datasets"] = [HUB_SETS[name]]
    if own["test_accuracy"] is not None:
        kind = HUB_SETS.get(name, "imagefolder")
        metric = {"type": "accuracy", "value": own["test_accuracy"], "name": "test accuracy"}
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": own["data"]["title"], "type": kind, "split": "test"},
            "metrics": [metric],
        }
        front["model-index"] = [{"name": title, "results": [result]}]
    return front


def _summary(config: Mapping[str, Any]) -> str:
    own, (channels, height, width) = config["dfkt"], config["pretrained_cfg"]["input_size"]
    colour = "grey" if channels == 1 else "colour"
    names = config["label_names"]
    listed = ", ".join(names) if len(names) <= MOST_CLASSES else f"{', '.join(names[:MOST_CLASSES])}, …"
    teacher = own["teacher"]
    learnt = f"taught by a {_named(teacher['settings']['network'])}" if teacher else "trained without a teacher"
    return (
        f"A {_named(own['network'])} {learnt}. It takes {colour} images of {height}x{width} pixels and tells "
        f"{len(names)} classes apart: {listed}."
    )


def _table(config: Mapping[str, Any]) -> str:
    own = config["dfkt"]
    lines = ["| | val % | test % | parameters | MACs per image | MiB |", "|---|---|---|---|---|---|"]
    if own["teacher"]:
        lines.append(_row(f"teacher {_named(own['teacher']['settings']['network'])}", own["teacher"]))
    lines.append(_row(f"student {_named(own['network'])}", own))
    note = (
        "Accuracies at the end of training; MACs by torch's FlopCounterMode, halved. How long an image takes depends on the "
        "machine: `python -m dfkt cost FOLDER` measures it."
    )
    return "\n".join(["## Accuracy and cost", "", *lines, "", note])


def _row(name: str, found: Mapping[str, Any]) -> str:
    shares = (found.get(f"{split}_accuracy") for split in ("val", "test"))
    cells = ["" if share is None else f"{100 * share:.2f}" for share in shares]
    cells += ["" if found.get(what) is None else scaled(found[what]) for what in ("parameters", "macs")]
    size = found.get("bytes")
    return f"| {' | '.join([name, *cells, '' if size is None else f'{size / 2**20:.3g}'])} |"


def _use(config: Mapping[str, Any]) -> str:
    shape = ", ".join(map(str, config["pretrained_cfg"]["input_size"]))
    own = config["dfkt"]["network"]["name"]
    known = own.startswith(("resnet", "torchvision:", "timm:"))
    needed = "" if known else f"\n\nIts network is `{own}`, which must be importable."
    return f"""## Use

```python
import torch

import dfkt

student = dfkt.load_student("FOLDER")  # where this file lies
images = torch.rand(16, {shape})  # yours: in 0..1, or uint8; it normalises them itself
with torch.inference_mode():
    logits = student(images)
names = [student.classes[k] for k in logits.argmax(1)]
```{needed}"""


def _training(config: Mapping[str, Any]) -> str:
    own = config["dfkt"]
    train, versions = own["train"], own["versions"]
    settings = f" ({own['described']})" if own["described"] else ""
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return (
        f"## Training\n\nMethod `{own['method']['name']}`{settings}, {train['epochs']:g} epochs of batches of "
        f"{train['batch_size']}, seed {own['seed']}, {own['precision']} on {own['device']}; run `{own['key']}` of {shown}. "
        "All settings stand in `config.json` under `dfkt`."
    )


def _named(network: Mapping[str, Any]) -> str:
    return described(str(network["name"]), network.get("width", 1))
