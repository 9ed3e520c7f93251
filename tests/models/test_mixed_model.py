"""Mixed models are ordinary models of transformers: trained, adapted, copied, saved and loaded like any other."""

from __future__ import annotations

import copy
import json
import math
import pickle
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import fxprune
from fxprune.channels.front_end import LOCATE
from fxprune.checkpoints.checkpoint import load, load_skeleton
from fxprune.core.errors import CheckpointError
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.core.plan import Plan
from fxprune.models.mixed_config import config_class_of, is_mixed, stock_config
from fxprune.models.mixed_model import model_class_of, stock_model_class
from fxprune.models.skeleton import state_shapes
from fxprune.runtimes.runners import EagerRunner, GraphRunner, greedy
from tests.slices import (
    SMALL,
    Keep,
    cut,
    cuts_of,
    expected_of,
    hidden_state,
    logits,
    make_model,
    save_slim,
    without_layers,
)

if TYPE_CHECKING:
    from collections.abc import Callable

IDS = torch.tensor([[5, 8, 13, 21, 34, 55], [3, 3, 4, 9, 16, 25]])
HEADS = [(4, 2), (3, 1)]
"""Query and KV heads of the layers of `mixed_dir`."""


def text(model: Any) -> torch.Tensor:
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    tokens: torch.Tensor = model.generate(IDS, attention_mask=mask, max_new_tokens=6, do_sample=False)
    return tokens


def assert_same(model: Any, other: Any) -> None:
    """Bit by bit: tensors, what they compute, and the text."""
    state, again = model.state_dict(), other.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) and tensor.dtype == again[name].dtype for name, tensor in state.items())
    model, other = model.eval(), other.eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, other(IDS).logits)
    assert torch.equal(text(model), text(other))


def assert_loads(directory: Path, model: Any) -> None:
    """Every way to load a directory gives the model."""
    for how in (AutoModelForCausalLM.from_pretrained, load, type(model).from_pretrained):
        again = how(directory)
        assert type(again) is type(model)
        assert_same(model, again)


def heads(config: Any) -> list[tuple[int, int]]:
    return [(layer.num_attention_heads, layer.num_key_value_heads) for layer in config.per_layer_config]


@pytest.fixture
def mixed(mixed_dir: Path) -> Any:
    model = load(mixed_dir)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight += 0.25  # it is no longer what lies in the directory
    return model


# ── The model ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.smoke
def test_it_is_an_instance_of_its_class_and_found_by_its_name(mixed_dir: Path) -> None:
    model = load(mixed_dir)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert isinstance(model.config, transformers.LlamaConfig)
    assert (type(model).__name__, model.config.model_type) == ("LlamaForCausalLM", "llama")
    assert model.config.to_dict()["model_type"] == "llama"
    assert stock_model_class(type(model)) is transformers.LlamaForCausalLM
    assert type(stock_config(model.config)) is transformers.LlamaConfig
    assert model_class_of(transformers.LlamaForCausalLM) is type(model)
    assert heads(model.config) == HEADS
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        _ = model.config.num_attention_heads


@pytest.mark.smoke
def test_a_checkpoint_loads_plainly(mixed_dir: Path) -> None:
    assert_loads(mixed_dir, load(mixed_dir))
    config = AutoConfig.from_pretrained(mixed_dir)
    assert heads(config) == HEADS
    assert type(config).from_pretrained(mixed_dir).to_json_string() == config.to_json_string()
    assert type(config).from_dict(config.to_dict()).to_json_string() == config.to_json_string()
    tokenizer = AutoTokenizer.from_pretrained(mixed_dir)
    assert tokenizer.decode(tokenizer("a graph").input_ids) == "a graph"


def test_copies(mixed: Any) -> None:
    assert_same(mixed, copy.deepcopy(mixed))
    assert_same(mixed, pickle.loads(pickle.dumps(mixed)))  # noqa: S301 - our own
    half = copy.deepcopy(mixed).to(torch.bfloat16)
    assert torch.isfinite(half(IDS).logits).all()
    assert heads(copy.deepcopy(mixed).config) == HEADS


