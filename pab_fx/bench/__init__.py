"""The benchmark: `python -m pab_fx bench`, or `run_bench(Settings(...))`.

`models` says what is timed, `contenders` what is compared, `measure` how; `race` runs one model, `run` all of them.
"""

from .race import BenchError
from .run import run_bench, run_model
from .settings import Settings

__all__ = ["BenchError", "Settings", "run_bench", "run_model"]
