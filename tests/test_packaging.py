"""Installing: source distribution, toolkit, an empty environment, the oldest torch, what is missing."""

import importlib.metadata
import os
import pathlib
import runpy
import shutil
import subprocess
import sys
import tempfile
import types
import warnings

import pytest
import setuptools
import torch
import torch.utils.cpp_extension
from environments import new_environment

import lnprune

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "lnprune", "setup.py", "pyproject.toml", "README.md", "LICENSE")
PRUNE = """
import torch, lnprune
module = torch.nn.Linear(300, 70, dtype=torch.bfloat16)
norms = lnprune.channel_norms(module.weight, 2, 0)
lnprune.ln_structured(module, "weight", 0.5, 2, 0)
kept = module.weight_mask[:, 0] == 1
assert int(kept.sum()) == 35 and norms[kept].min() >= norms[~kept].max()
print(torch.__version__, lnprune.__file__)
"""


def copy_sources(folder: pathlib.Path) -> None:
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, folder / name)


def run(command: list, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )


@pytest.fixture
def folder():
    # Not tmp_path: pytest keeps its last three, and these hold gigabytes.
    with tempfile.TemporaryDirectory() as name:
        yield pathlib.Path(name)


def import_in(package: pathlib.Path) -> subprocess.CompletedProcess:
    # -S leaves out what an editable install hooks into the import system; torch is found by its path.
    paths = f"{package}{os.pathsep}{pathlib.Path(torch.__file__).parent.parent}"
    environment = os.environ | {"PYTHONPATH": paths}
    return run([sys.executable, "-S", "-c", "import lnprune"], cwd=package, env=environment)


def test_without_a_library_the_error_says_how_to_build_one(folder):
    copy_sources(folder)
    result = import_in(folder)
    assert result.returncode == 1
    assert "none has been built" in result.stderr
    assert f"running: torch {torch.__version__}" in result.stderr
    assert "pip install --no-build-isolation" in result.stderr


def test_a_library_that_does_not_load_is_named(folder):
    copy_sources(folder)
    (library,) = (pathlib.Path(lnprune.__file__).parent).glob("_C.*so")
    (folder / "lnprune" / library.name).write_bytes(b"no library")
    result = import_in(folder)
    assert result.returncode == 1
    assert f"built: {library.name}" in result.stderr
    assert "pip install --no-build-isolation" in result.stderr


def test_without_a_compiler_the_build_says_so(folder):
    copy_sources(folder)
    environment = os.environ | {"CXX": "no-such-compiler"}
    result = run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder, env=environment)
    assert result.returncode != 0
    assert "found no compiler: no-such-compiler is not on the PATH" in result.stderr


@pytest.fixture
def extensions(monkeypatch, capfd):
    """Runs setup.py as a torch for CUDA 13.0 would see it, with a folder on the PATH and no GPU.

    Returns the extensions by name, and what is said.
    """
    exists = os.path.exists
    usual = "/usr/local/cuda"
    monkeypatch.setattr(os.path, "exists", lambda path: not str(path).startswith(usual) and exists(path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.chdir(ROOT)

    def extensions_of(path, commands=("build_ext",), **environment):
        found = {}

        def setup(ext_modules, cmdclass):
            found.update({one.name: one for one in ext_modules})
            return types.SimpleNamespace(have_run=dict.fromkeys(commands, True))

        monkeypatch.setattr(setuptools, "setup", setup)
        monkeypatch.setenv("PATH", f"{path}:/usr/bin:/bin")
        for variable in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "LNPRUNE_DEBUG_INFO"):
            monkeypatch.delenv(variable, raising=False)
        for variable, value in environment.items():
            monkeypatch.setenv(variable, str(value))
        runpy.run_path("setup.py")
        return found, capfd.readouterr().err

    return extensions_of


CODES = (70, 75, 80, 86, 89, 90, 100, 110, 103, 120, 121)


def make_toolkit(home: pathlib.Path, version="13.0", codes=CODES) -> pathlib.Path:
    """A folder with an nvcc that says its version and the machine code that it makes."""
    (home / "include").mkdir(parents=True)
    (home / "include" / "cuda_runtime.h").touch()
    (home / "bin").mkdir()
    listed = "\n".join([*(f"sm_{code}" for code in codes), "sm_90a", "sm_100f", "compute_130"])
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        f"""#!/bin/sh
        [ $1 = --version ] && echo "Cuda compilation tools, release {version}, V{version}.88"
        [ $1 = --list-gpu-code ] && echo "{listed}"
        """
    )
    nvcc.chmod(0o755)
    return home


