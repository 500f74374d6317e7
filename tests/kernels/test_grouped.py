"""Several matrices and one x: the operator, what torch.compile makes of single products, and the kernel."""

from __future__ import annotations

import itertools

import pytest
import torch

from spqr_format import SpqrError
from spqr_kernels import experts, joined, ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Rows of each matrix, and their columns. Tiles of 768 and of few, the last one not full; chunks even and odd.
SIZES = [((4096, 1024, 1024), 512), ((688, 688), 1280), ((48, 40, 17), 256), ((3, 5), 768), ((16, 33), 130)]
KINDS = [
    {"weight_bits": 3, "statistics": "bilevel"},
    {"weight_bits": 3, "statistics": "bilevel", "outliers": 0.0},
    {"weight_bits": 2, "statistics": "bilevel", "outliers": 0.02},
    {"weight_bits": 4, "statistics": "direct", "group_size": 128},
]
BOUND = {torch.float16: 1e-3, torch.bfloat16: 4e-3}


def matrices(random_matrix, rows, columns, kind, device, all_alike=False):
    """Layout, joined tensor and dense weight in float64 of each. The second one has no outliers, unless all are alike."""
    found = []
    for index, out in enumerate(rows):
        other = {"outliers": 0.0} if index == 1 and not all_alike else {}
        matrix = random_matrix(out, columns, seed=index, **kind | other)
        stored = {leaf: torch.from_numpy(tensor.copy()) for leaf, tensor in matrix.pack().items()}
        whole = joined.join(stored, matrix.layout).to(device)
        found.append((matrix.layout, whole, torch.from_numpy(matrix.dequantize()).double()))
    return found


def geometry(found):
    return [int(number) for layout, _, _ in found for number in ops.geometry(layout)]


