"""The suite itself: names that processes agree on, tables that cover what they promise, pinned versions."""

import itertools
import os
import pathlib
import re
import subprocess
import sys

import cases
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()


def test_no_name_holds_an_address(request):
    """Processes that share the tests have to call them the same: `pytest -n 2`."""
    names = [item.nodeid for item in request.session.items]
    assert [name for name in names if re.search(r"\bat 0x[0-9a-f]+", name)] == []
    assert len(names) == len(set(names))


@pytest.mark.slow
def test_two_processes_collect_the_same_names():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    collected = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        listing = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        ).stdout
        collected.append([line for line in listing.splitlines() if "::" in line])
    assert len(collected[0]) > 5000
    assert collected[0] == collected[1]


def test_any_two_values_of_two_axes_meet_in_a_table_of_pairs():
    for sizes in itertools.product((1, 2, 3, 5, 8), repeat=3):
        table = cases.pairs(*sizes)
        for a, b in itertools.combinations(range(3), 2):
            met = {(row[a], row[b]) for row in table}
            assert met == set(itertools.product(range(sizes[a]), range(sizes[b]))), sizes


def test_the_short_run_and_the_slow_one_have_every_combination_once():
    parameters = cases.in_pairs(x=["a", "b", "c"], y=[1, 2], z=[0.5, 2.5, 4.5, 6.5]).args[1]
    rows = [(a, b, c) for a, b, chosen in (parameter.values for parameter in parameters) for c in chosen]
    assert sorted(rows) == list(itertools.product("abc", [1, 2], [0.5, 2.5, 4.5, 6.5]))
    short = [parameter.values for parameter in parameters if not parameter.marks]
    assert sum(len(chosen) for _, _, chosen in short) == 12

    parameters = cases.in_turn(x=["a", "b", "c"], y=[1, 2]).args[1]
    assert [parameter.values for parameter in parameters] == list(itertools.product("abc", [1, 2]))
    short = [parameter.values for parameter in parameters if not parameter.marks]
    assert short == [("a", 1), ("b", 2), ("c", 1)]


def test_versions_of_what_is_installed_are_pinned():
    project = (ROOT / "pyproject.toml").read_text()
    needed = re.findall(r'"(.+)"', re.search(r"\ndev = \[(.+?)\n\]", project, re.DOTALL)[1])
    needed += re.findall(r"^[A-Za-z].*$", (ROOT / "tests" / "constraints.txt").read_text(), re.MULTILINE)
    # The packages of the Makefile's commands, which may go on in the next line.
    for command in re.findall(r"pip install (.+)\n", MAKEFILE.replace("\\\n", " ")):
        words = command.replace('"$(TORCH)"', re.search(r"TORCH \?= (\S+)", MAKEFILE)[1])
        words = re.sub(r"--(constraint|group|editable) \S+|--\S+", "", words)
        needed += words.split()
    assert len(needed) > 50
    assert [package for package in needed if not re.match(r"[\w.-]+==\d[\w.]*( ;|$)", package)] == []
