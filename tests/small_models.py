"""Small models for the tests of coupled channels, and what is to be found in each of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """Layers by name, and a function of them and the inputs."""

    def __init__(self, forward: Callable[..., Any], **layers: Any):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._function = forward

    def forward(self, *args, **kwargs):
        return self._function(self, *args, **kwargs)


class Case(NamedTuple):
    """A model, its example inputs, how many channels it has to offer, and a reason that it has to give.

    Labels alone offer what is wrong where ``is_found_by_trying``.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    channels: int
    reason: str | None = None
    is_found_by_trying: bool = False


def lines(function, channels=8, reason=None, inputs=8, width=8, trying=False, **layers):
    """Two linear layers over rows of channels, with a function between them."""

    def forward(net, x):
        return net.o(function(net, net.a(x)))

    def make():
        made = {name: layer() for name, layer in layers.items()}
        return Net(forward, a=nn.Linear(6, width), o=nn.Linear(inputs, 3), **made)

    return Case(make, (4, 6), channels, reason, trying)


def images(function, channels=8, reason=None, inputs=8, width=8, trying=False, **layers):
    """Two convolutions with a function between them."""

    def forward(net, x):
        return net.o(function(net, net.a(x)))

    def make():
        made = {name: layer() for name, layer in layers.items()}
        return Net(
            forward, a=nn.Conv2d(3, width, 3, padding=1), o=nn.Conv2d(inputs, 5, 3, padding=1), **made
        )

    return Case(make, (2, 3, 8, 8), channels, reason, trying)


def parameter(*shape):
    """A factory of a parameter."""
    return lambda: nn.Parameter(torch.randn(shape))


def _attention(net, x):
    """Heads of any number, of width 3: the sizes follow the weights."""
    b, n, _ = x.shape
    q, k, v = (layer(x).view(b, n, -1, 3).transpose(1, 2) for layer in (net.q, net.k, net.v))
    return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


def _grouped_queries(net, x):
    b, n, _ = x.shape
    q, k, v = (layer(x).view(b, n, -1, 3).transpose(1, 2) for layer in (net.q, net.k, net.v))
    k, v = (each[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for each in (k, v))
    return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


def _fused_attention(net, x):
    b, n, _ = x.shape
    q, k, v = net.qkv(x).view(b, n, 3, -1, 3).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q @ k.transpose(-2, -1) * 3**-0.5).softmax(-1)
    return net.o((scores @ v).transpose(1, 2).reshape(b, n, -1))


def _tokens(forward, shape=(2, 5, 6), channels=4, reason=None, trying=False, **layers):
    return Case(
        lambda: Net(forward, **{name: make() for name, make in layers.items()}),
        shape,
        channels,
        reason,
        trying,
    )


def linear(*sizes, **options):
    """A factory of a linear layer."""
    return lambda: nn.Linear(*sizes, **options)


def conv(*sizes, **options):
    """A factory of a convolution."""
    return lambda: nn.Conv2d(*sizes, **options)


def _shuffled(x, groups):
    b, _, h, w = x.shape
    return x.view(b, groups, -1, h, w).transpose(1, 2).reshape(b, -1, h, w)


def _written(net, x):
    y = x.clone()
    y[:, 2:5] = y[:, 3:6] * 2
    return y


def _padded(net, x):
    return F.pad(x, (1, 1, 1, 1), mode="circular")


def _weight_norm():
    return torch.nn.utils.weight_norm(nn.Linear(8, 8))


def _mixture(net, x):
    """Two experts, chosen by the values of the input."""
    y = net.a(x)
    chosen = net.gate(y).argmax(-1)
    out = torch.zeros_like(y)
    for i, expert in enumerate((net.e, net.f)):
        rows = torch.where(chosen == i)[0]
        out.index_add_(0, rows, expert(y[rows]))
    return net.o(out)


