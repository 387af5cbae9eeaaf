"""How a study fills a cluster that grows with its demand, and gives the machines back.

Ray's fake multi-node provider plays a cloud: its machines are Ray nodes of one CPU on this computer, started and ended by
Ray's real autoscaler. The head takes no work, as in `cluster.yaml`; the study asks for some runs at once. Machines are
counted twice a second; the runs at once follow from the study's own rows. The head and all it starts live in namespaces of
their own, so nothing else on the computer is met, and nothing stays behind.

Command     python benchmarks/growing.py [--machines 3] [--trials 9] [--epochs 120] [--figure docs/figures/growing.svg]
Hardware    Linux, as root: `unshare` makes the namespaces; elsewhere it says so and ends
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from itertools import accumulate
from pathlib import Path

import pandas as pd
import ray

from dfkt.store.study_store import read_study

PORT = 6379  # the provider's machines look for the head there
IDLE_MINUTES = 0.25
LONGEST = 900.0
NO_COMMANDS = [f"{who}_{what}_commands" for who in ("head", "worker") for what in ("setup", "start_ray")]
NO_COMMANDS += ["cluster_synced_files", "initialization_commands", "setup_commands"]
Steps = list[tuple[float, int]]


def cloud(machines: int) -> dict[str, object]:
    """Return a cluster file of the fake provider: up to so many machines of one CPU, and a head that takes no work."""
    worker = {"resources": {"CPU": 1, "object_store_memory": 100_000_000}, "node_config": {}, "min_workers": 0}
    return {
        "cluster_name": "fake",
        "max_workers": machines,
        "idle_timeout_minutes": IDLE_MINUTES,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,  # all are on this computer
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": worker | {"max_workers": machines},
        },
        "head_node_type": "ray.head.default",
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in NO_COMMANDS},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=3)
    parser.add_argument("--trials", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        return study_on_a_cloud(given.inside, given.machines, given.trials, given.epochs)
    own = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*own, "true"], capture_output=True, check=False).returncode:
        print("not measured: it needs namespaces of its own (Linux, unshare, root)")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        command = [*own, sys.executable, *sys.argv, "--inside", folder]
        done = subprocess.run(command, check=False, timeout=LONGEST, env={**os.environ, "HOME": folder})
        if done.returncode:
            return done.returncode
        machines = [(at, number) for at, number in json.loads((Path(folder) / "machines.json").read_text())]
        began = json.loads((Path(folder) / "began.json").read_text())
        runs = runs_at_once(Path(folder) / "results" / "growing", began)
    print(table(machines, runs))
    if given.figure:
        draw(machines, runs, given.figure)
    return 0


def study_on_a_cloud(folder: Path, machines: int, trials: int, epochs: int) -> int:
    """Start a head that may grow, run a study on it while its machines are counted, and wait until they are given back."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    Path("/tmp/ray").mkdir(exist_ok=True)
    (folder / "ray").mkdir()
    subprocess.run(["mount", "--bind", str(folder / "ray"), "/tmp/ray"], check=True)
    (folder / "cloud.yaml").write_text(json.dumps(cloud(machines)))  # JSON is YAML
    os.environ |= {"RAY_FAKE_CLUSTER": "1", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ |= {"RAY_enable_autoscaler_v2": "0", "OMP_NUM_THREADS": "1"}
    head = [f"--port={PORT}", "--num-cpus=0", "--object-store-memory=100000000", "--disable-usage-stats"]
    start = [str(Path(sys.executable).with_name("ray")), "start", "--head", *head]
    subprocess.run([*start, f"--autoscaling-config={folder / 'cloud.yaml'}"], check=True, stdout=subprocess.DEVNULL)
    seen: Steps = []
    over = threading.Event()
    began = time.time()
    (folder / "began.json").write_text(json.dumps(began))
    counting = threading.Thread(target=count, args=(began, seen, over))
    counting.start()
    study = ["-m", "dfkt", "study", "--name", "growing", "--data", "digits", "--results", str(folder / "results")]
    study += ["--teacher", "resnet14", "--teacher-epochs", "3", "--epochs", f"{epochs}", "--trials", f"{trials}"]
    study += ["--baselines", "", "--seeds", "1", "--confirm", "0", "--no-early-stopping", "--keep-targets", "0"]
    study += ["--at-once", f"{machines}", "--gpus-per-worker", "0", "--address", f"127.0.0.1:{PORT}"]
    code = subprocess.run([sys.executable, *study], check=False).returncode
    waited = time.time()
    while seen[-1][1] and time.time() - waited < 60 * IDLE_MINUTES + 90:
        time.sleep(1)
    over.set()
    counting.join()
    (folder / "machines.json").write_text(json.dumps(seen))
    return code


def count(began: float, seen: Steps, over: threading.Event) -> None:
    """Note how many machines there are whenever that changes, the head left out."""
    ray.init(address=f"127.0.0.1:{PORT}", log_to_driver=False, logging_level="ERROR")
    while not over.is_set():
        number = sum(bool(node["Resources"].get("CPU")) for node in ray.nodes() if node["Alive"])
        if not seen or number != seen[-1][1]:
            seen.append((time.time() - began, number))
        time.sleep(0.5)
    seen.append((time.time() - began, number))


def runs_at_once(folder: Path, began: float) -> Steps:
    """Return when how many runs were there at once, by the study's rows."""
    study = read_study(folder)
    rows = pd.concat([study.trials, study.finals])
    events = sorted([(at, 1) for at in rows.started] + [(at, -1) for at in rows.ended])
    levels = accumulate(change for _, change in events)
    return [(0.0, 0), *((at.timestamp() - began, level) for (at, _), level in zip(events, levels, strict=True))]


def table(machines: Steps, runs: Steps) -> str:
    """Return what happened, a line each."""
    first = {number: at for at, number in reversed(machines)}
    most = max(number for _, number in machines)
    lines = [f"machine {number} there after{first[number]:34.0f} s" for number in range(1, most + 1)]
    full = next((at for at, n in runs if n >= most), None)
    lines += [f"{most} runs at once {'not seen' if full is None else f'after{full:35.0f} s'}"]
    lines += [f"last run ended after{runs[-1][0]:35.0f} s"]
    back = next((at for at, n in machines if at > runs[-1][0] and n == 0), None)
    return "\n".join([*lines, f"all machines given back {f'{back - runs[-1][0]:.0f} s later' if back else 'not seen'}"])


def draw(machines: Steps, runs: Steps, path: Path) -> None:
    """Draw both over time."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "growing"
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.add_subplot()
    end = machines[-1][0]
    styles: list[dict[str, float]] = [{"lw": 6, "alpha": 0.3}, {"lw": 1.5}]
    for steps, name, style in zip((machines, runs), ("machines", "runs at once"), styles, strict=True):
        at, level = zip(*steps, (end, steps[-1][1]), strict=True)
        axes.step(at, level, where="post", label=name, lw=style["lw"], alpha=style.get("alpha"))
    axes.set_xlabel("seconds since the study was started")
    axes.set_yticks(range(max(number for _, number in machines) + 1))
    axes.legend(loc="upper right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
