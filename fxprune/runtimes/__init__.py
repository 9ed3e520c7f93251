"""Driving any form: eager module, traced graph, compiled module.

In: a form, tokens, a cache. Out: logits and the longer cache.
"""
