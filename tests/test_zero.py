"""Zeros in place: pruned channels become +0.0, and not a bit of anything else changes."""

import math
import mmap
import sys
import warnings

import cases
import pytest
import torch

import lnprune
from lnprune import ops

pytestmark = pytest.mark.parametrize("device", cases.DEVICES)

# One dtype of each size.
DTYPES_BY_SIZE = [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn]
# Where elements that are written begin and end within a vector, a cache line and a tile.
OFFSETS = [0, 1, 2, 3, 7, 8, 15, 16, 33]


def random_bits(shape, dtype, device):
    """Any bits: numbers and NaN of every payload, signalling ones too."""
    return (
        torch.randint(256, (math.prod(shape) * dtype.itemsize,)).byte().view(dtype).view(shape).to(device)
    )


def zeroed(tensor, keep, dim):
    """The bits that the tensor must have afterwards."""
    shape = [1] * tensor.dim()
    shape[dim] = -1
    before = cases.bits(tensor.detach())
    return torch.where(keep.view(shape), before, torch.zeros_like(before))


def assert_bits(tensors, expected, case=""):
    for number, (tensor, wanted) in enumerate(zip(tensors, expected, strict=True)):
        same = cases.bits(tensor.detach()) == wanted
        assert same.all(), (case, number, (~same).nonzero()[:5].tolist())


def assert_zeroed(tensor, keep, dim, case=""):
    """Zeroes, and compares every bit."""
    expected = zeroed(tensor, keep, dim)
    described = tensor.data_ptr(), tensor.shape, tensor.stride()
    assert ops.zero_channels_([tensor], [keep], [dim]) is None
    assert_bits([tensor], [expected], case)
    assert (tensor.data_ptr(), tensor.shape, tensor.stride()) == described


