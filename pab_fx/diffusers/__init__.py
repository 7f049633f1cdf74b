"""What diffusers says: configs become policies, which modules its hooks wrap, pipelines, cache contexts.

In: configs and models of diffusers. Out: policies, and calls to `run/` when a context or a generation begins or ends;
of a config that is about calls, what a model is called by. Beside `demo/`, `bench/`, `calibrate/`, `testing/` and
`enable.py` only this folder imports diffusers. It imports `policy/` and `run/`, and what a tensor looks like.
"""
