"""Benchmarks: scripts that measure what the README claims, each with a JSON result and a table."""