@pytest.mark.parametrize("dtype", cases.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("path", cases.WRITE_PATHS)
def test_every_path(path, dtype, device):
    shape, dim = cases.WRITE_PATHS[path]
    for make in (cases.special_values, random_bits):
        assert_zeroed(make(shape, dtype, device), cases.random_keep(shape[dim], device), dim)
    keep = cases.random_keep(shape[dim], device)
    assert_zeroed(random_bits(shape, dtype, device), keep, dim - len(shape))


@pytest.mark.parametrize("dtype", cases.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("layout", cases.DENSE_LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (30, 70), (1, 6, 1, 4, 1), (3, 2100)])
def test_every_dense_layout(shape, layout, dtype, device):
    for dim in range(len(shape)):
        tensor = cases.LAYOUTS[layout](cases.special_values(shape, dtype, device))
        assert_zeroed(tensor, cases.random_keep(shape[dim], device), dim, dim)


@pytest.mark.parametrize("dtype", DTYPES_BY_SIZE, ids=str)
@pytest.mark.parametrize(
    "path", ["columns", "columns_of_blocks", "runs", "rows_of_runs", "runs_beyond_a_block"]
)
def test_neighbours_in_the_storage_are_not_harmed(path, dtype, device):
    shape, dim = cases.WRITE_PATHS[path]
    elements = math.prod(shape)
    for offset in OFFSETS:
        # Other tensors before and after, to the last bit: nothing of a vector belongs to them.
        storage = random_bits((offset + elements + 40,), dtype, device)
        expected = cases.bits(storage)
        tensor = storage[offset : offset + elements].view(shape)
        for keep in (cases.random_keep(shape[dim], device), torch.zeros(shape[dim], dtype=bool).to(device)):
            expected[offset : offset + elements] = zeroed(tensor, keep, dim).flatten()
            ops.zero_channels_([tensor], [keep], [dim])
            assert_bits([storage], [expected], offset)


@pytest.mark.parametrize("dtype", DTYPES_BY_SIZE, ids=str)
@pytest.mark.parametrize("path", cases.WRITE_PATHS)
def test_all_channels_none_and_one(path, dtype, device):
    shape, dim = cases.WRITE_PATHS[path]
    channels = shape[dim]
    one = torch.zeros(channels, dtype=torch.bool, device=device)
    one[torch.randint(channels, (1,))] = True
    for keep in (torch.ones_like(one), ~one, one, torch.zeros_like(one)):
        assert_zeroed(random_bits(shape, dtype, device), keep, dim, int(keep.sum()))


@pytest.mark.parametrize("inner", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65])
def test_runs_of_every_length(inner, device):
    """Runs shorter than a vector of every dtype and longer, that begin anywhere in one."""
    for dtype in DTYPES_BY_SIZE:
        for shape, dim in (((23, inner), 0), ((3, 11, inner), 1)):
            assert_zeroed(
                random_bits(shape, dtype, device), cases.random_keep(shape[dim], device), dim, dtype
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_pattern_of_sixteen_bits(dtype, device):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    for shape, dim in (((1, -1), 0), ((256, 256), 0), ((256, 256), 1)):
        for keep in (True, False):
            tensor = patterns.clone().view(shape)
            flags = torch.full((tensor.shape[dim],), keep, device=device)
            assert_zeroed(tensor, flags, dim, (shape, keep))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_threads_and_lists_change_nothing(count, device):
    tensors, dims = [], []
    for number, (shape, dim) in enumerate(cases.WRITE_PATHS.values()):
        for layout in (cases.contiguous, cases.unaligned):
            dtype = cases.NATIVE_DTYPES[(number + len(tensors)) % len(cases.NATIVE_DTYPES)]
            tensors.append(layout(random_bits(shape, dtype, device)))
            dims.append(dim)
    keeps = [cases.random_keep(t.shape[dim], device) for t, dim in zip(tensors, dims, strict=True)]
    expected = [zeroed(*each) for each in zip(tensors, keeps, dims, strict=True)]
    flags = [keep.clone() for keep in keeps]
    with cases.threads(count):
        ops.zero_channels_(tensors, keeps, dims)
    assert_bits(tensors, expected)
    for keep, before in zip(keeps, flags, strict=True):
        assert torch.equal(keep, before)


@pytest.mark.parametrize("layout", sorted(set(cases.LAYOUTS) - set(cases.DENSE_LAYOUTS)))
def test_tensors_with_gaps_or_overlaps_are_refused_and_left_as_they_are(layout, device):
    dense = random_bits((6, 5, 4), torch.float32, device)
    others = cases.LAYOUTS[layout](random_bits((6, 5, 4), torch.float32, device))
    tensors, dims = [dense, others, dense.clone()], [0, 1, 2]
    keeps = [torch.zeros(size, dtype=torch.bool, device=device) for size in (6, 5, 4)]
    expected = [cases.bits(tensor) for tensor in tensors]
    with pytest.raises(RuntimeError, match="lnprune: expected a tensor without gaps or overlaps"):
        ops.zero_channels_(tensors, keeps, dims)
    with pytest.raises(RuntimeError, match="lnprune: expected a tensor without gaps or overlaps"):
        ops.prune_channels_(tensors, tensors, dims, 2.0, [6, 5, 4], [0.0] * 3)
    assert_bits(tensors, expected)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda keep: keep[:-1],
        lambda keep: torch.cat([keep, keep]),
        lambda keep: torch.cat([keep, keep])[::2],
        lambda keep: keep.byte(),
        lambda keep: keep.float(),
        lambda keep: keep.view(1, -1),
    ],
    ids=["short", "long", "gaps", "byte", "float", "dims"],
)
def test_wrong_flags_are_refused_and_change_nothing(wrong, device):
    tensors = [random_bits((6, 5), torch.float32, device) for _ in range(2)]
    keep = torch.zeros(6, dtype=torch.bool, device=device)
    expected = [cases.bits(tensor) for tensor in tensors]
    with pytest.raises(RuntimeError, match="lnprune: expected 6 contiguous bool keep flags"):
        ops.zero_channels_(tensors, [keep, wrong(keep)], [0, 0])
    with pytest.raises(RuntimeError, match="lnprune: expected keep flags for each of 2 tensors, got 1"):
        ops.zero_channels_(tensors, [keep], [0, 0])
    assert_bits(tensors, expected)


