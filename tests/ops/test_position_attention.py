"""Axial relative attention against loops over positions, and the tables that follow the size of the map."""
import pytest
import torch
import torch.nn as nn

import timm_gsa
from timm_gsa.ops import column_attention, resize_relative_table, row_attention
from timm_gsa.ops.gsa.reference import column_attention as column_attention_reference

from ..gradients import outputs_and_gradients

SIZES = [(1, 1), (1, 6), (6, 1), (5, 3), (4, 4)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tensors(height: int, width: int, rows: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Query and value of two images, two heads, three query and four value channels, and a table."""
    generator = torch.Generator().manual_seed(height * 10 + width)
    shapes = [(2, 2, 3, height, width), (2, 2, 4, height, width), (rows, 3)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def column_loops(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    batch, heads, channels, height, width = query.shape
    out = torch.zeros_like(value)
    for b in range(batch):
        for h in range(heads):
            for x in range(height):
                for y in range(width):
                    for i in range(height):
                        offset = i - x  # the neighbour's row from here
                        score = sum(query[b, h, d, x, y] * table[offset + height - 1, d] for d in range(channels))
                        out[b, h, :, x, y] += score * value[b, h, :, i, y]
    return out


def row_loops(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    batch, heads, channels, height, width = query.shape
    out = torch.zeros_like(value)
    for b in range(batch):
        for h in range(heads):
            for x in range(height):
                for y in range(width):
                    for j in range(width):
                        offset = j - y
                        score = sum(query[b, h, d, x, y] * table[offset + width - 1, d] for d in range(channels))
                        out[b, h, :, x, y] += score * value[b, h, :, x, j]
    return out


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('function', [column_attention, column_attention_reference])
def test_column_step_equals_loops_over_positions(function, size):
    inputs = tensors(*size, rows=2 * size[0] - 1)
    torch.testing.assert_close(
        outputs_and_gradients(function, *inputs), outputs_and_gradients(column_loops, *inputs), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize('size', SIZES)
def test_row_step_equals_loops_over_positions(size):
    inputs = tensors(*size, rows=2 * size[1] - 1)
    torch.testing.assert_close(
        outputs_and_gradients(row_attention, *inputs),
        outputs_and_gradients(row_loops, *inputs),
        rtol=1e-11,
        atol=1e-12,
    )


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_column_step_equals_reference(dtype):
    inputs = tensors(9, 7, rows=17, dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-1
    ours, theirs = (outputs_and_gradients(f, *inputs) for f in (column_attention, column_attention_reference))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_takes_any_memory_layout():
    query, value, table = tensors(4, 6, rows=7)
    expected = column_attention(query, value, table)
    query, value = (x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) for x in (query, value))
    torch.testing.assert_close(column_attention(query, value, table.t().contiguous().t()), expected)


@pytest.mark.parametrize('rows', [6, 8, 9, 13])
def test_a_table_of_another_size_is_refused(rows):
    query, value, table = tensors(4, 5, rows=rows)
    for backend in ('auto', 'reference'):
        with pytest.raises(ValueError, match=rf'table must have 2 \* 4 - 1 = 7 rows .* got {rows}'), \
                timm_gsa.use_backend(backend):
            column_attention(query, value, table)
    if rows != 9:  # which fits the other axis
        with pytest.raises(ValueError, match=rf'table must have 2 \* 5 - 1 = 9 rows .* got {rows}'):
            row_attention(query, value, table)


# Tables of another size


def table_by_offset(length: int, channels: int = 3) -> torch.Tensor:
    """A smooth table: cosines of the offset in units of the whole axis."""
    offset = torch.linspace(-1., 1., 2 * length - 1, dtype=torch.float64) if length > 1 else torch.zeros(1).double()
    return torch.stack([torch.cos((k + 1) * offset + k) for k in range(channels)], dim=1)


def resize_loops(table: torch.Tensor, length: int) -> torch.Tensor:
    """Linear interpolation, one offset at a time, scaled by old / new length."""
    old = (len(table) + 1) // 2
    rows = []
    for offset in range(-(length - 1), length):
        source = offset * (old - 1) / (length - 1) if length > 1 else 0.
        below = int(source // 1)
        share = source - below
        row = (1. - share) * table[below + old - 1]
        if share > 0.:
            row = row + share * table[below + old]
        rows.append(row * old / length)
    return torch.stack(rows)


@pytest.mark.parametrize('old', [1, 2, 3, 7])
@pytest.mark.parametrize('new', [1, 2, 3, 5, 8])
def test_resizing_equals_interpolation_offset_by_offset(old, new):
    table = torch.randn(2 * old - 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(old))
    ours = outputs_and_gradients(lambda t: resize_relative_table(t, new), table)
    assert ours[0].shape == (2 * new - 1, 3)
    theirs = outputs_and_gradients(lambda t: resize_loops(t, new), table)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('table', [torch.randn(13, 4), nn.Parameter(torch.randn(1, 4)), torch.randn(5, 4).half()])
def test_resizing_to_the_same_size_returns_the_table_itself(table):
    assert resize_relative_table(table, (len(table) + 1) // 2) is table


@pytest.mark.parametrize('new', [2, 3, 6, 13, 40])
def test_resizing_keeps_the_centre_and_the_extremes(new):
    table = torch.randn(13, 4)
    resized = resize_relative_table(table, new) * (new / 7)
    torch.testing.assert_close(resized[[0, new - 1, -1]], table[[0, 6, -1]])


def test_a_new_axis_of_one_position_has_the_offset_zero_alone():
    table = torch.randn(13, 4)
    torch.testing.assert_close(resize_relative_table(table, 1), table[6:7] * 7)


def test_an_old_axis_of_one_position_lends_its_embedding_to_every_offset():
    table = torch.randn(1, 4)
    torch.testing.assert_close(resize_relative_table(table, 5), table.expand(9, 4) / 5)


@pytest.mark.parametrize('new', [20, 31, 32, 56])
def test_resizing_up_and_back_returns_close_to_a_smooth_table(new):
    table = table_by_offset(14)
    back = resize_relative_table(resize_relative_table(table, new), 14)
    torch.testing.assert_close(back, table, rtol=0., atol=1e-2)


@pytest.mark.parametrize('old, new', [(8, 16), (16, 8), (7, 10)])
def test_scaling_keeps_the_size_of_the_sum_over_an_axis(old, new):
    """A constant map gathered with a smooth table gives nearly the same at the middle, however fine the axis is cut."""
    def gathered(length: int, table: torch.Tensor) -> torch.Tensor:
        query = torch.ones(1, 1, 3, length, 1, dtype=torch.float64)
        value = torch.ones(1, 1, 1, length, 1, dtype=torch.float64)
        return column_attention(query, value, table).mean()

    table = table_by_offset(old)
    torch.testing.assert_close(
        gathered(new, resize_relative_table(table, new)), gathered(old, table), rtol=5e-2, atol=0.)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_resizing_keeps_the_dtype_and_rounds_once(dtype):
    table = torch.randn(13, 4).to(dtype)
    resized = resize_relative_table(table, 10)
    assert resized.dtype == dtype
    exact = resize_relative_table(table.double(), 10)
    torch.testing.assert_close(resized.double(), exact, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-5)


@pytest.mark.parametrize('layout', ['contiguous', 'slice', 'channels_last'])
@pytest.mark.parametrize('height, width', [(48, 40), (90, 33), (41, 150), (128, 1), (200, 2)])
def test_large_maps_agree_with_the_reference(height, width, layout):
    """Their logits are computed by blocks of columns and images."""
    def in_layout(function):
        def run(qkv, table):
            if layout == 'channels_last':
                qkv = qkv.flatten(1, 3).contiguous(memory_format=torch.channels_last).view_as(qkv)
            query, _, value = qkv.unbind(1)
            if layout == 'contiguous':
                query, value = query.contiguous(), value.contiguous()
            return function(query, value, table)
        return run

    inputs = (
        torch.randn(3, 3, 2, 3, height, width, dtype=torch.float64),
        torch.randn(2 * height - 1, 3, dtype=torch.float64),
    )
    ours, theirs = (
        outputs_and_gradients(in_layout(f), *inputs) for f in (column_attention, column_attention_reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(in_layout(column_attention)(*inputs), theirs[0].detach(), rtol=1e-9, atol=1e-9)


def test_large_maps_of_which_only_some_inputs_have_gradients():
    query, value, table = tensors(30, 25, rows=59)
    expected = outputs_and_gradients(column_attention_reference, query, value, table)[1:]
    for i, name in enumerate(('query', 'value', 'table')):
        grads = outputs_and_gradients(
            lambda x, name=name: column_attention(**{**dict(query=query, value=value, table=table), name: x}),
            (query, value, table)[i])
        torch.testing.assert_close(grads[1], expected[i])


def test_large_maps_have_gradients_of_gradients():
    query, value, table = (x.requires_grad_() for x in tensors(130, 1, rows=259))
    assert torch.autograd.gradgradcheck(column_attention, (query, value, table), fast_mode=True)


def test_large_maps_keep_no_logits_for_the_backward_pass():
    query, value, table = (x.requires_grad_() for x in tensors(64, 64, rows=127))
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x):
        row_attention(query, column_attention(query, value, table), table)
    assert max(x.untyped_storage().nbytes() for x in held) <= value.untyped_storage().nbytes()
