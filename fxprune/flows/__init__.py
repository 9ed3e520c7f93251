"""One function for each thing that a user asks for: prune, export, evaluate, compare, benchmark.

In: options. Out: files, and the sections of a report. Passes and exporters are reached by name.
"""