def assert_pruned(scores, weights, dims, p, counts, fractions):
    """``prune_channels_`` against its three steps; returns the flags."""
    keeps = ops.select_channels(ops.channel_norms(scores, dims, p), [], counts, fractions)
    expected = [zeroed(*each) for each in zip(weights, keeps, dims, strict=True)]
    assert ops.prune_channels_(scores, weights, dims, p, counts, fractions) is None
    assert_bits(weights, expected, p)
    return keeps


@cases.in_turn(dtype=cases.NATIVE_DTYPES, p=[0.0, 1.0, 2.0, 3.0, 1.7, math.inf, -math.inf])
def test_pruning_is_its_three_steps(p, dtype, device):
    paths = ["columns", "columns_of_blocks", "runs", "rows_of_runs", "dims_of_size_one", "one_channel"]
    dims = [cases.WRITE_PATHS[path][1] for path in paths]
    amounts = [5, -1, 3, -1, 0, 1], [0.0, 0.5, 0.0, 0.3, 0.0, 0.0]
    weights = [cases.random_values(cases.WRITE_PATHS[path][0], dtype, device) for path in paths]
    keeps = assert_pruned(weights, weights, dims, p, *amounts)
    assert [int((~keep).sum()) for keep in keeps] == [5, 6, 3, round(0.3 * 5), 0, 1]
    scores = [cases.random_values(tuple(weight.shape), dtype, device) for weight in weights]
    held = [cases.bits(score) for score in scores]
    assert_pruned(scores, weights, dims, p, *amounts)
    assert_bits(scores, held)


def test_scores_of_other_dtypes_and_layouts(device):
    shape = (12, 20, 3, 3)
    for number, layout in enumerate(cases.LAYOUTS):
        for dim in range(len(shape)):
            scores = cases.LAYOUTS[layout](cases.random_values(shape, torch.float32, device))
            weight = random_bits(shape, cases.NATIVE_DTYPES[number], device)
            weight = cases.LAYOUTS[cases.DENSE_LAYOUTS[number % len(cases.DENSE_LAYOUTS)]](weight)
            (keep,) = assert_pruned([scores], [weight], [dim], 2.0, [1], [0.0])
            assert int((~keep).sum()) == 1


def test_every_score_is_read_before_anything_is_written(device):
    first, second = (cases.random_values((40, 50), torch.float32, device) for _ in range(2))
    assert_pruned([second, first], [first, second], [0, 1], 1.0, [-1, -1], [0.5, 0.5])


def test_pruning_again_keeps_what_is_zero(device):
    weight = cases.random_values((20, 30), torch.float32, device)
    for pruned in (5, 11):
        ops.prune_channels_([weight], [weight], [0], 2.0, [pruned], [0.0])
        assert int((weight == 0).all(dim=1).sum()) == pruned
        assert int((weight == 0).any(dim=1).sum()) == pruned


def test_infinity_and_nan_become_zero(device):
    weight = torch.tensor([[math.inf, -0.0], [math.nan, -1.0], [1.0, -0.0]], device=device)
    ops.zero_channels_([weight], [torch.tensor([False, False, True], device=device)], [0])
    assert cases.bits(weight).tolist() == [[0, 0], [0, 0], [0x3F800000, -(2**31)]]


def test_autograd_sees_that_the_tensors_have_changed(device):
    weight = torch.nn.Parameter(cases.random_values((6, 5), torch.float32, device))
    other = cases.random_values((6, 5), torch.float32, device)
    keep = torch.tensor([True, False] * 3, device=device)
    versions = weight._version, other._version
    product = weight * weight
    ops.zero_channels_([weight, other], [keep, keep], [0, 0])
    assert weight._version > versions[0]
    assert other._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    scores, scores_version, version = other, other._version, weight._version
    ops.prune_channels_([scores], [weight], [0], 2.0, [1], [0.0])
    assert weight._version > version
    assert scores._version == scores_version
    assert weight.requires_grad
    assert weight.is_leaf
    weight.square().sum().backward()
    assert torch.equal(weight.grad, 2 * weight)


