"""What `pip install pab-fx` brings: a small wheel whose commands run away from the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pab_fx

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as pip builds it, which fetches the build's own requirements."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(pip, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that imports the package from the wheel alone."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHONWARNINGS": "ignore"}


def run(environment: dict[str, str], folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pab_fx", *command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_is_small_and_says_what_it_is(wheel: Path) -> None:
    assert wheel.name == f"pab_fx-{pab_fx.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 12e6
    names = zipfile.ZipFile(wheel).namelist()
    assert "pab_fx/py.typed" in names
    assert not [name for name in names if not name.startswith(("pab_fx/", "pab_fx-"))]


@pytest.mark.slow
def test_its_commands_run_away_from_the_repository(elsewhere: dict[str, str], tmp_path: Path) -> None:
    where = subprocess.run(
        [sys.executable, "-c", "import pab_fx; print(pab_fx.__file__)"],
        cwd=tmp_path,
        env=elsewhere,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert where.startswith(elsewhere["PYTHONPATH"])
    run(elsewhere, tmp_path, "demo", "--steps", "2", "--clips", "1", "--rounds", "1", "--output", "demo.gif")
    assert (tmp_path / "demo.gif").stat().st_size > 0
    assert "spatial" in run(elsewhere, tmp_path, "explain", "--rounds", "0")
    assert "spatial" in run(elsewhere, tmp_path, "explain", "--rounds", "0")
    assert run(elsewhere, tmp_path, "--version").strip() == f"pab-fx {pab_fx.__version__}"


def test_the_changelog_and_the_citation_name_this_version() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert changes.split("\n## ")[1].startswith(pab_fx.__version__)
    assert f"\nversion: {pab_fx.__version__}\n" in (ROOT / "docs/CITATION.cff").read_text()


def test_the_help_imports_neither_torch_nor_diffusers() -> None:
    code = "import sys, pab_fx.cli; print(sorted({'torch', 'diffusers', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_and_folders_of_the_same_name_are_kept_apart() -> None:
    """`pab_fx.explain` is the function, whatever has been imported from the folder."""
    import pab_fx.calibrate.run
    import pab_fx.explain.subject
    import pab_fx.export.export
    import pab_fx.report.report

    for name in ("calibrate", "enable", "explain", "export", "report"):
        assert callable(getattr(pab_fx, name)), name
    assert set(pab_fx.__all__) <= set(dir(pab_fx))
    with pytest.raises(AttributeError, match="has no attribute 'enabel'"):
        pab_fx.enabel  # noqa: B018
