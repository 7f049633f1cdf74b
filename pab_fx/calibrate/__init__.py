"""Find the setting that is as fast as an error budget allows, over every policy.

    trajectory.py    what each part leaves in each step, from one generation of each prompt without a cache
    setting.py       what there is to choose from: methods, and lists of steps (`lists.py`)
    probes.py        the settings that show how much errors matter
    forecasts.py     what any setting's reads are off by, from that
    prediction.py    how much that matters, and the operations that are left
    search.py        the setting to try next
    signals.py       settings that go by a signal, tried beside it
    judge.py         tries them, until the best one that keeps the budget is known
    run.py           all of it in order

Beside them: `given.py` checks what it is given, `trials.py` runs a model under any setting, `laboratory.py` does so
once for each, `samples.py` generates and compares, `budget.py` is what is to be kept, `sketch.py` makes large tensors
small, `files.py` remembers what is finished, `result.py` is what comes out, `plots.py` draws.
"""

from .budget import Budget
from .result import Calibration, Outcome
from .run import calibrate

__all__ = ["Budget", "Calibration", "Outcome", "calibrate"]
