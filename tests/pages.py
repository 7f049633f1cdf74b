"""The pages of the documentation, the code on them, and stand-ins for what that code needs.

A page's blocks run in its order, in one namespace, as a reader would paste them. Nothing of them is changed. In place
of checkpoints there are tiny models with random weights, a GPU is the CPU, what compiles compiles nothing, and the
other ranks of a process group are not there.

A comment above a block says what is particular about it:

    <!-- given: model, text -->      names of the reader's own; `GIVEN` has them for the tests
    <!-- output -->                  a block of what the one before prints
    <!-- code: NAME -->              tests of its own run it, on top of what is here
    <!-- graph: NAME -->             is printed by examples/print_graphs.py, and not run
    <!-- not run: WHY -->

`python tests/pages.py docs/start.md` writes what that page's blocks print now into it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import zoo
from pipelines import prompted

import pab_fx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}

FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^>]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        page: the page's path in the repository.
        line: number of its first line of code.
        language: as the fence says; "" for none.
        code: its lines.
        mark: the comment above it, "" for none.
        shown: what the page says that it prints, `None` if it says nothing.
    """

    page: str
    line: int
    language: str
    code: str
    mark: str = ""
    shown: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def of(self, kind: str) -> str | None:
        """What stands behind `kind:` in the comment above it."""
        return self.mark.removeprefix(f"{kind}: ") if self.mark.startswith(f"{kind}: ") else None


def blocks(page: str, language: str = "python") -> list[Block]:
    """The blocks of a page in a language, in order."""
    text, found = PAGES[page].read_text(), list[Block]()
    for match in FENCE.finditer(text):
        if match["mark"] == "output":
            found[-1] = replace(found[-1], shown=match["code"])
        else:
            line = text.count("\n", 0, match.start("code")) + 1
            found.append(Block(page, line, match["language"], match["code"], match["mark"] or ""))
    return [block for block in found if block.language == language]


def run(block: Block, names: dict[str, Any]) -> None:
    """Run a block of Python in a namespace, after what the page leaves to the reader; errors tell the page's line."""
    for name in (block.of("given") or "").split(", "):
        if name:
            names[name] = GIVEN[block.page][name]()
    exec(compile("\n" * (block.line - 1) + block.code, str(PAGES[block.page]), "exec", dont_inherit=True), names)


def update(page: str) -> None:
    """Run a page, and write what its blocks print now in place of what it shows."""
    text, names = PAGES[page].read_text(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        stand_in(patch, Path(folder))
        for block in blocks(page):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                run(block, names)
            if block.shown is not None:
                old = f"{block.code}```\n\n<!-- output -->\n```\n{block.shown}```"
                new = f"{block.code}```\n\n<!-- output -->\n```\n{printed.getvalue().rstrip()}\n```"
                assert text.count(old) == 1, block
                text = text.replace(old, new)
    PAGES[page].write_text(text)


# ------------------------------------------------------------------------------------------ what stands in for what


def wan_transformer() -> Any:
    """A tiny one, which is where it can be."""
    model: Any = zoo.BY_NAME["WanTransformer3DModel"].build()
    model.to = lambda *args, **kwargs: model
    return model


CHECKPOINTS: dict[Any, Callable[[], Any]] = {
    diffusers.CogVideoXPipeline: prompted.cogvideox,
    diffusers.LattePipeline: prompted.latte,
    diffusers.WanPipeline: prompted.wan,
    diffusers.FluxPipeline: prompted.flux,
    diffusers.WanTransformer3DModel: wan_transformer,
}
"""What `from_pretrained` of a class makes."""


class Package:
    """A program in place of the package that AOTInductor would compile of it."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.module: Any = program.module()

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def load_constants(self, constants: dict[str, torch.Tensor], check_full_update: bool) -> None:
        for name, value in constants.items():
            self.module.get_buffer(name).copy_(value)


def stand_in(patch: pytest.MonkeyPatch, folder: Path, packages: bool = False) -> None:
    """Put the stand-ins in place until `patch` is undone.

    Args:
        patch: what puts them there.
        folder: where files are written to.
        packages: whether AOTInductor compiles packages after all.
    """
    for cls, make in CHECKPOINTS.items():
        patch.setattr(cls, "from_pretrained", lambda *args, make=make, **kwargs: make())
    patch.setattr(
        diffusers.FluxImg2ImgPipeline, "encode_prompt", lambda pipe, **kwargs: prompted.encode_pooled(**kwargs)
    )
    register_by_name(patch)
    init: Any = pab_fx.PABBackend.__init__
    patch.setattr(init, "__defaults__", tuple("eager" if each == "inductor" else each for each in init.__defaults__))
    patch.setattr(pab_fx, "calibrate", functools.partial(calibrate_shortly, pab_fx.calibrate))
    patch.setattr(torch.distributed, "init_process_group", lambda backend: join_ranks_that_are_not_there())
    patch.setattr(torch.accelerator, "device_count", lambda: 2)
    if not packages:
        made: dict[str, Any] = {}
        compile_package = lambda program, package_path: made.update({package_path: program}) or package_path  # noqa: E731
        patch.setattr(torch._inductor, "aoti_compile_and_package", compile_package)
        patch.setattr(torch._inductor, "aoti_load_package", lambda path: Package(made[path]))
    patch.chdir(folder)


def calibrate_shortly(calibrate: Callable[..., Any], *args: Any, **given: Any) -> Any:
    """`calibrate` in a few generations of a few steps, by a budget that these keep whatever a busy machine measures."""
    few = {"call": {"num_inference_steps": 8}, "batch": 2, "effort": "low", "rounds": 1, "parts": ["blocks"]}
    return calibrate(*args[:2], **{**given, **few, "budget": "psnr>=10"})


def register_by_name(patch: pytest.MonkeyPatch) -> None:
    """`backend="pab"` in a copy of the repository as in an installed package, which has an entry point."""
    registry: Any = torch._dynamo.backends.registry
    if "pab" not in torch._dynamo.list_backends(exclude_tags=None):
        patch.setitem(registry._BACKENDS, "pab", None)
        patch.setitem(registry._COMPILER_FNS, "pab", pab_fx.pab_backend)


def join_ranks_that_are_not_there(ranks: int = 2) -> None:
    """A process group in which this is rank 0: its collectives have the right shapes, and arbitrary values."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.distributed_c10d.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


def leave_ranks() -> None:
    """Leave the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _scheduler() -> diffusers.FlowMatchEulerDiscreteScheduler:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    return scheduler


GIVEN: dict[str, dict[str, Callable[[], Any]]] = {
    "docs/parallelism.md": {
        "model": wan_transformer,
        "config": lambda: pab_fx.PABConfig(spatial_attention_block_skip_range=2),
        "scheduler": _scheduler,
        "scale": lambda: 5.0,
        "latents": lambda: torch.randn(1, 4, 2, 8, 8),
        "text": lambda: torch.randn(1, 7, 16),
        "empty_text": lambda: torch.randn(1, 7, 16),
    },
}
"""What a page leaves to its reader, by name."""


if __name__ == "__main__":
    update(sys.argv[1])
