"""Several hosts on one machine: network namespaces on a bridge, each with its own processes, mounts, name and sshd.

Everything lives inside one outer PID namespace whose first process reads from a pipe that this process holds. When that
process ends, for whatever reason, so does every process of every host, and with them go namespaces, mounts, bridge and links.
Nothing is written outside the laboratory's folder.

It needs root, a kernel that allows namespaces, and the programs of :data:`PROGRAMS`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import psutil

Found = TypeVar("Found")
PROGRAMS = ("bash", "ip", "mount", "nsenter", "rsync", "ssh", "ssh-keygen", "sshd", "unshare")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NAMESPACES = ("net", "pid")
"""By which a process is known to belong to the laboratory."""
USER = "user"
"""The machine from which somebody works: it has the bridge, and no sshd."""
REPOSITORY = Path(__file__).parents[2]
READY = "ready\n"
OUTER = """
set -e
mkdir stage
mount -t tmpfs tmpfs stage
number=0
for path; do  # what stays visible although a folder above it is replaced
  mkdir stage/$number
  mount --bind "$path" stage/$number
  number=$((number + 1))
done
mount --move stage /mnt
"""
COVERED = """
set -e
hostname {name}
for pair in tmp:/tmp home:"$HOME" hosts:/etc/hosts; do
  mount --bind /mnt/0/{name}/"${{pair%%:*}}" "${{pair#*:}}"
done
number=0
for path; do
  mkdir -p "$path"
  mount --bind /mnt/$number "$path"
  number=$((number + 1))
done
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount -t tmpfs -o size=1g tmpfs /dev/shm
cd "$HOME"
echo ready
"""
SSHD = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
Subsystem sftp internal-sftp
"""
SERVE = 'exec "$(command -v sshd)" -D -e -f {folder}/sshd_config'


class LaboratoryError(Exception):
    """Something in the laboratory did not go as it must; its message says what."""


def why_impossible() -> str | None:
    """Return why this machine allows no laboratory, ``None`` where it does; namespaces, bridge and links are tried."""
    if os.geteuid() != 0:
        return "hosts as namespaces need root"
    if missing := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        return f"hosts as namespaces need {', '.join(missing)}"
    tried = "ip link add bridge type bridge && ip link add one type veth peer name two && mount -t tmpfs tmpfs /mnt"
    command = ["unshare", "-m", "-p", "-u", "-n", "-f", "--mount-proc", "bash", "-c", tried]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return f"the kernel allows no hosts as namespaces: {done.stderr.strip()}" if done.returncode else None


