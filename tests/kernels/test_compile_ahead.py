"""Every kernel compiles for GPUs that this machine does not have, and keeps its registers on sm_90."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget

from spqr_kernels.compile_ahead import AMD, NVIDIA, usage, variants

VARIANTS = {variant.name: variant for variant in variants()}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("arch", NVIDIA)
def test_compiles_for_nvidia(name, arch):
    compiled = VARIANTS[name].compile(GPUTarget("cuda", arch, 32))
    if arch == 90:
        used = usage(compiled)
        assert used.spills == 0
        if not VARIANTS[name].portable and "unpack" not in name:
            assert used.instructions["HMMA"] >= 16, "the product does not run on tensor cores"


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.portable])
@pytest.mark.parametrize("arch", AMD)
def test_portable_kernels_compile_for_amd(name, arch):
    """Compiled only: there is no such GPU here to run them."""
    compiled = VARIANTS[name].compile(GPUTarget("hip", arch, 64))
    assert compiled.asm["hsaco"]
