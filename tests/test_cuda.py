"""The CUDA library on a GPU: agreement with the CPU, streams, graphs, devices and memory."""

import concurrent.futures
import contextlib
import gc
import subprocess
import sys

import cases
import cuda_short_list
import pytest
import torch
from module_state import Snapshot, assert_same_outcome, assert_unchanged, bits
from torch import nn
from torch.nn.utils import prune as stock

import lnprune
from lnprune import ops


def why_not():
    """Why nothing here can run, if so."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not ops.has_cuda():
        return f"the CUDA library is not loaded: {ops.build_info()['cuda']}"
    return ""


pytestmark = pytest.mark.skipif(why_not() != "", reason=why_not())
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices")

MEBIBYTE = 1 << 20
# Cycles that keep any GPU busy for some tenths of a second: longer than Python takes to launch a call.
LONG = 1_000_000_000
SHORT = 20_000_000


def mixed_list(device="cuda"):
    """Tensors of every small shape and of two of several chunks, of every dtype in turn, with dims."""
    tensors, dims = [], []
    for number, shape in enumerate([*cases.SMALL_SHAPES.values(), (1100, 65), (9, 8200)]):
        dtype = cases.NATIVE_DTYPES[number % len(cases.NATIVE_DTYPES)]
        tensors.append(cases.random_values(shape, dtype, device))
        dims.append(number % 2)
    return tensors, dims


def prune(tensors, dims, masks=()):
    """Masks and weights of a list, half of the channels pruned."""
    count = len(tensors)
    return ops.prune_channels(tensors, list(masks), tensors, dims, 2.0, [-1] * count, [0.5] * count)


def prune_in_place(scores, weights, dims):
    """Half of the channels of a list become zero."""
    count = len(weights)
    ops.prune_channels_(scores, weights, dims, 2.0, [-1] * count, [0.5] * count)


def assert_pruned_in_place(weights, before, dims, scores=None, case=""):
    """What the CPU makes of the weights as they were before, ranked by the scores or by themselves."""
    expected = [weight.to("cpu", copy=True) for weight in before]
    prune_in_place(expected if scores is None else [score.cpu() for score in scores], expected, dims)
    for number, (weight, wanted) in enumerate(zip(weights, expected, strict=True)):
        cases.assert_same_bits(weight.cpu(), wanted, (case, number))


def on_the_cpu(tensors, dims, masks=()):
    """What the CPU makes of the same list."""
    return prune([tensor.cpu() for tensor in tensors], dims, [mask.cpu() for mask in masks])


def assert_same_results(actual, expected, case=""):
    """Two lists of masks and weights, bit for bit."""
    for name, tensors, wanted in zip(("mask", "weight"), actual, expected, strict=True):
        assert len(tensors) == len(wanted)
        for number, (tensor, other) in enumerate(zip(tensors, wanted, strict=True)):
            cases.assert_same_bits(tensor.cpu(), other.cpu(), (case, name, number))


def module_of(weight):
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    return module


# Agreement with the CPU and with torch.


def assert_same_choice(actual, expected, norms, n, case):
    """The flags of the CPU, but for channels whose norms differ by no more than rounding."""
    others = actual.cpu() != expected
    if others.any():
        assert n not in cases.EXACT_NORMS, case
        assert norms[others].max() <= norms[others].min() * (1 + cases.TOLERANCE), case


@pytest.mark.parametrize("dtype", cases.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_the_channels_are_those_that_the_cpu_chooses(layout, dtype):
    for name, shape in cases.SMALL_SHAPES.items():
        values = cases.random_values(shape, dtype)
        there, here = (cases.LAYOUTS[layout](values.to(device)) for device in ("cpu", "cuda"))
        for dim in range(len(shape)):
            for n in cases.NORMS:
                norms = lnprune.channel_norms(there, n, dim)
                cases.assert_norms_close(lnprune.channel_norms(here, n, dim).cpu(), norms, n, (name, dim))
                for amount in {1, shape[dim] // 2}:
                    expected = lnprune.channel_mask(there, amount, n, dim)
                    keep = lnprune.channel_mask(here, amount, n, dim)
                    assert keep.is_cuda
                    assert_same_choice(keep, expected, norms, n, (name, dim, n, amount))


@pytest.mark.parametrize("n", [1.0, 2.0, 3.0, cases.INFINITY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_channels_of_a_million_slices_are_those_that_the_cpu_chooses(dtype, n):
    lengths = torch.randint(1, 65, (50,)).tolist()
    tensors = [cases.random_values((20_000, length), dtype) for length in lengths]
    tensors[7][5, 0], tensors[8][6, -1] = cases.NAN, cases.INFINITY
    arguments = [0] * 50, n, [-1] * 50, torch.rand(50, dtype=torch.float64).tolist()
    expected, _ = ops.prune_channels(tensors, [], [], *arguments)
    masks, _ = ops.prune_channels([tensor.cuda() for tensor in tensors], [], [], *arguments)
    for number, (mask, wanted) in enumerate(zip(masks, expected, strict=True)):
        norms = lnprune.channel_norms(tensors[number], n, 0)
        assert_same_choice(mask[:, 0] != 0, wanted[:, 0] != 0, norms, n, number)


@pytest.mark.parametrize("n", [1, 2, cases.INFINITY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(4096, 4097), (256, 300, 3, 3), (17, 900_001), (900_001, 17)], ids=str)
def test_norms_of_large_tensors(shape, dtype, n):
    tensor = torch.randn(shape, device="cuda").to(dtype)
    for dim in (0, 1):
        norms = lnprune.channel_norms(tensor, n, dim)
        assert norms.is_cuda
        cases.assert_norms_close(norms, cases.reference_norms(tensor, n, dim), n, dim, 1e-12)


MODULES = {
    "linear": lambda: nn.Linear(40, 30),
    "convolution": lambda: nn.Conv2d(12, 20, 3),
    "large linear": lambda: nn.Linear(1024, 700),
    "large convolution": lambda: nn.Conv2d(128, 240, 3),
    "channels_last": lambda: nn.Conv2d(128, 240, 3).to(memory_format=torch.channels_last),
    "bfloat16": lambda: nn.Linear(1024, 700, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("make", list(MODULES.values()), ids=list(MODULES))
@pytest.mark.parametrize("before", [(), (0,), (0, 1)], ids=["first", "second", "third"])
def test_modules_equal_torchs_in_its_ranking(make, before):
    def build():
        module = make().cuda()
        for dim in before:
            stock.ln_structured(module, "weight", 0.2, 1, dim)
        return module

    for amount, n, dim in ((0.5, 2, 0), (3, 1, 1), (0.3, cases.INFINITY, -1)):

        def call(library, module, amount=amount, n=n, dim=dim):
            library.ln_structured(module, "weight", amount, n, dim)

        with lnprune.reference_ranking():
            actual, _ = assert_same_outcome(build, call)
        assert actual.weight.is_cuda
        actual, _ = assert_same_outcome(build, call, skipped_bits=("weight", "weight_mask"))
        assert torch.equal(bits(actual.weight), bits(actual.weight_mask * actual.weight_orig))


@pytest.mark.parametrize("dtype", cases.NATIVE_DTYPES[4:], ids=str)
@pytest.mark.parametrize("shape", [(30, 40), (1030, 1100)], ids=str)
def test_float8_modules_are_pruned_as_on_the_cpu(shape, dtype):
    values = cases.random_values(shape, dtype)
    modules = []
    for device in ("cpu", "cuda"):
        module = nn.Module()
        module.weight = nn.Parameter(values.to(device), requires_grad=False)
        lnprune.ln_structured(module, "weight", 0.5, 2, 0)
        lnprune.ln_structured(module, "weight", 0.25, 2, 1)
        modules.append(module)
    for name in ("weight", "weight_mask", "weight_orig"):
        there, here = (getattr(module, name) for module in modules)
        assert here.is_cuda
        cases.assert_same_bits(here.cpu(), there, name)


def test_plain_torch_chooses_the_same_channels_where_the_library_is_missing(monkeypatch):
    weight = torch.randn(300, 200, device="cuda")
    native = lnprune.ln_structured(module_of(weight), "weight", 0.5, 2, 0)
    monkeypatch.setattr(ops, "_HAS_CUDA", False)
    ops._warn_of_plain_torch.cache_clear()
    with pytest.warns(UserWarning, match="no CUDA kernels here"):
        plain = lnprune.ln_structured(module_of(weight), "weight", 0.5, 2, 0)
    for name in ("weight_mask", "weight"):
        cases.assert_same_bits(getattr(plain, name).detach(), getattr(native, name).detach(), name)


def test_every_kernel():
    cuda_short_list.run("cuda")


# The same bits again.


def test_runs_and_orders_of_a_list_do_not_change_the_bits():
    tensors, dims = mixed_list()
    for n in cases.NORM_KINDS:
        expected = ops.channel_norms(tensors, dims, float(n))
        for _ in range(20):
            order = torch.randperm(len(tensors)).tolist()
            norms = ops.channel_norms([tensors[i] for i in order], [dims[i] for i in order], float(n))
            for i, norm in zip(order, norms, strict=True):
                cases.assert_same_bits(norm, expected[i], (n, i))


def test_runs_of_many_blocks_do_not_change_the_bits():
    # Which block is the last, and folds the others' sums, is another one each time.
    for shape in ((3000, 5000), (2, 3_000_000), (700, 300, 3, 3)):
        tensor = torch.randn(shape, device="cuda")
        for dim in (0, 1):
            expected = lnprune.channel_norms(tensor, 1.7, dim)
            for _ in range(50):
                cases.assert_same_bits(lnprune.channel_norms(tensor, 1.7, dim), expected, (shape, dim))


# Graphs.


def captured(call):
    """A graph of the call and its results, after a run on a side stream, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def one_matrix():
    return [cases.random_values((512, 520), torch.float32, "cuda")], [1]


