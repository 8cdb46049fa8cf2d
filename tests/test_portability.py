"""Pruned models elsewhere: without lnprune, compiled, exported, and on tensors of every kind."""

import copy
import io
import subprocess
import sys
import textwrap

import pytest
import torch
from module_state import (
    DEVICES,
    assert_optimal,
    assert_same_outcome,
    bits,
    exact_norms,
    kept_channels,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune as stock

import lnprune

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.filterwarnings("ignore"),
]

WITHOUT_LNPRUNE = """
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lnprune":
            raise ImportError("lnprune is blocked")


sys.meta_path.insert(0, Blocker())
try:
    import lnprune
except ImportError:
    pass
else:
    raise SystemExit("lnprune was not blocked")
"""


def run_without_lnprune(code, *arguments):
    program = WITHOUT_LNPRUNE + textwrap.dedent(code)
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def model(device="cpu"):
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(device)


def prune_model(library, layers):
    for index in (0, 2):
        library.ln_structured(layers[index], "weight", 0.5, 2, 0)
    library.ln_structured(layers[0], "weight", 0.25, 1, 1)
    return layers


def large_and_small():
    layers = nn.Sequential(nn.Linear(520, 512), nn.ReLU(), nn.Linear(512, 4))
    prune_model(lnprune, layers)
    return layers


def test_a_saved_model_runs_without_lnprune(device, tmp_path):
    layers = large_and_small()
    inputs = torch.randn(3, 520)
    torch.save((layers, inputs, layers(inputs)), tmp_path / "model")
    run_without_lnprune(
        """
        import torch
        from torch.nn.utils import prune

        model, inputs, outputs = torch.load(sys.argv[1], weights_only=False)
        assert torch.allclose(model(inputs), outputs, rtol=1e-4, atol=1e-5)
        assert prune.is_pruned(model)
        before = model[0].weight_orig.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(inputs).sum().backward()
        optimizer.step()
        assert not torch.equal(model[0].weight_orig, before)
        model(inputs)
        assert torch.equal(model[0].weight, model[0].weight_mask * model[0].weight_orig)
        prune.ln_structured(model[0], "weight", 0.25, 2, 0)
        prune.remove(model[0], "weight")
        prune.remove(model[2], "weight")
        assert list(model.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
        assert not any(name.partition(".")[0] == "lnprune" for name in sys.modules)
        """,
        tmp_path / "model",
    )


def test_a_state_dict_loads_without_lnprune(device, tmp_path):
    layers = prune_model(lnprune, model())
    inputs = torch.randn(3, 8)
    torch.save(layers.state_dict(), tmp_path / "state")
    torch.save((inputs, layers(inputs).detach()), tmp_path / "outputs")
    run_without_lnprune(
        """
        import torch
        from torch import nn
        from torch.nn.utils import prune

        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        for index in (0, 2):
            prune.identity(model[index], "weight")
        model.load_state_dict(torch.load(sys.argv[1]))
        inputs, outputs = torch.load(sys.argv[2])
        assert torch.allclose(model(inputs), outputs, rtol=1e-4, atol=1e-5)
        """,
        tmp_path / "state",
        tmp_path / "outputs",
    )


def test_state_dicts_copy_and_load(device):
    layers, other = prune_model(lnprune, model(device)), prune_model(stock, model(device))
    copied = copy.deepcopy(layers.state_dict())
    assert list(copied) == list(other.state_dict())
    assert layers.state_dict()._metadata == other.state_dict()._metadata
    other.load_state_dict(copied)
    inputs = torch.randn(3, 8, device=device)
    assert torch.equal(other(inputs), layers(inputs))
    file = io.BytesIO()
    torch.save(layers, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(inputs), layers(inputs))


