"""fxprune: a compiler that makes transformers physically smaller."""