@pytest.mark.parametrize("repeated", [False, True], ids=["first", "repeated"])
@pytest.mark.parametrize("make", [one_matrix, mixed_list])
def test_a_graph_computes_with_what_its_inputs_hold(make, repeated):
    tensors, dims = make()
    masks = prune(tensors, dims)[0] if repeated else []
    graph, results = captured(lambda: prune(tensors, dims, masks))
    for replay in range(4):
        for tensor in tensors:
            tensor.copy_(cases.random_values(tuple(tensor.shape), tensor.dtype))
        # Other calls in between, whose tables and partial sums go where memory is free.
        for _ in range(replay):
            others, their_dims = mixed_list()
            assert_same_results(prune(others, their_dims), on_the_cpu(others, their_dims))
        graph.replay()
        assert_same_results(results, on_the_cpu(tensors, dims, masks), replay)


@pytest.mark.parametrize("make", [one_matrix, mixed_list])
def test_a_graph_prunes_in_place_what_its_inputs_hold(make):
    scores, dims = make()
    weights = [torch.zeros_like(score) for score in scores]
    graph, _ = captured(lambda: prune_in_place(scores, weights, dims))
    for replay in range(4):
        for tensor in (*scores, *weights):
            tensor.copy_(cases.random_values(tuple(tensor.shape), tensor.dtype))
        before = [weight.clone() for weight in weights]
        graph.replay()
        assert_pruned_in_place(weights, before, dims, scores, replay)


