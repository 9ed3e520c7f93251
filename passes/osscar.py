"""OSSCAR: the units go that least squares makes up for best, the same widths in every layer.

Structured optimal brain surgeon on the Gram matrix of what each consumer reads (Meng et al. 2024, "OSSCAR: one-shot
structured pruning in vision and language models with combinatorial optimization"; the sweep is that of
`fxprune.structured.obs`), then new weights for what is left, layer after layer, on already pruned inputs. Units are
chosen on the inputs of the dense model. There they chose once, by local search from greedy; here the sweep gives
every width at once.

Graph and refusals are those of `fxprune.structured.base`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fxprune.calibration.input_grams import input_grams
from fxprune.core.errors import UsageError
from fxprune.core.groups import AttentionGroup
from fxprune.structured.base import StructuredPass
from fxprune.structured.curves import obs_channel_curve, obs_head_curve, scaled
from fxprune.structured.obs import Elimination, positive_definite
from fxprune.structured.unit_scores import consumer_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxprune.calibration.gram import Gram
    from fxprune.core.groups import Group
    from fxprune.structured.case import Case
    from fxprune.structured.curves import Curve
    from fxprune.structured.reconstruction import Reconstruction

__all__ = ["Osscar", "layer_curve"]


def layer_curve(group: Group, grams: Mapping[str, Gram], case: Case, damping: float) -> Curve:
    """The curve of one group: the share of its consumers' output energy that no weights of what is left can give back.

    Args:
        group: heads or MLP channels.
        grams: of what its consumers read in the dense model, by consumer.
        case: gives weights and limits.
        damping: see `fxprune.structured.obs.positive_definite`.
    """
    problems, energy = [], 0.0
    for name in consumer_names([group]):
        gram, weight = grams[name], case.weight(name).double()
        gram.require_finite()
        live = gram.matrix.diagonal() > 0  # what is always 0 is free
        hessian, used = positive_definite(gram.matrix, damping)
        if used > damping:
            case.notes.setdefault("damping_raised", {})[name] = used
        problems.append(Elimination(hessian, weight.t() * live[:, None]))
        energy += 0.5 * gram.energy(weight)
    blocks = [torch.from_numpy(piece.indices).to(weight.device) for piece in group.consumers]
    limits = case.limits[group.name]
    if isinstance(group, AttentionGroup):
        curve = obs_head_curve(group, problems, blocks, limits)
    else:
        curve = obs_channel_curve(group, problems, blocks, limits)
    # Errors in units of the layer's own output: a layer with large activations does not decide for all others.
    factor = 1 / max(energy, torch.finfo(torch.float64).tiny)
    return scaled({group.name: curve}, {group.name: factor})[group.name]


class Osscar(StructuredPass):
    """Remove the units whose absence changes the consumers' outputs least (see the module's docstring).

    Args:
        damping: share of the median of a Gram matrix' diagonal that is added to it.
        **options: of every structured method, see `StructuredPass`.
    """

    name = "osscar"
    reconstruction: ClassVar[Reconstruction] = "ridge"
    inverts = True
    own_uniform: ClassVar[bool] = True

    def __init__(self, *, damping: float = 0.01, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < damping < float("inf"):
            raise UsageError(f"damping must be positive, got {damping}")
        self.damping = damping

    def curves(self, case: Case) -> Mapping[str, Curve]:
        """One pass over the text; a group's curve is swept as soon as the Gram matrices of its consumers are there."""
        waiting: dict[str, Gram] = {}
        found: dict[str, Curve] = {}
        readers = {group.name: consumer_names([group]) for group in case.groups}

        def sweep(grams: Mapping[str, Gram]) -> None:
            waiting.update(grams)
            for group in case.groups:
                if group.name not in found and all(name in waiting for name in readers[group.name]):
                    found[group.name] = layer_curve(group, waiting, case, self.damping)
                    for name in readers[group.name]:
                        del waiting[name]

        input_grams(
            case.program,
            consumer_names(case.groups),
            case.tokens,
            sweep,
            title="curves",
            forward_dtype=case.forward_dtype,
            batch_size=case.batch_size,
        )
        return found
