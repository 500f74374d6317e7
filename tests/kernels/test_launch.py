"""What a kernel is launched with, looked at without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spqr_format import Layout
from spqr_kernels import joined
from spqr_kernels.launch import LEAVES, Launch, addresses

GPU = torch.device("cuda:0")
OPTIONS = {"num_warps", "maxnreg", "launch_pdl"}
LAYOUTS = [
    Layout(4096, 4096, outliers=80_000),
    Layout(688, 512),
    Layout(11008, 4096, weight_bits=4, statistics="direct", group_size=128, outliers=5),
    Layout(4096, 11008, group_size=32, outliers=400_000),
]


class Recorder:
    """A kernel that notes how it is called, and what it compiles to."""

    arg_names = ("X", "Y", "rows", "columns", "BITS", "WARPS")

    def __init__(self) -> None:
        self.first: list = []
        self.later: list = []

    def __getitem__(self, grid):
        def run(*args, **kwargs):
            self.first.append((grid, args, kwargs))
            return SimpleCompiled(self.later)

        return run

    def warmup(self, *args, grid, **kwargs):
        self.first.append((grid, args, kwargs))
        return SimpleCompiled(self.later)


class SimpleCompiled:
    """Notes with what it is launched: the grid, what Triton's launcher is told of the kernel, and arguments."""

    def __init__(self, calls: list) -> None:
        self.calls, self.packed_metadata = calls, (4, 1, 1000)

    def __getitem__(self, grid):
        return lambda *args: self.calls.append((grid, *([self.packed_metadata] * (self.packed_metadata[1] > 1)), args))


def test_the_first_call_compiles_and_later_ones_give_the_same_in_the_order_of_the_signature():
    kernel = Recorder()
    constants = {"WARPS": 4, "BITS": 3, "num_warps": 4}
    launch = Launch(kernel, (7, 2), torch.device("cpu"), (torch.float16, torch.int32), (5, 6), constants)
    launch(32, 64)
    launch(96, 128)
    grid, (x, y, *integers), given = kernel.first[0]
    assert (grid, integers, given) == ((7, 2, 1), [5, 6], constants)
    assert [(p.data_ptr(), p.dtype) for p in (x, y)] == [(32, torch.float16), (64, torch.int32)]
    assert kernel.later == [((7, 2, 1), (96, 128, 5, 6, 3, 4))]
    assert len(kernel.first) == 1


def test_a_launch_of_clusters_only_compiles_first():
    """Without clusters its programs would wait for each other. Triton's launcher counts in clusters."""
    kernel = Recorder()
    launch = Launch(kernel, (12, 1), torch.device("cpu"), (torch.float16, torch.int32), (5, 6), {"WARPS": 4, "BITS": 3}, 4)
    launch(32, 64)
    launch(96, 128)
    assert kernel.later == [((3, 1, 1), (4, 4, 1000), (x, y, 5, 6, 3, 4)) for x, y in ((32, 64), (96, 128))]
    assert len(kernel.first) == 1


@pytest.mark.parametrize(("told", "known"), [(None, True), ((8, 2, 1000, 0), False), ((2, 8, 1000), False)])
def test_clusters_are_launched_where_triton_tells_its_launcher_of_them_as_known(monkeypatch, told, known):
    """The Triton that is installed does. Where one does not, no plan has clusters, and products are made without."""
    compiler = pytest.importorskip("triton.backends.nvidia.compiler", reason="no Triton")
    from spqr_kernels import gemm_plan, launch

    if told is not None:
        monkeypatch.setattr(compiler.CUDABackend, "pack_metadata", lambda self, metadata: told)
    launch.has_clusters.cache_clear()
    try:
        assert launch.has_clusters() is known
        assert (gemm_plan.plan_for(512, [256], 16, 132, True).cluster > 1) is known
    finally:
        launch.has_clusters.cache_clear()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_addresses_are_those_of_the_stored_tensors(layout):
    whole = torch.zeros(joined.length(layout), dtype=torch.int32)
    views = joined.split(whole, layout)
    found = addresses(joined.Joined(whole, layout), layout)
    assert found == [views[leaf].data_ptr() if leaf in views else whole.data_ptr() for leaf in LEAVES]
    assert found == addresses(views, layout)
    assert all(address % 16 == whole.data_ptr() % 16 for address in found)


