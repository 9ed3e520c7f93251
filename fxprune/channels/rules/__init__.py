"""The rules of channel tracing: one for each operator, a file for each family of them."""
