"""Reading a graph: dataflow, effects, modules, structure, costs; copies of graphs.

In: graphs of Dynamo, `torch.export` and `torch.fx.symbolic_trace`. Out: facts about their nodes. It imports
nothing of the package but `_torch`; no policy is known here.
"""