@pytest.fixture
def hopper(monkeypatch):
    pytest.importorskip("triton", reason="no Triton")
    from spqr_kernels import overlap

    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    overlap.options.cache_clear()
    yield
    overlap.options.cache_clear()


def complete(launch: Launch) -> None:
    """A value for every argument, in the signature's order, and nothing that is neither an argument nor an option."""
    names = launch.kernel.arg_names
    places = len(launch.dtypes) + len(launch.integers)
    assert set(names[places:]) == launch.constants.keys() - OPTIONS
    assert not set(names[:places]) & launch.constants.keys()
    assert all(isinstance(number, int) and not isinstance(number, bool) for number in launch.integers)
    annotated = [p.name for p in launch.kernel.params if p.is_constexpr]
    assert names[places:] == annotated


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_kernel_is_given_all_of_its_arguments(hopper, layout, dtype):
    from spqr_kernels import decode, expert_batches, gemm, grouped, matvec, outliers, pair_outliers, siblings, small

    shape, entries = outliers.without_outliers(layout)
    for bias in (None, torch.float32):
        complete(matvec.launch_for.__wrapped__(layout, dtype, bias, GPU, True))
        for batch in (1, 8, 33, 64):
            complete(decode._launch.__wrapped__(shape, entries, batch, dtype, bias, GPU))
        all_launches = [
            gemm._launches.__wrapped__(shape, entries, batch, dtype, bias, GPU, batch != 17)
            for batch in (17, 32, 33, 64, 65, 300, 1024)
        ]
        all_launches += [
            small._launches.__wrapped__(*small._without_outliers(layout), batch, dtype, bias, GPU, batch != 8)
            for batch in (2, 7, 8, 9, 16)
        ]
        other = Layout(**{**layout.as_dict(), "out_features": layout.out_features + 17})
        for layouts in ((layout, other), (other, layout, layout)):
            complete(siblings.row_launch.__wrapped__((layouts[0], layouts[1].with_outliers(0), *layouts[2:]), dtype, bias, GPU))
            shapes, kept, most = siblings.alike.__wrapped__(layouts)
            all_launches += [siblings._few_rows.__wrapped__(shapes, kept, batch, dtype, bias, GPU) for batch in (2, 9)]
            all_launches += [siblings._many_rows.__wrapped__(shapes, most, batch, dtype, bias, GPU) for batch in (17, 300)]
        for launches in all_launches:
            for launch in launches:
                if isinstance(launch, Launch):
                    complete(launch)
    kept = small.outliers_of_a_chunk(layout)
    for width in (8, 16, 32, 64, 128, 256):
        launches = expert_batches._launches.__wrapped__(layout, kept, entries, 8, 2, 20, width, dtype, GPU)
        for launch in launches:
            if launch is not None:
                complete(launch)
    complete(grouped._experts.__wrapped__(shape, pair_outliers.entries(layout), 8, 2, 6, 3, dtype, GPU))


