"""The benchmark: `python -m pab_fx bench`, or `run_bench(Settings(...))`.

`models` and `caches` say what is timed, `contenders` what is compared, `measure` how; `race` runs one model, `run` all.
"""

from .heap import keep_freed_memory
from .race import BenchError
from .run import run_bench, run_model
from .settings import Settings

__all__ = ["BenchError", "Settings", "keep_freed_memory", "run_bench", "run_model"]
