"""Benchmarks: scripts that measure what docs/benchmarks.md claims, each with a JSON result and a table."""
