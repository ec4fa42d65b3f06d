"""The style is kept, and each rule goes red on a planted violation."""

import subprocess
import sys
from pathlib import Path

import pytest
import tidy
from tidy import Rule, Source


@pytest.mark.parametrize("rule", tidy.PYTHON_RULES, ids=lambda rule: rule.__name__)
def test_python_files_keep(rule: Rule) -> None:
    wrong = [f"{s.name}: {what}" for s in tidy.python_files() for what in rule(s)]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("rule", tidy.TEXT_RULES, ids=lambda rule: rule.__name__)
def test_text_files_keep(rule: Rule) -> None:
    wrong = [f"{s.name}: {what}" for s in tidy.project_files() for what in rule(s)]
    assert not wrong, "\n" + "\n".join(wrong)


def test_the_product_stays_small() -> None:
    assert tidy.product_lines(tidy.python_files()) <= tidy.PRODUCT_LINES


def test_every_pure_module_exists() -> None:
    for name in tidy.pure_modules():
        path = tidy.ROOT.joinpath(*name.split(".")[1:])
        assert path.is_dir() or path.with_suffix(".py").is_file(), name


def test_launch_does_not_import_torch() -> None:
    modules = [s.module for s in tidy.python_files() if s.name.startswith("launch/")]
    program = f"import sys, {', '.join(modules)}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


PARAMETERS = ", ".join(f"a{i}" for i in range(8))
METHODS = "".join(f"    def m{i}(self): ...\n" for i in range(16))
HOME = "/" + "home/somebody/outlast"

PLANTED: list[tuple[str, Rule, str, str]] = [
    ("long file", tidy.file_budget, "layout/a.py", "x = 1\n" * 501),
    ("wide line", tidy.file_budget, "layout/a.py", "x = '" + "y" * 100 + "'\n"),
    ("long function", tidy.function_budget, "layout/a.py", "def f():\n" + "    x = 1\n" * 60),
    ("parameters", tidy.function_budget, "layout/a.py", f"def f({PARAMETERS}): ...\n"),
    ("keywords", tidy.function_budget, "layout/a.py", f"async def f(*, {PARAMETERS}): ...\n"),
    ("long class", tidy.class_budget, "layout/a.py", "class A:\n" + "    x = 1\n" * 250),
    ("methods", tidy.class_budget, "layout/a.py", "class A:\n" + METHODS),
    ("file name", tidy.file_name, "cluster/utils.py", ""),
    ("upwards", tidy.import_order, "layout/a.py", "import outlast.cluster.view\n"),
    ("upwards, lazily", tidy.import_order, "cluster/a.py",
     "def f():\n    from outlast.launch.cli import main\n"),
    ("relative", tidy.import_order, "cluster/a.py", "from .view import View\n"),
    ("torch in launch", tidy.import_order, "launch/a.py", "import torch\n"),
    ("runtime in launch", tidy.import_order, "launch/a.py",
     "try:\n    from outlast.runtime.run import init\nexcept ImportError:\n    raise\n"),
    ("clock", tidy.purity, "layout/a.py", "import time\n"),
    ("impure module", tidy.purity, "layout/a.py", "from outlast.cluster.mesh import Mesh\n"),
    ("broad except", tidy.broad_except, "cluster/a.py",
     "try:\n    f()\nexcept Exception:\n    pass\n"),
    ("one of several", tidy.broad_except, "cluster/a.py",
     "try:\n    f()\nexcept (OSError, BaseException):\n    pass\n"),
    ("bare except", tidy.broad_except, "cluster/a.py", "try:\n    f()\nexcept:\n    pass\n"),
    ("pickle", tidy.unsafe_load, "checkpoint/a.py", "import pickle\n"),
    ("pickle.load", tidy.unsafe_load, "checkpoint/a.py", "x = pickle.load(f)\n"),
    ("torch.load", tidy.unsafe_load, "checkpoint/a.py", "x = torch.load(f)\n"),
    ("weights_only", tidy.unsafe_load, "checkpoint/a.py", "torch.load(f, weights_only=False)\n"),
    ("np.load", tidy.unsafe_load, "checkpoint/a.py", "np.load(f, allow_pickle=True)\n"),
    ("eval", tidy.unsafe_load, "checkpoint/a.py", "x = eval('1')\n"),
    ("environ", tidy.environment_reads, "launch/a.py", "import os\nx = os.environ['A']\n"),
    ("getenv", tidy.environment_reads, "runtime/a.py", "from os import getenv\n"),
    ("foreign path", tidy.own_words, "docs/a.md", f"run it in {HOME}\n"),
    ("host in the lock", tidy.own_words, "requirements.lock", "torch @ https://host/torch.whl\n"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "name", "text"), [case[1:] for case in PLANTED], ids=[case[0] for case in PLANTED]
)
def test_planted_violation_is_found(tmp_path: Path, rule: Rule, name: str, text: str) -> None:
    assert list(rule(plant(tmp_path, name, text)))


CLEAN = '''"""A module that keeps every rule."""

import math
from outlast.layout.space import Space


def area(radius: float, space: Space) -> float:
    try:
        return math.pi * radius**2
    except OverflowError:
        return math.inf
'''


@pytest.mark.parametrize(
    "rule", tidy.PYTHON_RULES + tidy.TEXT_RULES, ids=lambda rule: rule.__name__
)
def test_clean_file_passes(tmp_path: Path, rule: Rule) -> None:
    assert not list(rule(plant(tmp_path, "layout/a.py", CLEAN)))


def test_planted_product_is_too_big(tmp_path: Path) -> None:
    big = plant(tmp_path, "layout/a.py", "x = 1\n" * (tidy.PRODUCT_LINES + 1))
    assert tidy.product_lines([big]) > tidy.PRODUCT_LINES
    assert tidy.product_lines([Source(big.path, "tests/a.py")]) == 0


def test_torch_may_be_imported_lazily_in_launch(tmp_path: Path) -> None:
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
    assert not list(tidy.import_order(plant(tmp_path, "launch/a.py", lazy)))


def plant(folder: Path, name: str, text: str) -> Source:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return Source(path, name)
