"""One file with everything that has to travel to a machine with a GPU, which may have torch and no network.

    python examples/pack_for_gpu.py pab-fx-gpu.tar.gz
    tar xzf pab-fx-gpu.tar.gz && bash pab-fx-gpu/run.sh        # there; results are in pab-fx-gpu/results

It holds this package, the wheels that it needs but for torch and what comes with torch, the tests, and a script that
makes a virtual environment over the machine's own Python, runs `pytest -m cuda` and then the benchmark. The wheels are
those of the environment that packs them, so pack with the Python version of the other machine.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
NAME = "pab-fx-gpu"
EXTRAS = ("test", "bench")
THERE = "torch"
"""Is on the other machine, with what it needs."""

RUN = """#!/usr/bin/env bash
# Correctness on a GPU first, then times: at most 8 minutes for each model and policy.
set -uo pipefail
cd "$(dirname "$0")"
python3 -m venv --system-site-packages env
env/bin/pip install --quiet --no-index --find-links wheels --upgrade-strategy only-if-needed "pab-fx[test,bench]"
mkdir -p results
(cd source && ../env/bin/python -m pytest -m cuda -n 0 -rA) >results/tests.txt 2>&1
echo "tests: exit code $?, results/tests.txt"
bench() {
  name=$1; shift
  env/bin/pab-fx bench --device cuda --results results/benchmarks.json "$@" >"results/$name.txt" 2>&1
  echo "$name: exit code $?, results/$name.txt"
}
for model in flux wan cogvideox latte; do
  bench "$model" --model "$model" --policy pab --policy blocks --policy taylorseer --policy firstblock --policy dbcache
done
for mode in reduce-overhead max-autotune-no-cudagraphs; do
  bench "$mode" --model flux --mode "$mode" --policy blocks --columns compile,specialize,cond,bound
done
"""


def needed(name: str, extras: tuple[str, ...] = ()) -> dict[str, str]:
    """Packages that one needs as it is installed here, and their versions; none of those that come with torch."""
    found: dict[str, str] = {}
    pending = [(name, extras)]
    while pending:
        for requirement in _requirements(*pending.pop()):
            own = _normal(requirement.name)
            if own not in found and own != THERE:
                try:
                    found[own] = version(own)
                except PackageNotFoundError:  # an extra of a package that is not installed here
                    continue
                pending.append((own, tuple(requirement.extras)))
    with_torch = {_normal(each.name) for each in _requirements(THERE)}
    return {own: at for own, at in found.items() if own not in with_torch}


def _requirements(name: str, extras: tuple[str, ...] = ()) -> Iterator[Requirement]:
    """Of a package with some of its extras, an extra that names further ones included."""
    for text in requires(name) or ():
        requirement = Requirement(text)
        if any(requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            if _normal(requirement.name) == _normal(name):
                yield from _requirements(name, tuple(requirement.extras))
            else:
                yield requirement


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pack(path: Path) -> None:
    """Write the file."""
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder) / NAME
        wheels = inside / "wheels"
        pip = [sys.executable, "-m", "pip", "--quiet"]
        subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)], check=True)
        wanted = [f"{name}=={at}" for name, at in needed("pab-fx", EXTRAS).items()]
        subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), *wanted], check=True)
        for each in ("tests", "examples"):
            shutil.copytree(ROOT / each, inside / "source" / each, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", inside / "source")
        (inside / "run.sh").write_text(RUN)
        shutil.make_archive(str(path).removesuffix(".tar.gz"), "gztar", folder, NAME)


def main(arguments: list[str] | None = None) -> None:
    """Pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a file that ends in .tar.gz")
    path = parser.parse_args(arguments).path
    if not path.name.endswith(".tar.gz"):
        parser.error(f"cannot write {path}: it has to end in .tar.gz.")
    pack(path.absolute())
    print(f"{path}: {path.stat().st_size / 2**20:.0f} MB")


if __name__ == "__main__":
    main()
