"""Which weights belong together, and what they cost.

In: a lifted graph. Out: channel ids, groups of units (heads, MLP channels, experts, ...), MACs and parameters.
Reads shapes only. A new operator is one rule in `rules/`.
"""
