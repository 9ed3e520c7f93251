"""Which precision and which kernels products get: what the machine says of itself is made up."""

from __future__ import annotations

import platform

import pytest
import torch

from fxprune.matmul import fast_products, multiplies_bfloat16
from fxprune.sparse_pass import forward_precision

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
