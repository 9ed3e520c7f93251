"""From a module to a flat graph.

In: a module. Out: a `Program` with a torch.fx graph whose projections are lifted to Linear modules.
May read the module and its configuration; weights are shared with the module, never copied or changed.
"""
