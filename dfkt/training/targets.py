"""What the teacher says to a run's batches: computed, or kept by an earlier run that saw the same batches.

Order, crops and flips of an epoch follow from (seed, epoch) alone, so all trials of a search see the same batches, and so do the
final runs of all arms by the same seed. The first run that comes to an epoch keeps what the teacher said to it, in files
(:mod:`dfkt.training.kept`): its logits, and the FSP matrices of all flow pairs that the study can ask for. Who comes later
reads, and is the same to the last bit on the CPU: what is kept is stored as it was computed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfkt.config import TrainConfig
from dfkt.data.batches import steps_per_epoch
from dfkt.data.image_set import ImageSet
from dfkt.methods.base import Features, Stage
from dfkt.methods.matrices import fsp_matrices
from dfkt.methods.patterns import FlowPair
from dfkt.networks.tapped import FrozenTeacher
from dfkt.networks.taps import Tap
from dfkt.training.kept import KeptFile, KeptSet, Writer
from dfkt.training.optim import autocast
from dfkt.training.parallel import Group
from dfkt.training.replay import Replayed
from dfkt.training.state import hash_weights

MOST_NUMBERS = 32_768
"""FSP matrices of more numbers an image are not kept: reading them would take as long as the teacher does."""
FLOW, LOGITS = "flow", "logits"


@dataclass(frozen=True)
class Keeping:
    """Where a run keeps what its teacher says.

    Args:
        root: Folder of all studies' on this host.
        study: Name of the study's folder below.
        budget: Bytes below ``root``; ``None`` takes a quarter of what is free.
        pairs: Flow pairs of the student whose matrices are kept.
    """

    root: str
    study: str
    budget: int | None = None
    pairs: tuple[FlowPair, ...] = ()

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return Path(os.path.expanduser(self.root)) / self.study


class Targets:
    """What the teacher says, step by step.

    Args:
        teacher: ``None`` where no stage reads one.
        matched: The teacher tap that each student tap meets.
        data: The image set, on the device.
        config: What the stages share.
        group: The data-parallel processes; each keeps what the teacher said to its own share of a batch.
        keeping: Where it is kept; ``None`` keeps nothing.
        replay: Record the teacher's passes as CUDA graphs, and replay them.
    """

    def __init__(
        self,
        teacher: FrozenTeacher | None,
        matched: Sequence[int],
        data: ImageSet,
        config: TrainConfig,
        group: Group,
        keeping: Keeping | None = None,
        *,
        replay: bool = False,
    ) -> None:
        self.teacher, self.matched, self.config = teacher, matched, config
        self.device, self.steps = data.device, steps_per_epoch(data, config.batch_size)
        self.kept: KeptSet | None = None
        self.pairs: tuple[FlowPair, ...] = ()
        if keeping is not None and teacher is not None:
            folder = keeping.folder / _set_key(teacher, data, config, group)
            self.kept = KeptSet(Path(os.path.expanduser(keeping.root)), folder, keeping.budget)
            if matched and numbers_per_image(keeping.pairs, [teacher.taps[m] for m in matched]) <= MOST_NUMBERS:
                self.pairs = keeping.pairs
        self.names = {p: " ".join(teacher.taps[matched[tap]].name for tap in p) for p in self.pairs if teacher}
        self.stage: Stage | None = None
        self.epoch, self.number = -1, 0
        self.read: dict[str, KeptFile] = {}
        self.written: dict[str, _Sender] = {}
        self.ahead: dict[str, tuple[int, dict[str, Tensor]]] = {}
        self.replay = replay
        self.replayed: dict[tuple[tuple[int, ...], bool], Replayed] = {}
        self.served = 0
        """Steps since the last :meth:`begin` to which nothing had to be computed."""

    def begin(self, stage: Stage, epoch: int, first: int) -> None:
        """Go to a step of an epoch, in a stage."""
        wanted = self._wanted(stage)
        goes_on = epoch == self.epoch and first == self.number
        for kind in [kind for kind in self.written if not goes_on or kind not in wanted]:
            self.written.pop(kind).writer.abandon()
        if stage is not self.stage:
            self.replayed = {}
        self.stage, self.epoch, self.number, self.served = stage, epoch, first, 0
        self.read, self.ahead = {}, {}
        for kind, entries in wanted.items():
            if kind in self.written:
                continue
            assert self.kept is not None
            if (file := self.kept.read(f"{kind}-{epoch:05d}", self.steps, entries)) is not None:
                self.read[kind] = file
            elif first == 0 and (writer := self.kept.write(f"{kind}-{epoch:05d}", self.steps)) is not None:
                self.written[kind] = _Sender(writer, self.device)

    def next(self, images: Tensor) -> Features:
        """Return what the teacher says to the next batch; activations and matrices come by student tap.

        Args:
            images: The batch, ``[B, C, H, W]``; looked at only where nothing is kept.
        """
        stage = self.stage
        if stage is None or not stage.reads_teacher:
            return Features({})
        rows = {kind: found for kind in list(self.read) if (found := self._rows(kind)) is not None}
        features = self._compute(stage, images, rows)
        self.number += 1
        return features

    def close(self) -> None:
        """Leave nothing half written."""
        for sender in self.written.values():
            sender.writer.abandon()
        self.written, self.read, self.ahead, self.replayed = {}, {}, {}, {}

    def _wanted(self, stage: Stage) -> dict[str, list[str]]:
        """Return what of a stage's needs is kept, with the entries of its files; nothing where activations are read."""
        if self.kept is None or stage.reads_maps:
            return {}
        flow = stage.flow_pairs and {*stage.flow_pairs} <= {*self.pairs}
        wanted = {FLOW: sorted({*self.names.values()})} if flow else {}
        return wanted | ({LOGITS: [LOGITS]} if stage.needs("teacher_logits") else {})

    def _compute(self, stage: Stage, images: Tensor, rows: Mapping[str, Mapping[str, Tensor]]) -> Features:
        """Run the teacher no further than what is not among the kept rows asks for; keep what was computed."""
        assert self.teacher is not None
        pairs: Iterable[FlowPair] = self.pairs if FLOW in self.written else () if FLOW in rows else stage.flow_pairs
        mapped = stage.taps if stage.reads_maps else tuple({tap for pair in pairs for tap in pair})
        asked = stage.needs("teacher_logits") and LOGITS not in rows
        found = Features({})
        if mapped or asked:
            taps = tuple(sorted({self.matched[tap] for tap in mapped}))
            outputs = self._pass(taps, asked, images)
            found = Features({tap: outputs[str(self.matched[tap])] for tap in mapped}, outputs.get("logits"))
        else:
            self.served += 1
        matrices, logits = None, found.logits if asked else None
        if FLOW in self.written:
            matrices = fsp_matrices(found.taps, self.pairs)
            self._keep(FLOW, {self.names[pair]: matrix for pair, matrix in matrices.items()})
        elif FLOW in rows:
            matrices = {pair: rows[FLOW][self.names[pair]] for pair in stage.flow_pairs}
        if LOGITS in self.written and logits is not None:
            self._keep(LOGITS, {LOGITS: logits})
        elif LOGITS in rows:
            logits = rows[LOGITS][LOGITS]
        return Features(found.taps, logits, matrices)

    def _pass(self, taps: tuple[int, ...], logits: bool, images: Tensor) -> dict[str, Tensor]:
        """Run the teacher; replayed, what it says lies where the next pass overwrites it."""
        assert self.teacher is not None
        part = self.teacher.part(taps, logits)

        def run(images: Tensor) -> dict[str, Tensor]:
            with torch.inference_mode(), autocast(self.config.precision, self.device):
                found: dict[str, Tensor] = part(images)
            return found

        return self.replayed.setdefault((taps, logits), Replayed(run))(images) if self.replay else run(images)

    def _keep(self, kind: str, rows: dict[str, Tensor]) -> None:
        if not self.written[kind].send({name: rows[name] for name in sorted(rows)}, last=self.number + 1 == self.steps):
            del self.written[kind]

    def _rows(self, kind: str) -> dict[str, Tensor] | None:
        """Return a kind's next kept rows on the device, and send those after them ahead; nothing more of a damaged file."""
        number, rows = self.ahead.pop(kind, (-1, {}))
        if number != self.number:
            fetched = self._fetch(kind, self.number)
            if fetched is None:
                return None
            rows = fetched
        if self.device.type != "cpu" and self.number + 1 < self.steps:
            after = self._fetch(kind, self.number + 1)
            if after is not None:
                self.ahead[kind] = (self.number + 1, after)
        return rows

    def _fetch(self, kind: str, number: int) -> dict[str, Tensor] | None:
        rows = self.read[kind].row(number) if kind in self.read else None
        if rows is None:
            self.read.pop(kind, None)
            return None
        if self.device.type == "cpu":
            return rows
        return {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in rows.items()}


