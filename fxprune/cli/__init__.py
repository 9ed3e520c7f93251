"""The command line: texts in, tables out, nothing else."""
