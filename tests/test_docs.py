"""What the documents show is what the code does: graphs, code, output, commands, links, names."""

from __future__ import annotations

import argparse
import contextlib
import doctest
import importlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pages
import print_graphs
import pytest
import torch
import typer
from pages import PAGES, ROOT, Block, blocks
from typer.testing import CliRunner

import pab_fx.testing
from pab_fx import rewrite
from pab_fx.cli import app
from pab_fx.report import data

every_page = pytest.mark.parametrize("page", PAGES)

# ----------------------------------------------------------------------------------------------------------- graphs

GRAPHS = {block.of("graph"): block.code.rstrip() for block in blocks("docs/architecture.md") if block.of("graph")}


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
    assert {"pab_calls", "pab_timestep", "pab_slot_0_0"} == set(
        again.run_decompositions().graph_signature.buffers_to_mutate.values()
    )
    module = again.module()
    for t, reuses in ((900.0, False), (700.0, True), (600.0, False), (500.0, True)):
        inputs = (torch.randn(1, 4, 8), torch.tensor([t]))
        output, plain = module(*inputs), block(*inputs)
        torch.testing.assert_close(rewritten(*inputs), output)
        assert torch.allclose(plain, output, atol=1e-5) != reuses


# ------------------------------------------------------------------------------------------------------------- code

TESTS_OF_THEIR_OWN = {
    "docs/migrating.md": "test_migrating.py",
    "docs/migrating_others.md": "test_migrating.py",
    "docs/export.md": "test_export.py",
}
"""Pages each of whose blocks is run, and what it does compared with something, by another file."""


