"""The rooms: imports point one way, ray and pyarrow enter where they may, scripts are thin."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load_script

import dfkt
from dfkt.config import StudyConfig

ROOT = Path(__file__).parents[1]
ROOMS = [
    *(
        "errors",
        "config",
        "storage",
        "folder",
        "sets",
        "data",
        "models",
        "taps",
        "cut",
        "tapped",
        "patterns",
        "flow",
        "losses",
    ),
    *(
        "terms",
        "methods",
        "checkpoint",
        "optim",
        "train",
        "teacher",
        "results",
        "space",
        "report",
        "tables",
        "comparison",
        "worker",
        "trial",
        "cluster",
        "search",
    ),
    *("recorder", "finals", "study", "arms", "compare", "distill", "switches", "__main__"),
]
"""From bottom to top: a room imports only from rooms before it."""
STUDIES = sorted(p for p in (ROOT / "studies").glob("*.py"))


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
    return {*names, *(n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module)}


def test_every_room_is_listed():
    assert {p.stem for p in (ROOT / "dfkt").glob("*.py")} == {*ROOMS, "__init__"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room):
    above = ROOMS[ROOMS.index(room) :]
    used = {name.split(".")[1] for name in imported(ROOT / "dfkt" / f"{room}.py") if name.startswith("dfkt.")}
    assert not used & set(above)


@pytest.mark.parametrize("room", ROOMS[: ROOMS.index("trial")])
def test_ray_enters_at_the_driver_and_below(room):
    assert not any(name.split(".")[0] == "ray" for name in imported(ROOT / "dfkt" / f"{room}.py"))


def test_parquet_is_the_stores_alone():
    users = {room for room in ROOMS if any(n.startswith("pyarrow") for n in imported(ROOT / "dfkt" / f"{room}.py"))}
    assert users == {"storage", "results"}


def test_configuration_needs_neither_torch_nor_ray():
    code = "import sys, dfkt.config; sys.exit(any(m in sys.modules for m in ('torch', 'ray')))"
    bare = f"import sys, types; m = types.ModuleType('dfkt'); m.__path__ = ['{ROOT}/dfkt']; sys.modules['dfkt'] = m; {code}"
    assert subprocess.run([sys.executable, "-c", bare], check=False).returncode == 0


def test_nothing_in_the_package_names_a_study():
    names = [name for study in STUDIES for name in (f"{study.stem}.py", f"studies.{study.stem}", study.stem)]
    names.remove("compare")  # a word that may stand anywhere
    for room in ROOMS:
        text = (ROOT / "dfkt" / f"{room}.py").read_text()
        assert not [name for name in names if name in text and (name, room) != ("compare.py", "compare")]


@pytest.mark.parametrize("study", STUDIES, ids=lambda p: p.stem)
def test_every_study_imports_and_says_what_it_is(study):
    module = load_script(study)

    if study.stem != "compare":  # its settings come from its switches
        assert isinstance(module.STUDY, StudyConfig)
        assert module.STUDY.name == study.stem
    assert all(word in module.__doc__ for word in ("Question", "Data", "Networks", "Budget", "Command"))


def test_public_names_exist():
    assert all(hasattr(dfkt, name) for name in dfkt.__all__)
