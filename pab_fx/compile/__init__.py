"""Compiling: the versions of a captured graph, whole or block by block, when they are needed.

In: conditional graphs and an inner compiler. Out: callables, with the state that they take and return. It imports what
`passes/` imports, and `passes/`.
"""
