"""What the import contracts do not say: rooms are small, settings are light, scripts are nobody's dependency."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dfkt

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "dfkt").rglob("*.py"))
STUDIES = sorted((ROOT / "studies").glob("*.py"))
MOST_LINES, MOST_FUNCTION_LINES = 300, 45
WITHOUT_PACKAGE = f"""
import sys, types
package = types.ModuleType("dfkt")
package.__path__ = [{str(ROOT / "dfkt")!r}]
sys.modules["dfkt"] = package
import dfkt.config
print(*({{"torch", "ray", "pyarrow", "optuna"}} & sys.modules.keys()))
"""
"""Imports the settings alone: the package itself offers names that need more."""


def long_functions(path: Path) -> Iterator[str]:
    """Yield the functions of a file that have too many lines, their docstrings left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            length = len(range(node.lineno, (node.end_lineno or 0) + 1)) - len((text or "").splitlines())
            if length > MOST_FUNCTION_LINES:
                yield f"{path.name} {node.name}: {length} lines"


def test_the_contracts_on_imports_are_kept() -> None:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 broken" in done.stdout


def test_files_and_functions_are_small() -> None:
    long = {path.name: count for path in FILES if (count := len(path.read_text().splitlines())) > MOST_LINES}
    assert long == {}
    assert [found for path in FILES for found in long_functions(path)] == []


def test_a_function_that_is_too_long_would_be_found(tmp_path: Path) -> None:
    body = "    x = 1\n"
    told = '    """One.\n\n    Two.\n    """\n'
    text = f"class A:\n  def f():\n{body * 45}\n\ndef g():\n{body * 44}\n\ndef h():\n{told}{body * 44}"
    (tmp_path / "one.py").write_text(text)
    assert list(long_functions(tmp_path / "one.py")) == ["one.py f: 46 lines"]


def test_nothing_in_the_package_names_a_study_script() -> None:
    stems = [study.stem for study in STUDIES if study.stem != "compare"]  # a word that may stand anywhere
    named = (*stems, "compare.py", "from studies", "import studies")
    assert len(stems) >= 5
    assert [(path.name, name) for path in FILES for name in named if name in path.read_text()] == []


def test_settings_need_neither_torch_nor_ray() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_public_names_exist() -> None:
    assert [name for name in dfkt.__all__ if not hasattr(dfkt, name)] == []


@pytest.mark.xdist_group("kept")
def test_several_processes_keep_the_groups_of_tests(request: pytest.FixtureRequest) -> None:
    """pytest-xdist 3.8 forgets them with pytest 9.2, and several Rays start at once."""
    assert request.node.nodeid.endswith("@kept") or not request.config.getoption("loadgroup", False)
