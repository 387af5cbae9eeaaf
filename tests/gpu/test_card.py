"""What only a card can show; `make gpu` runs it there. Without one: DFKT_TEST_DEVICE=cpu rehearses what a CPU can play."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_script, synthetic_images
from torch import Tensor

from dfkt.data.batches import random_areas, random_crops, random_flips, train_batches
from dfkt.errors import GraphError
from dfkt.methods.base import Features, Term
from dfkt.store.files import Storage
from dfkt.training.loop import Training
from dfkt.training.replay import WARM_UP, Replayed
from dfkt.training.state import load_state, save_state
from dfkt.training.targets import Keeping

SCRIPT = Path(__file__).with_name("card_runs.py")
runs = load_script(SCRIPT)
DEVICE = os.environ.get("DFKT_TEST_DEVICE", "cuda")
CARDS = torch.cuda.device_count() if torch.cuda.is_available() else 0
METHODS = list(runs.METHODS_SEEN)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE == "cuda" and CARDS == 0, reason="no GPU"),
    pytest.mark.filterwarnings("default"),  # what a card's libraries warn of is no fault of the package
]
real_card = pytest.mark.skipif(DEVICE == "cpu", reason="a CPU cannot play it")


@pytest.fixture(autouse=True)
def _float32() -> Iterator[None]:
    """Float32 is float32, unless a test says otherwise: torch lets convolutions round to TF32 by default."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def check(name: str, found: list[float], precision: str = "float32") -> None:
    """Hold losses against the CPU's float32."""
    distance, most = runs.apart(found, runs.on_cpu(name)), runs.carries(name, precision)
    print(f"{name}: {distance:.1e} from the CPU, at most {most:.1e}")
    assert distance <= most


@pytest.mark.parametrize("name", METHODS)
def test_a_run_in_float32_is_the_cpus_within_rounding(name: str) -> None:
    check(name, runs.losses(runs.begin(name, DEVICE).run()))


@pytest.mark.parametrize("name", METHODS)
def test_a_run_in_bfloat16_is_as_near_as_the_cpus_own(name: str) -> None:
    check(name, runs.losses(runs.begin(name, DEVICE, "bfloat16").run()), "bfloat16")