def test_a_new_model_of_the_configuration_is_initialised(mixed: Any) -> None:
    new = AutoModelForCausalLM.from_config(mixed.config)
    assert state_shapes(new) == state_shapes(mixed)
    assert all(torch.isfinite(parameter).all() for parameter in new.parameters())
    with pytest.raises(CheckpointError, match="built from the configuration of a mixed model, not from a LlamaConfig"):
        type(mixed)(stock_config(mixed.config))


def test_other_heads_on_the_same_layers(mixed: Any, tmp_path: Path) -> None:
    mixed.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(base(IDS).last_hidden_state, mixed.model(IDS).last_hidden_state)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert isinstance(classifier, transformers.LlamaForSequenceClassification)
    assert torch.equal(classifier.model.eval()(IDS).last_hidden_state, base(IDS).last_hidden_state)


# ── Saving by other means than ours ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.smoke
def test_save_pretrained(mixed: Any, tmp_path: Path) -> None:
    mixed.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert not (tmp_path / "out" / "fxprune.json").exists()
    assert_loads(tmp_path / "out", mixed)
    assert state_shapes(load_skeleton(tmp_path / "out")) == state_shapes(mixed)
    load(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert_loads(tmp_path / "again", mixed)
    first, second = (json.loads((tmp_path / name / "config.json").read_bytes()) for name in ("out", "again"))
    assert first == second


@pytest.mark.smoke
def test_trainer_saves_checkpoints_and_goes_on(mixed: Any, tmp_path: Path) -> None:
    data = [{"input_ids": row, "labels": row} for row in IDS for _ in range(2)]

    def trainer(model: Any, steps: int) -> Trainer:
        arguments = TrainingArguments(
            str(tmp_path / "out"),
            max_steps=steps,
            save_steps=1,
            per_device_train_batch_size=2,
            gradient_checkpointing=True,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(model=model, args=arguments, train_dataset=data)

    before = copy.deepcopy(mixed)
    trainer(mixed, 2).train()
    assert not torch.equal(
        mixed.model.layers[0].self_attn.q_proj.weight, before.model.layers[0].self_attn.q_proj.weight
    )
    assert_loads(tmp_path / "out" / "checkpoint-2", mixed.eval())
    trainer(before, 2).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert_loads(tmp_path / "out" / "checkpoint-2", before.eval())


@pytest.mark.smoke
def test_lora_is_trained_merged_and_saved(mixed_dir: Path, tmp_path: Path) -> None:
    model = load(mixed_dir)
    adapted: Any = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=2)
    )  # finds targets by model type
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = adapted.eval()(IDS).logits
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(IDS).logits, wanted, atol=1e-5, rtol=1e-4)
    assert_loads(tmp_path / "merged", merged)
    again: Any = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()  # it knows its base
    torch.testing.assert_close(again(IDS).logits, wanted, atol=0, rtol=0)


def test_a_fine_tuned_model_is_pruned_again_and_verified(mixed: Any, tmp_path: Path) -> None:
    mixed.save_pretrained(tmp_path / "tuned")
    program = Pipeline([build_pass(name, {}) for name in LOCATE])(fxprune.trace(load(tmp_path / "tuned"))).program
    assert {"model.layers.0.self_attn": 4, "model.layers.1.self_attn": 3, "model.layers.1.mlp": 48}.items() <= {
        group.name: group.units for group in program.groups
    }.items()
    plan = fxprune.Plan.of({"model.layers.0.self_attn": (2, 3), "model.layers.1.mlp": range(40)})
    passes = [build_pass(name, {}) for name in ("insert_masks", "slim", "verify")]
    slim = Pipeline(passes)(program.replace(plan=plan)).program
    fxprune.save(slim, tmp_path / "again")
    again = load(tmp_path / "again")
    assert heads(again.config) == [(2, 1), (3, 1)]
    assert_loads(tmp_path / "again", again)
    # Layers that have become alike need nothing of ours.
    kept = {"model.layers.0.self_attn": (2, 3), "model.layers.1.self_attn": (0, 1), "model.layers.0.mlp": range(48)}
    fxprune.save(Pipeline(passes)(program.replace(plan=fxprune.Plan.of(kept))).program, tmp_path / "alike")
    alike = load(tmp_path / "alike")
    assert type(alike) is transformers.LlamaForCausalLM
    assert (alike.config.num_attention_heads, alike.config.num_key_value_heads) == (2, 1)