def test_replays_in_a_row():
    """Each finds the counters of finished blocks as the one before found them."""
    tensor = torch.randn(3000, 700, device="cuda")
    graph, results = captured(lambda: ops.channel_norms([tensor], [1], 2.0))
    for _ in range(30):
        graph.replay()
    cases.assert_same_bits(results[0], lnprune.channel_norms(tensor, 2, 1))


def test_two_graphs_and_calls_outside_them():
    lists = [mixed_list(), one_matrix()]
    graphs = [captured(lambda tensors=tensors, dims=dims: prune(tensors, dims)) for tensors, dims in lists]
    for order in ((0, 1), (1, 0), (0, 0, 1, 1)):
        for i in order:
            graphs[i][0].replay()
            eager = prune(*lists[1 - i])
            assert_same_results(eager, on_the_cpu(*lists[1 - i]))
        for (_, results), (tensors, dims) in zip(graphs, lists, strict=True):
            assert_same_results(results, on_the_cpu(tensors, dims), order)


# In a process where no kernel has been loaded yet. Each finds what the CPU finds, or ends with an error.
FIRST_CALLS = {
    "recorded": """
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    masks, weights = prune([here])
graph.replay()
""",
    "of another thread while one records": """
ready, done = threading.Event(), threading.Event()
found = []
def other():
    ready.wait()
    with torch.cuda.stream(side):
        found.extend(prune([here]))
    done.set()
thread = threading.Thread(target=other)
thread.start()
graph = torch.cuda.CUDAGraph()
stream = torch.cuda.Stream()
stream.wait_stream(torch.cuda.current_stream())
with torch.cuda.graph(graph, stream=stream):
    copy = here + 1
    ready.set()
    assert done.wait(60), "the call of the other thread did not end"
thread.join()
masks, weights = found
""",
}


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("call", list(FIRST_CALLS.values()), ids=list(FIRST_CALLS))
def test_the_first_call_of_a_process(call, dim):
    """CUDA loads a kernel when it is first launched, which it may refuse while a graph is recorded."""
    program = f"""
import threading, torch, lnprune
from lnprune import ops
there = torch.randn(3000, 700)
here = there.cuda()
side = torch.cuda.Stream()
with torch.cuda.stream(side):  # memory at hand: while a graph is recorded torch gets no more
    rooms = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in (64 << 20, 1 << 10)]
    del rooms
here + 1
torch.cuda.synchronize()
def prune(tensors):
    return ops.prune_channels(tensors, [], tensors, [{dim}], 2.0, [-1], [0.5])
{call}
torch.cuda.synchronize()
expected = prune([there])
for actual, wanted in zip((masks, weights), expected, strict=True):
    assert torch.equal(actual[0].cpu(), wanted[0])
print("right")
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.stdout == "right\n", finished.stderr


# Streams, and no waiting.


@contextlib.contextmanager
def refusing_to_synchronise():
    """Inside, torch raises where it waits for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def pruned_once(weight):
    return lnprune.ln_structured(module_of(weight), "weight", 0.3, 2, 0)


