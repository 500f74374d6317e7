"""Every kernel compiles for GPUs that this machine does not have, and keeps its registers on sm_90."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget

from spqr_kernels import small
from spqr_kernels.compile_ahead import AMD, machine_code, usage, variants

VARIANTS = {variant.name: variant for variant in variants()}
GEMM, SMALL = (
    [name for name in VARIANTS if name.removeprefix("siblings ").removeprefix("experts ").startswith(kernel)]
    for kernel in ("gemm", "small")
)
QUICK = ("batch 16 large", "batch 32", "batch 256")  # of what siblings and experts make of the kernels of several rows


def is_long(name: str, arch: int = 90) -> bool:
    """Variants that differ little from others: they take minutes to compile."""
    if name in GEMM + SMALL and name.startswith(("siblings", "experts")):
        return not name.endswith(QUICK)
    return name.startswith("decode") and "3-bit bilevel batch" not in name and (arch == 89 or not name.endswith("batch 8"))


def each(names):
    return [pytest.param(name, marks=[pytest.mark.slow] * is_long(name)) for name in names]


def spills(name: str) -> int:
    """Loads and stores of spilled registers that stand, with Triton 3.6 to 3.9 (up to 3.6 about half as many).

    With 256 rows of x half of all registers are sums; groups of 32 have most, 34 with Triton 3.9. Siblings
    and experts have some more, as what a program chose of several must be held. Nearly all are outside of the
    loop over the columns, those of small batches all (26 are with direct statistics and Triton 3.9 alone), and with a register
    more fewer programs would fit, which was slower; the kernel of one row, none to
    four with Triton 3.6, may read some words a pair of chunks. The decode kernel is for GPUs without `wgmma`.
    """
    if name in GEMM:
        return (34 if name.endswith(" 256") else 22) + (14 if name.startswith(("siblings", "experts")) else 0)
    if name.startswith("decode"):
        return 16
    if name in SMALL:
        return 26 if "direct" in name else 11
    if name in ("matvec 2-bit bilevel *bf16", "round metric and outliers"):
        return 2  # one word, with Triton 3.6 alone
    limited = VARIANTS[name].registers is not None
    return 16 if limited and name.split()[0] in ("matvec", "siblings", "experts") else 0


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        pytest.param(name, arch, marks=[pytest.mark.slow] * is_long(name, arch))
        for name, variant in VARIANTS.items()
        for arch in variant.nvidia
    ],
)
def test_compiles_for_nvidia(name, arch):
    compiled = VARIANTS[name].compile(GPUTarget("cuda", arch, 32))
    if arch == 90:
        used = usage(compiled)
        assert used.spills <= spills(name)
        if not VARIANTS[name].portable and name.split()[0] not in ("unpack", "prepare"):
            assert used.instructions["HGMMA" if "gemm" in name else "HMMA"] >= 16, "the product does not run on tensor cores"


@pytest.mark.parametrize("name", each(name for name in GEMM if "gemm 3-bit" in name))
def test_no_sum_is_read_before_its_product_is_done(name):
    """Where only a wait behind the loop waited for the last product, the assembler had read the sums above it: the last 64
    columns were missing from results, on a GPU that was quick enough."""
    code = machine_code(VARIANTS[name].compile(GPUTarget("cuda", 90, 32)))
    last = max(i for i, line in enumerate(code) if line.startswith("HGMMA"))
    first = int(re.match(r"HGMMA\S* R(\d+),", code[last])[1])
    sums = {f"R{first + i}" for i in range(VARIANTS[name].constants["BATCH"] // 2)}
    behind = code[last + 1 :]
    wait = next(i for i, line in enumerate(behind) if line.startswith("WARPGROUP.DEPBAR"))
    assert behind[wait].split()[-1] == "0x0"
    assert not any(sums & set(re.findall(r"\bR\d+", line)) for line in behind[:wait])


@pytest.mark.parametrize("name", each(GEMM))
def test_batches_spill_next_to_nothing_within_the_loop_over_the_chunks(name):
    code = machine_code(VARIANTS[name].compile(GPUTarget("cuda", 90, 32)))
    products = [i for i, line in enumerate(code) if line.startswith("HGMMA")]
    assert len(products) == 16  # of a chunk
    spilled = sum("LDL" in line or "STL" in line for line in code[products[0] : products[-1]])
    assert spilled <= (8 if name.endswith(" 256") else 0)


@pytest.mark.parametrize("name", each(SMALL))
def test_small_batches_keep_as_many_programs_on_a_multiprocessor_as_its_choice_says(name):
    variant = VARIANTS[name]
    used = usage(variant.compile(GPUTarget("cuda", 90, 32)))
    choice = small.choice_for(variant.constants["BATCH"], variant.constants["BILEVEL"], name.endswith(" large"))
    assert used.registers <= choice.registers
    assert choice.resident * 32 * choice.warps * used.registers <= 65536
    assert choice.resident * (variant.constants["ROOM"] + 1024) <= 228 * 1024  # the first KB of each is the system's


@pytest.mark.parametrize("name", each(SMALL))
def test_small_batches_spill_nothing_within_the_loop_over_the_chunks(name):
    code = machine_code(VARIANTS[name].compile(GPUTarget("cuda", 90, 32)))
    begin = next(i for i, line in enumerate(code) if line.startswith("DEPBAR"))  # the wait for a chunk's copies
    end = max(i for i, line in enumerate(code) if line.startswith("HMMA"))
    assert end - begin > 300
    assert not any("LDL" in line or "STL" in line for line in code[begin:end])


@pytest.mark.parametrize(
    "name", each(name for name, variant in VARIANTS.items() if "DEPENDENT" in variant.kernel.arg_names and name not in SMALL)
)
def test_x_is_not_read_before_the_kernel_that_makes_it_has_ended(name):
    """x is read by loads of 2, 8 or 16 bytes or copies through L1, and by `gemm` through the copy engine; before the wait the
    matrix is by none of these. Kernels that read no matrix read nothing before it."""
    code = machine_code(VARIANTS[name].compile(GPUTarget("cuda", 90, 32)))
    wait = next(i for i, line in enumerate(code) if "ACQBULK" in line)
    matrix = {"Weight", "Stored", "Joined0"} & set(VARIANTS[name].kernel.arg_names)

    def reads_x(line):
        if name in GEMM:
            return "UBLKCP" in line
        load = re.search(r"LDG\.E\.(128|64|U16)" if matrix else "LDG", line)
        return load or ("LDGSTS" in line and "BYPASS" not in line)

    assert not any(reads_x(line) or "STG" in line for line in code[:wait])
    assert any(reads_x(line) for line in code[wait:])


@pytest.mark.parametrize("name", each(name for name, variant in VARIANTS.items() if "DEPENDENT" in variant.kernel.arg_names))
def test_the_next_kernel_begins_behind_that_wait(name):
    """As it may read at once what only kernels before this one wrote; but one that is followed by a product of ours."""
    code = machine_code(VARIANTS[name].compile(GPUTarget("cuda", 90, 32)))
    wait = next(i for i, line in enumerate(code) if "ACQBULK" in line)
    begins = [i for i, line in enumerate(code) if "PREEXIT" in line]
    assert all((i > wait) != name.startswith("prepare") for i in begins)
    assert begins or name.split()[0] in ("siblings", "experts", "decode")


@pytest.mark.parametrize("name", each(SMALL))
def test_small_batches_copy_x_behind_that_wait(name):
    """x comes by copies of 16 bytes, as the matrix does: before the wait stand those of the matrix's first chunks, but where it
    is an expert's, which comes from the kernel before too."""
    code = machine_code(VARIANTS[name].compile(GPUTarget("cuda", 90, 32)))
    wait = next(i for i, line in enumerate(code) if "ACQBULK" in line)
    constants = VARIANTS[name].constants
    copies = [i for i, line in enumerate(code) if "LDGSTS" in line and "BYPASS.128" in line]
    of_x = constants["BATCH"] // constants["WARPS"]
    of_tiles = (constants["BITS"] + 1) * constants["TALL"]
    of_first = (constants["STAGES"] - 1) * of_tiles
    assert sum(i < wait for i in copies) == (0 if name.startswith("experts") else of_first)
    assert len(copies) == of_first + of_x + (of_tiles + of_x)  # of first chunks, x of the first, and those of the loop
    assert not any("STG" in line for line in code[:wait])


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.portable])
@pytest.mark.parametrize("arch", AMD)
def test_portable_kernels_compile_for_amd(name, arch):
    """Compiled only: there is no such GPU here to run them."""
    compiled = VARIANTS[name].compile(GPUTarget("hip", arch, 64))
    assert compiled.asm["hsaco"]