@pytest.fixture
def wrapper(tmp_path):
    """A folder with an nvcc that calls the one of a toolkit in another folder, and that toolkit."""
    home, path = make_toolkit(tmp_path / "a toolkit"), tmp_path / "wrapper" / "bin"
    path.mkdir(parents=True)
    nvcc = path / "nvcc"
    said = f"#$ _SPACE_= \\n#$ _HERE_={home}/bin\\n#$ _THERE_={home}/bin\\n"
    nvcc.write_text(f"#!/bin/sh\n[ $1 = --dryrun ] && printf '{said}' >&2\n")
    nvcc.chmod(0o755)
    return path, home


def test_the_toolkit_behind_a_wrapper_of_its_compiler_is_found(wrapper, extensions):
    path, home = wrapper
    found, said = extensions(path)
    assert f"{home}/include" in found["lnprune._C_cuda"].include_dirs
    assert "CPU only" not in said


def test_a_toolkit_that_is_named_comes_first(wrapper, extensions, tmp_path):
    path, home = wrapper
    named = make_toolkit(tmp_path / "named")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        found, _ = extensions(path, **{variable: named})
        assert f"{named}/include" in found["lnprune._C_cuda"].include_dirs
    # One that is named and is not there, or is for another CUDA: the one that fits.
    for other in (tmp_path, make_toolkit(tmp_path / "other", "12.9")):
        found, _ = extensions(path, CUDA_HOME=other)
        assert f"{home}/include" in found["lnprune._C_cuda"].include_dirs


def test_a_toolkit_of_another_major_version_leaves_the_cpu_and_a_warning(extensions, tmp_path):
    home = make_toolkit(tmp_path / "toolkit", "12.9")
    found, said = extensions(tmp_path, CUDA_HOME=home)
    assert list(found) == ["lnprune._C"]
    assert said.strip().splitlines()[-1] == (
        "WARNING: lnprune was built for the CPU only. This torch has CUDA 13.0, but the toolkit is another:"
        f" 12.9 in {home}. Name the folder of one for CUDA 13, which holds bin/nvcc and"
        " include/cuda_runtime.h, in CUDA_HOME, and repeat."
    )
    # Another minor version is no obstacle.
    found, said = extensions(tmp_path, CUDA_HOME=make_toolkit(tmp_path / "newer", "13.2"))
    assert "lnprune._C_cuda" in found
    assert "CPU only" not in said


def generated(extension) -> list[str]:
    """The flags of an extension that say for which GPUs it is built."""
    return [flag for flag in extension.extra_compile_args["nvcc"] if "arch" in flag]


@pytest.mark.parametrize("named", [None, "", "native"])
def test_without_a_gpu_all_that_the_toolkit_knows_are_built_for(named, extensions, tmp_path):
    listed = {} if named is None else {"TORCH_CUDA_ARCH_LIST": named}
    home = make_toolkit(tmp_path / "toolkit")
    found, _ = extensions(tmp_path, CUDA_HOME=home, **listed)
    machine = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in (75, 80, 90, 100, 110, 120)]
    assert generated(found["lnprune._C_cuda"]) == [*machine, "-gencode=arch=compute_120,code=compute_120"]
    # Only a later one of a major version.
    home = make_toolkit(tmp_path / "few", codes=(72, 86, 89))
    found, _ = extensions(tmp_path, CUDA_HOME=home, **listed)
    assert generated(found["lnprune._C_cuda"]) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_86,code=compute_86",
    ]


def test_architectures_that_are_named_and_gpus_that_are_there_are_left_to_torch(
    extensions, tmp_path, monkeypatch
):
    home = make_toolkit(tmp_path / "toolkit")
    found, _ = extensions(tmp_path, CUDA_HOME=home, TORCH_CUDA_ARCH_LIST="8.0")
    assert generated(found["lnprune._C_cuda"]) == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found, _ = extensions(tmp_path, CUDA_HOME=home)
    assert generated(found["lnprune._C_cuda"]) == []


