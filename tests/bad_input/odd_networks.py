"""Networks as users write them by mistake, and some that only look like one."""

from typing import Any

import torch
from torch import Tensor, nn


class Plain(nn.Module):
    """Three taps, as a user's network has them; what is derived from it has one fault."""

    taps = ("low", "middle", "high")

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(in_channels, 4, 3, padding=1), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6), nn.ReLU())
        self.high = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1, stride=2), nn.ReLU())
        self.fc = nn.Linear(8, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Return ``[B, 8]``."""
        high: Tensor = self.high(self.middle(self.low(images)))
        return high.mean((2, 3))

    def forward(self, images: Tensor) -> Any:  # noqa: D102
        return self.fc(self.features(images))


class Two(Plain):
    """Returns logits twice."""

    def forward(self, images: Tensor) -> Any:  # noqa: D102
        logits = super().forward(images)
        return logits, logits


class Named(Plain):
    """Returns a dict."""

    def forward(self, images: Tensor) -> Any:  # noqa: D102
        return {"logits": super().forward(images)}


class TwoInTraining(Plain):
    """Returns logits twice, but only in training mode."""

    def forward(self, images: Tensor) -> Any:  # noqa: D102
        logits = super().forward(images)
        return (logits, logits) if self.training else logits


class More(Plain):
    """Has a logit too many."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes + 1, in_channels)


class Spatial(Plain):
    """Returns ``[B, C, 1, 1]``."""

    def forward(self, images: Tensor) -> Any:  # noqa: D102
        return super().forward(images)[:, :, None, None]


class Squeezed(Plain):
    """Loses the batch's dimension where there is one image."""

    def forward(self, images: Tensor) -> Any:  # noqa: D102
        return super().forward(images).squeeze(0)


class Whole(Plain):
    """Returns numbers of classes, not logits."""

    def forward(self, images: Tensor) -> Any:  # noqa: D102
        return super().forward(images).argmax(1)


class Long(Plain):
    """Returns logits of double precision, whatever it is given."""

    def forward(self, images: Tensor) -> Any:  # noqa: D102
        return super().forward(images).double()


class Single(Plain):
    """Returns logits of single precision, whatever it is given."""

    def forward(self, images: Tensor) -> Any:  # noqa: D102
        return super().forward(images).float()


class Frozen(Plain):
    """Nothing of it learns."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        self.requires_grad_(False)


class Detached(Plain):
    """No gradient reaches a weight."""

    def forward(self, images: Tensor) -> Any:  # noqa: D102
        return super().forward(images).detach()


class Weightless(nn.Module):
    """Has no weights at all."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.classes = num_classes

    def forward(self, images: Tensor) -> Any:  # noqa: D102
        return images.flatten(1)[:, : self.classes]


class Nan(Plain):
    """Divides zero by zero."""

    def forward(self, images: Tensor) -> Any:  # noqa: D102
        logits = super().forward(images)
        return logits / (logits - logits)


class Overwriting(Plain):
    """Changes the images that it is given."""

    def forward(self, images: Tensor) -> Any:  # noqa: D102
        return super().forward(images.mul_(2))


class BrokenGradient(Plain):
    """Overwrites what its gradient needs."""

    def forward(self, images: Tensor) -> Any:  # noqa: D102
        middle = self.middle(self.low(images)).sigmoid()
        high = self.high(middle)
        middle.zero_()
        return self.fc(high.mean((2, 3)))


class Raising(Plain):
    """Raises what its forward pass is made to raise."""

    error: BaseException = KeyError("no such thing")

    def forward(self, images: Tensor) -> Any:  # noqa: D102
        raise self.error


class Leaving(Raising):
    """Ends the program."""

    error = SystemExit(0)


class Branching(Plain):
    """Does something else where its images are bright."""

    def forward(self, images: Tensor) -> Any:  # noqa: D102
        logits = super().forward(images)
        return logits if bool(logits.mean() > 0) else 2 * logits


class Leading(Plain):
    """Ends the program where its control flow meets a stand-in for a tensor."""

    def forward(self, images: Tensor) -> Any:  # noqa: D102
        if not isinstance(images, Tensor):
            raise SystemExit(3)
        return super().forward(images)


class Counting(Plain):
    """Is another network at every call."""

    calls = 0

    def features(self, images: Tensor) -> Tensor:  # noqa: D102
        self.calls += 1
        return super().features(images * self.calls)


class Noisy(Plain):
    """Draws noise, in training mode, that a trace takes for a constant."""

    def features(self, images: Tensor) -> Tensor:  # noqa: D102
        return super().features(images * torch.rand(()) if self.training else images)


class Uncopied(Plain):
    """Cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("there is only one of it")


class Idle(Plain):
    """Has weights that nothing reads."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        self.idle = nn.Linear(3, 3)


class Double(Plain):
    """Has weights of double precision."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        self.double()


class Half(Plain):
    """Has weights of half precision."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        self.half()


class Lazy(Plain):
    """Finds out its shapes only when it is run."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        self.fc = nn.LazyLinear(num_classes)


class Spectral(Plain):
    """Has weights that follow from others, and change with every pass in training mode."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        self.middle[0] = nn.utils.parametrizations.spectral_norm(self.middle[0])
        self.drop = nn.Dropout(0.5)

    def features(self, images: Tensor) -> Tensor:  # noqa: D102
        dropped: Tensor = self.drop(super().features(images))
        return dropped


def made(kind: type[Plain] = Plain, *, num_classes: int, in_channels: int) -> nn.Module:
    """Return a network, by a function whose arguments have names only."""
    return kind(num_classes, in_channels)


def wanting(num_classes: int, in_channels: int, depth: int) -> nn.Module:
    """Want an argument that nobody gives."""
    return Plain(num_classes + depth, in_channels)


def raising(num_classes: int) -> nn.Module:
    """Raise, as a constructor may."""
    raise ZeroDivisionError(f"{num_classes} classes\nare too many")


def leaving() -> nn.Module:
    """End the program, as a script's own error handling may."""
    raise SystemExit("this network needs a licence")


def nothing() -> None:
    """Return no network."""