# ── Every kind of difference ──────────────────────────────────────────────────────────────────────────────────────


def biased(tmp_path: Path) -> Path:
    """Heads, widths, and biases of o_proj and down_proj that the class does not have."""
    model = make_model("llama", **SMALL)
    tensors = cut(model.state_dict(), cuts_of(model, [Keep(heads=(2, 3), kv=(1,)), Keep(mlp=range(16)), Keep()]))
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj"):
        tensors[f"{name}.bias"] = torch.randn(32)
    save_slim(tensors, model, tmp_path)
    return tmp_path


def hidden(model_type: str) -> Callable[[Path], Path]:
    """A hidden size, epsilons and scales that no field can say, and fields that the class refuses."""

    def write(tmp_path: Path) -> Path:
        model = make_model(model_type)
        tensors, epsilons = hidden_state(model, tuple(range(30)))
        save_slim(tensors, model, tmp_path, epsilons=epsilons)
        return tmp_path

    return write


def counted(tmp_path: Path) -> Path:
    """Head counts that GPT-2 keeps in attributes of its modules."""
    model = make_model("gpt2")
    plan = {"transformer.h.1.attn": (0, 2, 3), "transformer.h.2.mlp": range(16)}
    program = Pipeline([build_pass(name, {}) for name in LOCATE])(fxprune.trace(model)).program
    passes = [build_pass(name, {}) for name in ("insert_masks", "slim")]
    fxprune.save(Pipeline(passes)(program.replace(plan=fxprune.Plan.of(plan))).program, tmp_path / "out")
    return tmp_path / "out"


def shorter(tmp_path: Path) -> Path:
    """Fewer layers, whose scales depend on where they stood."""
    model = make_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    tensors, _ = without_layers(model, {"transformer.h": (0, 2, 3)})
    save_slim(tensors, model, tmp_path)
    return tmp_path


KINDS: dict[str, Callable[[Path], Path]] = {
    "biases": biased,
    "llama, hidden": hidden("llama"),
    "gemma3, hidden": hidden("gemma3_text"),
    "gpt2, heads": counted,
    "gpt2, depth": shorter,
}


@pytest.mark.parametrize("write", KINDS.values(), ids=KINDS.keys())
def test_every_kind_goes_round(write: Callable[[Path], Path], tmp_path: Path) -> None:
    directory = write(tmp_path / "slim")
    model = load(directory)
    assert is_mixed(model.config)
    wanted = logits(model)
    for how in (load, AutoModelForCausalLM.from_pretrained):
        how(directory).save_pretrained(tmp_path / "saved")
        for again in (load(tmp_path / "saved"), AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
            assert torch.equal(logits(again), wanted)
            assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
        shutil.rmtree(tmp_path / "saved")


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Its `config.json` has the base's own model type, and `fxprune.json` alone says what differs."""
    from fxprune.models.manifest import read_manifest, write_manifest

    model = load(biased(tmp_path / "new"))
    config = stock_config(model.config)
    config.architectures = ["LlamaForCausalLM"]
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    config.to_json_file(tmp_path / "old" / "config.json")
    write_manifest(tmp_path / "old", read_manifest(tmp_path / "new"))
    old = load(tmp_path / "old")
    assert torch.equal(logits(old), logits(model))
    old.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))
    (tmp_path / "old" / "fxprune.json").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load(tmp_path / "old")


# ── Bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────