@pytest.mark.parametrize(
    "nvcc", [None, "exit 1", "printf 'no such word\\n' >&2"], ids=["none", "fails", "silent"]
)
def test_without_a_toolkit_the_build_ends_with_a_warning(nvcc, extensions, tmp_path):
    if nvcc is not None:
        (tmp_path / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
        (tmp_path / "nvcc").chmod(0o755)
    found, said = extensions(tmp_path)
    assert list(found) == ["lnprune._C"]
    (last,) = said.strip().splitlines()[-1:]
    assert last.startswith("WARNING: lnprune was built for the CPU only.")
    assert "no toolkit was found" in last
    assert "CUDA_HOME" in last
    # Where nothing is built, as for a wheel's metadata, nothing is said.
    assert "CPU only" not in extensions(tmp_path, ["egg_info"])[1]


def test_debug_information_is_built_only_when_asked_for(extensions, tmp_path):
    home = make_toolkit(tmp_path / "toolkit")
    for wanted, environment in ((False, {}), (True, {"LNPRUNE_DEBUG_INFO": 1})):
        found, _ = extensions(tmp_path, CUDA_HOME=home, **environment)
        cpu, cuda = (found[name].extra_compile_args for name in ("lnprune._C", "lnprune._C_cuda"))
        assert ["-g0" in flags for flags in (cpu, cuda["cxx"])] == [not wanted] * 2


def test_the_library_has_its_symbols_and_no_debug_information():
    sections = run(["readelf", "--section-headers", "--wide", lnprune._C.__file__])
    assert sections.returncode == 0, sections.stderr
    assert ".symtab" in sections.stdout
    assert (".debug_info" in sections.stdout) == bool(os.environ.get("LNPRUNE_DEBUG_INFO"))


def version_of(*command, **options) -> str:
    found = run([sys.executable, *command], **options)
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()[-1]


def test_the_version_has_one_source(folder):
    copy_sources(folder)
    metadata = importlib.metadata.metadata("lnprune")
    assert metadata["Version"] == lnprune.__version__
    # It is read, not imported: building needs no library of a build before.
    init = folder / "lnprune" / "__init__.py"
    init.write_text(init.read_text().replace(f'"{lnprune.__version__}"', '"7.8.9"'))
    assert version_of("setup.py", "--version", cwd=folder) == "7.8.9"


def tracked() -> set[str]:
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT)
    if listed.returncode != 0:
        pytest.skip("the sources came without their history")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


@pytest.mark.slow
def test_a_wheel_from_the_source_distribution_prunes(folder):
    source, clean = folder / "source", folder / "clean"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    # As `python -m build` does, but with the torch of this run.
    hooks = "import setuptools.build_meta as b, sys; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    archive = version_of("-W", "ignore", "-c", hooks, "build_sdist", clean, cwd=source)
    assert archive == f"lnprune-{lnprune.__version__}.tar.gz"
    shutil.unpack_archive(clean / archive, clean, filter="data")
    unpacked = clean / archive.removesuffix(".tar.gz")
    shutil.rmtree(source)

    made = {"PKG-INFO", "setup.cfg"}
    held = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    held = {name for name in held - made if ".egg-info" not in name}
    # What serves the repository itself stays there.
    assert tracked() - held <= {".gitignore", ".pre-commit-config.yaml", ".ci/run"}
    assert held <= tracked()

    wheel = version_of("-W", "ignore", "-c", hooks, "build_wheel", clean, cwd=unpacked)
    site = folder / "site"
    shutil.unpack_archive(clean / wheel, site, "zip")
    assert {path.name for path in (site / "lnprune").iterdir()} > {"py.typed", "_C.pyi", "__init__.py"}
    environment = os.environ | {
        "PYTHONPATH": f"{site}{os.pathsep}{pathlib.Path(torch.__file__).parent.parent}"
    }
    pruned = run([sys.executable, "-S", "-W", "ignore", "-c", PRUNE], cwd="/", env=environment)
    assert pruned.returncode == 0, pruned.stderr
    assert pruned.stdout.split()[1] == str(site / "lnprune" / "__init__.py")


@pytest.mark.slow
def test_pip_installs_into_an_empty_environment(folder):
    copy_sources(folder)
    python = new_environment(folder / "environment")
    # The build gets the torch of this run, so that the test does not depend on what is newest.
    constraint = folder / "constraint.txt"
    constraint.write_text(f"torch=={torch.__version__.split('+')[0]}\n")
    environment = os.environ | {
        "PIP_CONSTRAINT": str(constraint),
        "PIP_BUILD_CONSTRAINT": str(constraint),
    }
    installed = run([python, "-m", "pip", "install", "."], cwd=folder, env=environment)
    assert installed.returncode == 0, installed.stderr[-2000:]
    pruned = run([python, "-W", "ignore", "-c", PRUNE], cwd="/")
    assert pruned.returncode == 0, pruned.stderr
    assert "site-packages" in pruned.stdout