def test_training_equals_torchs(device):
    torch.manual_seed(3)
    start = model(device).state_dict()
    inputs = torch.randn(5, 8, device=device)
    results = []
    for library in (lnprune, stock):
        layers = model(device)
        layers.load_state_dict(start)
        with lnprune.reference_ranking():
            prune_model(library, layers)
        optimizer = torch.optim.Adam(layers.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layers(inputs).square().sum().backward()
            optimizer.step()
        with lnprune.reference_ranking():
            prune_model(library, layers)
        results.append(layers.state_dict())
    assert list(results[0]) == list(results[1])
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key
    assert not torch.equal(results[0]["0.weight_orig"], start["0.weight"])


def outcome(call):
    try:
        return call()
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(device, backend):
    layers = prune_model(lnprune, model(device))
    inputs = torch.randn(3, 8, device=device)
    expected = layers(inputs)
    torch._dynamo.reset()
    compiled = torch.compile(layers, backend=backend)
    torch.testing.assert_close(compiled(inputs), expected)
    with torch.no_grad():
        layers[0].weight_orig += 1
    torch.testing.assert_close(compiled(inputs), layers(inputs))
    assert not torch.equal(layers(inputs), expected)
    compiled(inputs).sum().backward()
    pruned = layers[0].weight_mask == 0
    assert pruned.any()
    assert not layers[0].weight_orig.grad[pruned].any()
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [True, False])
def test_exported(device, strict):
    """What torch makes of a module pruned by either is the same, a program or an error."""
    inputs = (torch.randn(3, 8, device=device),)

    def export(library):
        torch.manual_seed(3)
        with lnprune.reference_ranking():
            layers = prune_model(library, model(device))
        exported = torch.export.export(layers, inputs, strict=strict)
        return [node.name for node in exported.graph.nodes], exported.module()(*inputs).tolist()

    assert outcome(lambda: export(lnprune)) == outcome(lambda: export(stock))


def test_exported_after_remove(device):
    layers = prune_model(lnprune, model(device))
    for index in (0, 2):
        lnprune.remove(layers[index], "weight")
    inputs = (torch.randn(3, 8, device=device),)
    exported = torch.export.export(layers, inputs)
    torch.testing.assert_close(exported.module()(*inputs), layers(*inputs))


def prune_call(amount, n, dim):
    return lambda library, module: library.ln_structured(module, "weight", amount, n, dim)


def ranked_both_ways(make, call, **options):
    assert_same_outcome(make, call, **options)
    with lnprune.reference_ranking():
        return assert_same_outcome(make, call, **options)


@pytest.mark.parametrize("shape", [(4, 6), (512, 520)], ids=str)
def test_meta_tensors(device, shape):
    make = lambda: nn.Linear(*shape, device="meta")  # noqa: E731
    for amount in (0, 0.5, 1.0):
        actual, _ = ranked_both_ways(make, prune_call(amount, 2, 0))
        assert actual.weight_mask.is_meta
    for arguments in ((shape[1] + 1, 2, 0), (1, 2, 5)):
        ranked_both_ways(make, prune_call(*arguments), raises=True)


