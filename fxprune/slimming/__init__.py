"""The graph rewritten smaller.

In: a graph and a plan. Out: a graph with smaller Linears. This is where weights are cut.
May write a new graph; the one that it is given stays as it is.
"""