def relative_error(y, expected):
    assert torch.isfinite(y).all()
    return ((y.double().cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
@pytest.mark.parametrize("device", DEVICES)
def test_products_of_one_x_match_float64(random_matrix, device, kind):
    for (rows, columns), all_alike in itertools.product(SIZES, (False, True)):
        found = matrices(random_matrix, rows, columns, kind, device, all_alike)
        for dtype, batch, biased in [
            (torch.float16, 1, False), (torch.bfloat16, 1, True), (torch.float16, 2, True), (torch.bfloat16, 16, False),
            (torch.float16, 20, False), (torch.float16, 130, True),
        ]:  # fmt: skip
            x = torch.randn(batch, 1, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
            biases = [torch.randn(out).to(dtype) for out in rows] if biased else []
            given = [bias.to(device) for bias in biases]
            results = torch.ops.spqr.linears(x.to(device), given, [whole for _, whole, _ in found], geometry(found))
            assert len(results) == len(rows)
            for index, y in enumerate(results):
                expected = x.double() @ found[index][2].T + (biases[index].double() if biased else 0)
                assert y.shape == (batch, 1, rows[index])
                assert y.dtype == dtype
                assert relative_error(y, expected) < BOUND[dtype], (rows, dtype, batch, index)
            again = torch.ops.spqr.linears(x.to(device), given, [whole for _, whole, _ in found], geometry(found))
            assert all(torch.equal(y, other) for y, other in zip(results, again, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_matrices_that_are_not_alike_are_multiplied_too(random_matrix, device):
    found = matrices(random_matrix, (48, 48), 256, KINDS[0], device)[:1]
    found += matrices(random_matrix, (32, 48), 256, KINDS[3], device)[:1]
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(1)).half()
    results = torch.ops.spqr.linears(x.to(device), [], [whole for _, whole, _ in found], geometry(found))
    for y, (_, _, exact) in zip(results, found, strict=True):
        assert relative_error(y, x.double() @ exact.T) < BOUND[torch.float16]


def test_operands_that_do_not_fit_are_refused(random_matrix):
    found = matrices(random_matrix, (48, 40), 256, KINDS[0], "cpu")
    x, stored = torch.randn(1, 256), [whole for _, whole, _ in found]
    for wrong in (
        (x, [], stored[:1], geometry(found)),
        (x, [torch.zeros(48)], stored, geometry(found)),
        (x, [torch.zeros(40), torch.zeros(48)], stored, geometry(found)),
        (x, [], stored[::-1], geometry(found)),
        (x[:, :-1], [], stored, geometry(found)),
    ):
        with pytest.raises(SpqrError, match="E509"):
            torch.ops.spqr.linears(*wrong)


class Family(torch.nn.Module):
    """Products of single matrices: three of x, one of what the first gives, one of x again."""

    def __init__(self, found, device):
        super().__init__()
        self.whole = torch.nn.ParameterList([torch.nn.Parameter(whole, requires_grad=False) for _, whole, _ in found])
        self.geometry = [ops.geometry(layout) for layout, _, _ in found]
        self.bias = torch.nn.Parameter(torch.ones(found[0][0].out_features, device=device).half())

    def product(self, x, index, bias=None):
        return torch.ops.spqr.linear_forward(x, bias, [self.whole[index]], *self.geometry[index])

    def forward(self, x, times):
        first, second = self.product(x, 0), self.product(x, 1)
        inner = self.product(first.relu(), 3)
        return first, second * times, self.product(x * 2, 2), inner, self.product(x, 2), self.product(x, 0, self.bias)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 3])
def test_torch_compile_merges_the_products_of_one_x(random_matrix, device, rows, monkeypatch):
    found = matrices(random_matrix, (256, 48, 17), 256, KINDS[0], device)
    found += matrices(random_matrix, (64,), 256, KINDS[0], device)
    model = Family(found, device)
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(3)).half().to(device)
    with torch.no_grad():
        expected = model(x, 2.0)
        compiled = torch.compile(model, fullgraph=True)
        compiled(x, 2.0)
        with torch.profiler.profile() as profile:
            results = compiled(x, 2.0)
    for y, target in zip(results, expected, strict=True):
        torch.testing.assert_close(y, target, rtol=2e-3, atol=2e-3)
    calls = {event.key: event.count for event in profile.key_averages() if event.key.startswith("spqr::")}
    # x: with 0, 1 and 2 in one; 3 and 2 have an x of their own, and 0 with a bias is of another kind
    assert calls == {"spqr::linears": 1, "spqr::linear_forward": 3}


def test_rows_that_a_mask_chose_compile(random_matrix):
    found = matrices(random_matrix, (256, 48, 17, 64), 256, KINDS[0], "cpu")
    model = Family(found, "cpu")
    x, mask = torch.randn(3, 256).half(), torch.tensor([False, True, False])
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(lambda x, mask: model(x[mask], 2.0), fullgraph=True)
        results = compiled(x, mask)
        for y, target in zip(results, model(x[mask], 2.0), strict=True):
            torch.testing.assert_close(y, target, rtol=2e-3, atol=2e-3)


def test_opcheck(random_matrix):
    found = matrices(random_matrix, (48, 40), 256, KINDS[0], "cpu")
    stored = [whole for _, whole, _ in found]
    torch.library.opcheck(torch.ops.spqr.linears, (torch.randn(1, 256), [], stored, geometry(found)))
    torch.library.opcheck(torch.ops.spqr.linear_forward, (torch.randn(1, 256), None, stored[:1], *ops.geometry(found[0][0])))


# Experts

EXPERT_KINDS = [  # of expert 0, 1, ...: equal, or differing in what the table is for
    [{"outliers": 0.01}, {"outliers": 0.03}, {"outliers": 0.0}, {"outliers": 0.002}],
    [{"outliers": 0.0}] * 4,
    [
        {},
        {"weight_bits": 2},
        {"weight_bits": 4, "outliers": 0.0},
        {"weight_bits": 4, "statistics": "direct", "group_size": 128},
    ],
]


def pool(random_matrix, kinds, parts, out, columns, device):
    """stored, tables, geometry, and the dense weights in float64 [experts][parts]."""
    found = [[random_matrix(out, columns, seed=10 * e + p, **kind) for p in range(parts)] for e, kind in enumerate(kinds)]
    layouts = [[matrix.layout for matrix in its] for its in found]
    begins, end = experts.arrange(layouts)
    stored = torch.zeros(end, dtype=torch.int32)
    for its, places in zip(found, begins, strict=True):
        for matrix, begin in zip(its, places, strict=True):
            tensors = {leaf: torch.from_numpy(tensor.copy()) for leaf, tensor in matrix.pack().items()}
            whole = joined.join(tensors, matrix.layout)
            stored[begin : begin + len(whole)] = whole
    made = experts.tables(layouts, begins)
    numbers = [int(number) for table in made for number in ops.geometry(table.layout)]
    dense = [[torch.from_numpy(matrix.dequantize()).double() for matrix in its] for its in found]
    return stored.to(device), [table.begins.to(device) for table in made], numbers, dense


@pytest.mark.parametrize("kinds", EXPERT_KINDS, ids=["outliers", "none", "kinds"])
@pytest.mark.parametrize("device", DEVICES)
def test_experts_match_float64(random_matrix, device, kinds):
    for parts, out, columns, rows, chosen in ((2, 48, 256, 1, 2), (1, 40, 768, 3, 1), (2, 17, 512, 5, 4), (1, 33, 250, 2, 2)):
        stored, tables, numbers, dense = pool(random_matrix, kinds, parts, out, columns, device)
        generator = torch.Generator().manual_seed(rows)
        for dtype in (torch.float16, torch.bfloat16):
            x = torch.randn(rows, columns, generator=generator).to(dtype)
            ids = torch.stack([torch.randperm(4, generator=generator)[:chosen] for _ in range(rows)]).reshape(-1)
            y = torch.ops.spqr.experts(x.to(device), ids.to(device), stored, tables, numbers)
            expected = torch.stack(
                [
                    torch.cat([weight @ x[pair // chosen].double() for weight in dense[expert]])
                    for pair, expert in enumerate(ids)
                ]
            )
            assert y.shape == (rows * chosen, parts * out)
            assert relative_error(y, expected) < BOUND[dtype], (parts, out, dtype)
            again = torch.ops.spqr.experts(x.to(device), ids.to(device), stored, tables, numbers)
            assert torch.equal(again, y)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
def test_an_id_that_is_no_expert_gives_nan_where_the_host_does_not_see_it(random_matrix, device):
    stored, tables, numbers, _ = pool(random_matrix, EXPERT_KINDS[2], 2, 40, 256, device)
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(1)).half().to(device)
    right = torch.ops.spqr.experts(x, torch.tensor([0, 1, 2, 3], device=device), stored, tables, numbers)
    y = torch.ops.spqr.experts(x, torch.tensor([0, 4, -1, 3], device=device), stored, tables, numbers)
    assert y[1:3].isnan().all()
    assert torch.equal(y[[0, 3]], right[[0, 3]])


def test_no_rows_and_operands_that_do_not_fit(random_matrix):
    stored, tables, numbers, _ = pool(random_matrix, EXPERT_KINDS[0], 2, 48, 256, "cpu")
    x, ids = torch.randn(2, 256), torch.tensor([0, 1, 2, 3])
    assert torch.ops.spqr.experts(x[:0], ids[:0], stored, tables, numbers).shape == (0, 96)
    for wrong in (
        (x, ids[:3], stored, tables, numbers),
        (x[:0], ids, stored, tables, numbers),
        (x, ids - 1, stored, tables, numbers),
        (x, ids + 1, stored, tables, numbers),
        (x, ids, stored, [table.transpose(0, 1).contiguous().transpose(0, 1) for table in tables], numbers),
        (x, ids.int(), stored, tables, numbers),
        (x[:, :-1], ids, stored, tables, numbers),
        (x, ids, stored.long(), tables, numbers),
        (x, ids, stored, [tables[0].int()], numbers),
        (x, ids, stored, [], []),
        (x, ids, stored, [*tables, *tables], numbers),
    ):
        with pytest.raises(SpqrError, match="E509"):
            torch.ops.spqr.experts(*wrong)


def test_the_experts_operator_passes_opcheck(random_matrix):
    stored, tables, numbers, _ = pool(random_matrix, EXPERT_KINDS[2], 2, 48, 256, "cpu")
    torch.library.opcheck(torch.ops.spqr.experts, (torch.randn(2, 256), torch.tensor([0, 1, 2, 3]), stored, tables, numbers))
