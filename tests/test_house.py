"""The house: who may import whom, what stands on the top level, what answers at once.

The imports are read with `ast`, those inside functions too. An import goes down the order below. So
a reader can take the files from top to bottom, and a change can only reach what stands above it.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
MODULES = ("data", "envs", "prepare", "model", "parallel",
           "learner", "checkpoint", "plots", "eval", "train")
PACKAGES = ("behaviors", "kernels", "tests", "studies", "course")
ORDER = ("data", "envs", "kernels", "model", "behaviors", "prepare", "parallel", "learner",
         "checkpoint", "plots", "eval", "train", "studies", "course", "tests")
TOP_LEVEL = {
    "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "requirements.txt",
    *(f"{name}.py" for name in MODULES),
    *PACKAGES, "results",
    ".ci", ".github", ".gitignore",
}


class Import(NamedTuple):
    """An import: the module it is in, its line, the module that it names, and a name in that."""
    importer: str
    line: int
    module: str
    name: str  # "" if it takes the module itself

    @property
    def imported(self):
        return f"{self.module}.{self.name}" if self.name else self.module

    def __str__(self):
        return f"{self.importer}, line {self.line}, imports {self.imported}"


def room(module):
    """A module's file on the top level, or its package."""
    return module.split(".")[0]


def modules_of(root):
    """{name: path} of the repository's modules; a package's own name stands for its __init__.py."""
    paths = [path for path in root.glob("*.py") if path.stem in MODULES]
    for package in PACKAGES:
        paths += [path for path in (root / package).rglob("*.py")
                  if path.parent.name != "answers"]  # a student's, which course.blank keeps
    modules = {}
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        modules[".".join(parts)] = path
    return modules


