"""The rules of the source tree that no compiler checks."""

import ast
import functools
import pathlib
import platform
import re
import shutil
import subprocess

import pytest

from lnprune import _C

ROOT = pathlib.Path(__file__).resolve().parent.parent
NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
KERNELS = [path for path in NATIVE if path.name not in {"ops.h", "ops.cpp", "ops_cuda.cpp"}]


def code_of(path: pathlib.Path) -> str:
    """The file without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def relative(path: pathlib.Path) -> str:
    """How a test names a file."""
    return str(path.relative_to(ROOT))


def test_the_sources_are_found():
    assert {"csrc/lp_norm.h", "csrc/ops.cpp", "csrc/cpu/norms.cpp"} <= {relative(path) for path in NATIVE}


@pytest.mark.parametrize("path", NATIVE, ids=relative)
def test_every_file_says_its_purpose_in_its_first_line(path):
    assert re.match(r"// \S.{20,}", path.read_text())


@pytest.mark.parametrize("path", [path for path in NATIVE if path.name != "lp_norm.h"], ids=relative)
def test_the_mathematics_of_a_norm_stands_in_lp_norm_alone(path):
    assert re.findall(r"\b(?:std::)?(?:sqrtf?|powf?|f?absf?|hypot|exp2?|log2?)\s*\(", code_of(path)) == []


@pytest.mark.parametrize("path", KERNELS, ids=relative)
def test_kernels_know_nothing_of_torch_but_its_half_types(path):
    headers = re.findall(r'#include\s+[<"]((?:torch|ATen|c10)/[^>"]+)[>"]', code_of(path))
    assert [
        h for h in headers if not re.fullmatch(r"torch/headeronly/util/(Half|BFloat16|Float8_\w+)\.h", h)
    ] == []
    assert "torch::" not in code_of(path)


@pytest.mark.parametrize("path", NATIVE, ids=relative)
def test_no_unstable_torch_interface(path):
    assert re.findall(r"<(?:ATen|c10)/[^>]+>|<torch/(?:extension|library|all)\.h>", code_of(path)) == []


@pytest.mark.parametrize("path", NATIVE, ids=relative)
def test_one_definition_of_the_ranking_order(path):
    defines = re.search(r"RankingKey\s+ranking_key\s*\(double", code_of(path)) is not None
    assert defines == (path.name == "topk.h")


def dotted(path: pathlib.Path) -> str:
    """The name of a Python file in the package: ``steps.norms`` say, and ``steps`` of a folder itself."""
    parts = path.relative_to(ROOT / "lnprune").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PYTHON = {dotted(path): path for path in sorted((ROOT / "lnprune").rglob("*.py"))}
MODULES = sorted(name for name in PYTHON if name and PYTHON[name].stem != "__init__")


@functools.cache
def imported_rooms(name: str) -> set[str]:
    """The modules of the package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(PYTHON[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lnprune":
            module = node.module.partition(".")[2]
            found |= {module, *(f"{module}.{alias.name}".strip(".") for alias in node.names)}
    return found & set(MODULES)


def reachable(name: str) -> set[str]:
    found, left = set(), {name}
    while left:
        found |= left
        left = set().union(*(imported_rooms(each) for each in left)) - found
    return found - {name}


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_each_other_in_one_direction(name):
    assert all(name not in reachable(other) for other in reachable(name))


# From the ground up. The ground floor is what every floor may use: it is about no step and no plan.
# Integrations need packages that lnprune does without. Commands import them where they are used.
GROUND = {"errors", "torch_internals", "atomic_file", "import_report"}
FLOORS = (
    *("", "steps", "modules", "plans", "removal", "checkpoints"),
    *("calls", "pretrained", "integrations", "commands"),
)
# What the command line starts with lies where Python looks for it.
ELSEWHERE = {"__main__": "commands"}


def floor(name: str) -> int:
    folder = name.rpartition(".")[0]
    return FLOORS.index(folder if folder or name in GROUND else ELSEWHERE.get(name, "calls"))


def test_the_floors_are_those_of_the_folders():
    assert {floor(name) for name in MODULES} == set(range(len(FLOORS)))
    assert {path.parent.name for path in PYTHON.values()} == {"lnprune", *FLOORS[1:]} - {"calls"}
    assert imported_rooms("modules.application") & {"steps.masks", "modules.transaction", "errors"} == {
        "steps.masks",
        "modules.transaction",
        "errors",
    }, "imports are seen, of modules and from them"


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_only(name):
    assert {other for other in imported_rooms(name) if floor(other) > floor(name)} == set()


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("plans.")])
def test_plans_meet_modules_only_where_they_are_applied(name):
    assert {other for other in imported_rooms(name) if floor(other) == 2} <= {"modules.application"}


# What knows weights by their names, shapes and places alone.
@pytest.mark.parametrize("name", ["plans.layers", "plans.selection", "plans.plan_file", "plans.report"])
def test_what_needs_no_module_knows_none(name):
    assert {other for other in reachable(name) if floor(other) == 2} == set()


@pytest.mark.parametrize("name", PYTHON)
def test_every_module_says_its_purpose(name):
    assert len(ast.get_docstring(ast.parse(PYTHON[name].read_text())).splitlines()[0]) > 20


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_longer_than_one_can_keep_in_mind(name):
    assert len(PYTHON[name].read_text().splitlines()) <= 350


