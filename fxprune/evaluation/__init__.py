"""Quality: perplexity, and tasks by lm-eval.

In: a form and text. Out: figures with their definitions. Keeps results in a cache of its own.
"""
