"""What PAB does to a model, for people to see.

explain      captures a model and measures it; a report like `PAB.report()`, with times
stopwatch    times each node of a graph
outline      the graphs before and after the rewrite, as boxes for a drawing
subject      what the commands look at
"""

from .explain import explain

__all__ = ["explain"]
