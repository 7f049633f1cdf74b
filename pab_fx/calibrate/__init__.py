"""Find the ranges and windows that suit a model: as fast as an error budget allows.

    changes.py       how much each output changes from step to step, from one instrumented generation
    settings.py      what there is to choose from: groups of modules, ranges, windows
    laboratory.py    generations with settings, and probes of single roles within single stretches of steps
    prediction.py    the error and the speed-up of any setting, to first order, from those
    search.py        the front of the fastest settings
    verify.py        the fastest of them that really keeps the budget
    run.py           all of it in order

Beside them: `given.py` checks what it is given, `trials.py` runs one captured model under any setting, `samples.py`
generates and compares, `budget.py` is what is to be kept, `sketch.py` makes large tensors small, `files.py` remembers
what is finished, `result.py` is what comes out, `plots.py` draws.
"""

from .budget import Budget
from .result import Calibration, Outcome
from .run import calibrate

__all__ = ["Budget", "Calibration", "Outcome", "calibrate"]
