"""Units: curves of what each costs, the knapsack that chooses, and reconstruction of what stays.

In: a program with groups and statistics. Out: a `Plan`, and weights that make up for what goes.
"""
