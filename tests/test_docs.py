"""What the documents show is what the code does: graphs, code, commands, links."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pab_fx import rewrite

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import print_graphs  # noqa: E402

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GRAPHS = dict(
    re.findall(r"<!-- graph: (.*?) -->\n```python\n(.*?)\n?```", (ROOT / "docs/architecture.md").read_text(), re.DOTALL)
)


@pytest.fixture(scope="module")
def stages() -> Iterator[dict[str, str]]:
    """The graphs as they are printed now; gradients do not matter, the block's parameters need none."""
    yield print_graphs.stages()
    torch._dynamo.reset()


def _without_order_of_operands(code: str) -> str:
    """torch 2.15 hands a branch its operands in another order than 2.13."""
    return re.sub(r"(cond\(.*\()(.*)\)\)", lambda m: m[1] + ", ".join(sorted(m[2].split(", "))), code)


def test_every_stage_is_shown(stages: dict[str, str]) -> None:
    assert list(GRAPHS) == list(stages)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_architecture_shows_the_graph_that_is_printed(name: str, stages: dict[str, str]) -> None:
    """`python examples/print_graphs.py --update docs/architecture.md` brings the document up to date."""
    assert _without_order_of_operands(GRAPHS[name]) == _without_order_of_operands(stages[name])


def test_an_exported_graph_is_rewritten_and_exported_again() -> None:
    block, tokens = print_graphs.build(), torch.randn(1, 4, 8)
    exported = torch.export.export(block, (tokens, torch.tensor([1.0])))
    rewritten = rewrite(exported.module(), print_graphs.CONFIG)
    again = torch.export.export(rewrite(exported.module(), print_graphs.CONFIG), (tokens, torch.tensor([1.0])))
    assert {"pab_calls", "pab_timestep", "pab_cache_0"} == set(
        again.run_decompositions().graph_signature.buffers_to_mutate.values()
    )
    module = again.module()
    for t, reuses in ((900.0, False), (700.0, True), (600.0, False), (500.0, True)):
        inputs = (torch.randn(1, 4, 8), torch.tensor([t]))
        output, plain = module(*inputs), block(*inputs)
        torch.testing.assert_close(rewritten(*inputs), output)
        assert torch.allclose(plain, output, atol=1e-5) != reuses


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_code_in_documents_compiles(document: Path) -> None:
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)):
        compile(code, f"{document.name}, block {i}", "exec")


def test_the_code_about_testing_runs_and_prints_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs/testing.md").read_text()
    scope: dict[str, object] = {}
    for code, shown in re.findall(r"```python\n(.*?)```(?:\n\n<!-- output -->\n```\n(.*?)```)?", text, re.DOTALL):
        exec(code, scope)
        assert capsys.readouterr().out.rstrip() == shown.rstrip()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_point_to_something(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", document.read_text())
    assert not [link for link in links if "://" not in link and not (document.parent / link).exists()]


@pytest.mark.parametrize(
    ("mark", "command"),
    [("demo", "pip install -e . && pab-fx demo"), ("test", 'pip install -e ".[test]" && pytest')],
)
def test_the_readme_has_the_command_that_ci_runs(mark: str, command: str) -> None:
    """As `.ci/run` cuts it out: from the mark to the end of the next fenced block."""
    block = re.search(rf"^<!-- {mark} -->$(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert block is not None
    assert [line for line in block[1].splitlines() if line.startswith("pip install")] == [command]


def test_example_files_named_in_documents_exist() -> None:
    named = {name for path in DOCUMENTS for name in re.findall(r"(?:examples|tests)/\w+\.py", path.read_text())}
    assert named
    assert not [name for name in named if not (ROOT / name).is_file()]
