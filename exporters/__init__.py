"""Exporters, one target a file; imported as `fxprune.exporters`."""
