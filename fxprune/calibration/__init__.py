"""Text through the graph, statistics out.

In: a program and text. Out: Gram matrices, activations, gradients of the loss, each block by block.
May keep signals on disk; changes no weight.
"""