@pytest.mark.slow
def test_the_library_built_here_loads_in_the_oldest_torch(oldest_torch):
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(lnprune.__file__).parent.parent)}
    pruned = run([oldest_torch, "-W", "ignore", "-c", PRUNE], cwd="/", env=environment)
    assert pruned.returncode == 0, pruned.stderr
    _, file = pruned.stdout.split()
    assert pathlib.Path(file).samefile(lnprune.__file__)


REGISTERED = """
import torch, lnprune
print(lnprune.ops.build_info()["cuda"], torch.version.cuda, lnprune.ops.has_cuda())
for name in ("channel_norms", "select_channels", "write_masks", "prune_channels"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("lnprune::" + name, "CUDA"), name
"""


def toolkits_here() -> list[str]:
    """The folders of toolkits that hold headers."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    return [home for home in homes if home and pathlib.Path(home, "include", "cuda_runtime.h").exists()]


@pytest.mark.slow
def test_a_real_toolkit_compiles_for_all_gpus(request, tmp_path):
    homes = [
        home for home in toolkits_here() if "release 13." in run([f"{home}/bin/nvcc", "--version"]).stdout
    ]
    if not homes:
        pytest.skip("no toolkit for CUDA 13 with headers")
    extensions = request.getfixturevalue("extensions")  # it hides the usual folder: a link leads there
    home = tmp_path / "toolkit"
    home.symlink_to(homes[0])
    found, _ = extensions(tmp_path, CUDA_HOME=home)
    flags = found["lnprune._C_cuda"].extra_compile_args["nvcc"]
    built = {flag.rpartition("code=")[2] for flag in flags if "-gencode" in flag}
    assert {"sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_120"} <= built
    include = f"-I{pathlib.Path(torch.__file__).parent / 'include'}"
    nvcc = [home / "bin" / "nvcc", "-c", "-std=c++20", *flags, include, "csrc/cuda/roots.cu"]
    compiled = run([*nvcc, "-o", tmp_path / "roots.o"], cwd=ROOT)
    assert compiled.returncode == 0, compiled.stderr


@pytest.mark.slow
def test_the_cuda_library_builds_loads_and_registers_without_a_gpu(oldest_torch, folder):
    cuda = run(
        [oldest_torch, "-W", "ignore", "-c", "import torch; print(torch.version.cuda)"]
    ).stdout.strip()
    homes = toolkits_here()
    if cuda == "None" or not homes:
        pytest.skip(f"torch for CUDA {cuda}, toolkits with headers: {homes or 'none'}")
    copy_sources(folder)
    environment = os.environ | {"CUDA_HOME": homes[0], "PYTHONPATH": str(folder)}
    # The first and the last of those in setup.py: each takes two minutes or more of two cores.
    environment["TORCH_CUDA_ARCH_LIST"] = "7.5;12.0+PTX"
    build = [oldest_torch, "setup.py", "--quiet", "build_ext", "--inplace"]
    built = run(build, cwd=folder, env=environment)
    assert built.returncode == 0, built.stderr[-2000:]
    sizes = {path.name.split(".")[0]: path.stat().st_size for path in (folder / "lnprune").glob("*.so")}
    assert set(sizes) == {"_C", "_C_cuda"}
    assert sizes["_C"] < 8 << 20, "no debug information"
    registered = run([oldest_torch, "-W", "ignore", "-c", REGISTERED], cwd="/", env=environment)
    assert registered.returncode == 0, registered.stderr
    built_with, running, has_cuda = registered.stdout.split()
    assert built_with == running
    assert has_cuda == "True"
    pruned = run([oldest_torch, "-W", "ignore", "-c", PRUNE], cwd="/", env=environment)
    assert pruned.returncode == 0, pruned.stderr


def test_cuda_tensors_without_the_cuda_library_are_said_once_to_take_plain_torch(monkeypatch):
    class OnCuda:  # what is_native() asks a tensor
        dtype, layout, is_cpu, is_cuda = torch.float32, torch.strided, False, True

        def numel(self):
            return 1

        def is_neg(self):
            return False

    monkeypatch.setattr(lnprune.ops, "PLAIN_TYPES", (OnCuda,))
    monkeypatch.setattr(lnprune.ops, "_HAS_CUDA", False)
    lnprune.ops._warn_of_plain_torch.cache_clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert [lnprune.ops.is_native(OnCuda()) for _ in range(2)] == [False, False]
    (warning,) = warned
    assert "no CUDA kernels here" in str(warning.message)
    assert f"running: torch {torch.__version__}" in str(warning.message)
    assert "pip install --no-build-isolation" in str(warning.message)
    monkeypatch.setattr(lnprune.ops, "_HAS_CUDA", True)
    assert lnprune.ops.is_native(OnCuda())
