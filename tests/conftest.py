"""Fixtures that many tests share: a tiny random Llama with a tokenizer, the real default model, the shared data."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fxprune
from fxprune.channels.front_end import LOCATE
from fxprune.core.errors import CheckpointError
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.core.plan import Plan
from fxprune.models.default_model import default_model_path
from fxprune.tracing.trace import trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TINY_VOCABULARY = 97
SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TINY_LINES = (
    "the compiler traces a model to a graph and finds which weights belong together",
    "heads and channels that matter least are removed, and what is left is smaller",
    "a small graph computes what the masked graph does",
    "numbers such as 1, 2 and 3 are words too. so is the end.",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The long matrix is for `make test-all`."""
    parser.addoption("--long", action="store_true", help="20 random plans for each family and kind of unit, not 5")


@pytest.fixture(scope="session")
def plans_a_cell(pytestconfig: pytest.Config) -> int:
    """How many random plans a family and kind of unit is tried with."""
    return 20 if pytestconfig.getoption("--long") else 5


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one file run in one worker, where they share what is traced once; the zoo is split by family."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.fixture(scope="session")
def tiny_llama() -> LlamaForCausalLM:
    """A random Llama with grouped queries, a head_dim of its own and tied embeddings; read-only, copy it to change."""
    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A BPE tokenizer of at most 97 tokens: `<unk>`, `<s>`, `</s>` and `<pad>` are 0 to 3."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY, special_tokens=list(SPECIAL_TOKENS.values()), show_progress=False
    )
    tokenizer.train_from_iterator(TINY_LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


@pytest.fixture(scope="session")
def tiny_llama_dir(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny Llama and its tokenizer as saved by transformers; read-only, copy it to change."""
    path = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tiny_llama.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def mixed_dir(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny Llama with other numbers of query heads, KV heads and MLP channels in each layer; read-only."""
    program = Pipeline([build_pass(name, {}) for name in LOCATE])(trace(tiny_llama, tokenizer=tiny_tokenizer)).program
    plan = {"model.layers.0.self_attn": (0, 2, 3, 4), "model.layers.0.mlp": range(8, 72)}
    plan |= {"model.layers.1.self_attn": (3, 4, 5), "model.layers.1.mlp": range(48)}
    program = Pipeline([build_pass(name, {}) for name in ("insert_masks", "slim")])(
        program.replace(plan=Plan.of(plan))
    ).program
    path = tmp_path_factory.mktemp("mixed") / "mixed"
    fxprune.save(program, path)
    return path


@pytest.fixture(scope="session")
def real_model_dir() -> Path:
    """The default model, SmolLM2-135M-Instruct in float32."""
    try:
        return default_model_path()
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with evaluation and calibration data that lies beside the repository."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no evaluation data at {path}")
    return path
