"""A comparison as `fxprune.flows.comparison.run_comparison` returns it, for the tests of its report."""

from __future__ import annotations

from typing import Any

__all__ = ["COMPARISON"]


def _form(name: str, runtime: str, size: int) -> dict[str, Any]:
    return {
        "name": name, "where": f"models/{name}", "runtime": runtime, "dtype": "float32", "file_bytes": size,
        "sha256": "ab" * 32, "cached": 0, "seconds": 12.5,
    }  # fmt: skip


COMPARISON: dict[str, Any] = {
    "forms": [
        _form("dense", "torch", 538_000_000),
        _form("slim", "torch", 452_000_000),
        _form("int4", "onnxruntime", 90_000_000),
    ],
    "quality": [
        {
            "text": "wiki.test.raw",
            "metric": "perplexity",
            "better": "lower",
            "scale": "log",
            "definition": "windows of 512",
            "figures": [
                {"form": "dense", "value": 35.2, "stderr": 0.9, "items": 60},
                {"form": "slim", "value": 60.1, "stderr": 1.4, "items": 60},
                {"form": "int4", "value": 35.9, "stderr": 0.9, "items": 60},
            ],
            "differences": [
                {
                    "form": "slim", "difference": 0.535, "stderr": 0.02, "ci": [0.5, 0.57], "p": 1e-30, "p_holm": 3e-30,
                    "test": "paired t", "pairs": 60, "ratio": 1.707, "ratio_ci": [1.649, 1.768],
                },
                {
                    "form": "int4", "difference": 0.02, "stderr": 0.02, "ci": [-0.02, 0.06], "p": 0.3, "p_holm": 0.6,
                    "test": "paired t", "pairs": 60, "ratio": 1.02, "ratio_ci": [0.98, 1.062],
                },
            ],
        },
        {
            "text": "arc_easy",
            "metric": "acc",
            "better": "higher",
            "scale": "absolute",
            "definition": "acc: lm-eval's acc, aggregated by mean",
            "figures": [
                {"form": "dense", "value": 0.52, "stderr": 0.025, "items": 400},
                {"form": "slim", "value": 0.45, "stderr": 0.025, "items": 400},
                {"form": "int4", "value": 0.515, "stderr": 0.025, "items": 400},
            ],
            "differences": [
                {
                    "form": "slim", "difference": -0.07, "stderr": 0.018, "ci": [-0.105, -0.035], "p": 0.0001,
                    "p_holm": 0.0003, "test": "exact McNemar", "pairs": 400, "gained": 12, "lost": 40,
                },
            ],
            "note": "int4: <b>no</b> documents",
        },
    ],
    "tests": {"paired t": "a paired t test", "exact McNemar": "an exact test"},
    "settings": {"window": 512, "device": "cpu"},
    "machine": {"cpu": "some CPU", "memory_bytes": 2**34},
    "versions": {"fxprune": "0.1.0"},
}  # fmt: skip