def changed(*keys: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        entry: Any = config
        for key in keys[:-1]:
            entry = entry.setdefault(key, {})
        entry[keys[-1]] = value

    return change


BAD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "unknown base": (changed("base_model_type", value="nothing"), "no (base_)?model_type 'nothing'"),
    "base that is ours": (changed("base_model_type", value="fxprune"), "no (base_)?model_type 'fxprune'"),
    "another version": (changed("fxprune", "version", value=2), "version: Input should be 1"),
    "unknown key": (changed("fxprune", "code", value="x"), "code: Extra inputs"),
    "text for a shape": (changed("fxprune", "parameters", value={"model.norm.weight": ["a"]}), "valid integer"),
    "shape of a norm": (changed("fxprune", "parameters", value={"model.norm.weight": [7]}), "no projection of this"),
    "no module": (
        changed("fxprune", "parameters", value={"model.no.weight": [7]}),
        "has no module for model.no.weight",
    ),
    "no number": (changed("fxprune", "constants", value={"model.norm": {"weight": 1.0}}), "no number called weight"),
    "not a number": (changed("fxprune", "constants", value={"model.norm": {"x": "y"}}), "fxprune: constants"),
    "private field": (changed("fxprune", "overrides", value={"_attn_implementation": 3}), "no number _attn"),
    "switch": (changed("fxprune", "overrides", value={"attention_bias": 1}), "no number attention_bias"),
    "text in a layer": (
        changed("per_layer_config", value={"0": {"hidden_act": "relu"}}),
        "per_layer_config: 0.hidden_act",
    ),
    "layer without number": (changed("per_layer_config", value={"first": {}}), "per_layer_config: first"),
    "no such layer": (changed("per_layer_config", value={"9": {"intermediate_size": 8}}), "layer override 9"),
    "no such field": (changed("per_layer_config", value={"0": {"nothing": 8}}), "does not fit LlamaConfig"),
    "layers without end": (changed("num_hidden_layers", value=10**9), "no model has as many layers"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_records_are_refused(
    change: Callable[[dict[str, Any]], None], message: str, mixed_dir: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(mixed_dir, tmp_path / "bad"))
    (directory / "fxprune.json").unlink()
    config = json.loads((directory / "config.json").read_bytes())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))
    for how in (load, load_skeleton, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            how(directory)


@pytest.mark.parametrize("names", [[], None, 1.5, ["NoSuchClass"]])
def test_a_class_that_is_not_named_is_refused(names: object, mixed_dir: Path, tmp_path: Path) -> None:
    """By `fxprune.load`, which takes the class that was saved; an auto class has one of its own."""
    load(mixed_dir).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": names}))
    for how in (load, load_skeleton):
        with pytest.raises(CheckpointError, match="names no class in|no model class called|cannot be used|refuses"):
            how(tmp_path)


VALUES = (None, -1, 0, 3, 10**9, 10**30, 1.5, math.nan, "x", "", [], {}, [1], {"a": 1}, True, [10**9, 10**9])


def mutated(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A configuration in which one entry, nested ones included, has another value or is gone, or one came."""
    changed = copy.deepcopy(config)
    node = changed
    key = rng.choice(list(node))
    while isinstance(node[key], dict) and node[key] and rng.random() < 0.8:
        node = node[key]
        key = rng.choice(list(node))
    if rng.random() < 0.2:
        del node[key]
    else:
        node[rng.choice([key, key, key, "model.norm", "7"])] = rng.choice(VALUES)
    return changed


def test_a_mutated_configuration_gives_an_error_or_a_model(tmp_path: Path) -> None:
    load(biased(tmp_path / "slim")).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_bytes())
    errors = 0
    for seed in range(120):
        path.write_text(json.dumps(mutated(config, random.Random(seed))))
        try:
            load(tmp_path / "saved")
        except CheckpointError:
            errors += 1
    assert 40 < errors < 120


def test_weights_that_do_not_belong_are_refused(mixed_dir: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(mixed_dir, tmp_path / "bad"))
    (directory / "fxprune.json").unlink()
    config = json.loads((directory / "config.json").read_bytes())
    cases = [
        (1, {"0": config["per_layer_config"]["0"]}, r"unexpected keys \['model\.layers\.1"),
        (3, config["per_layer_config"], r"missing keys \['model\.layers\.2"),
        (30, {}, "config.json describes a model of .* numbers, and the weight files hold"),
        (900, {}, "far more parameters than the"),
    ]
    for depth, layers, message in cases:
        values = config | {"num_hidden_layers": depth, "per_layer_config": layers}
        (directory / "config.json").write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=message):
            load(directory)


def test_a_checkpoint_cannot_choose_kernels_or_code(mixed_dir: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(mixed_dir, tmp_path / "bad"))
    config = json.loads((directory / "config.json").read_bytes())
    config |= {"attn_implementation": "someone/kernel", "auto_map": {"AutoModelForCausalLM": "code.Model"}}
    (directory / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
    assert model.config._attn_implementation == "sdpa"
    eager = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False, attn_implementation="eager")
    assert eager.model.layers[0].self_attn.config._attn_implementation == "eager"
    with pytest.raises(CheckpointError, match="is that of a llama model, not of qwen2"):
        config_class_of(transformers.Qwen2Config).from_pretrained(directory)


def test_expected_logits_prove_a_mixed_model_too(tmp_path: Path) -> None:
    model = make_model("llama", **SMALL)
    tensors = cut(model.state_dict(), cuts_of(model, [Keep(mlp=range(16)), Keep(), Keep()]))
    assert save_slim(tensors, model, tmp_path / "first").kind == "mixed"
    slim = load(tmp_path / "first")
    info = save_slim(slim.state_dict(), slim, tmp_path / "out", expected=expected_of(slim))
    assert (info.kind, info.layer_overrides) == ("mixed", {0: {"intermediate_size": 16}})


# --- classes that tell layers apart themselves -----------------------------------------------------------------------


def told_apart() -> Any:
    """Full attention has wider heads than sliding attention: the class's own `per_layer_config`."""
    torch.manual_seed(0)
    config = transformers.Gemma4UnifiedTextConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=12,
        num_global_key_value_heads=1,
        max_position_embeddings=64,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        pad_token_id=0,
        initializer_range=0.2,
    )
    return transformers.Gemma4UnifiedForCausalLM(config).eval()


@pytest.mark.parametrize(
    "kept",
    [
        {"model.layers.0.mlp": range(24), "model.layers.1.self_attn": [0, 2]},
        # Not the last layer of its kind: the class marks that one as the store of its keys and values.
        {"model.layers": [1, 2, 3], "model.layers.1.mlp": range(24)},
    ],
    ids=["widths", "depth"],
)
def test_layers_that_the_class_tells_apart(kept: dict[str, Any], tmp_path: Path) -> None:
    program = fxprune.trace(told_apart())
    program = Pipeline([build_pass(name, {}) for name in LOCATE])(program).program
    passes = [build_pass(name, {}) for name in ("insert_masks", "slim")]
    save = build_pass("save", {"out": str(tmp_path / "slim")})
    program = Pipeline([*passes, save])(program.replace(plan=Plan.of(kept))).program
    model = fxprune.load(tmp_path / "slim")
    ids = torch.arange(4, 12)[None]
    expected = greedy(GraphRunner(program.graph_module, program.interface), ids, 4)
    assert torch.equal(greedy(EagerRunner(model), ids, 4), expected)
    model.save_pretrained(tmp_path / "again")
    for directory in ("slim", "again"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / directory)
        assert_same(loaded, model)
        kinds = enumerate(loaded.config.layer_types)
        assert {kind: loaded.config.per_layer_config[layer].head_dim for layer, kind in kinds} == {
            "sliding_attention": 8,
            "full_attention": 12,
        }


def test_layers_that_the_class_tells_apart_cannot_choose_kernels() -> None:
    record = {"version": 1, "stock_layers": {"1": {"head_dim": 12, "_attn_implementation": "owner/kernel"}}}
    values = told_apart().config.to_dict()
    config = config_class_of(transformers.Gemma4UnifiedTextConfig).from_dict({**values, "fxprune": record})
    assert config.per_layer_config[1].head_dim == 12
    assert config.per_layer_config[1]._attn_implementation != "owner/kernel"


def test_a_head_on_a_mixed_base_model_keeps_added_biases(tmp_path: Path) -> None:
    """The base model of a classifier is built by an auto class, and is one of ours too."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 3}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_labels=1)
    model = transformers.LlamaForSequenceClassification(config).eval()
    program = Pipeline([build_pass(name, {}) for name in LOCATE])(fxprune.trace(model)).program
    plan = Plan.of({"model.layers.0.mlp": range(40), "model.layers.1.mlp": range(32)})
    program = Pipeline([build_pass(name, {}) for name in ("insert_masks", "slim")])(program.replace(plan=plan)).program
    reader = program.graph_module.get_submodule("model.layers.1.mlp.down_proj")
    reader.bias = torch.nn.Parameter(torch.randn(32))
    fxprune.save(program, tmp_path / "slim")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "slim")
    for slim in (plain, load(tmp_path / "slim")):
        assert torch.equal(slim.model.layers[1].mlp.down_proj.bias, reader.bias)
        assert slim.model.layers[0].mlp.down_proj.bias is None