# Both ways to zero every second channel of weights, whose even channels have the larger norms.
IN_PLACE = {
    "zero": lambda library, weights: library.zero_channels_(
        weights, [torch.arange(len(w), device=w.device) % 2 == 0 for w in weights], [0] * len(weights)
    ),
    "prune": lambda library, weights: library.prune_channels_(
        weights, weights, [0] * len(weights), 2.0, [-1] * len(weights), [0.5] * len(weights)
    ),
}


def even_channels_larger(shape, device="cpu"):
    weight = cases.random_values(shape, torch.float32, device)
    weight[::2] *= 1e6
    return weight


@pytest.mark.parametrize("way", IN_PLACE)
@pytest.mark.parametrize("shape", [(6, 5), (300, 700)])
def test_lazy_copies_get_memory_of_their_own_before_they_are_written(shape, way, device):
    weight = even_channels_larger(shape, device)
    before = cases.bits(weight)
    copies = [torch._lazy_clone(weight) for _ in range(3)]
    # As its own scores, beside another copy, and through a view.
    IN_PLACE[way](ops, copies[:2])
    IN_PLACE[way](ops, [copies[2].view(shape)])
    assert torch.equal(cases.bits(weight), before)
    before[1::2] = 0
    assert_bits(copies, [before] * 3)


def test_a_lazy_copy_is_ranked_by_scores_that_share_its_memory(device):
    weight = even_channels_larger((6, 5), device)
    copy, before = torch._lazy_clone(weight), cases.bits(weight)
    ops.prune_channels_([weight], [copy], [0], 2.0, [3], [0.0])
    assert torch.equal(cases.bits(weight), before)
    before[1::2] = 0
    assert torch.equal(cases.bits(copy), before)


@pytest.fixture
def read_only(tmp_path, device):
    """A weight in a file that is mapped for reading, as some loaders of checkpoints do."""
    if device != "cpu":
        pytest.skip("files are mapped into the memory of the CPU")
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux is asked whether memory can be written")
    file = tmp_path / "weight"
    file.write_bytes(even_channels_larger((64, 300)).numpy().tobytes())
    with file.open("rb") as opened:
        mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = torch.frombuffer(mapping, dtype=torch.float32).view(64, 300)
    yield weight
    assert weight.numpy().tobytes() == file.read_bytes()


@pytest.mark.parametrize("way", IN_PLACE)
def test_memory_that_cannot_be_written_is_refused_before_anything_is(way, read_only, device):
    # By the ops of the CPU, also where tests run others.
    native = torch.ops.lnprune
    weight = even_channels_larger((6, 5))
    before, version = cases.bits(weight), weight._version
    for weights, place in (
        ([read_only], "0 of 1"),
        ([weight, read_only], "1 of 2"),
        ([read_only.flatten()[3:4].view(1, 1), weight], "0 of 2"),
        ([read_only.view(torch.float8_e5m2).flatten()[5:11].view(2, 3)], "0 of 1"),  # not aligned
        ([weight] * 5 + [read_only.view(300, 64)], "5 of 6"),
    ):
        with pytest.raises(
            RuntimeError, match=f"expected memory that can be written, got .* tensor {place}"
        ):
            IN_PLACE[way](native, weights)
    assert torch.equal(cases.bits(weight), before)
    assert weight._version == version
    norms = lnprune.channel_norms(read_only, 2, 0)
    assert norms[::2].min() > norms[1::2].max()


@pytest.mark.parametrize("way", IN_PLACE)
def test_files_mapped_for_writing_are_written(way, tmp_path, device):
    if device != "cpu":
        pytest.skip("files are mapped into the memory of the CPU")
    for shared in (False, True):
        weight = even_channels_larger((64, 300))
        expected = weight.clone()
        expected[1::2] = 0
        file = tmp_path / f"weight_{shared}"
        file.write_bytes(weight.numpy().tobytes())
        mapped = torch.from_file(str(file), shared=shared, size=weight.numel()).view(64, 300)
        IN_PLACE[way](torch.ops.lnprune, [mapped])
        assert torch.equal(mapped, expected)
        held = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32).view(64, 300)
        assert torch.equal(held, expected if shared else weight)