@pytest.mark.parametrize("shape", [(4, 6), (512, 520)], ids=str)
def test_fake_tensors(device, shape):
    with FakeTensorMode() as mode:
        described = []
        for library in (lnprune, stock):
            module = nn.Linear(*shape, device=device)
            library.ln_structured(module, "weight", 0.5, 2, 0)
            tensors = (module.weight_mask, module.weight)
            assert all(tensor.fake_mode is mode for tensor in tensors)
            described.append([(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors])
        assert described[0] == described[1]


def test_fake_tensors_through_the_ops(device):
    with FakeTensorMode():
        weight = torch.randn(6, 4, device=device)
        for tensor, shape in (
            (lnprune.ops.channel_norms([weight], [0], 2.0)[0], (6,)),
            (lnprune.ops.prune_channels([weight], [], [weight], [0], 2.0, [1], [0.0])[1][0], (6, 4)),
        ):
            assert tensor.shape == shape


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex(device, dtype):
    def make():
        module = nn.Module()
        module.weight = nn.Parameter(torch.randn(6, 4, dtype=dtype, device=device))
        return module

    with lnprune.reference_ranking():
        for n in (2, 1, float("inf")):
            actual, _ = assert_same_outcome(make, prune_call(0.5, n, 0))
    assert actual.weight_mask.dtype is dtype
    actual, _ = assert_same_outcome(make, prune_call(0.5, 2, 0), skipped_bits=("weight", "weight_mask"))
    keep = actual.weight_mask.real.sum(dim=1) != 0
    norms = torch.linalg.vector_norm(actual.weight_orig.detach().to(torch.complex128), dim=1)
    assert_optimal(keep, norms, 3)


def test_sparse(device):
    for layout in (torch.sparse_coo, torch.sparse_csr):

        def make(layout=layout):
            module = nn.Module()
            dense = torch.randn(4, 6, device=device)
            weight = dense.to_sparse() if layout is torch.sparse_coo else dense.to_sparse_csr()
            module.weight = nn.Parameter(weight)
            return module

        for library in (stock, lnprune):
            module = make()
            held = module.weight
            with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
                library.ln_structured(module, "weight", 2, 2, 0)
            if library is lnprune:
                assert module.weight is held


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8(device, dtype):
    """Torch has no norm of float8; here the mask has the weight's dtype, as for other dtypes."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(8, 6, device=device).to(dtype), requires_grad=False)
    original = bits(module.weight)
    scores = module.weight.detach().double()
    lnprune.ln_structured(module, "weight", 0.5, 2, 0)
    assert module.weight_mask.dtype is module.weight.dtype is dtype
    assert torch.equal(bits(module.weight_orig), original)
    keep = kept_channels(module.weight_mask, 0)
    assert_optimal(keep, exact_norms(scores, 2, 0), 4)
    assert torch.equal(module.weight_mask.float(), keep[:, None].float().expand(8, 6))
    assert torch.equal(module.weight.float(), module.weight_mask.float() * scores.float())


def test_tied_weights(device):
    """One parameter in two modules: each is pruned by itself, the original stays shared."""

    def make():
        pair = nn.ModuleList([nn.Linear(6, 4, device=device), nn.Linear(6, 4, device=device)])
        pair[1].weight = pair[0].weight
        return pair

    def call(library, pair):
        library.ln_structured(pair[0], "weight", 1, 2, 0)
        library.ln_structured(pair[1], "weight", 2, 1, 1)
        library.ln_structured(pair[0], "weight", 0.5, 2, 0)

    with lnprune.reference_ranking():
        actual, _ = assert_same_outcome(make, call)
    assert actual[0].weight_orig is actual[1].weight_orig
    (actual[0].weight.sum() + actual[1].weight.sum()).backward()
    expected = actual[0].weight_mask + actual[1].weight_mask
    assert torch.equal(actual[0].weight_orig.grad, expected)


@pytest.fixture
def mesh(device):
    """A mesh of this process alone."""
    if not torch.distributed.is_available():
        pytest.skip("torch without torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sharded", [0, 1, None], ids=["rows", "columns", "replicated"])
@pytest.mark.parametrize("dim", [0, 1])
def test_sharded_weights(device, mesh, sharded, dim):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placement = Replicate() if sharded is None else Shard(sharded)

    def make(weight):
        module = nn.Module()
        module.weight = nn.Parameter(distribute_tensor(weight, mesh, [placement]))
        return module

    weight = torch.randn(8, 6)
    plain = nn.Module()
    plain.weight = nn.Parameter(weight.clone())
    results = []
    for library in (stock, lnprune):
        module = make(weight)
        try:
            with lnprune.reference_ranking():
                library.ln_structured(module, "weight", 0.5, 2, dim)
        except RuntimeError:
            assert "weight" in module._parameters
            results.append((RuntimeError, None))
        else:
            local = module.weight.full_tensor()
            results.append((type(module.weight), local))
            assert module.weight_mask.placements == module.weight_orig.placements
    if results[0][1] is None and results[1][1] is not None:
        lnprune.ln_structured(plain, "weight", 0.5, 2, dim)
        assert torch.equal(results[1][1], plain.weight)
        return
    assert results[0][0] is results[1][0]
    if results[0][1] is not None:
        assert torch.equal(results[0][1], results[1][1])