# What is called, and what it is called with: made before the GPU must not be waited for.
CALLS = {
    "norms": (lambda weight: weight, lambda weight: lnprune.channel_norms(weight, 2, 1)),
    "channel mask": (lambda weight: weight, lambda weight: lnprune.channel_mask(weight, 0.5, 1, 0)),
    "a list": (lambda weight: [weight] * 20, lambda weights: prune(weights, [0, 1] * 10)),
    "in place": (
        lambda weight: [weight] * 20,
        lambda weights: prune_in_place(weights, weights, [0, 1] * 10),
    ),
    "first call": (module_of, lambda module: lnprune.ln_structured(module, "weight", 0.5, 2, 0)),
    "first call, a number": (module_of, lambda module: lnprune.ln_structured(module, "weight", 5, 2, 1)),
    "nothing to prune": (module_of, lambda module: lnprune.ln_structured(module, "weight", 0, 2, 0)),
    "repeated call": (pruned_once, lambda module: lnprune.ln_structured(module, "weight", 0.5, 2, 0)),
}


@pytest.mark.parametrize("shape", [(30, 40), (1030, 1100), (60, 50, 3, 3)], ids=str)
@pytest.mark.parametrize(("make", "call"), list(CALLS.values()), ids=list(CALLS))
def test_no_call_waits_for_the_gpu(make, call, shape):
    arguments = [make(torch.randn(shape, device="cuda")) for _ in range(3)]
    # Kernels are loaded, and memory is at hand, on the host too, where all of a call waits to run.
    torch.cuda._sleep(SHORT)
    call(arguments[0])
    with refusing_to_synchronise():
        call(arguments[1])
    torch.empty(128 * MEBIBYTE, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    still_busy = torch.cuda.Event()
    still_busy.record()
    call(arguments[2])
    assert not still_busy.query()
    torch.cuda.synchronize()


def test_a_number_of_channels_waits_where_the_error_for_too_many_needs_those_left():
    module = pruned_once(torch.randn(30, 40, device="cuda"))
    snapshot = Snapshot(module)
    with refusing_to_synchronise(), pytest.raises(RuntimeError, match="synchroniz"):
        lnprune.ln_structured(module, "weight", 2, 2, 0)
    assert_unchanged(module, snapshot)


def test_a_call_runs_on_the_current_stream():
    values, dims = mixed_list("cpu")
    pinned = [value.pin_memory() for value in values]
    tensors = [torch.zeros_like(value, device="cuda") for value in values]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SHORT)
        for tensor, value in zip(tensors, pinned, strict=True):
            tensor.copy_(value, non_blocking=True)
        results = prune(tensors, dims)
        copies = [[tensor.clone() for tensor in part] for part in results]
        # What the call read is overwritten as soon as it has run.
        for tensor in tensors:
            tensor.view(torch.uint8).zero_()
    stream.synchronize()
    assert_same_results(copies, prune(values, dims))


