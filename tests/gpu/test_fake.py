"""What a card would refuse, seen without one: every tensor says that it lies on CUDA, has a shape, and no values.

Autograd asks for the card's own context, which is not there, so nothing here goes backwards; `test_pretended.py` does.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import synthetic_images
from small_runs import METHODS, RESNET, ROUNDS, build
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from dfkt.data.batches import eval_batches, random_areas, random_crops, random_flips
from dfkt.data.image_set import ImageSet, Split
from dfkt.methods.base import Features, Method, Term
from dfkt.methods.dfkt import Dfkt, FlowTerm
from dfkt.methods.flow import FLOW_NORMS
from dfkt.methods.matrices import fsp_matrices
from dfkt.networks.build import network_taps
from dfkt.networks.tapped import FrozenTeacher, TappedNetwork
from dfkt.networks.taps import StudentTaps
from dfkt.training.average import WeightAverage

CARD = torch.device("cuda", 0)
BATCH = 6
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card: its own tests say more")
EVERY: dict[str, Method] = METHODS | {"rounds, frozen": ROUNDS}
EVERY |= {f"dfkt, {norm}": Dfkt(pattern="dense", order="joint", norm=norm) for norm in FLOW_NORMS}


@dataclass(frozen=True, kw_only=True)
class Leaving(Term):
    """A term that leaves a constant on the CPU."""

    name = "leaving"
    student_logits = True

    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:
        """Return the mean of the logits, each weighed."""
        assert student.logits is not None
        return (student.logits * torch.ones(student.logits.shape[1])).mean()


@dataclass(frozen=True, kw_only=True)
class Looking(Leaving):
    """A term that looks at a value."""

    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:
        """Return the mean of the logits where it is positive."""
        assert student.logits is not None
        return student.logits.mean() if bool(student.logits.sum() > 0) else student.logits.sum()


@pytest.fixture(scope="module")
def networks() -> tuple[TappedNetwork, FrozenTeacher]:
    """A student and its teacher, on the CPU, with every part that a stage reads cut from them."""
    data = synthetic_images()
    pair = build(RESNET, data, seed=1), build(RESNET, data, seed=2)
    student, teacher = (
        kind(network, network_taps(network, RESNET), data.shape)
        for kind, network in zip((TappedNetwork, FrozenTeacher), pair, strict=True)
    )
    assert isinstance(teacher, FrozenTeacher)
    return student, teacher


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    """While it lasts, tensors have no values, and may lie on a card."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        yield mode


def on_card(mode: FakeTensorMode, value: Tensor) -> Tensor:
    """Return a tensor of the same shape and layout that says that it lies on the card."""
    return mode.from_tensor(value).to(CARD)


def carded(mode: FakeTensorMode, data: ImageSet) -> ImageSet:
    """Return an image set on the card."""
    padded, val = (Split(on_card(mode, s.images), on_card(mode, s.labels)) for s in (data.padded, data.val))
    return replace(data, padded=padded, val=val, mean=on_card(mode, data.mean), std=on_card(mode, data.std))


def forward(mode: FakeTensorMode, network: TappedNetwork, taps: tuple[int, ...], logits: bool) -> dict[str, Tensor]:
    """Return what a part of a network gives for a batch on the card."""
    part = network.part(taps, logits)
    state = {name: on_card(mode, value) for name, value in (*part.named_parameters(), *part.named_buffers())}
    images = torch.empty(BATCH, 1, 8, 8, device=CARD).contiguous(memory_format=torch.channels_last)
    found: dict[str, Tensor] = torch.func.functional_call(part, state, (images,))
    return found


def features(outputs: dict[str, Tensor]) -> Features:
    return Features({int(k): v for k, v in outputs.items() if k != "logits"}, outputs.get("logits"))


def both(mode: FakeTensorMode, networks: tuple[TappedNetwork, FrozenTeacher], term: Term) -> tuple[Features, Features]:
    """Return what a term reads of the teacher and of the student."""
    student, teacher = networks
    with torch.inference_mode():
        asked = term.taps, term.teacher_logits
        theirs = forward(mode, teacher, *asked) if any(asked) else {}
    return features(theirs), features(forward(mode, student, term.taps, term.student_logits))


