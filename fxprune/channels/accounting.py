"""Accounting: parameters, multiply-accumulates (MACs) and bytes of a model, and the shares that pruning removed.

Three figures are never mixed: *mask sparsity* (zeros that are still stored), the *removed share of parameters* (of
the block Linears, and of all) and the *removed MACs*. Everything is computed from the module and, for a
`torch.fx.GraphModule`, from its data flow; module names only label what is returned.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.channels.attention_shapes import (
    AttentionShape,
    attention_shapes,
    attribute_of,
    grouped_rows,
    is_grouped,
    op_name,
    parameter_products,
    propagated_shapes,
    traced_shapes,
)
from fxprune.channels.block_linears import (
    block_linear_parameters,
    block_linear_tensors,
    expert_tensors,
    identity,
    lm_heads,
    unique,
)
from fxprune.core.errors import PreconditionError
from fxprune.tracing.grouped import GroupedLinear
from fxprune.tracing.lifted import is_projection

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = [
    "AttentionShape",
    "MacCount",
    "MacsChange",
    "ParameterChange",
    "attention_shapes",
    "bytes_of_weights",
    "bytes_read_per_step",
    "compare_macs",
    "compare_parameters",
    "count_parameters",
    "linear_parameters_by_name",
    "macs_per_token",
    "mask_sparsity",
    "removed_share",
]


# ---- parameters and bytes ------------------------------------------------------------------------------------------


def count_parameters(module: nn.Module) -> int:
    """Number of parameter elements; tensors that share storage (tied embeddings) count once. Buffers do not count."""
    return sum(parameter.numel() for parameter in unique(module.parameters()))


def bytes_of_weights(module: nn.Module) -> int:
    """Bytes that the parameters take in memory, in their own dtypes; shared tensors count once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in unique(module.parameters()))


def bytes_read_per_step(module: nn.Module) -> int:
    """Bytes of weights that a forward step for one token reads: what bounds decoding at batch 1.

    This is `bytes_of_weights` less the tables from which only single rows are looked up (embeddings that are not tied
    to an output projection), and less the experts that the token is not sent to, where their number is known.
    """
    share = {identity(weight): Fraction(0) for weight in _lookup_tables(module)}
    share |= {identity(weight): part for weight, part in _expert_shares(module)}
    read = (p.numel() * p.element_size() * share.get(identity(p), Fraction(1)) for p in unique(module.parameters()))
    return round(sum(read))


def _expert_shares(module: nn.Module) -> Iterator[tuple[Tensor, Fraction]]:
    """The weights of experts, with the share of the experts that one token is sent to."""
    if isinstance(module, GraphModule):
        for node, rows in grouped_rows(module, traced_shapes(module)).items():
            grouped = module.get_submodule(str(node.target))
            assert isinstance(grouped, GroupedLinear)
            yield grouped.weight, min(rows / grouped.experts, Fraction(1))
    elif (per_token := _experts_per_token(module)) is not None:
        for _, weight in expert_tensors(module):
            if weight.ndim >= 3:
                yield weight, Fraction(per_token, weight.shape[0])


def _lookup_tables(module: nn.Module) -> list[Tensor]:
    if not isinstance(module, GraphModule):
        embeddings = [child.weight for child in module.modules() if isinstance(child, nn.Embedding)]
        owners = (child for child in module.modules() if not isinstance(child, nn.Embedding))
        others = {identity(tensor) for child in owners for tensor in child.parameters(recurse=False)}
        return [weight for weight in embeddings if identity(weight) not in others]
    lookups: list[Tensor] = []
    others = set()
    for node in module.graph.nodes:
        if node.op == "call_module":
            child = module.get_submodule(str(node.target))
            if isinstance(child, nn.Embedding):
                lookups.append(child.weight)
            else:
                others |= {identity(tensor) for tensor in child.parameters()}
        elif node.op == "get_attr" and isinstance(value := attribute_of(module, str(node.target)), nn.Parameter):
            if all(op_name(user) == "embedding" for user in node.users):
                lookups.append(value)
            else:
                others.add(identity(value))
    return [weight for weight in lookups if identity(weight) not in others]


def linear_parameters_by_name(module: nn.Module) -> dict[str, int]:
    """Elements of weight and bias of every `nn.Linear` and `GroupedLinear`, by qualified name.

    The output projection (`lm_heads`) is included. A weight that two Linears share is listed under both names. In a
    module without a graph the projections of experts are no Linears; they are listed under their parameters' names (see
    `block_linear_parameters`).
    """
    found = {
        name: sum(parameter.numel() for parameter in child.parameters(recurse=False))
        for name, child in module.named_modules()
        if is_projection(child)
    }
    return found | {name: tensor.numel() for name, tensor in expert_tensors(module)}


