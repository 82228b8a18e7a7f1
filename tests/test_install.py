"""constraints.txt: exact versions of everything, which the requirements do not contradict, and which `make` uses."""

import re

import pytest
from conftest import ROOT

PIN = re.compile(r"([\w.-]+)==([^;\s]+)")
FREE = {"torch", "torchvision"}  # their builds differ among machines
FILES = sorted(path.name for path in ROOT.glob("requirements*.txt"))


def pins(name: str) -> dict[str, str]:
    """Return the versions of a file by the names of packages, as pip compares them."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    found = [PIN.match(line).groups() for line in lines if line]
    versions = {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found}
    assert len(versions) == len(found), f"{name}: a package twice"
    return versions


def contradictions(name: str) -> list[str]:
    constraints = pins("constraints.txt")
    wanted = {package: version for package, version in pins(name).items() if package not in FREE}
    pairs = ((package, version, constraints.get(package, "nothing")) for package, version in wanted.items())
    return [
        f"{package}: {version} in {name}, {other} in constraints.txt"
        for package, version, other in pairs
        if version != other
    ]


@pytest.mark.parametrize("name", FILES)
def test_constraints_contradict_no_requirement(name):
    assert not contradictions(name)


def test_a_contradiction_is_named(monkeypatch):
    monkeypatch.setitem(globals(), "pins", lambda name: {"numpy": "2.2.7" if name == "constraints.txt" else "2.2.6"})
    assert contradictions("requirements.txt") == ["numpy: 2.2.6 in requirements.txt, 2.2.7 in constraints.txt"]


def test_constraints_leave_out_what_differs_among_machines():
    names = pins("constraints.txt").keys()
    assert not names & FREE and not [name for name in names if name.startswith(("nvidia-", "cuda-"))]
    assert {"filelock", "fsspec", "jinja2", "sympy", "pyparsing"} <= names  # that others need
    assert not re.search(r"\+\w|@|^-", (ROOT / "constraints.txt").read_text(), re.M)  # no local build, no path


def test_make_installs_by_the_constraints():
    makefile = (ROOT / "Makefile").read_text()
    installs = re.findall(r"\$\(PIP\) .*", makefile)
    assert len(installs) == 4 and all("requirement" in line for line in installs)
    assert re.search(r"^PIP := .* pip install .*\$\(addprefix --constraint ,\$\(CONSTRAINTS\)\)$", makefile, re.M)
    assert re.search(r"^\$\(INSTALLED\): .*\$\(CONSTRAINTS\)$", makefile, re.M)