def terms(method: Method, networks: tuple[TappedNetwork, FrozenTeacher]) -> list[Term]:
    taps = StudentTaps.of(networks[0].taps, networks[1].taps)
    return [term for stage in method.schedule(60, taps) for term in stage.terms]


@pytest.mark.parametrize("name", EVERY)
def test_every_term_of_every_method_stays_on_the_card(fake, networks, name):
    labels = torch.empty(BATCH, dtype=torch.int64, device=CARD)
    for term in terms(EVERY[name], networks):
        teacher, student = both(fake, networks, term)

        loss = term(teacher, student, labels)

        assert isinstance(loss, FakeTensor)
        assert (loss.device, loss.shape, loss.requires_grad) == (CARD, (), True)


@pytest.mark.parametrize("norm", FLOW_NORMS)
def test_a_flow_loss_takes_kept_matrices_on_the_card(fake, networks, norm):
    (term,) = [t for t in terms(Dfkt(order="joint", norm=norm), networks) if isinstance(t, FlowTerm)]
    teacher, student = both(fake, networks, term)
    kept = Features({}, None, fsp_matrices(teacher.taps, term.pairs))

    assert term(kept, student, torch.empty(BATCH, dtype=torch.int64, device=CARD)).device == CARD


def test_a_constant_that_was_left_on_the_cpu_is_refused(fake, networks):
    teacher, student = both(fake, networks, Leaving())
    with pytest.raises(RuntimeError, match=r"cuda:0.*cpu|cpu.*cuda:0"):
        Leaving()(teacher, student, torch.empty(BATCH, dtype=torch.int64, device=CARD))


def test_a_look_at_a_value_is_refused(fake, networks):
    teacher, student = both(fake, networks, Looking())
    with pytest.raises(DataDependentOutputException):
        Looking()(teacher, student, torch.empty(BATCH, dtype=torch.int64, device=CARD))


def test_crops_flips_and_moments_stay_on_the_card(fake):
    data = carded(fake, synthetic_images(channels=3, padding=2))
    chosen, top, left = torch.empty(3, BATCH, dtype=torch.int64, device=CARD)
    flip = torch.empty(BATCH, dtype=torch.bool, device=CARD)

    crops = random_flips(random_crops(data.padded.images, data.image_size, chosen, top, left), flip)
    areas = random_areas(data.padded.images.index_select(0, chosen), torch.empty(BATCH, 4, device=CARD))
    images = data.normalise(crops)

    assert [t.device for t in (crops, areas, images)] == [CARD] * 3
    assert (crops.shape, crops.dtype) == ((BATCH, 8, 8, 3), torch.uint8)
    assert images.shape == (BATCH, 3, 8, 8)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_images_that_are_judged_stay_on_the_card(fake):
    data = carded(fake, synthetic_images())
    for images, labels in eval_batches(data, data.val, 16):
        assert (images.device, labels.device) == (CARD, CARD)


def test_moments_that_were_left_on_the_cpu_are_refused(fake):
    data = carded(fake, synthetic_images())
    wrong = replace(data, mean=torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"cuda:0.*cpu|cpu.*cuda:0"):
        wrong.normalise(data.val.images)


def test_the_optimizer_and_the_average_of_the_weights_stay_on_the_card(fake):
    network = torch.nn.Linear(3, 5, device=CARD)
    average = WeightAverage(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, foreach=True)
    for parameter in network.parameters():
        parameter.grad = torch.empty_like(parameter)
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    average.update()

    held = [*average.ours, *(state["momentum_buffer"] for state in optimizer.state.values())]
    assert {tensor.device for tensor in held} == {CARD}


def test_backwards_asks_for_the_cards_own_context(fake):
    """The day on which this fails, the backward passes can be tested here too."""
    weight = torch.empty(3, device=CARD, requires_grad=True)
    with pytest.raises(RuntimeError, match="device"):
        (weight * 2).sum().backward()
