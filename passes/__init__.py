"""Pruning and rewriting passes, one topic a file; imported as `fxprune.passes`."""