def test_what_was_not_joined_does_not_overlap(hopper):
    """A kernel that has just made one of the tensors need not have ended."""
    from spqr_kernels import gemm, matvec, small

    for joined_, overlaps in ((True, True), (False, False)):
        launch = matvec.launch_for.__wrapped__(LAYOUTS[0], torch.float16, None, GPU, joined_)
        few = small._launches.__wrapped__(LAYOUTS[0], 64, 8, torch.float16, None, GPU, joined_).product
        product = gemm._launches.__wrapped__(LAYOUTS[0], 1, 32, torch.float16, None, GPU, joined_).product
        wide = gemm._launches.__wrapped__(LAYOUTS[0], 1, 512, torch.float16, None, GPU, joined_).product
        found = [(it.constants["DEPENDENT"], it.constants["launch_pdl"]) for it in (launch, few, product, wide)]
        assert found == [(overlaps, overlaps)] * 4


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layers_that_differ_in_the_number_of_outliers_share_launches(layout):
    pytest.importorskip("triton", reason="no Triton")
    from spqr_kernels import outliers, pair_outliers

    shape, entries = outliers.without_outliers(layout)
    assert shape == layout.with_outliers(0)
    if not layout.outliers:
        assert entries == pair_outliers.entries(layout) == 0
        return
    fewer = layout.with_outliers(layout.outliers - 1)
    assert entries == outliers.outliers_a_lane(layout)
    assert outliers.without_outliers(fewer) == (shape, entries)
    assert pair_outliers.entries(fewer) == pair_outliers.entries(layout) > 0


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_small_batches_copy_nearly_all_outliers_of_a_chunk(layout):
    pytest.importorskip("triton", reason="no Triton")
    from spqr_kernels import small

    shape, kept = small._without_outliers(layout)
    assert shape == layout.with_outliers(0)
    if not layout.outliers:
        assert kept == 0
        return
    assert small._without_outliers(layout.with_outliers(layout.outliers - 1)) == (shape, kept)
    rng = np.random.default_rng(0)
    chunks = layout.tile_rows * (layout.blocks // 16)
    in_each = np.bincount(rng.integers(chunks, size=layout.outliers), minlength=chunks)
    assert (in_each > kept).mean() < 0.01


@pytest.mark.parametrize("batch", [8, 16])
@pytest.mark.parametrize("shape", [(16, 256), (48, 768), (4096, 11008), (28672, 8192)], ids=str)
def test_small_batches_share_all_chunks_evenly(hopper, shape, batch):
    from spqr_kernels import small

    layout = Layout(*shape)
    choice = small.choice_for(batch, True, shape[0] * shape[1] >= 8192 * 8192)
    launches = small._launches.__wrapped__(*small._without_outliers(layout), batch, torch.float16, None, GPU, True)
    product, width = launches.product, 16 * choice.warps * choice.tall
    programs = product.grid[0]
    base, extra = product.integers[-2:]
    pieces = -(-layout.out_features // width)
    assert 0 <= extra < programs <= 132 * choice.resident
    assert programs * base + extra == pieces * (layout.in_features // 256)
    assert programs == 1 or base >= choice.least
    assert launches.parts >= programs * (2 * width * batch + 2)  # two parts, and a flag of 8 bytes


@pytest.mark.parametrize("tiles", [1, 255, 256, 700, 5000])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.0005, 0.01, 0.05])
@pytest.mark.parametrize("kind", [{"weight_bits": bits, "group_size": 16} for bits in (2, 3, 4)], ids=str)
def test_a_program_of_one_row_has_room_and_a_pair_of_chunks_for_each_warp(kind, share, permuted, tiles):
    pytest.importorskip("triton", reason="no Triton")
    from spqr_kernels import matvec, pair_outliers, ring

    for chunks in (1, 2, 3, 16, 43, 112):
        layout = Layout(16 * tiles, 256 * chunks, permuted=permuted, outliers=int(share * 4096 * tiles * chunks), **kind)
        entries = pair_outliers.entries(layout)
        constants = matvec.row_constants(layout, entries, tiles, torch.float16)
        warps = constants["WARPS"]
        own = ring.warp_bytes(layout.weight_bits, True, entries, permuted and entries > 0)
        assert warps * own + ring.ZEROS_BYTES < 48 * 1024  # more than a kernel may declare
        assert warps == 1 or 2 * (warps - 1) < chunks, "a warp that has nothing to do"
        assert constants["WHOLE"] == (chunks % (2 * warps) == 0)