class Host:
    """One host of a laboratory.

    Args:
        name: Its host name.
        number: The last part of its address.
        folder: The laboratory's.
        kept: Folders that every host sees as they are.
    """

    def __init__(self, name: str, number: int, folder: Path, kept: Sequence[Path]) -> None:
        self.name, self.address, self.folder = name, f"10.77.0.{number}", folder
        self.port, self.kept = f"port{number}", kept
        self._started: subprocess.Popen[bytes] | None = None
        self._init: psutil.Process | None = None

    def start(self, before: Sequence[str], prepare: str, last: str) -> None:
        """Start its namespaces.

        Args:
            before: The command that enters the namespaces around it.
            prepare: A script that runs there first.
            last: A shell command: what its first process then is.
        """
        script = prepare + COVERED.format(name=self.name) + last
        kinds = ["-m", "-p", "-u", "-n", "-f", "--mount-proc", "--kill-child"]
        with (self.folder / f"{self.name}.log").open("wb") as log:
            self._started = subprocess.Popen(
                [*before, "unshare", *kinds, "bash", "-c", script, "bash", *map(str, self.kept)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={"PATH": PATH, "HOME": home_of_root(), "LC_ALL": "C.UTF-8"},
                start_new_session=True,
            )
        self._init = wait_for(self._find_init, 20, f"the first process of {self.name}")

    def _find_init(self) -> psutil.Process | None:
        """Return the first process of its PID namespace: the child of ``unshare``, which is that of ``nsenter``."""
        assert self._started is not None
        if self._started.poll() is not None:
            raise LaboratoryError(f"{self.name} did not start: {self.log()}")
        top = psutil.Process(self._started.pid)
        for process in (top, *top.children()):
            if name_of(process) == "unshare" and READY in self.log():
                return process.children()[0]
        return None

    def log(self) -> str:
        """Return what its first process wrote."""
        return (self.folder / f"{self.name}.log").read_text()

    @property
    def pid(self) -> int:
        """Its first process, as this process sees it."""
        assert self._init is not None
        return self._init.pid

    def enter(self, *kinds: str) -> list[str]:
        """Return the command that enters its namespaces."""
        return ["nsenter", "-t", str(self.pid), *(kinds or ("-m", "-n", "-u", "-p")), "--"]

    def command(self, text: str) -> list[str]:
        """Return the command that runs a shell command on it, as after a login: the network is not needed."""
        clean = ["env", "-i", f"HOME={home_of_root()}", f"PATH={PATH}", "LC_ALL=C.UTF-8"]
        return [*self.enter(), *clean, "bash", "--login", "-c", f"cd; {text}"]

    def start_command(self, text: str, output: Path) -> subprocess.Popen[bytes]:
        """Start a shell command on it; what it writes goes into a file."""
        with output.open("wb") as file:
            return subprocess.Popen(
                self.command(text), stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )

    def run(self, text: str, timeout: float = 60.0) -> str:
        """Run a shell command on it; return what it wrote.

        Raises:
            LaboratoryError: If it fails, or takes longer than so many seconds.
        """
        output = self.folder / f"{self.name}-{time.monotonic_ns()}.out"
        started = self.start_command(text, output)
        try:
            code: int | None = started.wait(timeout)
            how = f"exit code {code}"
        except BaseException as error:  # what a command leaves running when it ends by itself, such as Ray, stays
            end(started)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code, how = None, f"no end within {timeout:g} s"
        said = output.read_text(errors="replace")
        if code != 0:
            raise LaboratoryError(f"`{text}` on {self.name}: {how}\n{said}")
        return said

    def succeeds(self, text: str, timeout: float = 15.0) -> bool:
        """Whether a shell command on it does."""
        try:
            self.run(text, timeout)
        except LaboratoryError:
            return False
        return True

    def processes(self) -> list[psutil.Process]:
        """Return its processes but the first one and what ssh left open."""
        ours = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = [process for process in processes_in({ours}) if process.pid != self.pid]
        return [process for process in found if "sshd" not in name_of(process)]

    def find(self, *parts: str) -> list[psutil.Process]:
        """Return its processes whose command holds all of these texts."""
        return [process for process in self.processes() if all(part in command_of(process) for part in parts)]

    def route(self) -> None:
        """Give it its address and a default route."""
        for text in (
            "link set lo up",
            f"addr replace {self.address}/24 dev eth0",
            "link set eth0 up",
            "route replace default via 10.77.0.1",
        ):
            subprocess.run([*self.enter("-n"), "ip", *text.split()], check=True, timeout=20)

    def end(self) -> None:
        """Wait until what was started for it has ended; end it if it does not."""
        if self._started is not None:
            assert self._started.stdin is not None
            self._started.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._started.wait(30)
            end(self._started)


class Laboratory:
    """Hosts on a network of their own, as long as the context lasts.

    Args:
        folder: An empty folder for everything that they write; ``shared`` in it is seen by all of them under the same path.
        names: Of the hosts that have an sshd.
        profile: Shell commands of every login.

    Raises:
        LaboratoryError: If a host does not come up; after the context, if anything of it is left.
    """

    def __init__(self, folder: Path, names: Sequence[str] = ("head", "worker"), profile: str = "") -> None:
        self.folder, self.profile = folder, profile
        kept = [folder, REPOSITORY, *{Path(sys.prefix), Path(sys.base_prefix)}]
        self.user = Host(USER, 1, folder, kept)
        self.hosts = {name: Host(name, number, folder, kept) for number, name in enumerate(names, 2)}
        self.shared, self.key = folder / "shared", folder / "user_key"
        self._namespaces: set[str] = set()

    def __enter__(self) -> Laboratory:
        """Start all hosts."""
        try:
            self._write_files()
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End everything, and prove that nothing is left."""
        left = self.stop()
        if left and error is None:
            raise LaboratoryError(f"left by the laboratory: {'; '.join(left)}")

    def _write_files(self) -> None:
        self.shared.mkdir(parents=True)
        for name in ("user_key", "host_key"):
            new = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(new, check=True, timeout=30)
        (self.folder / "sshd_config").write_text(SSHD.format(folder=self.folder))
        for host in (self.user, *self.hosts.values()):
            own = self.folder / host.name
            (own / "tmp").mkdir(parents=True)
            (own / "tmp").chmod(0o1777)
            (own / "home").mkdir()
            (own / "home" / ".bash_profile").write_text(f"test ! -e ~/.bashrc || . ~/.bashrc\n{self.profile}\n")
            others = "".join(f"{other.address} {other.name}\n" for other in self.hosts.values() if other is not host)
            # as Debian has it: a host's own name is a loopback address
            (own / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n{others}")
        (self.folder / USER / "home" / ".bashrc").write_text(f"export PATH={Path(sys.prefix) / 'bin'}:$PATH\n")

    def _start(self) -> None:
        self.user.start([], OUTER, "read -r")
        self._note(self.user)
        for text in (
            "link add bridge type bridge",
            "addr add 10.77.0.1/24 dev bridge",
            "link set bridge up",
            "link set lo up",
        ):
            self._ip(text)
        for host in self.hosts.values():
            host.start(self.user.enter("-m", "-n", "-p"), "", SERVE.format(folder=self.folder))
            self._note(host)
            self._ip(f"link add {host.port} type veth peer name eth0 netns {host.pid}")
            self._ip(f"link set {host.port} master bridge up")
            host.route()
        for host in self.hosts.values():
            wait_for(partial(self.user.succeeds, self.ssh(host, "true")), 20, f"sshd of {host.name}")

    def _note(self, host: Host) -> None:
        self._namespaces |= {os.readlink(f"/proc/{host.pid}/ns/{kind}") for kind in NAMESPACES}

    def ssh(self, host: Host, text: str) -> str:
        """Return the shell command that runs one on a host from the user's machine."""
        options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o ConnectTimeout=5 -q"
        return f"ssh {options} -i {self.key} root@{host.address} {shlex.quote(text)}"

    def cut(self, host: Host) -> None:
        """Pull a host's network cable: its packets, and those for it, are lost in silence."""
        self._ip(f"link set {host.port} down")

    def mend(self, host: Host) -> None:
        """Put a host's network cable back."""
        self._ip(f"link set {host.port} up")

    def _ip(self, text: str) -> None:
        subprocess.run([*self.user.enter("-n"), "ip", *text.split()], check=True, timeout=20)

    def stop(self) -> list[str]:
        """End every process of every host; return what is left of the laboratory, in words: nothing."""
        hosts = [*self.hosts.values(), self.user]
        with contextlib.suppress(psutil.Error, AssertionError):
            psutil.Process(self.user.pid).kill()  # and the kernel ends all others with it
        for host in hosts:
            host.end()
        return self.left()

    def left(self) -> list[str]:
        """Return what there is of a laboratory that was stopped: processes, mounts."""
        ours = {os.readlink(f"/proc/self/ns/{kind}") for kind in NAMESPACES}
        found = [f"process {command_of(process)}" for process in processes_in(self._namespaces - ours)]
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        return found + [f"mount {line}" for line in mounts if str(self.folder) in line]


def home_of_root() -> str:
    """Return the home that a login has, whatever this process's environment says."""
    return pwd.getpwuid(0).pw_dir


def end(started: subprocess.Popen[bytes]) -> None:
    """End a command that was started, with all that it started in its session, if it has not ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    started.wait()


def wait_for(look: Callable[[], Found | None], seconds: float, what: str) -> Found:
    """Return the first true value that a look gives.

    Raises:
        LaboratoryError: If none came in so many seconds.
    """
    until = time.monotonic() + seconds
    while True:
        if found := look():
            return found
        if time.monotonic() > until:
            raise LaboratoryError(f"{what} did not come within {seconds:g} s")
        time.sleep(0.1)


def processes_in(namespaces: Iterable[str]) -> list[psutil.Process]:
    """Return the living processes that are in any of these namespaces."""
    wanted, found = set(namespaces), []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            inside = {os.readlink(f"/proc/{process.pid}/ns/{kind}") for kind in NAMESPACES}
            if wanted & inside and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def command_of(process: psutil.Process) -> str:
    """Return a process's command line, empty where it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def name_of(process: psutil.Process) -> str:
    """Return a process's name, empty where it has ended."""
    try:
        return process.name()
    except psutil.Error:
        return ""
