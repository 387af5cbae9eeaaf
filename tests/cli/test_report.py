"""``report`` writes one page, replaces only its own, and a browser draws it whole at both widths."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import synthetic_images
from made import Arm, write_journal, write_study

from dfkt.cli.main import main
from dfkt.config import NetworkConfig
from dfkt.methods.scratch import Scratch
from dfkt.networks.build import build_network
from dfkt.store.files import Storage
from dfkt.students.keep import keep_student
from dfkt.training.config import RunConfig
from dfkt.training.run import Trained

pytestmark = pytest.mark.slow
SMALL = NetworkConfig(name="resnet8", width=0.25)
FLOW = (("flow", None), ("task", 0.7), ("task", 0.9), ("task", 0.9))
TRIALS = [("COMPLETE", 0.5), ("COMPLETE", 0.7), ("PRUNED", 0.1)]
ARMS = (
    Arm("scratch", {1: 0.80, 2: 0.82}, present=[0, 1]),
    Arm("dfkt", {1: 0.84, 2: 0.88}, FLOW, TRIALS, planned=3, present=[0, 1]),
)
DATA = {"title": "Blobs", "train": 90, "val": 10, "classes": 10, "channels": 1, "image_size": [8, 8]}
COUNTS = {
    "teacher": {"parameters": 366_000, "macs": 9, "bytes": 9},
    "student": {"parameters": 75_000, "macs": 9, "bytes": 9},
}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOK = """<script>(async () => {
  const wait = time => new Promise(done => setTimeout(done, time));
  while (!document.body.dataset.ready) await wait(100);
  for (const open of [false, true, false, true]) {
    document.querySelectorAll("details").forEach(box => box.open = open);
    await wait(500);
  }
  const boxes = [...document.querySelectorAll(".chart")];
  const fits = box => box.querySelector(".main-svg").getBoundingClientRect().width <= box.clientWidth + 1;
  parent.postMessage({
    plots: boxes.length, drawn: boxes.filter(box => box.querySelector(".cartesianlayer .trace path")).length,
    fitting: boxes.filter(fits).length, across: document.documentElement.scrollWidth, width: innerWidth,
    low: boxes.filter(box => box.clientHeight < 50).length
  }, "*");
})();</script>"""
"""Folds and unfolds all parts of a report, then tells the page around it what is seen in it."""


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(folder: str, *arms: Arm, name: str = "blobs") -> None:
    write_study(Path(folder), arms or ARMS, name=name, data=DATA, cost=COUNTS)
    write_journal(Path(folder), "dfkt", [0.5, 0.7, None, 0.6, 0.55])


def test_the_page_lies_where_it_is_wanted_and_a_later_one_replaces_it(capsys: pytest.CaptureFixture[str]) -> None:
    write("results/blobs")
    assert main(["report", "results/blobs", "--seconds", "0"]) == 0
    assert re.fullmatch(r"blobs\.html: 1 study, \d\.\d MB\n", capsys.readouterr().out)
    first = Path("blobs.html").read_text()
    assert len(first) < 6_000_000
    assert main(["report", "results/blobs", "--seconds", "0", "-o", "blobs.html"]) == 0
    assert main(["report", "results", "--seconds", "0", "-o", "other.html"]) == 0
    assert sorted(path.name for path in Path().iterdir()) == ["blobs.html", "other.html", "results"]


def test_nothing_of_a_study_is_touched() -> None:
    write("blobs")
    before = {path: path.read_bytes() for path in Path("blobs").rglob("*") if path.is_file()}
    assert main(["report", "blobs", "--seconds", "0"]) == 0
    assert {path: path.read_bytes() for path in Path("blobs").rglob("*") if path.is_file()} == before


def test_a_folder_of_studies_and_several_folders_are_one_page(capsys: pytest.CaptureFixture[str]) -> None:
    write("results/one", name="same")
    write("results/two", name="same")
    write("three", name="third")
    assert main(["report", "results", "three", "--seconds", "0", "-o", "all.html"]) == 0
    assert "3 studies" in capsys.readouterr().out
    text = Path("all.html").read_text()
    for title in ("results/one", "results/two", "third"):  # two of one name go by their folders
        assert re.search(rf"<h2>[^<]*{title}</h2>", text)


def test_a_study_that_cannot_be_read_stands_on_the_page_and_is_told_at_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write("results/one")
    Path("results/two").mkdir()
    Path("results/two/study.json").write_text("{")
    assert main(["report", "results", "--seconds", "0"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("failed: 1 of 2 studies cannot be read: study.json in ")
    assert err.count("\n") == 1
    assert Path("results.html").read_text().count("results/two is damaged") == 2


def test_time_is_measured_for_the_best_student_of_a_study_that_is_over() -> None:
    write("blobs")
    run = RunConfig(method=Scratch(), student=SMALL)
    network = build_network(SMALL, num_classes=4, in_channels=1)
    keep_student(Storage("blobs/students/dfkt-seed1"), Trained(run, network, synthetic_images(), 0.5, 0.25), None)
    assert main(["report", "blobs", "--seconds", "0.01", "--device", "cpu"]) == 0
    text = Path("blobs.html").read_text()
    assert "ms an image, batch 64" in text
    assert re.search(r"networks in turns, float32 on [^<]*, 1 thread\.", text)
    assert "milliseconds an image, batch 1." in text


def test_where_no_time_is_measured_the_page_says_why() -> None:
    write("over")
    write("running", *ARMS, Arm("kd"))
    assert main(["report", "over", "running", "--seconds", "0.01", "-o", "p.html"]) == 0
    text = Path("p.html").read_text()
    assert "No time was measured: " in text
    assert "has no config.json" in text
    assert "No time was measured, since the study is not over" in text


BAD = [
    ("nowhere", "must hold a study (study.json) or several below it, but "),
    ("empty", "must hold a study (study.json)"),
    ("broken", "study.json in "),
    ("blobs -o page.txt", "name must end with .html, but got 'page.txt'"),
    ("blobs -o .html", "name must end with .html"),
    ("blobs -o gone/page.html", "folder must exist, but gone does not"),
    ("blobs -o mine.html", "mine.html was not written by this command, so it stays"),
    ("blobs -o folder.html", "folder.html cannot be replaced: Is a directory"),
    ("blobs blobs", "A page of several folders needs a name"),
    ("blobs --seconds -1", "`seconds >= 0` must hold"),
    ("blobs --threads 0", "`threads >= 1` must hold"),
    ("blobs --device tpu", "`device` must be one of cpu"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[argv for argv, _ in BAD])
def test_bad_input_is_one_line_and_writes_nothing(capsys: pytest.CaptureFixture[str], argv: str, message: str) -> None:
    write("blobs")
    Path("mine.html").write_text("<html>mine</html>")
    for name in ("empty", "broken", "folder.html"):
        Path(name).mkdir()
    Path("broken/study.json").write_text("{")
    before = sorted(Path().rglob("*"))
    assert main(["report", *argv.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
    assert Path("mine.html").read_text() == "<html>mine</html>"


def test_without_plotly_one_line_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("blobs")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main(["report", "blobs"]) == 2
    assert (
        "needs plotly, which is not installed. Install it with: pip install 'dfkt[report]'" in capsys.readouterr().err
    )


@pytest.mark.timeout(180)
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium to draw the page")
@pytest.mark.parametrize("width", [1400, 400])
def test_a_browser_draws_every_figure_without_an_error_and_nothing_is_cut(tmp_path: Path, width: int) -> None:
    write("results/one", name="one")
    write("results/two", *ARMS, Arm("kd", {1: None}), name="two")
    assert main(["report", "results", "--seconds", "0", "-o", "page.html"]) == 0
    text = Path("page.html").read_text().replace("</body>", f"{LOOK}</body>")
    Path("seen.html").write_text(text)
    around = "onmessage = e => { document.body.textContent = JSON.stringify(e.data); }"
    frame = f"<iframe src='seen.html' width='{width}' height='3000'></iframe>"
    Path("frame.html").write_text(f"<body><script>{around}</script>{frame}</body>")
    profile, place = f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'frame.html'}"
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,3000", "--virtual-time-budget=30000"]
    logged = ["--enable-logging=stderr", "--v=0", "--dump-dom"]
    command = [str(BROWSER), *switches, *logged, profile, place]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=170)

    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    (found,) = re.findall(r"\{.*\}", done.stdout)
    seen = json.loads(found)
    assert seen["plots"] == text.count('class="chart"') >= 20
    assert seen["drawn"] == seen["fitting"] == seen["plots"]
    assert seen["low"] == 0
    assert seen["across"] <= seen["width"] == width
