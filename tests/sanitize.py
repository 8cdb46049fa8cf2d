"""Builds the native code under AddressSanitizer and UndefinedBehaviorSanitizer and runs its tests on it."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
COPIED = ("csrc", "lnprune", "setup.py", "pyproject.toml", "README.md", "LICENSE", "tests")
# The tests that run native code on every path; the others add nothing for a sanitizer to see.
TESTS = ("test_norms.py", "test_selection.py", "test_write.py", "test_zero.py", "test_ops.py")
# The CUDA kernels on the emulated GPU take longer: every path once, not every dtype and order.
EMULATED_TESTS = ("test_norms.py", "test_selection.py", "test_write.py", "test_zero.py")
EMULATED_CHOICE = (
    "test_norms_of_every_dtype and bfloat16 or test_an_unaligned and float64 or test_ties or test_nan_is"
    " or test_only_channels or test_first_masks and float16 or test_repeated_masks_and and float32"
    " or test_every_path and float16 or test_neighbours or test_threads_and_lists"
)


def main() -> int:
    """Exits with the status of the test run, or of the build."""
    compiler = os.environ.get("CXX", "c++")
    # The C++ runtime too: the sanitizer looks for what it intercepts, exceptions among it, when it starts.
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
            else:
                shutil.copy(source, copy / name)
        environment = os.environ | {
            "LNPRUNE_SANITIZE": "1",
            "PYTHONPATH": folder,
            # Python and torch keep memory until the process ends; leaks are counted by the tests.
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=86",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        }
        build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        status = subprocess.run(build, cwd=copy, env=environment, check=False).returncode
        if status != 0:
            return status
        environment["LD_PRELOAD"] = " ".join(runtimes)
        # Reports of the sanitizers go to the file descriptor: only what Python prints is captured.
        options = ["-q", "--capture=sys", "-p", "no:cacheprovider", "-m", "not slow"]
        tests = [sys.executable, "-m", "pytest", *options]
        emulated = ["--emulated-cuda", "-k", EMULATED_CHOICE]
        for names, more in ((TESTS, []), (EMULATED_TESTS, emulated)):
            paths = [str(copy / "tests" / name) for name in names]
            command = [*tests, *more, *paths]
            status = subprocess.run(command, cwd=copy, env=environment, check=False).returncode
            if status != 0:
                return status
        return 0


if __name__ == "__main__":
    sys.exit(main())