def _experts_per_token(module: nn.Module) -> int | None:
    """How many experts a token is sent to, as the model's configuration says."""
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text, "num_experts_per_tok", None)
    return count if isinstance(count, int) else None


def mask_sparsity(module: nn.Module, *, outputs: Sequence[str] | None = None) -> float:
    """Share of exact zeros in the weights (not the biases) of the block Linears, those of experts included, 0 to 1.

    Zeros that are stored: neither parameters nor MACs are saved by them in a dense kernel.

    Args:
        module: any module with at least one block Linear.
        outputs: see `lm_heads`.

    Raises:
        PreconditionError: the module has no block Linear, or its weights are on the meta device.
    """
    weights = [tensor for tensor in unique(block_linear_tensors(module, outputs)) if tensor.ndim >= 2]
    total = sum(weight.numel() for weight in weights)
    if not total:
        raise PreconditionError(
            f"mask sparsity of {type(module).__name__} is undefined: it has no nn.Linear besides its output "
            "projection; lift the graph's projections first"
        )
    if any(weight.is_meta for weight in weights):
        raise PreconditionError(
            f"mask sparsity of {type(module).__name__} needs weights, but they are on the meta device; load the model"
        )
    return 1.0 - sum(int(torch.count_nonzero(weight.detach())) for weight in weights) / total


def removed_share(dense: float, slim: float) -> float | None:
    """The share of `dense` that is gone in `slim`, or None when there was nothing to remove (`dense` is 0)."""
    return 1.0 - slim / dense if dense else None


