"""A compact model is a model like any other: torch.export, torch.compile and ONNX take it, and agree."""

import io
import sys
import types
from contextlib import redirect_stdout

import pytest
import torch

import lnprune
from benchmarks.resnet50 import resnet50
from tests.small_models import CASES
from tests.test_coupling import first

NAMES = ["residual", "batch norm", "depthwise", "flatten", "encoder layer"]
OTHERS = [name for name, case in CASES.items() if case.channels and name not in NAMES]
CHOSEN = [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
# The rest are recurrent: torch.compile takes none of these, whatever their sizes.
COMPILED = [each for each in CHOSEN if not any(kind in str(each) for kind in ("lstm", "gru"))]


def compacted(name):
    torch.manual_seed(0)
    model, inputs = CASES[name].make().eval(), torch.randn(CASES[name].shape)
    small = lnprune.compact(model, inputs, 0.5, 2)
    assert sum(each.numel() for each in small.parameters()) < sum(
        each.numel() for each in model.parameters()
    )
    return small, inputs


def assert_same(found, small, inputs):
    with torch.no_grad():
        expected = first(small(inputs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", CHOSEN)
def test_torch_export_takes_it(name):
    small, inputs = compacted(name)
    exported = torch.export.export(small, (inputs,))
    assert {tuple(each.shape) for each in exported.state_dict.values()} == {
        tuple(each.shape) for each in small.state_dict().values()
    }
    assert_same(first(exported.module()(inputs)), small, inputs)


@pytest.mark.parametrize("name", COMPILED)
def test_torch_compile_takes_it_as_one_graph(name):
    small, inputs = compacted(name)
    torch.compiler.reset()
    with torch.no_grad():
        found = first(torch.compile(small, backend="aot_eager", fullgraph=True)(inputs))
    assert_same(found, small, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "encoder layer"])
def test_torch_compile_makes_native_code_of_it(name):
    small, inputs = compacted(name)
    torch.compiler.reset()
    with torch.no_grad():
        found = first(torch.compile(small, fullgraph=True)(inputs))
    assert_same(found, small, inputs)


def run_by_onnxruntime(small, inputs):
    """The output of what torch.onnx makes of a model."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    with redirect_stdout(io.StringIO()):
        program = torch.onnx.export(small, (inputs,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: inputs.numpy()}
    return torch.from_numpy(session.run(None, feed)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*NAMES, "cat", "transposed", "three dims", "grouped", "lstm", "one dim", "embedding"]
)
def test_onnxruntime_computes_the_same(name):
    small, inputs = compacted(name)
    assert_same(run_by_onnxruntime(small, inputs), small, inputs)


def vit_tiny():
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("_meta_registrations"))
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=64).eval()


@pytest.mark.slow
@pytest.mark.parametrize("make", [resnet50, vit_tiny])
def test_onnxruntime_computes_the_same_for_models_of_images(make):
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 64, 64)
    small = lnprune.compact(make(), inputs, 0.5, 2)
    assert_same(run_by_onnxruntime(small, inputs), small, inputs)
