"""What is told of a backend: the captured graphs, what their nodes cost, the schedule, all together as data.

In: the runtime and the captured graphs. Out: a `Report`, which is frozen data. It imports what `run/` imports, and
`run/`.
"""