@real_card
@pytest.mark.parametrize("name", METHODS)
def test_a_run_in_tf32_is_nearer_than_bfloat16_may_be(name: str) -> None:
    """TF32 rounds the factors of products to 11 bits, bfloat16 to 8 bits, and what comes of them too."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    check(name, runs.losses(runs.begin(name, DEVICE).run()), "bfloat16")


def test_crops_and_flips_are_the_cpus_bit_for_bit() -> None:
    data, draws = synthetic_images(channels=3, padding=2), torch.Generator().manual_seed(0)
    chosen, tops, lefts = torch.randint(96, (64,), generator=draws), *torch.randint(5, (2, 64), generator=draws)
    flip = torch.rand(64, generator=draws) < 0.5

    def augmented(device: str) -> Tensor:
        drawn = [value.to(device) for value in (chosen, tops, lefts)]
        return random_flips(random_crops(data.to(device).padded.images, data.image_size, *drawn), flip.to(device))

    ours = augmented(DEVICE)
    assert ours.dtype == torch.uint8
    assert torch.equal(ours.cpu(), augmented("cpu"))


def test_batches_are_the_cpus_and_normalised_within_three_roundings() -> None:
    data = synthetic_images(channels=3, padding=2, flip=True)
    ours, theirs = (list(train_batches(data.to(device), 16, seed=3, epoch=2)) for device in (DEVICE, "cpu"))
    assert len(ours) == len(theirs) == 6
    for (images, labels), (expected, expected_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(labels.cpu(), expected_labels)
        # A value of at most 3 in size is a factor (one rounding), a product and a sum: 3 * 3 * 2**-24 at the most.
        torch.testing.assert_close(images.cpu(), expected, rtol=0, atol=9 * 2**-24)
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_random_areas_are_the_cpus_within_rounding() -> None:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(256, (8, 12, 12, 3), dtype=torch.uint8, generator=draws)
    height, width, top, left = torch.rand(4, 8, generator=draws) * 0.7 + 0.3
    box = torch.stack([height, width, top * (1 - height), left * (1 - width)], 1)
    ours = random_areas(images.to(DEVICE), box.to(DEVICE)).cpu()
    # Coordinates of up to 12 pixels carry some 8 roundings of 2**-24, and neighbours differ by up to 255 along two sides.
    torch.testing.assert_close(ours, random_areas(images, box), rtol=0, atol=2 * 255 * 12 * 8 * 2**-24)


@dataclass(frozen=True, kw_only=True)
class Watch(Term):
    """From a stage's third step to its last it forbids to wait for the card; it adds nothing to the loss.

    The first two make what lasts: the plan of the flow loss, momentum, the workspaces of libraries. Behind the last one the loop
    looks at the losses.
    """

    name = "watch"
    steps: int
    looks: bool = False
    seen: list[int] = field(default_factory=list)

    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:
        """Return zero; turn the guard on or off. Where it ``looks``, it waits itself."""
        self.seen.append(len(self.seen) + 1)
        number = (len(self.seen) - 1) % self.steps + 1
        if 3 <= number < self.steps:
            torch.cuda.set_sync_debug_mode("error")
        else:
            torch.cuda.set_sync_debug_mode("default")
        if self.looks:
            int(labels.sum())
        return torch.zeros((), device=labels.device)


def watched(name: str, precision: str, *, looks: bool = False) -> list[Watch]:
    """Run a method, each stage an epoch long, and return the watches of its stages."""
    begun = runs.begin(name, DEVICE, precision)
    watches = [Watch(steps=begun.epoch_steps, looks=looks) for _ in begun.schedule]
    stages = zip(begun.schedule, watches, strict=True)
    schedule = tuple(replace(stage, epochs=1.0, terms=(*stage.terms, watch)) for stage, watch in stages)
    training = Training(schedule, begun.student, begun.teacher, begun.data, begun.config)
    try:
        for _ in training.run():
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return watches


@real_card
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_no_step_waits_for_the_card(name: str, precision: str) -> None:
    assert all(len(watch.seen) == watch.steps >= 6 for watch in watched(name, precision))


@real_card
def test_a_step_that_waits_is_found() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"):
        watched("scratch", "float32", looks=True)


@real_card
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_of_recorded_steps_is_the_run_without(name: str, precision: str) -> None:
    found = [list(runs.whole_stages(name, DEVICE, precision, replay=replay).run()) for replay in (False, True)]
    distance = runs.apart(*map(runs.losses, found))
    print(f"{name}: {distance:.1e} from the run without graphs")
    assert distance <= runs.carries(name, precision)


class Guarded(Training):
    """Forbids to wait for the card from a stage's fifth step on, the first after the recording, but for an epoch's last step."""

    guarded = 0

    def _step(self, updates: Any, images: Tensor, labels: Tensor) -> Any:
        guard = self.step - updates.running.start > WARM_UP and (self.step + 1) % self.epoch_steps != 0
        self.guarded += guard
        torch.cuda.set_sync_debug_mode("error" if guard else "default")
        return super()._step(updates, images, labels)


@real_card
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_no_recorded_step_waits_for_the_card(name: str, precision: str) -> None:
    training = runs.whole_stages(name, DEVICE, precision, epochs=2.0, replay=True, kind=Guarded)
    try:
        for _ in training.run():
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert training.epoch_steps == 6
    assert training.guarded == len(training.schedule) * (1 + 5)


@real_card
def test_recorded_draws_are_new_at_every_replay_and_follow_the_seed() -> None:
    dropped = Replayed(lambda values: torch.nn.functional.dropout(values, 0.5, training=True))
    values = torch.ones(1000, device=DEVICE)
    for _ in range(WARM_UP + 1):
        dropped(values)
    seen = []
    for _ in range(2):
        torch.cuda.manual_seed(7)
        seen.append([dropped(values).clone() for _ in range(3)])
    assert all(torch.equal(first, second) for first, second in zip(*seen, strict=True))
    assert not any(torch.equal(earlier, later) for earlier, later in pairwise(seen[0]))


@real_card
def test_a_step_that_cannot_be_recorded_is_refused_in_a_line_and_others_go_on() -> None:
    looking = Replayed(lambda values: values * float(values.sum()))
    values = torch.ones(3, device=DEVICE)
    for _ in range(WARM_UP):
        looking(values)
    with pytest.raises(GraphError, match=r"recorded as a CUDA graph must .*--cuda-graphs off"):
        looking(values)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    found = [runs.losses(runs.whole_stages("kd", DEVICE, replay=replay).run()) for replay in (False, True)]
    assert runs.apart(*found) <= runs.carries("kd", "float32")
    torch.nn.functional.dropout(values, 0.5)  # torch refuses draws after such a failure, unless they are renewed


@real_card
def test_a_checkpoint_of_recorded_steps_goes_on_on_the_cpu(tmp_path: Path) -> None:
    first, second = runs.whole_stages("dfkt", DEVICE, replay=True), runs.whole_stages("dfkt", "cpu")
    records, storage = [next(first.run())], Storage(str(tmp_path))
    save_state(storage, first.state())
    state = load_state(storage)
    assert state is not None
    second.load(state)
    records += second.run()
    expected = runs.losses(runs.whole_stages("dfkt", "cpu").run())
    assert runs.apart(runs.losses(records), expected) <= runs.carries("dfkt", "float32")


@pytest.mark.parametrize("name", ["kd", "fitnets", "dfkt"])
@pytest.mark.parametrize("way", ["card to CPU", "CPU to card"])
def test_a_checkpoint_goes_on_on_the_other_device(way: str, name: str, tmp_path: Path) -> None:
    devices = (DEVICE, "cpu") if way == "card to CPU" else ("cpu", DEVICE)
    first, second = (runs.begin(name, device) for device in devices)
    records, storage = [next(first.run())], Storage(str(tmp_path))
    save_state(storage, first.state())
    state = load_state(storage)
    assert state is not None
    second.load(state)

    for key, value in first.student.network.state_dict().items():
        assert torch.equal(second.student.network.state_dict()[key].cpu(), value.cpu()), key
    assert next(second.student.network.parameters()).device.type == devices[1]
    records += second.run()
    check(name, runs.losses(records))


@pytest.mark.parametrize("replay", [False, pytest.param(True, marks=real_card)])
@pytest.mark.parametrize("name", ["kd", "dfkt"])
def test_what_the_teacher_said_is_kept_and_read_again(name: str, replay: bool, tmp_path: Path) -> None:
    keeping = Keeping(str(tmp_path), "study", 10**8, tuple((i, j) for j in range(4) for i in range(j)))
    shares, found = [], []
    for place in (None, keeping, keeping):
        records = list(runs.whole_stages(name, DEVICE, keeping=place, replay=replay and place is not None).run())
        found.append(runs.losses(records))
        shares.append(min(record["kept_share"] for record in records))
    assert shares == [0, 0, 1]
    assert max(runs.apart(losses, found[0]) for losses in found) <= runs.carries(name, "float32")


def processes(tmp_path: Path, name: str, *places: tuple[str, ...]) -> list[list[float]]:
    """Run processes at once, each with its device and what follows, and return their losses."""
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    files = [tmp_path / f"{number}.json" for number in range(len(places))]
    started = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(file), name, *place], env=env)
        for file, place in zip(files, places, strict=True)
    ]
    try:
        assert [process.wait(150) for process in started] == [0] * len(places)
    finally:
        for process in started:
            process.kill()
    found: list[Any] = [json.loads(file.read_text()) for file in files]
    return found


def test_two_processes_on_one_card_at_once_give_what_one_gives(tmp_path: Path) -> None:
    for found in processes(tmp_path, "dfkt", (DEVICE,), (DEVICE,)):
        check("dfkt", found)


@pytest.mark.skipif(DEVICE == "cuda" and CARDS < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("name", ["kd", "similarity", "dfkt"])
def test_two_workers_on_two_cards_give_what_one_gives(name: str, tmp_path: Path) -> None:
    cards = ["cpu"] * 2 if DEVICE == "cpu" else ["cuda:0", "cuda:1"]
    workers = [(card, str(rank), "2", str(tmp_path / "meeting")) for rank, card in enumerate(cards)]
    for found in processes(tmp_path, name, *workers):
        check(name, found)
