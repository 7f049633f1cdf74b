"""What the scripts for released checkpoints share: their options, compiling with PAB or without, the timed rounds."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import pab_fx
from pab_fx.graph.modules import repeated_blocks


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options of every script; `defaults` are its prompt, output, checkpoint, steps, height and width."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("prompt", "output", "checkpoint"):
        result.add_argument(f"--{name}", default=defaults[name])
    for name in ("steps", "height", "width"):
        result.add_argument(f"--{name}", type=int, default=defaults[name])
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--rounds", type=int, default=2, help="outputs to make; the first one includes compiling")
    result.add_argument("--no-pab", action="store_true", help="torch.compile alone, to compare with")
    result.add_argument("--regional", action="store_true", help="compile one block for all: starts sooner")
    result.add_argument("--inner", default="inductor", help='the compiler; "eager" compiles nothing')
    return result


def timed_rounds(
    pipe: Any, config: pab_fx.PABConfig, generate: Callable[[Any, argparse.Namespace], Any], args: argparse.Namespace
) -> Any:
    """Compile as the options say, generate `args.rounds` times, print seconds and report; the last output."""
    pab, output = None, None
    if not args.no_pab:
        pab = pab_fx.enable(pipe, config, regional=args.regional, inner=args.inner)
    elif args.regional:
        for block in repeated_blocks(pipe.transformer):
            block.compile(backend=args.inner)
    else:
        pipe.transformer.compile(backend=args.inner)
    for turn in range(args.rounds):
        start = time.perf_counter()
        output = generate(pipe, args)
        print(f"round {turn + 1}: {time.perf_counter() - start:.1f} seconds")
    if pab is not None:
        print(pab.report())
    return output
