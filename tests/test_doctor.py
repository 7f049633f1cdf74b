"""`pab-fx doctor`: it says what is there, tries it, and its exit code tells."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pab_fx import doctor
from pab_fx.cli import app


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_all_is_well_here_and_said_as_json() -> None:
    shown = invoke("--inner", "eager", "--json", "-")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["ok"]
    checks = {check["name"]: check for check in found["checks"]}
    assert (
        checks["torch"]["found"] == torch.__version__.partition("+")[0] or torch.__version__ in checks["torch"]["found"]
    )
    assert "equal to diffusers' hooks to the bit" in checks["self-test, eager"]["found"]
    assert "all is well" in shown.stderr


def test_a_compiler_that_does_not_work_fails_with_code_1() -> None:
    shown = invoke("--inner", "inductr")
    assert shown.exit_code == 1
    assert "1 of the checks failed" in shown.output
    assert "inner='inductr' is not a registered Dynamo backend" in " ".join(shown.output.split())


@pytest.mark.parametrize("wrong", [lambda out: out + 1e-3, lambda out: out * float("nan")], ids=["off", "nan"])
def test_a_compiler_that_computes_something_else_is_found_out(wrong: Any) -> None:
    def inner(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        return lambda *args: tuple(wrong(out) for out in gm(*args))

    with pytest.raises(RuntimeError, match="differ from those of diffusers' hooks"):
        doctor.self_test(inner, tolerance=1e-4)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_self_test_passes_with_inductor() -> None:
    assert "of diffusers' hooks" in doctor.self_test("inductor", tolerance=1e-4)


def test_a_version_that_is_too_old_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["torch>=99", "no-such-package", "numpy; extra == 'x'"]
    )
    found = {check.name: check for check in doctor.versions()}
    assert found["torch"].ok is False
    assert "pip install 'torch>=99'" in found["torch"].found
    assert found["no-such-package"].ok is False
    assert "numpy" not in found


def test_it_says_what_would_be_broadcast_of_a_model() -> None:
    shown = invoke("wan", "--inner", "eager")
    assert shown.exit_code == 0, shown.output
    said = " ".join(shown.output.split())
    assert "blocks.{0-4}.attn1 x 5 spatial: queries, keys and values come from one sequence" in said
    assert "blocks.{0-4}.attn2 x 5 cross: keys and values come from another sequence" in said


def test_an_unknown_model_is_refused_before_anything_runs() -> None:
    shown = invoke("WanTransformer3DModel")
    assert shown.exit_code == 2
    assert "it is one of demo, cogvideox, latte, flux, wan, or a folder" in " ".join(shown.output.split())
    assert "self-test" not in shown.output
