"""The zoo: a tiny random model of every family, located once a process, and legal plans for every kind of unit.

Sizes are chosen so that no two dimensions are equal by accident. Three structures that exist only as remote code for
old transformers (packed W_pack with ALiBi, fused c_attn with w1/w2/c_proj, packed multi-query with packed SwiGLU) are
plain modules.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor, nn

from fxprune.channels.front_end import LOCATE
from fxprune.core.groups import AttentionGroup, ExpertMlpGroup, Group
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.core.plan import Plan
from fxprune.tracing.trace import trace
from tests.families import randomise

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fxprune.core.program import Program

__all__ = ["KINDS", "ZOO", "Family", "kinds_of", "legal_plans", "located"]

Form = Literal["causal", "encoder", "vision", "seq2seq", "plain"]
KINDS = ("attention", "mlp", "hidden", "experts", "expert_mlp", "layers")
HEADS, DIM = 6, 8


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: its name in the table.
        form: what kind of model it is.
        build: makes a tiny random one.
    """

    name: str
    form: Form
    build: Callable[[], nn.Module]


def _made(config_class: str, model_class: str, sizes: dict[str, Any]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**sizes)
        model: nn.Module = getattr(transformers, model_class)(config).eval()
        randomise(model)
    return model


TOKENS: dict[str, Any] = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
BASE: dict[str, Any] = TOKENS | {
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "intermediate_size": 20,
}
GROUPED: dict[str, Any] = BASE | {"num_key_value_heads": 2, "head_dim": DIM}
SQUARE: dict[str, Any] = BASE | {"hidden_size": HEADS * DIM}
EXPERTS: dict[str, Any] = GROUPED | {"num_experts_per_tok": 2}

_CAUSAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED | {"num_hidden_layers": 4}),
    "mistral": ("MistralConfig", "MistralForCausalLM", GROUPED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED),
    "gptj": (
        "GPTJConfig",
        "GPTJForCausalLM",
        TOKENS
        | {"n_embd": 48, "n_layer": 2, "n_head": HEADS, "n_inner": 20, "rotary_dim": 4, "n_positions": 64}
        | {"initializer_range": 0.2},
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        TOKENS
        | {"hidden_size": 48, "word_embed_proj_dim": 48, "num_hidden_layers": 2, "ffn_dim": 20, "init_std": 0.2}
        | {"num_attention_heads": HEADS, "max_position_embeddings": 64},
    ),
    "gpt_neox (dolly-v2)": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SQUARE),
    "falcon (multi-query)": (
        "FalconConfig",
        "FalconForCausalLM",
        SQUARE
        | {"multi_query": True, "parallel_attn": True, "bias": False, "alibi": False, "ffn_hidden_size": 20}
        | {"new_decoder_architecture": False},
    ),
    "falcon (grouped)": (
        "FalconConfig",
        "FalconForCausalLM",
        SQUARE
        | {"num_kv_heads": 2, "new_decoder_architecture": True, "bias": False, "alibi": False, "ffn_hidden_size": 20},
    ),
    "falcon (ALiBi)": (
        "FalconConfig",
        "FalconForCausalLM",
        SQUARE
        | {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True, "ffn_hidden_size": 20}
        | {"new_decoder_architecture": False},
    ),
    "mpt": (
        "MptConfig",
        "MptForCausalLM",
        TOKENS
        | {"d_model": 48, "n_layers": 2, "n_heads": HEADS, "expansion_ratio": 2, "max_seq_len": 64}
        | {"initializer_range": 0.2},
    ),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        TOKENS | {"hidden_size": 48, "n_layer": 2, "n_head": HEADS, "initializer_range": 0.2},
    ),
    "cohere (command-r)": ("CohereConfig", "CohereForCausalLM", SQUARE | {"num_key_value_heads": 2}),
    "glm": ("GlmConfig", "GlmForCausalLM", GROUPED),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        TOKENS
        | {"n_embd": 48, "n_layer": 2, "n_head": HEADS, "n_inner": 20, "n_positions": 64, "initializer_range": 0.2},
    ),
    "gpt_bigcode": (
        "GPTBigCodeConfig",
        "GPTBigCodeForCausalLM",
        TOKENS
        | {"n_embd": 48, "n_layer": 2, "n_head": HEADS, "n_inner": 20, "n_positions": 64, "initializer_range": 0.2},
    ),
    "phi": ("PhiConfig", "PhiForCausalLM", SQUARE),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", SQUARE | {"num_key_value_heads": 2}),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", SQUARE | {"num_key_value_heads": 2}),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", SQUARE | {"num_key_value_heads": 2}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", GROUPED),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", EXPERTS | {"num_local_experts": 5}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", EXPERTS | {"num_experts": 5, "moe_intermediate_size": 12}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GROUPED),
    "granite": ("GraniteConfig", "GraniteForCausalLM", SQUARE | {"num_key_value_heads": 2}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", SQUARE | {"num_key_value_heads": 2}),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", EXPERTS | {"num_local_experts": 5}),
}
_OTHERS: dict[str, tuple[Form, str, str, dict[str, Any]]] = {
    "bert": ("encoder", "BertConfig", "BertForMaskedLM", SQUARE),
    "roberta": ("encoder", "RobertaConfig", "RobertaForMaskedLM", SQUARE),
    "distilbert": (
        "encoder",
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {"vocab_size": 61, "dim": 48, "n_layers": 2, "n_heads": HEADS, "hidden_dim": 20, "max_position_embeddings": 64}
        | {"initializer_range": 0.2},
    ),
    "vit": (
        "vision",
        "ViTConfig",
        "ViTForImageClassification",
        {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 20}
        | {"image_size": 16, "patch_size": 8, "num_channels": 3, "num_labels": 7, "initializer_range": 0.2},
    ),
    "t5": (
        "seq2seq",
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": 61, "d_model": 44, "d_kv": DIM, "d_ff": 20, "num_layers": 3, "num_decoder_layers": 3}
        | {"num_heads": HEADS, "relative_attention_num_buckets": 10, "relative_attention_max_distance": 16}
        | {"decoder_start_token_id": 0, "initializer_factor": 1.0},
    ),
}


