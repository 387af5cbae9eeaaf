"""Networks as the loop reads them: at taps, cut off behind the highest one; the teacher frozen, the student adapted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dfkt.networks.cut import cut, parameters_below
from dfkt.networks.fold import fold_batchnorm
from dfkt.networks.taps import Tap, measure_taps


class TappedNetwork:
    """A network with its taps, and the parts of it that end at some of them, each cut once and kept.

    Args:
        network: Shared with the parts.
        names: Module paths of the taps, from bottom to top. Without any, nothing is measured, and the network may be
            one that no tap could be read from.
        input_shape: Channels, height and width of an image.

    Raises:
        TapError: As :func:`measure_taps`.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 9, 3))
        >>> TappedNetwork(network, ["1"], (3, 8, 8)).taps
        (Tap(name='1', channels=5, height=6, width=6),)
        >>> TappedNetwork(network, (), (3, 8, 8)).taps
        ()
    """

    def __init__(self, network: nn.Module, names: Sequence[str], input_shape: tuple[int, int, int]) -> None:
        self.network = network
        self.taps: tuple[Tap, ...] = measure_taps(network, names, input_shape)
        """What was measured at ``names``."""
        self._cuts: dict[tuple[tuple[int, ...], bool], nn.Module] = {}

    def part(self, taps: tuple[int, ...], logits: bool) -> nn.Module:
        """Return the part that computes some taps (keys ``"0"``, ``"1"``, …) and, where asked for, the logits.

        Logits alone are the whole network's, which need not be traceable.

        Raises:
            TapError: As :func:`cut`; also if neither taps nor logits are asked for.
        """
        if (taps, logits) not in self._cuts:
            names = {self.taps[tap].name: str(tap) for tap in taps}
            whole = logits and not taps
            part = _WholeNetwork(self.network) if whole else cut(self.network, names, logits=logits)
            self._cuts[taps, logits] = self._joined(part)
        return self._cuts[taps, logits]

    def _joined(self, part: nn.Module) -> nn.Module:
        """Return a part with what stands before it."""
        return part

    def below(self, tap: int) -> frozenset[str]:
        """Return the names of the parameters that a tap's activation depends on."""
        return parameters_below(self.network, self.taps[tap].name)


class FrozenTeacher(TappedNetwork):
    """A copy for inference: evaluation mode, batch norms folded into the convolutions, no gradient, ever.

    Args:
        network: Left as it is.
        names: Module paths of the taps, from bottom to top; none for what is read at its logits only.
        input_shape: Channels, height and width of an image.
        first: What images go through before the network and every part of it; not folded into a convolution, which
            would be another network where zeros are padded. ``None`` is nothing.

    Raises:
        TapError: As :func:`measure_taps`.
    """

    def __init__(
        self,
        network: nn.Module,
        names: Sequence[str],
        input_shape: tuple[int, int, int],
        first: nn.Module | None = None,
    ) -> None:
        folded = fold_batchnorm(network, names).to(memory_format=torch.channels_last)
        super().__init__(folded, names, input_shape)
        self._first = first

    def state(self) -> dict[str, Tensor]:
        """Return all numbers that its answers depend on, by name."""
        first = {} if self._first is None else self._first.state_dict(prefix="first.")
        return {**self.network.state_dict(), **first}

    def _joined(self, part: nn.Module) -> nn.Module:
        return part if self._first is None else nn.Sequential(self._first, part)


class Renormalise(nn.Module):
    """Images of one normalisation -> the same images by another, channel by channel.

    ``(x * of_std + of_mean - mean) / std``, as one product and one sum, whose factors are float64 until the module is
    cast. What was black stays black: the zeros that crops run into were there before the first normalisation.

    Args:
        of_mean: ``[C]``, by which the images that come were normalised, in units of 0..1; ``of_std`` likewise.
        of_std: ``[C]``.
        mean: ``[C]`` or ``[1]``, by which they are normalised when they go; ``std`` likewise.
        std: ``[C]`` or ``[1]``.

    Example:
        >>> first = Renormalise(torch.tensor([0.2]), torch.tensor([0.1]), torch.tensor([0.5]), torch.tensor([0.25]))
        >>> first.float()(torch.tensor([[[[3.0]]]]))  # 0.5 in 0..1
        tensor([[[[0.]]]])
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, of_mean: Tensor, of_std: Tensor, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        of_mean, of_std, mean, std = (values.double() for values in (of_mean, of_std, mean, std))
        for name, values in (("scale", of_std / std), ("shift", (of_mean - mean) / std)):
            self.register_buffer(name, values[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Return ``[B, C, H, W]`` by the other normalisation, laid out as the images are."""
        return images * self.scale + self.shift


class _WholeNetwork(nn.Module):
    """A network that is read at its logits only; needs no graph."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the logits under the key of cut networks."""
        return {"logits": self.network(images)}


class AdaptedNetwork(nn.Module):
    """A part of the student with 1x1 convolutions behind the taps whose channels differ from the teacher's."""

    def __init__(self, part: nn.Module, adapters: nn.ModuleDict) -> None:
        super().__init__()
        self.part, self.adapters = part, adapters

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return activations by tap, adapted, and logits."""
        outputs = self.part(images)
        return {key: self.adapters[key](out) if key in self.adapters else out for key, out in outputs.items()}
