"""The model that learned pruning trains: gates in the masks, LoRA on frozen weights, logits and hidden states out.

    ProgramGates ─ LoRA (peft) into its graph ─ logits and what every layer hands on ─ each gate, Linear and LoRA as one
                 ─ one checkpoint a block

Student and teachers are this one module with other gates and other adapters: the weights are held once, and are those
of the program it was made from. They are frozen while it is in use.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxprune.calibration.distillation import with_hidden_states
from fxprune.calibration.engine import text_samples
from fxprune.channels.lora_targets import lora_targets
from fxprune.core.errors import PreconditionError
from fxprune.core.groups import LayerGroup
from fxprune.core.precision import coarsest
from fxprune.learned.gates import ProgramGates
from fxprune.learned.lora_product import fuse_lora
from fxprune.learned.recomputation import before_masks, by_block
from fxprune.runtimes.matmul import fast_products
from fxprune.tracing.graphs import erase_dead
from fxprune.tracing.lifted_graphs import own_projections
from fxprune.tracing.nodes import get_attribute

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch.fx import GraphModule

    from fxprune.core.groups import Group
    from fxprune.core.program import Program
    from fxprune.learned.unit_gates import HeadScheme

__all__ = ["GatedModel", "merge_adapters"]

_ADAPTER = "default"


class GatedModel:
    """A program with gates and adapters, and how to run it on text.

    Args:
        program: the dense, lifted, located program; its weights are shared, and frozen inside `frozen`.
        groups: those that get gates; with none, LoRA is all that is trained.
        heads: see `fxprune.learned.unit_gates.HeadGates`.
        drop_rate: probability of each unit to be closed at the start.
        rank: of LoRA; 0 for none.
        alpha: scale of LoRA; twice the rank by default.
        targets: of LoRA, see `lora_targets`.
        checkpointing: whether all activations inside a block are computed again in the backward pass instead of kept;
            without it only those that gates alone would keep (see `fxprune.learned.recomputation`).
        hidden: whether hidden states are returned.
        forward_dtype: precision of the products; None for the graph's own.
        seed: of LoRA's first values.

    Attributes:
        gates: the gates.
        adapters: parameters of LoRA by name; empty with rank 0.
        refit: (out, in) by Linear, the weights that the student has instead of the program's inside `as_refit`, and
            LoRA is merged into; empty until something is fitted.
        layers: how many hidden states are returned.

    Raises:
        PreconditionError: hidden states or checkpoints are wanted, and no stack of layers was located.
        UsageError: a LoRA target matches nothing.
    """

    def __init__(
        self,
        program: Program,
        groups: Sequence[Group],
        *,
        heads: HeadScheme = "both",
        drop_rate: float = 0.01,
        rank: int = 0,
        alpha: float | None = None,
        targets: Sequence[str] = ("all",),
        checkpointing: bool = False,
        hidden: bool = True,
        forward_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        self.program = program
        self._flags = [(parameter, parameter.requires_grad) for parameter in program.graph_module.parameters()]
        kinds = tuple(dict.fromkeys(group.kind for group in groups))
        self.gates = ProgramGates(program.replace(groups=tuple(groups)), kinds=kinds, heads=heads, drop_rate=drop_rate)
        self.scale = 0.0
        self.linears: list[str] = []
        if rank:
            self.scale = (2.0 * rank if alpha is None else alpha) / rank
            self.linears = lora_targets(program, targets)
            _inject(self.gates.graph_module, self.linears, rank=rank, alpha=self.scale * rank, seed=seed)
        self._restore()
        named = self.gates.graph_module.named_parameters()
        self.adapters: dict[str, nn.Parameter] = {name: p for name, p in named if ".lora_" in name}
        exits = [node for group in program.groups if isinstance(group, LayerGroup) for node in group.exits]
        if (hidden or checkpointing) and not exits:
            raise PreconditionError(
                "no stack of layers was located, so there are no hidden states to distil and no blocks to checkpoint: "
                "run locate_layers, or use layer_weight=0 and checkpointing=False"
            )
        self.layers = len(exits) if hidden else 0
        flat = _flat(self.gates.graph_module, program.interface.outputs, exits if hidden else [])
        fuse_lora(flat, self.linears, _ADAPTER, program.weight_masks)
        self._graph: nn.Module = flat
        if checkpointing:
            self._graph = by_block(flat, exits)
        else:
            before_masks(flat)
        self.forward_dtype = forward_dtype
        self.refit: dict[str, Tensor] = {}
        self._fixed: dict[tuple[int, int], dict[str, Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.program.graph_module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest precision of products and activations."""
        return self.forward_dtype or coarsest(self.program.graph_module.parameters())

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The program's weights require no gradients as long as the context lasts; adapters and gates do."""
        try:
            for parameter, _ in self._flags:
                parameter.requires_grad_(False)  # noqa: FBT003 - torch's own name for it is not annotated
            with fast_products():
                yield
        finally:
            self._restore()

    def _restore(self) -> None:
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    def __call__(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits (batch, length, vocabulary) and hidden states (batch, length, hidden), with the gates as applied.

        Args:
            tokens: (batch, length) int64, on the model's device; no padding.
        """
        interface = self.program.interface
        shape = (tokens.shape[0], tokens.shape[1])
        if shape not in self._fixed:
            self._fixed[shape] = dict(text_samples(interface, tokens).fixed(shape[0]))
        given = {**self._fixed[shape], "input_ids": tokens}
        with torch.autocast(tokens.device.type, self.forward_dtype, enabled=self.forward_dtype is not None):
            logits, *states = self._graph(*(given.get(name, tokens) for name in interface.inputs))
        return logits, tuple(states)

    @contextmanager
    def as_refit(self) -> Iterator[None]:
        """The student's fitted weights stand in for the program's as long as the context lasts; nothing is copied.

        Backward passes of what was computed inside belong inside.
        """
        weights = {name: self._weight(name) for name in self.refit}
        before = {name: weight.data for name, weight in weights.items()}
        try:
            for name, weight in weights.items():
                weight.data = self.refit[name]
            yield
        finally:
            for name, weight in weights.items():
                weight.data = before[name]

    def _weight(self, name: str) -> nn.Parameter:
        """The weight of a Linear, behind its adapter if it has one."""
        module: Any = get_attribute(self.gates.graph_module, name)
        weight: nn.Parameter = getattr(module, "base_layer", module).weight
        return weight

    def zeroed(self) -> dict[str, Tensor]:
        """What the adapters' tensors were made as, for the intact model: copies of them as they are now."""
        return {name: parameter.detach().clone() for name, parameter in self.adapters.items()}

    def load_adapters(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the adapters."""
        with torch.no_grad():
            for name, parameter in self.adapters.items():
                parameter.copy_(tensors[name])

    def merged(self) -> Program:
        """The student without adapters: LoRA added to the program's weights, or to those that were fitted."""
        program = self.program
        if self.refit:
            root = own_projections(program.graph_module, self.refit)
            for name, weight in self.refit.items():
                module = get_attribute(root, name)
                module.weight = nn.Parameter(weight, module.weight.requires_grad)
            program = program.replace(graph_module=root, channels=None)
        return merge_adapters(program, self.gates.graph_module, self.linears)


def merge_adapters(program: Program, graph_module: GraphModule, linears: Sequence[str]) -> Program:
    """Add LoRA's products to the weights; those that the program's weight masks removed stay 0.

    Args:
        program: the program without adapters; it is left as it is.
        graph_module: a graph whose Linears of these names are peft's.
        linears: qualified names.
    """
    if not linears:
        return program
    root = own_projections(program.graph_module, linears)
    for name in linears:
        layer: Any = get_attribute(graph_module, name)
        old = get_attribute(root, name)
        with torch.no_grad():
            # W + s B A, the product and the sum in float32 whatever the weight's precision is.
            product = layer.lora_B[_ADAPTER].weight.float() @ layer.lora_A[_ADAPTER].weight.float()
            if name in program.weight_masks:
                product = product * program.weight_masks[name].to(product.device)
            weight = old.weight.float() + layer.scaling[_ADAPTER] * product
        old.weight = nn.Parameter(weight.to(old.weight.dtype), old.weight.requires_grad)
    return program.replace(graph_module=root, channels=None)


def _inject(graph_module: GraphModule, linears: Sequence[str], *, rank: int, alpha: float, seed: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415 - optional, and slow to import
    except ImportError as error:
        raise PreconditionError(
            'LoRA needs the package peft: pip install "fxprune[train]"; or train masks alone with lora_rank=0'
        ) from error
    pattern = "|".join(map(re.escape, linears))
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=rf"({pattern})")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, graph_module, adapter_name=_ADAPTER)
    for name, parameter in graph_module.named_parameters():
        if ".lora_" in name:  # peft makes them in the weights' precision, in which bfloat16 has no steps small enough
            parameter.data = parameter.data.float()


# ---- graphs --------------------------------------------------------------------------------------------------------


def _flat(graph_module: GraphModule, outputs: Sequence[str], exits: Sequence[str]) -> GraphModule:
    """A graph that returns logits and hidden states and nothing else."""
    graph = with_hidden_states(graph_module, exits)
    end = next(node for node in graph.graph.nodes if node.op == "output")
    values = end.args[0]
    end.args = ((values[list(outputs).index("logits")], *values[len(outputs) :]),)
    erase_dead(graph.graph)
    graph.recompile()
    return graph