# --- structures that exist only as remote code ----------------------------------------------------------------------


class _RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


def _rotated(x: Tensor, interleaved: bool, dims: int) -> Tensor:
    """Rotary embedding of the first `dims` channels of (batch, heads, length, channels)."""
    position = torch.arange(x.shape[2], device=x.device)[:, None]
    angle = position / 100.0 ** (torch.arange(0, dims, 2, device=x.device) / dims)
    cos, sin = angle.cos(), angle.sin()
    turned, rest = x[..., :dims], x[..., dims:]
    if interleaved:
        even, odd = turned[..., 0::2], turned[..., 1::2]
        pair = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
        return torch.cat([pair.flatten(-2), rest], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.full((length, length), -1e9, device=device).triu(1)


class _PackedAttention(nn.Module):
    """Packed q, k, v of equal size (W_pack, or c_attn with a bias), with ALiBi or rotary positions."""

    def __init__(self, hidden: int, *, alibi: bool, bias: bool) -> None:
        super().__init__()
        self.alibi, width = alibi, HEADS * DIM
        self.pack, self.o = nn.Linear(hidden, 3 * width, bias=bias), nn.Linear(width, hidden, bias=False)
        self.register_buffer("slopes", torch.tensor([2.0 ** -(1 + h / 2) for h in range(HEADS)]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        packed = self.pack(x).unflatten(-1, (3, HEADS * DIM)).unsqueeze(0).transpose(0, -2).squeeze(-2)
        q, k, v = (part.view(batch, length, HEADS, DIM).transpose(1, 2) for part in packed)
        bias = _causal(length, x.device)
        if self.alibi:
            position = torch.arange(length, device=x.device)
            bias = bias + self.slopes[:, None, None] * (position[None, :] - position[:, None])
        else:
            q, k = (_rotated(t, interleaved=False, dims=DIM) for t in (q, k))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(DIM) + bias, dim=-1)
        return self.o((weights @ v).transpose(1, 2).reshape(batch, length, HEADS * DIM))


class _MultiQueryAttention(nn.Module):
    """Multi-query groups in one packed projection (q | k | v), interleaved rotary on half of the channels."""

    def __init__(self, hidden: int, kv_heads: int = 2) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.query_key_value = nn.Linear(hidden, (HEADS + 2 * kv_heads) * DIM)
        self.dense = nn.Linear(HEADS * DIM, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        sizes = [HEADS * DIM, self.kv_heads * DIM, self.kv_heads * DIM]
        q, k, v = (t.unflatten(-1, (-1, DIM)).transpose(1, 2) for t in self.query_key_value(x).split(sizes, dim=-1))
        q, k = (_rotated(t, interleaved=True, dims=DIM // 2) for t in (q, k))
        repeat = HEADS // self.kv_heads
        k, v = (t.unsqueeze(2).expand(-1, -1, repeat, -1, -1).reshape(batch, HEADS, length, DIM) for t in (k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dense(out.transpose(1, 2).reshape(batch, length, HEADS * DIM))


class _Mlp(nn.Module):
    """SwiGLU: separate gate and up (`w1`, `w2`) or packed in one projection."""

    def __init__(self, hidden: int, width: int, *, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        if packed:
            self.dense_h_to_4h = nn.Linear(hidden, 2 * width, bias=False)
        else:
            self.w1, self.w2 = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width, bias=False)
        self.c_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.dense_h_to_4h(x).chunk(2, dim=-1) if self.packed else (self.w2(x), self.w1(x))
        return self.c_proj(nn.functional.silu(first) * second)


class _Block(nn.Module):
    def __init__(self, hidden: int, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.attn, self.mlp = _RmsNorm(hidden), _RmsNorm(hidden), attention, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class _Decoder(nn.Module):
    def __init__(self, attention: Callable[[int], nn.Module], *, packed: bool, hidden: int = 44) -> None:
        super().__init__()
        self.wte = nn.Embedding(61, hidden)
        self.h = nn.ModuleList(_Block(hidden, attention(hidden), _Mlp(hidden, 20, packed=packed)) for _ in range(2))
        self.ln_f, self.lm_head = _RmsNorm(hidden), nn.Linear(hidden, 61, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.wte(input_ids)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def _plain(attention: Callable[[int], nn.Module], *, packed: bool) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _Decoder(attention, packed=packed).eval()


_PLAIN: dict[str, Callable[[], nn.Module]] = {
    "baichuan (W_pack, ALiBi)": lambda: _plain(lambda n: _PackedAttention(n, alibi=True, bias=False), packed=False),
    "qwen-7b (c_attn, w1/w2)": lambda: _plain(lambda n: _PackedAttention(n, alibi=False, bias=True), packed=False),
    "chatglm3 (packed MQA, SwiGLU)": lambda: _plain(_MultiQueryAttention, packed=True),
}

ZOO: dict[str, Family] = {
    family.name: family
    for family in (
        *(Family(name, "causal", functools.partial(_made, *spec)) for name, spec in _CAUSAL.items()),
        *(Family(name, form, functools.partial(_made, *spec)) for name, (form, *spec) in _OTHERS.items()),
        *(Family(name, "plain", build) for name, build in _PLAIN.items()),
    )
}


# --- programs and plans ---------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def located(name: str) -> Program:
    """A tiny model of a family traced, lifted and located; read-only."""
    family = ZOO[name]
    model = family.build()
    inputs = None
    if family.form == "plain":
        inputs = {"input_ids": torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(0))}
    passes = [build_pass(step, {}) for step in LOCATE]
    return Pipeline(passes)(trace(model, example_inputs=inputs)).program


def kinds_of(program: Program) -> tuple[str, ...]:
    """The kinds of units a program has, in the order of the table."""
    found = {group.kind for group in program.groups}
    return tuple(kind for kind in KINDS if kind in found)


def _subset(size: int, least: int = 1, multiple: int = 1) -> st.SearchStrategy[list[int]]:
    counts = [n for n in range(least, size + 1) if n % multiple == 0 or n == size]
    chosen = st.sampled_from(counts)
    return chosen.flatmap(lambda n: st.lists(st.integers(0, size - 1), min_size=n, max_size=n, unique=True))


@st.composite
def _in_parts(draw: st.DrawFn, group: Group) -> list[int]:
    """As many units of every part; of an attention whole KV heads, with as many query heads of each."""
    parts = group.parts
    members = [[unit] for unit in range(group.units)]
    if isinstance(group, AttentionGroup):
        parts, members = group.kv_parts, [group.heads_of(kv) for kv in range(group.kv_heads)]
    assert parts is not None
    least = -(-group.least // len(parts))
    count, each = draw(st.integers(least, parts.shape[1])), draw(st.integers(1, len(members[0])))
    chosen = [int(part[place]) for part in parts for place in draw(st.permutations(range(len(part))))[:count]]
    return [members[one][place] for one in chosen for place in draw(st.permutations(range(len(members[one]))))[:each]]


@st.composite
def legal_plans(draw: st.DrawFn, groups: Sequence[Group], kind: str) -> Plan:
    """A legal plan for the groups of one kind, or of all; a group may be left whole."""
    kept: dict[str, list[int]] = {}
    for group in groups:
        if kind not in {group.kind, "all"} or draw(st.integers(0, 3)) == 0:
            continue
        if group.parts is not None:
            kept[group.name] = draw(_in_parts(group))
            continue
        if isinstance(group, AttentionGroup):
            heads = draw(_subset(group.kv_heads))
            per_head = draw(st.integers(1, len(group.heads_of(0))))
            members = [draw(_subset(len(group.heads_of(kv)), per_head)) for kv in heads]
            kept[group.name] = [
                group.heads_of(kv)[index]
                for kv, chosen in zip(heads, members, strict=True)
                for index in chosen[:per_head]
            ]
        elif isinstance(group, ExpertMlpGroup):
            first = draw(_subset(group.width, group.multiple, group.multiple))
            others = [draw(st.permutations(range(group.width)))[: len(first)] for _ in range(group.experts - 1)]
            kept[group.name] = [e * group.width + c for e, listed in enumerate([first, *others]) for c in listed]
        else:
            # Norms over a handful of channels have vanishing gradients, which float32 cannot compare.
            least = max(group.least, 8) if group.kind == "hidden" else group.least
            kept[group.name] = draw(_subset(group.units, least, group.multiple))
    return Plan.of(kept)
