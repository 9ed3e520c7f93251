"""Which precision and which kernels products get: what the machine says of itself is made up."""

from __future__ import annotations

import copy
import platform
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.evaluation.perplexity import window_losses
from fxprune.runtimes import matmul
from fxprune.runtimes.compiled import CompiledRunner
from fxprune.runtimes.matmul import fast_products, multiplies_bfloat16, wide_products
from fxprune.runtimes.runners import EagerRunner, GraphRunner, scoring_products
from fxprune.weights.base import forward_precision

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("machine", "avx512_bf16", "amx", "onednn", "native"),
    [
        ("x86_64", False, False, True, False),  # AVX-512 alone: oneDNN takes bfloat16, and is slow in it
        ("x86_64", True, False, True, True),
        ("AMD64", False, True, True, True),
        ("x86_64", False, False, False, False),
        ("aarch64", False, False, True, True),
        ("aarch64", False, False, False, False),
    ],
)
def test_auto_is_bfloat16_where_the_machine_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, *, machine: str, avx512_bf16: bool, amx: bool, onednn: bool, native: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    for device in (CPU, torch.device("meta")):
        assert multiplies_bfloat16(device) is native
        assert forward_precision("auto", torch.float32, device) is (torch.bfloat16 if native else None)
        assert forward_precision("bfloat16", torch.float32, device) is torch.bfloat16  # what is asked for is done
    assert multiplies_bfloat16(torch.device("cuda"))


def test_fast_products_keep_float32_and_the_flag() -> None:
    one, other = (torch.randn(300, 200, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    with fast_products():
        found = one @ other.T
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]
    assert torch.allclose(found, (one.double() @ other.double().T).float(), atol=1e-4)


@pytest.fixture
def _without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "multiplies_bfloat16", lambda _: False)


def _products(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a forward pass multiplies, on operands that are bfloat16 numbers."""
    generator = torch.Generator().manual_seed(0)
    x, y, weight = (torch.randn(2, 4, 64, 64, generator=generator).bfloat16().to(dtype) for _ in range(3))
    functional = torch.nn.functional
    return {
        "linear": functional.linear(x, weight[0, 0], weight[0, 0, 0]),
        "linear of a matrix": functional.linear(x[0, 0], weight[0, 0]),
        "matmul": x @ y,
        "vector": x[0, 0] @ y[0, 0, 0],
        "attention": functional.scaled_dot_product_attention(x, y, weight, is_causal=True),
        "masked attention": functional.scaled_dot_product_attention(x, y, weight, torch.ones(64, 64).tril().bool()),
        "convolution": functional.conv1d(x[0], y[0, :, :, :3]),
    }


@pytest.mark.usefixtures("_without_bfloat16")
def test_wide_products_are_float32_products_rounded_once() -> None:
    exact = _products(torch.float32)
    with torch.no_grad(), wide_products():
        found = _products(torch.bfloat16)
    for name, value in found.items():
        assert value.dtype is torch.bfloat16
        # Sums of float32 in another order can fall on the other side of a half of bfloat16's last digit.
        wrong = value != exact[name].bfloat16()
        assert wrong.float().mean() < 2e-3, name
        assert torch.allclose(value.float(), exact[name], rtol=2**-7, atol=1e-5), name


@pytest.mark.usefixtures("_without_bfloat16")
def test_wide_products_never_reach_slow_kernels_and_leave_other_types_alone() -> None:
    seen: list[tuple[str, torch.dtype]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if str(func).split(".")[1] in {"mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu"}:
                seen.append((str(func), args[0].dtype))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        with wide_products():
            _products(torch.bfloat16)
        assert {dtype for _, dtype in seen} == {torch.float32}
        assert len(seen) >= 5
        with wide_products():
            assert (torch.ones(3, 3, dtype=torch.float64) @ torch.ones(3, 3, dtype=torch.float64)).dtype is (
                torch.float64
            )
        seen.clear()
        _products(torch.bfloat16)  # behind the block everything is as before
        assert torch.bfloat16 in {dtype for _, dtype in seen}


def test_wide_products_change_nothing_where_bfloat16_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "multiplies_bfloat16", lambda _: True)
    before = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    with wide_products():
        assert torch.utils._python_dispatch._get_current_dispatch_mode_stack() == before
    monkeypatch.setattr(matmul, "multiplies_bfloat16", lambda _: False)
    with wide_products("meta"):
        assert torch.utils._python_dispatch._get_current_dispatch_mode_stack() == before


@pytest.mark.usefixtures("_without_bfloat16")
def test_figures_of_a_bfloat16_model_are_those_of_its_numbers(tiny_llama: LlamaForCausalLM) -> None:
    tokens = torch.randint(0, 60, (3, 32), generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(tiny_llama).bfloat16()
    exact = EagerRunner(copy.deepcopy(model).float())
    for other in (CompiledRunner.__new__(CompiledRunner), GraphRunner.__new__(GraphRunner)):
        widened = type(scoring_products(other, "cpu")) is not nullcontext
        assert widened is isinstance(other, GraphRunner)  # a compiled form is judged as it runs
    found, dtype = window_losses(EagerRunner(model), tokens, text="made up")
    wanted, _ = window_losses(exact, tokens, text="made up")
    assert dtype == "bfloat16"
    assert found == pytest.approx(wanted, abs=0.02)
