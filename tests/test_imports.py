"""Names of a user's own are found in the current folder, whatever script runs, and refused in one line."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from dfkt.errors import ConfigError
from dfkt.imports import import_name


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, which is not on the import path; what is imported from it is forgotten afterwards."""
    loaded = set(sys.modules)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(Path.cwd()))])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - loaded:
        del sys.modules[name]


def test_a_module_in_the_current_folder_is_found(folder):
    (folder / "own_one.py").write_text("def f(): return 5")
    assert import_name("own_one:f")() == 5


def test_a_package_in_the_current_folder_is_found_with_or_without_its_init(folder):
    for name in ("own_package", "own_namespace"):
        (folder / name / "deep").mkdir(parents=True)
        (folder / name / "deep" / "nets.py").write_text(f"NAME = {name!r}")
    (folder / "own_package" / "__init__.py").touch()
    assert import_name("own_package.deep.nets:NAME") == "own_package"
    assert import_name("own_namespace.deep.nets:NAME") == "own_namespace"


def test_the_current_folder_comes_before_the_scripts_own(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("script")
    for place in (elsewhere, folder):
        (place / "own_twice.py").write_text(f"PLACE = {str(place)!r}")
    sys.path.insert(0, str(elsewhere))
    assert import_name("own_twice:PLACE") == str(folder)
    assert sys.path[0] == str(elsewhere)


def test_neighbours_can_be_imported_later_and_objects_unpickled(folder):
    (folder / "own_lazy.py").write_text(
        "class C:\n    def f(self):\n        import own_neighbour\n        return own_neighbour.X"
    )
    (folder / "own_neighbour.py").write_text("X = 7")
    made = import_name("own_lazy:C")()
    assert made.f() == 7
    pickled = pickle.dumps(made)
    del sys.modules["own_lazy"]
    assert pickle.loads(pickled).f() == 7


def test_the_folder_stays_at_the_end_of_the_path_and_only_if_something_lay_in_it(folder):
    before = list(sys.path)
    import_name("json:dumps")
    with pytest.raises(ConfigError):
        import_name("own_absent:f")
    assert sys.path == before
    (folder / "own_two.py").write_text("f = 1")
    import_name("own_two:f")
    import_name("own_two:f")
    assert sys.path == [*before, str(folder)]


def test_a_script_that_lies_elsewhere_finds_it(tmp_path):
    (tmp_path / "studies").mkdir()
    (tmp_path / "own_three.py").write_text("f = 'found'")
    script = tmp_path / "studies" / "study.py"
    script.write_text("from dfkt.imports import import_name; print(import_name('own_three:f'))")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "found\n", done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *[(text, "`package.module:name` must hold, but got") for text in ("", ":", "json", "json:", ":dumps")],
        ("no_such_package.module:f", "Cannot import 'no_such_package.module:f': ModuleNotFoundError: No module named"),
        ("json:absent", "Cannot import 'json:absent': AttributeError: .*absent"),
        (".json:dumps", "Cannot import '.json:dumps': TypeError"),
        ("own_broken:f", "Cannot import 'own_broken:f': ZeroDivisionError: division by zero"),
        ("own_script:f", "Cannot import 'own_script:f': it is a script that ends when imported"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_one_line(folder, text, message):
    (folder / "own_broken.py").write_text("1 / 0")
    (folder / "own_script.py").write_text("import sys\nsys.exit('usage:\\nmany lines')")
    with pytest.raises(ConfigError, match=message) as caught:
        import_name(text)
    assert "\n" not in str(caught.value)


def test_a_command_imports_no_library_that_it_may_not_need():
    script = (
        "import sys, dfkt.cli.study, dfkt.cli.show; print({'ray', 'sklearn', 'timm', 'torchvision'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