def named_by(node, package):
    """The (module, name) that an import statement names; name "" is the module itself."""
    if isinstance(node, ast.Import):
        return [(alias.name, "") for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    above = package[:len(package) - node.level + 1] if node.level else []
    module = ".".join([*above, *filter(None, [node.module])])
    return [(module, alias.name) for alias in node.names]


def imports_of(importer, path, modules):
    """The Imports of a module."""
    package = importer.split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        for module, name in named_by(node, package):
            if f"{module}.{name}" in modules:  # from studies import step
                module, name = f"{module}.{name}", ""
            found.append(Import(importer, node.lineno, module, name))
    return found


def read_imports(root):
    """{module: its Imports} of the whole repository"""
    modules = modules_of(root)
    return {name: imports_of(name, path, modules) for name, path in modules.items()}


def upwards(imports):
    """The Imports that do not go down the order; within a package, all are allowed."""
    found = []
    for one in ours(imports):
        if ORDER.index(room(one.module)) > ORDER.index(room(one.importer)):
            found.append(str(one))
    return found


def ours(imports):
    """All Imports of the repository's own modules."""
    found = []
    for module in imports:
        found += [one for one in imports[module] if room(one.module) in ORDER]
    return found


def names_made(path):
    """All names that a file gives to anything."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    return names


def leading_nowhere(imports, modules):
    """The Imports of our modules that name a module, or a name in one, that there is not."""
    made = {name: names_made(path) | {"", "*"} for name, path in modules.items()}
    found = []
    for one in ours(imports):
        if one.name not in made.get(one.module, ()):
            found.append(str(one))
    return found


def circle(imports):
    """The modules of a circle of imports, in its order; [] if there is none."""
    checked = set()

    def visit(module, path):
        if module in path:
            return [*path[path.index(module):], module]
        if module in checked or module not in imports:
            return []
        for one in imports[module]:
            if found := visit(one.module, [*path, module]):
                return found
        checked.add(module)
        return []

    for module in imports:
        if found := visit(module, []):
            return found
    return []


def dead_links(text):
    """The links of a markdown file to files, or to headings in such, that are not there."""
    dead = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text.read_text()):
        name, _, heading = link.partition("#")
        path = text.parent / name if name else text
        if not path.exists() or heading and heading not in headings_of(path):
            dead.append(f"{text.name}: {link}")
    return dead


def headings_of(path):
    """How links name a markdown file's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def needs(module, imports):
    """The rooms and packages that a module imports, itself or through others."""
    found, waiting = set(), [module]
    while waiting:
        for one in imports.get(waiting.pop(), ()):
            if one.module not in found:
                found.add(one.module)
                waiting.append(one.module)
    return {room(module) for module in found}


@pytest.fixture(scope="module")
def imports():
    return read_imports(ROOT)


# ---------------------------------------------------------------- the house as it stands

def test_every_room_has_its_place(imports):
    assert sorted(ORDER) == sorted([*MODULES, *PACKAGES])
    assert set(MODULES) < set(imports)


def test_no_import_goes_upwards(imports):
    assert upwards(imports) == []


def test_no_imports_go_in_a_circle(imports):
    assert circle(imports) == []


def test_what_is_imported_is_there(imports):
    """Inside functions too, where no other test may come by."""
    assert leading_nowhere(imports, modules_of(ROOT)) == []


def test_the_learner_s_side_needs_no_simulator(imports):
    """Data of a robot can be learnt from where no environment can be installed."""
    kernels = [module for module in imports if room(module) == "kernels"]
    assert len(kernels) > 2
    for module in ("data", "model", "parallel", "learner", *kernels):
        assert not needs(module, imports) & {"gymnasium", "mujoco"}, module
    assert "gymnasium" in needs("envs", imports)  # else this test sees nothing


def test_nothing_else_is_on_the_top_level():
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository")
    command = ["git", "ls-files"]  # what a user put there beside it does not count
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert {line.split("/")[0] for line in ran.stdout.splitlines()} <= TOP_LEVEL


def test_links_in_texts_lead_somewhere():
    texts = [ROOT / name for name in ("README.md", "CHANGELOG.md")]
    for package in PACKAGES:
        texts += (ROOT / package).glob("*.md")
    assert len(texts) > 5
    for text in texts:
        assert dead_links(text) == []


# ---------------------------------------------------------------- the rules themselves

@pytest.mark.parametrize("name, text, imported", [
    ("data", "def late(): from eval import act", "eval.act"),
    ("kernels/attention", "import model", "model"),
    ("learner", "import numpy, studies.step", "studies.step"),
    ("studies/step", "from tests import conftest", "tests.conftest"),
    ("behaviors/collect", "from prepare import build", "prepare.build"),
])
def test_an_import_upwards_is_seen(tmp_path, name, text, imported):
    make_house(tmp_path)
    (tmp_path / f"{name}.py").write_text(text)
    said = f"{name.replace('/', '.')}, line 1, imports {imported}"
    assert upwards(read_imports(tmp_path)) == [said]


@pytest.mark.parametrize("text, nowhere", [
    ("from eval import act", ["eval.act"]),
    ("import kernels.latent_block", ["kernels.latent_block"]),
    ("def late(): from studies import bench", ["studies.bench"]),
    ("import torch, learner\nfrom studies import step\nfrom learner import Learner", []),
])
def test_an_import_of_what_is_not_there_is_seen(tmp_path, text, nowhere):
    make_house(tmp_path)
    (tmp_path / "learner.py").write_text("class Learner: pass")
    (tmp_path / "studies/ladder.py").write_text(text)
    found = leading_nowhere(read_imports(tmp_path), modules_of(tmp_path))
    assert found == [f"studies.ladder, line 1, imports {name}" for name in nowhere]


@pytest.mark.parametrize("one, text_of_one, other, text_of_other, found", [
    ("studies/step", "from studies import ladder", "studies/ladder", "import studies.step",
     {"studies.step", "studies.ladder"}),
    ("behaviors/__init__", "from . import collect", "behaviors/collect", "import behaviors",
     {"behaviors", "behaviors.collect"}),
    ("behaviors/collect", "from behaviors import TASKS", "studies/step", "from .ladder import rows",
     set()),
])
def test_a_circle_is_seen(tmp_path, one, text_of_one, other, text_of_other, found):
    make_house(tmp_path)
    (tmp_path / f"{one}.py").write_text(text_of_one)
    (tmp_path / f"{other}.py").write_text(text_of_other)
    assert set(circle(read_imports(tmp_path))) == found


def test_a_dead_link_is_seen(tmp_path):
    text = tmp_path / "a.md"
    text.write_text("# One, two\n[x](#one-two) [y](b.md) [z](a.md#three) [w](https://a.org#b)")
    assert dead_links(text) == ["a.md: b.md", "a.md: a.md#three"]


def make_house(root):
    """The rooms that the tests above change, without imports."""
    names = ["data", "eval", "learner", "model", "prepare"]
    for package in ("behaviors/collect", "kernels/attention", "studies/step", "tests/conftest"):
        (root / package).parent.mkdir()
        names += [package, f"{Path(package).parent}/__init__"]
    for name in (*names, "studies/ladder"):
        (root / f"{name}.py").write_text("")


# ---------------------------------------------------------------- answered at once

@pytest.mark.parametrize("line, answer", [
    ("train.py --stepz 1", "unrecognized arguments: --stepz"),
    ("train.py --size huge", "invalid choice: 'huge'"),
    ("train.py --steps many", "argument --steps: invalid int value: 'many'"),
    ("eval.py", "the following arguments are required: RUN"),
    ("plots.py", "the following arguments are required: RUN"),
    ("-m course.grade iqn", "invalid choice: 'iqn'"),
    ("prepare.py biuld", "invalid choice: 'biuld'"),
])
def test_a_typing_error_is_answered_before_torch_is_imported(line, answer):
    """The import of torch takes seconds. `-X importtime` names each module as it is imported."""
    command = [sys.executable, "-X", "importtime", *line.split()]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2
    assert answer in ran.stderr
    imported = re.findall(r"^import time:.*\| +(\S+)$", ran.stderr, re.M)
    assert "argparse" in imported
    assert "torch" not in imported