class _Sender:
    """A writer that gets its rows from a device one step late, so that no step waits for them."""

    def __init__(self, writer: Writer, device: torch.device) -> None:
        self.writer, self.device = writer, device
        self.late: tuple[Any, dict[str, Tensor]] | None = None

    def send(self, rows: dict[str, Tensor], *, last: bool) -> bool:
        """Write a step's rows; say whether there are more to come."""
        if self.device.type == "cpu":
            return self.writer.add(rows)
        copied = {
            n: torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for n, t in rows.items()
        }
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        before, self.late = self.late, (event, copied)
        return self._write(before) and (not last or self._write(self.late))

    def _write(self, late: tuple[Any, dict[str, Tensor]] | None) -> bool:
        if late is None:
            return True
        late[0].synchronize()
        return self.writer.add(late[1])


def numbers_per_image(pairs: Iterable[FlowPair], teacher: Sequence[Tap]) -> int:
    """Return how many numbers the FSP matrices of some flow pairs have.

    Args:
        pairs: Of student taps.
        teacher: The teacher tap that each student tap meets.

    Example:
        >>> taps = [Tap("t", channels, 8, 8) for channels in (16, 16, 32)]
        >>> numbers_per_image([(0, 1), (1, 2)], taps)
        768
    """
    return sum(teacher[i].channels * teacher[j].channels for i, j in pairs)


def _set_key(teacher: FrozenTeacher, data: ImageSet, config: TrainConfig, group: Group) -> str:
    """Return 16 hexadecimal digits that name all that the last bits of a teacher's answers depend on."""
    device = data.device
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.get_num_threads()
    entries = {
        "teacher": [hash_weights(teacher.state()), repr(teacher.network)],
        "images": [data.checksum, len(data.padded), *data.image_size, data.padding, data.flip, data.resized],
        "moments": [data.mean.tolist(), data.std.tolist()],
        "batches": [config.seed, config.batch_size, config.precision],
        "where": [device.type, card, torch.__version__, *asdict(group).values()],
    }
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]