# ---- MACs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates of a model; one MAC is two floating-point operations.

    Attributes:
        blocks: MACs per token of the block Linears; of experts only those that a token is sent to.
        lm_head: MACs per token of the output projection.
        attention: the attentions; None when they are not known (no example inputs were given).
        uncounted: labels of products with a parameter that are no Linear (in a module without a graph: matrices that
            belong to neither a Linear, nor an embedding, nor a mixture), and of experts when it is not known how many
            a token is sent to; their MACs are in no figure here.
    """

    blocks: int
    lm_head: int
    attention: tuple[AttentionShape, ...] | None = None
    uncounted: tuple[str, ...] = ()

    @property
    def linear(self) -> int:
        """MACs per token of all Linears, the output projection included."""
        return self.blocks + self.lm_head

    def attention_scores(self, new: int, total: int) -> int:
        """MACs of all attentions for `new` tokens of one sequence that is `total` long after them.

        Raises:
            PreconditionError: the attentions are not known.
        """
        if self.attention is None:
            raise PreconditionError("attention MACs are unknown: pass example_inputs to macs_per_token")
        return sum(shape.macs(new, total) for shape in self.attention)

    def of_step(self, new: int, past: int = 0, batch: int = 1, logits: int | None = None) -> int:
        """MACs of one forward step, with attention where it is known.

        Args:
            new: new tokens per sequence.
            past: tokens already in the cache.
            batch: number of sequences.
            logits: positions per sequence for which the output projection is computed; all `new` when None.
        """
        attention = 0 if self.attention is None else self.attention_scores(new, past + new)
        return batch * (self.blocks * new + self.lm_head * (new if logits is None else logits) + attention)


def macs_per_token(
    module: nn.Module,
    *,
    outputs: Sequence[str] | None = None,
    example_inputs: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
) -> MacCount:
    """Count the MACs of a model: in_features * out_features for every call of an `nn.Linear`.

    In a graph module a Linear that is called twice counts twice, and a `GroupedLinear` counts for as many experts as it
    has rows for each token: at the example inputs when they are given, else at those that the graph was traced with. In
    another module calls are not visible: each Linear counts once, and experts for the `num_experts_per_tok` of the
    configuration.

    Args:
        module: any module; a lifted graph module for an exact count.
        outputs: see `lm_heads`.
        example_inputs: inputs of the graph, by name or in order; when given, the attentions are measured under fake
            tensors (no arithmetic is done). Ignored for a module without a graph.
    """
    heads = set(lm_heads(module, outputs=outputs))
    blocks = head = 0
    for name, calls in _linear_calls(module).items():
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        macs = calls * linear.in_features * linear.out_features
        blocks, head = (blocks, head + macs) if name in heads else (blocks + macs, head)
    if not isinstance(module, GraphModule):
        experts, uncounted = _expert_macs(module)
        return MacCount(blocks + experts, head, uncounted=uncounted)
    given = example_inputs is not None
    shapes = traced_shapes(module) if example_inputs is None else propagated_shapes(module, example_inputs)
    experts, unknown = _grouped_macs(module, shapes)
    attention = attention_shapes(module, example_inputs or (), shapes) if given else None
    return MacCount(blocks + experts, head, attention, (*parameter_products(module), *unknown))


def _grouped_macs(module: GraphModule, shapes: Mapping[Any, tuple[int, ...]]) -> tuple[int, tuple[str, ...]]:
    """MACs per token of the grouped Linears, and labels of those whose rows for a token are not known."""
    rows = grouped_rows(module, shapes)
    macs, unknown = 0, []
    for node in module.graph.nodes:
        if not is_grouped(module, node):
            continue
        grouped = module.get_submodule(str(node.target))
        assert isinstance(grouped, GroupedLinear)
        if node in rows:
            macs += round(rows[node] * grouped.in_features * grouped.out_features)
        else:
            unknown.append(f"GroupedLinear({node.target})")
    return macs, tuple(unknown)


def _expert_macs(module: nn.Module) -> tuple[int, tuple[str, ...]]:
    """MACs per token of the mixtures of a module without a graph, and the names of matrices that are not counted."""
    per_token = _experts_per_token(module)
    known = dict(expert_tensors(module))
    owners = {name.rpartition(".")[0] for name in known}
    macs, uncounted = 0, []
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | nn.Embedding):
            continue
        for parameter_name, parameter in child.named_parameters(prefix=name, recurse=False):
            if parameter_name in known and parameter.ndim == 2:
                macs += parameter.numel()  # a router
            elif parameter_name in known and per_token is not None:
                macs += parameter.numel() // parameter.shape[0] * per_token
            elif parameter.ndim >= (3 if name in owners else 2):  # in a mixture two axes are a bias
                uncounted.append(parameter_name)
    return macs, tuple(uncounted)


def _linear_calls(module: nn.Module, prefix: str = "") -> Counter[str]:
    if isinstance(module, nn.Linear):
        return Counter({prefix: 1})
    calls: Counter[str] = Counter()
    if isinstance(module, GraphModule):
        children = [str(node.target) for node in module.graph.nodes if node.op == "call_module"]
    else:
        children = [name for name, _ in module.named_children()]
    for name in children:
        calls.update(_linear_calls(module.get_submodule(name), f"{prefix}.{name}" if prefix else name))
    return calls


# ---- comparing two forms -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterChange:
    """Parameters of the dense and the slim form, all and those of the block Linears; shared tensors count once."""

    dense: int
    slim: int
    dense_blocks: int
    slim_blocks: int

    def to_json(self) -> dict[str, Any]:
        """The `params` section of `report.json`; a share of nothing is absent."""
        shares = {
            "removed_share_blocks": removed_share(self.dense_blocks, self.slim_blocks),
            "removed_share_all": removed_share(self.dense, self.slim),
        }
        counts = {"dense": self.dense, "slim": self.slim}
        counts |= {"dense_blocks": self.dense_blocks, "slim_blocks": self.slim_blocks}
        return counts | {key: share for key, share in shares.items() if share is not None}


@dataclass(frozen=True)
class MacsChange:
    """MACs per token of all Linears (output projection included) of the dense and the slim form."""

    dense: MacCount
    slim: MacCount

    def to_json(self) -> dict[str, Any]:
        """The `macs` section of `report.json`, MACs per token without the attention scores."""
        section: dict[str, Any] = {"dense": self.dense.linear, "slim": self.slim.linear}
        section |= {"lm_head_dense": self.dense.lm_head, "lm_head_slim": self.slim.lm_head}
        share = removed_share(self.dense.linear, self.slim.linear)
        return section if share is None else section | {"removed_share": share}


def compare_parameters(
    dense: nn.Module,
    slim: nn.Module,
    *,
    outputs: Sequence[str] | None = None,
    dense_outputs: Sequence[str] | None = None,
) -> ParameterChange:
    """Count the parameters of two forms of one model; outputs as for `lm_heads`, the dense form's if they differ."""
    return ParameterChange(
        count_parameters(dense),
        count_parameters(slim),
        block_linear_parameters(dense, outputs=dense_outputs or outputs),
        block_linear_parameters(slim, outputs=outputs),
    )


def compare_macs(
    dense: nn.Module,
    slim: nn.Module,
    *,
    outputs: Sequence[str] | None = None,
    dense_outputs: Sequence[str] | None = None,
) -> MacsChange:
    """Count the MACs per token of two forms of a model; outputs as for `lm_heads`, the dense form's if they differ."""
    return MacsChange(macs_per_token(dense, outputs=dense_outputs or outputs), macs_per_token(slim, outputs=outputs))
