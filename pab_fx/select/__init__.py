"""Policies and a graph become regions: nodes with a role, a policy, and what of them is kept.

In: a captured graph and a tuple of `Policy`. Out: `Region`s; no graph is changed. It imports `policy/` and `graph/`.
"""
