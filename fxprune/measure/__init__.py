"""Time, size and bounds: benchmarks, latency tables, footprints, the speed gate.

In: forms. Out: medians with confidence intervals. May start processes, and export to scratch directories.
"""