def test_a_call_in_place_runs_on_the_current_stream():
    values, dims = mixed_list("cpu")
    pinned = [value.pin_memory() for value in values]
    weights = [torch.zeros_like(value, device="cuda") for value in values]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SHORT)
        for weight, value in zip(weights, pinned, strict=True):
            weight.copy_(value, non_blocking=True)
        prune_in_place(weights, weights, dims)
    stream.synchronize()
    assert_pruned_in_place(weights, values, dims)


def test_a_module_on_a_side_stream():
    stream = torch.cuda.Stream()
    values = torch.randn(600, 700)
    weight = torch.zeros(600, 700, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SHORT)
        weight.copy_(values.pin_memory(), non_blocking=True)
        module = module_of(weight)
        lnprune.ln_structured(module, "weight", 0.5, 2, 0)
        lnprune.ln_structured(module, "weight", 0.5, 1, 1)
    stream.synchronize()
    other = module_of(values)
    lnprune.ln_structured(other, "weight", 0.5, 2, 0)
    lnprune.ln_structured(other, "weight", 0.5, 1, 1)
    cases.assert_same_bits(module.weight.detach().cpu(), other.weight.detach())


def test_two_lists_in_flight():
    """Calls that are queued on two streams, all of their tables written before the first of them runs."""
    lists = [mixed_list(), one_matrix(), mixed_list()]
    expected = [on_the_cpu(tensors, dims) for tensors, dims in lists]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG)
    results = []
    for turn in range(30):
        tensors, dims = lists[turn % 3]
        with torch.cuda.stream(streams[turn % 2]):
            results.append(prune(tensors, dims))
    torch.cuda.synchronize()
    for turn, result in enumerate(results):
        assert_same_results(result, expected[turn % 3], turn)


def test_threads_with_streams_of_their_own():
    lists = [mixed_list() for _ in range(4)]
    expected = [on_the_cpu(tensors, dims) for tensors, dims in lists]
    torch.cuda.synchronize()

    def work(i):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [prune(*lists[i]) for _ in range(15)]
        stream.synchronize()
        return results

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for i, results in enumerate(pool.map(work, range(4))):
            for result in results:
                assert_same_results(result, expected[i], i)


def many_matrices():
    """More than the tables of one launch hold, with their masks: each of several strips and chunks."""
    return [torch.randn(300, 700, device="cuda") for _ in range(120)], [0, 1] * 60


def test_threads_on_one_stream():
    """What the threads enqueue mixes, launch by launch."""
    tensors, dims = many_matrices()
    masks = prune(tensors, dims)[0]
    expected = on_the_cpu(tensors, dims, masks)

    def work(_):
        return [prune(tensors, dims, masks) for _ in range(10)]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for results in pool.map(work, range(4)):
            for result in results:
                assert_same_results(result, expected)


def test_a_large_call_behind_small_ones_that_wait():
    """The first calls of a stream are still queued when a call needs more counters than they do."""
    small, large = one_matrix(), many_matrices()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        results = [prune(*each) for each in (small, large, small, large)]
    stream.synchronize()
    for result, each in zip(results, (small, large, small, large), strict=True):
        assert_same_results(result, on_the_cpu(*each))


def test_a_graph_beside_calls_on_other_streams():
    tensors, dims = many_matrices()
    graph, results = captured(lambda: prune(tensors, dims))
    others, other_dims = many_matrices()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    eager = []
    for _ in range(10):
        with torch.cuda.stream(streams[0]):
            graph.replay()
        with torch.cuda.stream(streams[1]):
            eager.append(prune(others, other_dims))
    torch.cuda.synchronize()
    assert_same_results(results, on_the_cpu(tensors, dims))
    for result in eager:
        assert_same_results(result, on_the_cpu(others, other_dims))


def test_nothing_stays_in_a_memory_pool():
    tensors, dims = many_matrices()
    expected = on_the_cpu(tensors, dims)
    pool = torch.cuda.MemPool()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.cuda.use_mem_pool(pool):
        results = prune(tensors, dims)
        stream.synchronize()
        assert_same_results(results, expected)
        del results
    blocks = [block for segment in pool.snapshot() for block in segment["blocks"]]
    assert {block["state"] for block in blocks} <= {"inactive"}


def test_compiled_into_graphs():
    weight = torch.randn(1030, 1100, device="cuda")
    compiled = torch.compile(
        lambda tensor: ops.channel_norms([tensor], [0], 2.0)[0] + 1, mode="reduce-overhead"
    )
    for _ in range(5):
        values = compiled(weight).clone()
        cases.assert_same_bits(values, lnprune.channel_norms(weight, 2, 0) + 1)