# By the operation that each of them is about.
CASES: dict[str, Case] = {
    "relu": lines(lambda net, x: x.relu()),
    "in place": lines(lambda net, x: x.relu_().add_(1).mul_(2)),
    "hardswish": images(lambda net, x: F.hardtanh(F.hardswish(x))),
    "clamp where": lines(lambda net, x: torch.where(x > 0, x.clamp(max=3), -x)),
    "masked_fill": lines(lambda net, x: x.masked_fill(x < 0, 0.5)),
    "dropout": lines(lambda net, x: F.dropout(x, 0.5, net.training)),
    "residual": images(lambda net, x: x + net.b(x).relu(), b=conv(8, 8, 3, padding=1)),
    "batch norm": images(lambda net, x: net.n(x).relu(), n=lambda: nn.BatchNorm2d(8)),
    "batch norm without affine": images(
        lambda net, x: net.n(x).sigmoid(), n=lambda: nn.BatchNorm2d(8, affine=False)
    ),
    "batch norm of its own statistics": images(
        lambda net, x: net.n(x), n=lambda: nn.BatchNorm2d(8, track_running_stats=False)
    ),
    "instance norm": images(
        lambda net, x: net.n(x), n=lambda: nn.InstanceNorm2d(8, affine=True), trying=True
    ),
    "group norm": images(
        lambda net, x: net.n(x), channels=0, reason="group norm", n=lambda: nn.GroupNorm(4, 8)
    ),
    "layer norm": lines(
        lambda net, x: net.n(x), 0, "layer norm in the LayerNorm `n`", n=lambda: nn.LayerNorm(8)
    ),
    "rms norm": lines(lambda net, x: net.n(x), 0, "cross", n=lambda: nn.RMSNorm(8)),
    "rms norm by hand": lines(
        lambda net, x: x * (x.pow(2).mean(-1, keepdim=True) + 1).rsqrt(), 0, "its channels cross a mean"
    ),
    "softmax over channels": lines(lambda net, x: x.softmax(-1), 0, "cross a softmax"),
    "softmax over rows": lines(lambda net, x: x.softmax(0)),
    "log_softmax": lines(lambda net, x: x.log_softmax(1), 0, "cross a log_softmax"),
    "logsumexp over rows": lines(lambda net, x: x + x.logsumexp(0, keepdim=True)),
    "cumsum over channels": lines(lambda net, x: x.cumsum(1), 0, "cross a cumsum"),
    "cumsum over rows": lines(lambda net, x: x.cumsum(0)),
    "sort": lines(lambda net, x: x.sort(1).values, 0, "cross a sort"),
    "topk": lines(lambda net, x: x.topk(4, 1).values, 0, "cross a topk", inputs=4),
    "argmax": lines(lambda net, x: x + x.argmax(1, keepdim=True), 0, "cross a argmax"),
    "var_mean over positions": images(lambda net, x: x - torch.var_mean(x, (2, 3), keepdim=True)[1]),
    "vector_norm over channels": lines(
        lambda net, x: x / (1 + torch.linalg.vector_norm(x, dim=1, keepdim=True)),
        0,
        "cross a linalg_vector_norm",
    ),
    "vector_norm over rows": lines(
        lambda net, x: x / (1 + torch.linalg.vector_norm(x, dim=0, keepdim=True))
    ),
    "amax over positions": images(lambda net, x: x * x.amax((2, 3), keepdim=True)),
    "max over positions": images(lambda net, x: x * x.max(2, keepdim=True).values),
    "sum of all": lines(lambda net, x: x + x.sum(), 0, "cross a sum"),
    "maximum": lines(lambda net, x: torch.max(x, net.b(x)), b=linear(8, 8)),
    "maxout": lines(lambda net, x: x.view(4, -1, 2).amax(-1), channels=4, inputs=4),
    "flip": images(lambda net, x: x.flip(1)),
    "roll": lines(lambda net, x: x.roll(3, 1), 0, "size", trying=True),
    "roll of all": lines(lambda net, x: x.roll(3), 0, "rolled over all dims"),
    "permute": images(lambda net, x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2)),
    "t": lines(lambda net, x: x.t().relu().t()),
    "unsqueeze squeeze": lines(
        lambda net, x: x.unsqueeze(1).expand(-1, 3, -1).sum(1).unsqueeze(0).squeeze(0)
    ),
    "repeat": lines(lambda net, x: x.repeat(1, 2), inputs=16),
    "repeat of rows": lines(lambda net, x: x.repeat(3, 1)),
    "every second channel": lines(
        lambda net, x: x[:, ::2], channels=0, reason="size", inputs=4, trying=True
    ),
    "one channel": lines(lambda net, x: x + x[:, 2:3], 0, "size", trying=True),
    "select": lines(lambda net, x: x + x[:, 2].unsqueeze(1), 0, "size", trying=True),
    "split in two": lines(lambda net, x: torch.cat(x.chunk(2, 1)[::-1], 1), 0, "size", trying=True),
    "gated": lines(lambda net, x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid(), channels=4, inputs=4),
    "glu": lines(lambda net, x: F.glu(x), channels=4, inputs=4),
    "unbind": lines(lambda net, x: torch.stack(x.view(4, 2, -1).unbind(1), 1).flatten(1), 4),
    "cat": lines(lambda net, x: torch.cat([x, net.b(x)], 1), channels=12, inputs=12, b=linear(8, 4)),
    "cat with constants": lines(lambda net, x: torch.cat([x, x.new_zeros(4, 2)], 1), inputs=10),
    "stack": lines(lambda net, x: torch.stack([x, x.relu()], 2).flatten(1), inputs=16),
    "pad of channels": lines(lambda net, x: F.pad(x, (1, 2)), inputs=11),
    "reflection pad": images(lambda net, x: F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "circular pad": images(_padded),
    "pixel shuffle": images(lambda net, x: F.pixel_shuffle(x, 2), channels=2, inputs=2),
    "pixel unshuffle": images(lambda net, x: F.pixel_unshuffle(x, 2), inputs=32),
    "channel shuffle": images(lambda net, x: F.channel_shuffle(x, 2), channels=4, trying=True),
    "shuffle by views": images(lambda net, x: _shuffled(x, 2), channels=4, trying=True),
    "unfold": images(lambda net, x: F.unfold(x, 3, padding=1).view(2, -1, 8, 8), inputs=72),
    "index by constants": lines(
        lambda net, x: x[:, torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])], channels=0, reason="size", trying=True
    ),
    "index_select": lines(
        lambda net, x: torch.cat([x, x.index_select(1, torch.tensor([0, 2, 4]))], 1),
        inputs=11,
        channels=0,
        reason="size",
        trying=True,
    ),
    "index by inputs": lines(lambda net, x: x[:, x[0].argsort()], 0, "cross"),
    "gather": lines(lambda net, x: x.gather(1, (x > 0).long()), 0, "used as indices"),
    "rows by index": lines(lambda net, x: x[torch.tensor([2, 0])]),
    "scatter": lines(
        lambda net, x: x.scatter(1, torch.tensor([[0], [1], [2], [3]]), 1.0), 0, "written by index"
    ),
    "index_add": lines(lambda net, x: torch.zeros_like(x).index_add(0, torch.tensor([1, 0, 3, 2]), x)),
    "written in part": lines(_written, channels=0, reason="size", trying=True),
    "written into zeros": lines(lambda net, x: x.new_zeros(4, x.shape[1]).copy_(x)),
    "as_strided": lines(
        lambda net, x: x.as_strided((4, 8), (8, 1)), channels=0, reason="size", trying=True
    ),
    "tril": lines(lambda net, x: x.tril(), 0, "triangle"),
    "read by Python": lines(lambda net, x: x * x.sum().item(), 0, "cross a sum"),
    "flatten": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 5)
        ),
        (2, 3, 8, 8),
        8,
    ),
    "pools": images(lambda net, x: F.interpolate(F.avg_pool2d(F.max_pool2d(x, 2), 2), scale_factor=4)),
    "bilinear": images(lambda net, x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "adaptive pool": images(lambda net, x: x * F.adaptive_avg_pool2d(x, 1)),
    "squeeze and excite": images(
        lambda net, x: x * net.f(net.e(x.mean((2, 3), keepdim=True)).relu()).sigmoid(),
        channels=12,
        e=conv(8, 4, 1),
        f=conv(4, 8, 1),
    ),
    "depthwise": images(lambda net, x: net.d(x), d=conv(8, 8, 3, padding=1, groups=8)),
    "depthwise with a multiplier": images(
        lambda net, x: net.d(x), inputs=16, d=conv(8, 16, 3, padding=1, groups=8)
    ),
    "grouped": images(lambda net, x: net.d(x), channels=8, d=conv(8, 8, 3, padding=1, groups=2)),
    "transposed": images(
        lambda net, x: net.d(x), channels=12, inputs=4, d=lambda: nn.ConvTranspose2d(8, 4, 2, 2)
    ),
    "transposed grouped": images(
        lambda net, x: net.d(x), channels=6, inputs=4, d=lambda: nn.ConvTranspose2d(8, 4, 2, 2, groups=2)
    ),
    "transposed depthwise": images(
        lambda net, x: net.d(x), d=lambda: nn.ConvTranspose2d(8, 8, 2, 2, groups=8)
    ),
    "one dim": Case(
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.AvgPool1d(2), nn.Conv1d(8, 4, 3)),
        (2, 3, 16),
        8,
    ),
    "three dims": Case(
        lambda: nn.Sequential(nn.Conv3d(2, 8, 3), nn.BatchNorm3d(8), nn.MaxPool3d(2), nn.Conv3d(8, 4, 1)),
        (2, 2, 8, 8, 8),
        8,
    ),
    "prelu": images(lambda net, x: net.p(x), p=lambda: nn.PReLU(8)),
    "prelu of one": images(lambda net, x: net.p(x), p=lambda: nn.PReLU()),
    "layer scale": images(lambda net, x: x + net.b(x) * net.s, b=conv(8, 8, 1), s=parameter(8, 1, 1)),
    "bias of all": lines(lambda net, x: x + net.s, s=parameter(8)),
    "constants": lines(lambda net, x: x * torch.arange(8.0, dtype=x.dtype), 0, "without channels"),
    "matmul of channels": lines(lambda net, x: x @ net.w, channels=16, w=parameter(8, 8)),
    "einsum": lines(lambda net, x: torch.einsum("bi,oi->bo", x, net.w), channels=16, w=parameter(8, 8)),
    "mv dot": lines(lambda net, x: x * (x @ net.w)[:, None], w=parameter(8)),
    "bilinear layer": lines(lambda net, x: net.b(x, x), 0, "_trilinear", b=lambda: nn.Bilinear(8, 8, 8)),
    "shared layer": lines(lambda net, x: net.b(net.b(x).relu()), b=linear(8, 8)),
    "size in the code": lines(lambda net, x: x / x.shape[1] ** 0.5, 0, "size", trying=True),
    "view of a number": lines(lambda net, x: x.view(-1, 8), 0, "size", trying=True),
    "view over fewer": lines(lambda net, x: x.view(-1, 2, 4).flatten(1), 0, "size", trying=True),
    "fft": lines(lambda net, x: torch.fft.fft(x).real, 0, "_fft_r2c"),
    "cdist": lines(
        lambda net, x: torch.cdist(x, x).expand(4, 4).sum(1, keepdim=True) + x, 0, "does not know"
    ),
    "embedding": Case(
        lambda: Net(
            lambda net, x: net.o(net.e((x > 0).long()).mean(1)), e=nn.Embedding(2, 8), o=nn.Linear(8, 3)
        ),
        (4, 6),
        8,
    ),
    "weight norm": lines(lambda net, x: net.b(x), reason="cross the norm of a weight", b=_weight_norm),
    "lstm": _tokens(
        lambda net, x: net.o(net.a(x)[0]),
        a=lambda: nn.LSTM(6, 8, batch_first=True),
        o=linear(8, 3),
        channels=8,
    ),
    "gru": _tokens(
        lambda net, x: net.o(net.a(x)[0]),
        a=lambda: nn.GRU(6, 8, batch_first=True),
        o=linear(8, 3),
        channels=8,
    ),
    "lstm behind a layer": _tokens(
        lambda net, x: net.o(net.b(net.a(x))[0]),
        a=linear(6, 8),
        b=lambda: nn.LSTM(8, 4, batch_first=True),
        o=linear(4, 3),
        channels=12,
    ),
    "attention": _tokens(_attention, q=linear(6, 12), k=linear(6, 12), v=linear(6, 12), o=linear(12, 5)),
    "grouped queries": _tokens(
        _grouped_queries, q=linear(6, 12), k=linear(6, 6), v=linear(6, 6), o=linear(12, 5), channels=2
    ),
    "fused attention": _tokens(_fused_attention, qkv=linear(6, 36), o=linear(12, 5)),
    "encoder layer": Case(
        lambda: nn.TransformerEncoderLayer(12, 4, 8, batch_first=True), (2, 5, 12), 8, "size", True
    ),
    "mixture of experts": Case(
        lambda: Net(
            _mixture,
            a=nn.Linear(6, 8),
            gate=nn.Linear(8, 2),
            e=nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8)),
            f=nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8)),
            o=nn.Linear(8, 3),
        ),
        (9, 6),
        16,
        "cross a argmax",
    ),
}
