"""Machines that join a study while it runs: looked at as all were before it began."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

from ray import tune

from dfkt.study.doctor import Node, look_at, others
from dfkt.study.findings import Finding
from dfkt.study.queue import Queue

EVERY = 10.0
"""Seconds between two looks at which machines there are."""
PATIENCE = 180.0
"""Seconds until a machine must have answered: one that joins is busy with its first runs."""


class Newcomers(tune.Callback):
    """Tells what is wrong with machines that join: other versions, results or images that they do not see.

    A study goes on meanwhile, on them too: Ray has no way to keep runs off a machine. Who reads the line can.

    Args:
        look: Asks machines, and returns what is wrong with them; called in a thread.
        log: Receives a line for each.
        there: Returns the machines that hold runs, as Ray describes them.
        clock: Returns seconds.
    """

    def __init__(
        self,
        look: Callable[[Sequence[Node]], list[Finding]],
        log: Callable[[str], None],
        there: Callable[[], list[Node]] = others,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.look, self.log, self.there, self.clock = look, log, there, clock
        self.known = {node["NodeID"] for node in there()}
        self.next = clock() + EVERY
        self.found: SimpleQueue[list[Finding]] = SimpleQueue()

    @classmethod
    def of(cls, queue: Queue) -> Newcomers:
        """Return what looks at machines for a queue's studies."""
        configs, first = [study.config for study in queue.studies], queue.studies[0]
        return cls(lambda nodes: look_at(nodes, configs, first.store.storage, first.placement, PATIENCE), queue.log)

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything out: Tune pickles its callbacks."""
        return {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tell what was found, and look for machines that are new; Tune calls this several times a second."""
        while not self.found.empty():
            for finding in self.found.get():
                self.log(f"a machine that joined: {finding.describe()}")
        if self.clock() < self.next:
            return
        self.next = self.clock() + EVERY
        with contextlib.suppress(Exception):  # the cluster may have gone
            if new := [node for node in self.there() if node["NodeID"] not in self.known]:
                self.known |= {node["NodeID"] for node in new}
                threading.Thread(target=self._ask, args=(new,), daemon=True).start()

    def _ask(self, nodes: Sequence[Node]) -> None:
        with contextlib.suppress(Exception):
            self.found.put(self.look(nodes))