# Devices.


@two_devices
def test_a_device_that_is_not_the_current_one():
    tensors, dims = mixed_list("cuda:1")
    assert torch.cuda.current_device() == 0
    results = prune(tensors, dims)
    assert {tensor.get_device() for part in results for tensor in part} == {1}
    assert_same_results(results, on_the_cpu(tensors, dims))
    module = module_of(torch.randn(60, 70, device="cuda:1"))
    lnprune.ln_structured(module, "weight", 0.5, 2, 0)
    assert module.weight.get_device() == module.weight_mask.get_device() == 1
    assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        here, _ = mixed_list("cuda:0")
        assert_same_results(prune(here, dims), on_the_cpu(here, dims))
        assert torch.cuda.current_device() == 1


@two_devices
def test_tensors_of_one_call_on_several_devices():
    first, dims = mixed_list("cuda:0")
    second, _ = mixed_list("cuda:1")
    tensors = [tensor for pair in zip(first, second, strict=True) for tensor in pair]
    dims = [dim for dim in dims for _ in range(2)]
    results = prune(tensors, dims)
    for part in results:
        assert [tensor.device for tensor in part] == [tensor.device for tensor in tensors]
    expected = on_the_cpu(tensors, dims)
    assert_same_results(results, expected)
    assert_same_results(prune(tensors, dims, results[0]), on_the_cpu(tensors, dims, expected[0]))
    before = [tensor.clone() for tensor in tensors]
    prune_in_place(tensors, tensors, dims)
    assert_pruned_in_place(tensors, before, dims)


def test_mixed_devices_give_the_references_error():
    for here, there in (("cuda", "cpu"), ("cpu", "cuda")):
        for before in (0, 1):
            for shape in ((30, 40), (1030, 1100)):

                def make(here=here, before=before, shape=shape):
                    module = module_of(torch.randn(shape, device=here))
                    for _ in range(before):
                        stock.ln_structured(module, "weight", 0.2, 2, 0)
                    return module

                def call(library, module, there=there, shape=shape):
                    scores = torch.ones(shape, device=there)
                    library.ln_structured(module, "weight", 0.5, 2, 0, importance_scores=scores)

                assert_same_outcome(make, call, raises=True)


def test_a_list_on_the_cpu_and_on_cuda_is_refused():
    tensors = [torch.randn(6, 5, device="cuda"), torch.randn(6, 5)]
    for mixed in (tensors, tensors[::-1]):
        with pytest.raises(RuntimeError, match="lnprune: expected"):
            ops.channel_norms(mixed, [0, 0], 2.0)
    with pytest.raises(RuntimeError, match="lnprune: expected"):
        ops.prune_channels(tensors[:1], [torch.ones(6, 5)], [], [0], 2.0, [1], [0.0])
    before = [tensor.clone() for tensor in tensors]
    for mixed in (tensors, tensors[::-1]):
        with pytest.raises(RuntimeError, match="lnprune: expected"):
            prune_in_place(mixed, mixed, [0, 0])
        with pytest.raises(RuntimeError, match="lnprune: expected"):
            prune_in_place(mixed[:1], mixed[1:], [0])
    for tensor, unchanged in zip(tensors, before, strict=True):
        assert torch.equal(tensor, unchanged)


# Memory.


def test_a_thousand_calls_leave_no_memory_behind():
    tensors, dims = mixed_list()
    copies = [tensor.clone() for tensor in tensors]
    weight = torch.randn(300, 200, device="cuda")
    graph_input = torch.randn(300, 200, device="cuda")
    graph, results = captured(lambda: prune([graph_input], [0]))

    def calls():
        prune(tensors, dims)
        prune_in_place(tensors, copies, dims)
        ops.channel_norms(tensors, dims, 1.7)
        module = pruned_once(weight)
        lnprune.ln_structured(module, "weight", 1, 2, 1)
        with pytest.raises(RuntimeError):
            prune(tensors, [9] * len(dims))
        graph.replay()

    def held():
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    for _ in range(20):
        calls()
    before = held()
    for _ in range(200):  # six calls each
        calls()
    assert held() == before
    assert_same_results(results, on_the_cpu([graph_input], [0]))


