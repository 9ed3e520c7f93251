"""`import fxprune` teaches transformers' auto classes, in any order, quickly, and never in anybody's way."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

LOAD = """
from transformers import AutoConfig
config = AutoConfig.from_pretrained({directory!r})
assert [layer.num_attention_heads for layer in config.per_layer_config] == [4, 3]
"""
QUICK = """
import sys
import fxprune
heavy = {"torch", "transformers", "pydantic", "numpy"} & set(sys.modules)
assert not heavy, heavy
from transformers.models.auto import configuration_auto
import importlib.util, inspect
assert importlib.util.find_spec(configuration_auto.__name__).loader is configuration_auto.__loader__
assert "CONFIG_MAPPING" in inspect.getsource(configuration_auto)
assert not any(type(finder).__module__.startswith("fxprune") for finder in sys.meta_path)
"""
BROKEN = """
import logging
logging.basicConfig()
import fxprune
import sys
sys.modules["fxprune.models.mixed_config"] = None  # importing it raises
from transformers import AutoConfig
print(AutoConfig.for_model("llama").model_type)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    "first", ["import fxprune", "import transformers.models.auto.configuration_auto\nimport fxprune"]
)
def test_either_may_be_imported_first(first: str, mixed_dir: Path) -> None:
    done = run(first + LOAD.format(directory=str(mixed_dir)))
    assert done.returncode == 0, done.stderr


def test_importing_fxprune_stays_quick_and_leaves_no_trace() -> None:
    done = run(QUICK)
    assert done.returncode == 0, done.stderr


def test_a_failure_is_logged_and_breaks_nothing() -> None:
    done = run(BROKEN)
    assert (done.returncode, done.stdout.strip()) == (0, "llama"), done.stderr
    assert "will not load mixed checkpoints of fxprune" in done.stderr


def test_without_fxprune_the_model_type_is_unknown(mixed_dir: Path) -> None:
    done = run(LOAD.format(directory=str(mixed_dir)))
    assert "does not recognize this architecture" in done.stderr
    assert "model type `fxprune`" in done.stderr
