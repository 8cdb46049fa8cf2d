"""Random networks of known operations: what is offered can always go, and little is refused that could."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lnprune
from tests.test_coupling import difference


class Steps(nn.Module):
    """Layers and functions one after another; each function gets the module that it asked for."""

    def __init__(self, seed):
        super().__init__()
        self.layers = nn.ModuleList()
        self.functions = []
        self.names = []
        self._draw = random.Random(seed)
        width = self._conv(3, self._draw.choice([4, 6, 8, 12]))
        for _ in range(self._draw.randint(2, 7)):
            name = self._draw.choice(sorted(STEPS))
            self.names.append(name)
            width = STEPS[name](self, width)
        self._conv(width, 5)

    def add(self, layers, function):
        """A function of the inputs and these layers."""
        first = len(self.layers)
        self.layers.extend(layers)
        self.functions.append((function, range(first, first + len(layers))))

    def _conv(self, width, out, **options):
        self.add([nn.Conv2d(width, out, 1, **options)], lambda x, conv: conv(x))
        return out

    def choose(self, *values):
        return self._draw.choice(values)

    def forward(self, x):
        for function, indices in self.functions:
            x = function(x, *(self.layers[i] for i in indices))
        return x


STEPS = {}


def step(function):
    STEPS[function.__name__] = function
    return function


def same_width(name, make, *layers):
    """A step that keeps the number of channels."""

    def put(net, width):
        net.add([layer(width) for layer in layers], make)
        return width

    STEPS[name] = put


def conv1(width):
    return nn.Conv2d(width, width, 1)


same_width("relu", lambda x: x.relu())
same_width("sigmoid", lambda x: x.sigmoid())
same_width("in_place", lambda x: x.clone().mul_(2).add_(1))
same_width("batch_norm", lambda x, n: n(x), nn.BatchNorm2d)
same_width("batch_norm_plain", lambda x, n: n(x), lambda width: nn.BatchNorm2d(width, affine=False))
same_width("instance_norm", lambda x, n: n(x), lambda width: nn.InstanceNorm2d(width, affine=True))
same_width("group_norm", lambda x, n: n(x), lambda width: nn.GroupNorm(2, width))
same_width("prelu", lambda x, p: p(x), nn.PReLU)
same_width("residual", lambda x, c: x + c(x).relu(), conv1)
same_width("product", lambda x, c, d: c(x) * d(x).sigmoid(), conv1, conv1)
same_width("maximum", lambda x, c: torch.maximum(x, c(x)), conv1)
same_width(
    "depthwise", lambda x, c: c(x), lambda width: nn.Conv2d(width, width, 3, padding=1, groups=width)
)
same_width("grouped", lambda x, c: c(x), lambda width: nn.Conv2d(width, width, 1, groups=2))
same_width("excite", lambda x, c, d: x * d(c(x.mean((2, 3), True)).relu()).sigmoid(), conv1, conv1)
same_width("shared", lambda x, c: c(c(x).relu()), conv1)
same_width("flip", lambda x: x.flip(1))
same_width("permute", lambda x: x.permute(0, 2, 3, 1).tanh().permute(0, 3, 1, 2))
same_width("linear", lambda x, o: o(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), lambda w: nn.Linear(w, w))
same_width("positions", lambda x: x.flatten(2).softmax(-1).view_as(x))
same_width("channel_softmax", lambda x: x.softmax(1))
same_width("centred", lambda x: x - x.mean((2, 3), True))
same_width("channel_mean", lambda x: x - x.mean(1, True))
same_width("pool", lambda x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2))
same_width("circular", lambda x: F.pad(x, (1, 1, 1, 1), mode="circular")[:, :, 1:-1, 1:-1])
same_width("roll", lambda x: x.roll(1, 1))
same_width("shuffle", lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))
same_width("swap", lambda x: torch.cat(x.chunk(2, 1)[::-1], 1))
same_width("divided", lambda x: x / x.shape[1])
same_width(
    "weight_norm", lambda x, c: c(x), lambda width: nn.utils.parametrizations.weight_norm(conv1(width))
)
same_width("read_channel", lambda x: x + x[:, 1:2])


@step
def conv(net, width):
    out = net.choose(4, 6, 8)
    net.add([nn.Conv2d(width, out, 3, padding=1)], lambda x, c: c(x))
    return out


@step
def transposed(net, width):
    out = net.choose(4, 6)
    net.add([nn.ConvTranspose2d(width, out, 1)], lambda x, c: c(x))
    return out


@step
def gated(net, width):
    net.add([nn.Conv2d(width // 2, 4, 1)], lambda x, c: c(x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid()))
    return 4  # an even number again


@step
def cat(net, width):
    net.add([nn.Conv2d(width, 4, 1)], lambda x, c: torch.cat([x, c(x)], 1))
    return width + 4


@step
def twice(net, width):
    net.add([], lambda x: torch.cat([x, x.relu()], 1))
    return 2 * width


@step
def every_second(net, width):
    net.add([nn.Conv2d(width // 2, 4, 1)], lambda x, c: c(x[:, ::2]))
    return 4


@step
def pixel_unshuffle(net, width):
    net.add(
        [nn.Conv2d(4 * width, 4, 1)],
        lambda x, c: F.interpolate(c(F.pixel_unshuffle(x, 2)), scale_factor=2.0),
    )
    return 4


@step
def unfolded(net, width):
    net.add(
        [nn.Conv2d(9 * width, 4, 1)], lambda x, c: c(F.unfold(x, 3, padding=1).unflatten(2, x.shape[2:]))
    )
    return 4


def fuzzed(seed):
    """How many channels can go each group by itself, as labels offer, and how many the trial refuses."""
    torch.manual_seed(seed)
    net = Steps(seed).double().eval()
    for tensor in [*net.parameters(), *net.buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.3, 1.0)
            if tensor.dim() > 1:
                tensor.data.mul_(torch.randint(2, tensor.shape) * 2 - 1)
    inputs = (torch.randn(2, 3, 4, 4, dtype=torch.float64),)
    offered = lnprune.couple(net, inputs)
    for draw in range(3):
        if offered.groups:
            assert difference(net, offered.groups, inputs, draw) < 1e-9, f"{seed}: {net.names}\n{offered}"
    right = refused = 0
    taken = {(m.name, m.dim) for group in offered.groups for m in group.members}
    for group in lnprune.couple(net, inputs, check=False).groups:
        try:
            is_right = all(difference(net, [group], inputs, draw) < 1e-9 for draw in range(6))
        except (AssertionError, RuntimeError, ValueError, IndexError):
            is_right = False
        if is_right and group.channels > 1:
            right += group.channels
            if not any((m.name, m.dim) in taken for m in group.members):
                refused += group.channels
    return right, refused


def check_fuzzed(seeds):
    counts = [fuzzed(seed) for seed in seeds]
    right, refused = (sum(each) for each in zip(*counts, strict=True))
    assert right > 4 * len(counts)
    assert refused <= 0.05 * right


def test_random_networks():
    check_fuzzed(range(20))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 2000, 100))
def test_many_random_networks(start):
    check_fuzzed(range(start, start + 100))
