"""One call of a compiled graph (`call`): whose state, begin, decide, run, hold.

In: the inputs of a call. Out: its outputs; state goes from step to step in `state`, with one owner (`runtime`). It
imports what `compile/` imports, and `compile/`; it knows neither diffusers nor the backend.
"""