@contextlib.contextmanager
def little_memory(room):
    """Inside, torch's allocator gets no more than so many bytes beyond what it holds."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties().total_memory
    before = torch.cuda.get_per_process_memory_fraction()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before)


@pytest.mark.parametrize("times", [0, 1, 2], ids=["first", "second", "third"])
@pytest.mark.parametrize("room", [0, 4, 40], ids=lambda room: f"{room} MiB")
def test_out_of_memory_leaves_the_module_as_it_was(room, times):
    """A mask and a weight of 32 MiB each: there is no room for the first, or none for the second."""
    module = module_of(torch.randn(2048, 4096, device="cuda"))
    for _ in range(times):
        lnprune.ln_structured(module, "weight", 0.2, 2, 0)
    snapshot = Snapshot(module)
    for amount in (0.5, 7):
        with little_memory(room * MEBIBYTE), pytest.raises(RuntimeError):
            lnprune.ln_structured(module, "weight", amount, 2, 0)
        assert_unchanged(module, snapshot)
    lnprune.ln_structured(module, "weight", 0.5, 2, 0)
    assert torch.equal(module.weight, module.weight_mask * module.weight_orig)
    stock.remove(module, "weight")


@pytest.mark.parametrize("step", ["channel_norms", "write_masks", "prune_channels"])
def test_any_step_out_of_memory_leaves_the_module_as_it_was(step, monkeypatch):
    reached = []

    def failing(*arguments):
        reached.append(step)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory, on purpose")

    for times in (0, 1, 2):
        module = module_of(torch.randn(30, 40, device="cuda"))
        for _ in range(times):
            lnprune.ln_structured(module, "weight", 0.2, 2, 0)
        for ranking in (contextlib.nullcontext, lnprune.reference_ranking):
            for amount in (0.5, 2):
                snapshot, before = Snapshot(module), len(reached)
                with monkeypatch.context() as patch, ranking():
                    patch.setattr(ops, step, failing)
                    try:
                        lnprune.ln_structured(module, "weight", amount, 2, 0)
                    except torch.cuda.OutOfMemoryError:
                        assert_unchanged(module, snapshot)
                        assert len(reached) == before + 1
                    else:  # a call that takes other steps
                        assert len(reached) == before
    assert reached


# More than 32 bits of elements.


def needs_memory(size):
    """Skips where the GPU has not got so many bytes to spare."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"{size >> 30} GiB of the GPU's memory are needed, {free >> 30} are free")


@pytest.mark.slow
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((65_537, 65_541), torch.float8_e5m2),  # more than 2**32 elements, in rows that are never aligned
        ((32_771, 65_552), torch.bfloat16),  # more than 2**31, in rows that are
    ],
    ids=str,
)
def test_pruning_beyond_32_bits(shape, dtype, dim):
    size = shape[0] * shape[1] * dtype.itemsize
    needs_memory(4 * size)
    channels = shape[dim]
    # Powers of two as channels, small integers for what is told apart: sums are exact in any order.
    scale = 2.0 ** torch.randint(-2, 3, (channels,), device="cuda")
    scale[-1] = 8
    pattern = torch.tensor([1.0, -1.0, 2.0, 0.5], device="cuda").repeat(-(-shape[1 - dim] // 4))
    pattern = pattern[: shape[1 - dim]]
    rows, columns = (scale, pattern) if dim == 0 else (pattern, scale)
    matrix = torch.empty(shape, dtype=dtype, device="cuda")
    for start in range(0, shape[0], 1024):
        matrix[start : start + 1024] = (rows[start : start + 1024, None] * columns).to(dtype)

    norms = lnprune.channel_norms(matrix, 1, dim)
    assert torch.equal(norms, scale.double() * pattern.double().abs().sum())
    (mask,), (weight,) = ops.prune_channels([matrix], [], [matrix], [dim], 1.0, [-1], [0.5])
    ranking = torch.sort(norms, descending=True, stable=True).indices
    keep = torch.zeros(channels, dtype=torch.bool, device="cuda")
    keep[ranking[: channels - round(0.5 * channels)]] = True
    for start in range(0, shape[0], 1024):
        some = slice(start, start + 1024)
        flags = (keep[some, None] if dim == 0 else keep[None]).float()
        assert bool((mask[some].float() == flags).all()), start
        assert bool((weight[some].float() == flags * matrix[some].float()).all()), start
    prune_in_place([matrix], [matrix], [dim])
    for start in range(0, shape[0], 1024):
        some = slice(start, start + 1024)
        assert bool((matrix[some].float() == weight[some].float()).all()), start
