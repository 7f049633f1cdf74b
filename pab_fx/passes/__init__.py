"""Passes: each takes a graph and returns it, changed; each says in its docstring what it does, as graphs.

In: a captured graph and its regions. Out: a conditional graph in functional form, lowered (`order`) for a compiler, or
sunk into a module that is whole by itself. It imports `policy/`, `graph/` and `select/`.
"""