def runs_here(block: Block) -> bool:
    return block.page not in TESTS_OF_THEIR_OWN and block.of("graph") is None


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(runs_here, blocks(page)))])
def test_the_code_of_a_page_runs_and_prints_what_is_shown(
    page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python tests/pages.py PAGE` writes what is printed now into a page."""
    pages.stand_in(monkeypatch, tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    try:
        for block in filter(runs_here, blocks(page)):
            pages.run(block, names)
            printed = capsys.readouterr().out
            assert block.shown is None or printed.rstrip() == block.shown.rstrip(), block
    finally:
        pages.leave_ranks()


def test_no_block_is_left_out() -> None:
    every = [block for page in PAGES for block in blocks(page)]
    assert not [str(block) for block in every if block.of("not run")]
    for page, file in TESTS_OF_THEIR_OWN.items():
        assert all(block.of("code") for block in blocks(page)), page
        assert f'blocks("{page}")' in (ROOT / "tests" / file).read_text()


PUBLIC_MODULES = sorted({getattr(pab_fx, name).__module__ for name in pab_fx.__all__} | {"pab_fx.run.clock"})


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_examples_in_docstrings_of_the_api_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pages.register_by_name(monkeypatch)
    with torch.no_grad():
        assert doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed == 0


# --------------------------------------------------------------------------------------------------------- commands

COMMAND = re.compile(r"^(?:torchrun [\w -]*?(?=examples/)|python (?=examples/|-m pab_fx)|(?=pab-fx ))")


def commands(page: str) -> list[str]:
    """The commands of the package and of its examples: lines of blocks, and spans of code in the text."""
    text = PAGES[page].read_text()
    lines = [line for block in blocks(page, "sh") for line in block.code.replace("\\\n", " ").splitlines()]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", pages.FENCE.sub("", text))]
    parts = [part.partition("  #")[0].strip() for line in (*lines, *spans) for part in line.split("&&")]
    return [part for part in parts if COMMAND.match(part)]


COMMANDS = sorted({command for page in PAGES for command in commands(page)})


class Parsed(Exception):
    """Ends a script once its options are read."""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_there_is(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options are those of the package's commands, and of the scripts."""
    program, *arguments = shlex.split(COMMAND.sub("", command), comments=True)
    if program in ("pab-fx", "-m"):
        parse(arguments if program == "pab-fx" else arguments[1:])
        return
    source = (ROOT / program).read_text()
    if "argparse" not in source and "parser(" not in source:
        assert not arguments
        return
    read = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, given: Any = None, namespace: Any = None) -> Any:
        read(parser, given, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(Parsed):
        importlib.import_module(Path(program).stem).main()


def parse(arguments: list[str]) -> None:
    """Read the options of one of the package's commands."""
    if arguments:
        group: Any = typer.main.get_command(app)
        context = group.make_context("pab-fx", arguments)
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        with contextlib.suppress(typer.Exit):  # of --help; what is refused raises another error
            command.make_context(name, rest, parent=context)


RUN = [command for command in COMMANDS if re.match("pab-fx (explain|doctor)", command)]
"""The commands that need no checkpoint. Others run for minutes: tests of their own call them on less."""


@pytest.mark.parametrize("command", [a for a in RUN if not any(b.startswith(f"{a} ") for b in RUN)])
def test_a_command_that_needs_no_checkpoint_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_pipeline: Callable[[Path], None]
) -> None:
    """Of two of which one begins with the other, the longer one: it does the same and more."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    tiny_pipeline(tmp_path / "path" / "to" / "a" / "pipeline")
    shown = CliRunner().invoke(app, shlex.split(command, comments=True)[1:])
    assert shown.exit_code == 0, shown.output
    assert shown.output


@pytest.mark.parametrize(
    ("mark", "command"),
    [("demo", "pip install -e . && pab-fx demo"), ("test", 'pip install -e ".[test]" && pytest')],
)
def test_the_readme_has_the_command_that_ci_runs(mark: str, command: str) -> None:
    """As `.ci/run` cuts it out: from the mark to the end of the next fenced block."""
    block = next(block for block in blocks("README.md", "sh") if block.mark == mark)
    assert [line for line in block.code.splitlines() if line.startswith("pip install")] == [command]


def test_every_method_of_the_readme_is_a_policy() -> None:
    """Of its table: each expression yields one, with what a reader has from the package."""
    ratios = [1.0] * 28
    names = {**{name: getattr(pab_fx, name) for name in pab_fx.__all__}, "pab_fx": pab_fx, "ratios": ratios}
    rows = [line for line in PAGES["README.md"].read_text().splitlines() if line.startswith("| ")]
    found = [text for row in rows for text in re.findall(r"`((?:Policy|pab_fx\.preset)\(.*?\))`", row)]
    assert len(found) >= 8
    assert all(isinstance(eval(text, names), pab_fx.Policy) for text in found)


# --------------------------------------------------------------------------------------------------- links and names


@every_page
def test_relative_links_point_to_something(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", PAGES[page].read_text())
    assert not [link for link in links if "://" not in link and not (PAGES[page].parent / link).exists()]


@every_page
def test_pictures_are_there_and_a_command_on_a_page_makes_each(page: str) -> None:
    for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGES[page].read_text()):
        path = (PAGES[page].parent / picture).resolve()
        said = f"docs/{path.relative_to(ROOT / 'docs')}"
        made_by = (f" {said} ", f"--page {said.removesuffix('.png')}.md ")  # a chart beside a page is made with it
        assert path.is_file()
        assert any(part in f"{command} " for command in COMMANDS for part in made_by), picture


def test_files_named_in_documents_exist() -> None:
    named = {name for path in PAGES.values() for name in re.findall(r"(?:examples|tests)/\w+\.py", path.read_text())}
    assert named
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "docs/site/mkdocs.yml").read_text()))
    assert {f"docs/{name}" for name in listed} == set(PAGES) - {"README.md"}


def test_every_public_name_is_in_the_api() -> None:
    """And every name there is something."""
    text = "".join(path.read_text() for page, path in PAGES.items() if page.startswith("docs/api/"))
    shown = [named(name) for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]
    public = {f"{module.__name__}.{name}": getattr(module, name) for module in PACKAGES for name in module.__all__}
    reports = {name: found for name, found in vars(data).items() if name.endswith("Report")}
    assert not [name for name, found in {**public, **reports}.items() if not any(found is each for each in shown)]


PACKAGES = (pab_fx, pab_fx.testing)


def named(name: str) -> Any:
    """The object, or the module, of that name."""
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute, None)
    return importlib.import_module(name) if found is None else found
