"""Tensors of more than 2**31 elements: norms, masks, weights, zeros beyond the reach of 32-bit indices."""

import cases
import pytest
import torch

from lnprune import ops

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("device", cases.DEVICES, scope="module")]

DTYPE = torch.float8_e5m2
# 2**31 + 98,305 elements: the last row starts beyond 2**31.
ROWS, COLUMNS = 32_769, 65_537


@pytest.fixture(scope="module")
def matrix(device):
    """Random bytes of finite float8 values, repeated every 1,021 rows, but for the last rows."""
    tile = cases.random_values((1021, COLUMNS), DTYPE, device).view(torch.uint8)
    tensor = torch.empty(ROWS, COLUMNS, dtype=torch.uint8, device=device)
    for start in range(0, ROWS, 1021):
        tensor[start : start + 1021] = tile[: ROWS - start]
    tensor = tensor.view(DTYPE)
    assert tensor.numel() > 2**31
    # The very last elements matter: an infinity and, in the row before, a NaN.
    tensor[-1, -1] = cases.INFINITY
    tensor[-2, -2] = cases.NAN
    return tensor


def some(channels):
    """A few channels from the first to the last."""
    return [0, 1, channels // 2, channels - 3, channels - 2, channels - 1]


@pytest.mark.parametrize("n", [0, 2, cases.INFINITY])
@pytest.mark.parametrize("dim", [0, 1])
def test_norms(dim, n, matrix, device):
    (norms,) = ops.channel_norms([matrix], [dim], float(n))
    chosen = some(matrix.shape[dim])
    slices = torch.stack([matrix.select(dim, c).view(torch.uint8) for c in chosen]).view(DTYPE)
    cases.assert_norms_close(norms[chosen], cases.exact_norms(slices, n, 0), n)


@pytest.mark.parametrize("dim", [0, 1])
def test_masks_and_weights(dim, matrix, device):
    channels = matrix.shape[dim]
    keep = torch.ones(channels, dtype=torch.bool, device=device)
    pruned = some(channels)[1::2]
    keep[pruned] = False
    (mask,), (weight,) = ops.write_masks([keep], [matrix], [], [matrix], [dim])
    assert mask.shape == weight.shape == matrix.shape
    for channel in {*some(channels), *range(channels - 40, channels)}:
        values = matrix.select(dim, channel).contiguous()
        flag = torch.full((values.numel(),), float(keep[channel]), device=device).to(DTYPE)
        cases.assert_same_bits(mask.select(dim, channel).contiguous(), flag, channel)
        product = (flag.cpu() * values.cpu()).to(device)  # torch multiplies float8 on the CPU alone
        cases.assert_same_bits(weight.select(dim, channel).contiguous(), product, channel)
    ones = sum(int(part.count_nonzero()) for part in mask.view(torch.uint8).split(1024))
    assert ones == (channels - len(pruned)) * (matrix.numel() // channels)


@pytest.mark.parametrize("dim", [0, 1])
def test_zeros_in_place(dim, matrix, device):
    channels = matrix.shape[dim]
    keep = torch.ones(channels, dtype=torch.bool, device=device)
    pruned = some(channels)[1::2]
    keep[pruned] = False
    weight = matrix.clone()
    ops.zero_channels_([weight], [keep], [dim])
    for channel in pruned:
        assert not weight.select(dim, channel).view(torch.uint8).any(), channel
    changed = 0
    for start in range(0, ROWS, 1024):
        before, after = (t[start : start + 1024].view(torch.uint8) for t in (matrix, weight))
        changed += int((before != after).sum())
    assert changed == len(pruned) * (matrix.numel() // channels)


def test_pruning_chooses_and_writes_beyond_32_bits(matrix, device):
    # The last rows hold NaN and infinity, so that they stay; of the others those of the smallest norm go.
    (mask,), _ = ops.prune_channels([matrix], [], [], [0], 2.0, [ROWS - 2], [0.0])
    first = mask[:, 0].float().tolist()
    assert first == [0.0] * (ROWS - 2) + [1.0, 1.0]


def test_a_channel_of_more_than_32_bits_of_elements(device):
    length = 2**32 + 5
    bytes_of_ones = torch.ones(1).to(DTYPE).view(torch.uint8).item()
    tensor = torch.full((1, length), bytes_of_ones, dtype=torch.uint8, device=device).view(DTYPE)
    tensor[0, -1] = -2.0
    for matrix, dim in ((tensor, 0), (tensor.view(length, 1), 1)):
        assert ops.channel_norms([matrix], [dim], 0.0)[0].tolist() == [length]
        assert ops.channel_norms([matrix], [dim], 1.0)[0].tolist() == [length + 1]
        assert ops.channel_norms([matrix], [dim], cases.INFINITY)[0].tolist() == [2.0]