# The functions of ops.py and reference.py, by what they do.
ASK = {"is_native", "are_native", "has_cuda"}
RANK = {"channel_norms", "channel_sums", "scaled_norms", "norms_of_sums", "torch_norms"}
WRITE = {"write_masks", "write_mask", "prune_channels", "prune_channels_", "zero_channels_"}


def steps_taken(source: str) -> set[str]:
    """What a source uses of ops.py and reference.py, and of the native ops past them."""
    found = set()
    tree = ast.parse(source)
    aliases = {"ops", "reference", "_C"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("lnprune", "lnprune.steps"):
            aliases |= {
                alias.asname for alias in node.names if alias.asname and alias.name in ("ops", "reference")
            }
        elif isinstance(node, ast.ImportFrom) and node.module in (
            "lnprune.steps.ops",
            "lnprune.steps.reference",
        ):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("lnprune") for alias in node.names), "one way to import"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            path = ast.unparse(node.value)
            if path in aliases or path == "torch.ops.lnprune":
                found.add(node.attr)
    return found


def test_the_steps_that_a_source_takes_are_seen():
    for source in (
        "from lnprune import ops; ops.write_masks()",
        "from lnprune.steps.ops import write_masks",
        "from lnprune import ops as native; native.write_masks()",
        "import torch; torch.ops.lnprune.write_masks()",
        "from lnprune.steps import ops; write = ops.write_masks",
    ):
        assert steps_taken(source) & WRITE == {"write_masks"}, source


def test_one_place_ranks_and_one_writes():
    taken = {name: steps_taken(path.read_text()) for name, path in PYTHON.items()}
    rooms = {
        what: {name for name, steps in taken.items() if steps & functions}
        - {"steps.ops", "steps.reference"}
        for what, functions in (("ask", ASK), ("rank", RANK), ("write", WRITE))
    }
    assert rooms["ask"] == {
        f"steps.{name}" for name in ("norms", "flags", "masks", "in_place", "sharded_masks")
    }
    # Selection ranks groups of norms. What is ranked for masks and in place is written there too.
    assert rooms["rank"] == {"steps.norms", "steps.masks", "steps.in_place", "plans.layers"}
    assert rooms["write"] == {"steps.masks", "steps.in_place", "steps.sharded_masks"}


# Private attributes that are no torch's: those of Python's own namedtuple and copyreg.
PYTHONS_OWN = {"_replace", "_reconstructor"}


def private_names(source: str) -> set[str]:
    """The private names that a source imports or reads from an object that is not its own."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") not in {"self", "cls"}:
            found.add(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            paths = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            if not paths[0].startswith("lnprune"):
                found.update(part for path in paths for part in path.split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)  # for getattr, say
    return {name for name in found if re.match(r"_[A-Za-z]", name)}


def own_private_names(source: str) -> set[str]:
    """The private names that a source defines: functions, methods, classes, and attributes of self."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self":
            found.add(node.attr)
    return found


INTERNALS = private_names(PYTHON["torch_internals"].read_text())
OWN = set().union(*(own_private_names(path.read_text()) for name, path in PYTHON.items()))


def test_the_private_names_of_torch_are_seen():
    for source in (
        "module._parameters",
        "import torch._C",
        "from torch.nn.modules.conv import _ConvTransposeNd",
        "from torch._foreach import x",
        "getattr(module, '_parameters')",
        "stock._compute_norm(tensor)",
        "torch.nn.modules.module._global_parameter_registration_hooks",
    ):
        assert private_names(source), source
    assert private_names("from __future__ import annotations; from lnprune import _C; self._x") == set()
    assert {"_parameters", "_tensor_name", "_compute_norm", "_python_dispatch", "_orig_mod"} <= INTERNALS


@pytest.mark.parametrize("name", sorted(set(PYTHON) - {"torch_internals"}))
def test_private_names_of_torch_stand_in_torch_internals_alone(name):
    found = private_names(PYTHON[name].read_text()) - PYTHONS_OWN
    assert found & INTERNALS == set()
    assert found - OWN - {"_orig", "_mask"} == set()


def test_torch_internals_knows_no_other_room():
    assert imported_rooms("torch_internals") == set()


def test_the_build_sets_no_flag_that_changes_results():
    setup = (ROOT / "setup.py").read_text()
    assert re.findall(r"-ffast-math|-Ofast|-march=native|-std=|use_fast_math", setup) == []
    assert "-ffp-contract=off" in setup
    assert len(setup.splitlines()) < 120


def calls_when_loaded(source: str) -> set[str]:
    """What the library calls, for one source file, the moment that it is loaded."""
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", _C.__file__]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "<lnprune::cpu::write(" in listing, "the library has its symbols"
    start = listing.find(f"<_GLOBAL__sub_I_{source}>:")
    if start < 0:
        return set()
    body = listing[start : listing.index("\n\n", start)]
    return set(re.findall(r"(?:call|jmp) +\w+ <(.+?)(?:@plt)?>$", body, re.MULTILINE))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one set of loops")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils is not installed")
@pytest.mark.parametrize("level", [3, 4])
def test_loading_runs_no_instruction_that_a_processor_may_lack(level):
    # What is made at load time, a static table say, is made by the file's own instruction set, on every
    # processor. The two calls allowed are those of <iostream>.
    calls = calls_when_loaded(f"loops_x86_64_v{level}.cpp")
    assert calls <= {"std::ios_base::Init::Init()", "__cxa_atexit"}
