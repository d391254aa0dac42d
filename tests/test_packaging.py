"""What is built and installed is what the checkout holds, and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import structcot

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_wheel_holds_the_two_packages_and_their_data(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("structcot-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"structcot", "structcot_kernels", f"structcot-{structcot.__version__}.dist-info"}
    for wanted in ("structcot/py.typed", "structcot_kernels/py.typed", "structcot/report.css", "structcot/report.js"):
        assert wanted in names


def test_metadata_stands_in_one_place() -> None:
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "structcot.__version__"}
    assert not re.search(r"install_requires|version\s*=|name\s*=", (ROOT / "setup.py").read_text(encoding="utf-8"))


def test_extras_and_entry_point_have_the_promised_names() -> None:
    assert set(PROJECT["project"]["optional-dependencies"]) == {"dev", "cuda", "eval", "vllm"}
    assert PROJECT["project"]["scripts"] == {"structcot": "structcot.cli:main"}
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.14"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, structcot, structcot.cli; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_commands_of_the_readme_exist() -> None:
    from structcot.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^(?:\$ )?structcot ([a-z]+)", text, flags=re.MULTILINE)) | set(re.findall(r"`structcot ([a-z]+)", text))
    assert named, "the README shows no command"
    assert named <= known, f"the README shows commands that do not exist: {named - known}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("qwen2_5_32b_*.toml")), ids=lambda path: path.stem)
def test_every_recipe_has_a_plan_with_which_it_fits(path: Path) -> None:
    plan = (ROOT / "docs" / "plans" / f"{path.stem}.md").read_text()
    assert plan.startswith(f"# Plan of `configs/{path.name}`\n")
    assert " x h100-80gb: fits: peak " in plan
    assert f"[{path.stem.removeprefix('qwen2_5_32b_')}]({path.stem}.md)" in (ROOT / "docs" / "plans" / "README.md").read_text()
