"""Programs that broadcast without the runtime: a rewritten graph, an exported program.

In: a traced graph, or a model, and a config. Out: a module or a program that counts and keeps in its own buffers. It
imports `passes/`, `select/` and, for configs, `diffusers/`.
"""
