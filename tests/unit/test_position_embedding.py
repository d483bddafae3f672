"""The sine table against its formula, and the cache of tables."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mpformer_hf.position_embedding import MAX_CACHED_TABLES, cache_table, sine_position_embedding

CPU = torch.device("cpu")


def embed_by_formula(height: int, width: int, num_channels: int) -> torch.Tensor:
    """DETR's embedding, number by number: (height * width, num_channels)."""
    half = num_channels // 2
    table = []
    for row in range(height):
        for column in range(width):
            cell = []
            for index, length in ((row, height), (column, width)):
                position = (index + 1) / (length + 1e-6) * 2 * math.pi
                for channel in range(half):
                    angle = position / 10000 ** (2 * (channel // 2) / half)
                    cell.append(math.sin(angle) if channel % 2 == 0 else math.cos(angle))
            table.append(cell)
    return torch.tensor(table, dtype=torch.float64)


@pytest.mark.parametrize(("height", "width", "num_channels"), [(3, 5, 16), (1, 1, 4), (7, 2, 12), (25, 34, 256)])
def test_table_follows_the_formula(height: int, width: int, num_channels: int):
    table = sine_position_embedding(height, width, num_channels, torch.float32, CPU)
    assert table.shape == (height * width, num_channels)
    torch.testing.assert_close(table.double(), embed_by_formula(height, width, num_channels), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tables_are_rounded_float32_tables(dtype: torch.dtype):
    exact = sine_position_embedding(6, 9, 32, torch.float32, CPU)
    assert torch.equal(sine_position_embedding(6, 9, 32, dtype, CPU), exact.to(dtype))


def test_the_same_shape_gives_the_same_object():
    first = sine_position_embedding(4, 6, 8, torch.float32, CPU)
    assert sine_position_embedding(4, 6, 8, torch.float32, CPU) is first


def test_height_width_channels_and_type_have_tables_of_their_own():
    table = sine_position_embedding(4, 6, 8, torch.float32, CPU)
    assert not torch.equal(sine_position_embedding(6, 4, 8, torch.float32, CPU), table)
    assert sine_position_embedding(4, 6, 16, torch.float32, CPU).shape == (24, 16)
    assert sine_position_embedding(4, 6, 8, torch.bfloat16, CPU).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------ the cache


@pytest.fixture
def counted_table():
    """A cached function of one number and the list of the numbers it was computed for."""
    computed: list[int] = []

    @cache_table
    def table(number: int) -> torch.Tensor:
        computed.append(number)
        return torch.full((2,), float(number))

    return table, computed


def test_only_the_last_eight_tables_are_kept(counted_table):
    table, computed = counted_table
    for number in range(MAX_CACHED_TABLES + 1):
        table(number)
    assert MAX_CACHED_TABLES == 8
    table(MAX_CACHED_TABLES)  # still there
    table(1)
    assert computed == list(range(9))
    table(0)  # pushed out by the ninth
    assert computed == [*range(9), 0]


def test_nothing_is_cached_while_compiling(counted_table, monkeypatch: pytest.MonkeyPatch):
    table, computed = counted_table
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    table(1)
    table(1)
    monkeypatch.undo()
    table(1)
    assert computed == [1, 1, 1]


def test_a_compiled_function_makes_its_own_table():
    def add_table(cells: torch.Tensor) -> torch.Tensor:
        return cells + sine_position_embedding(3, 4, 8, cells.dtype, cells.device)

    cells = torch.randn(12, 8)
    compiled = torch.compile(add_table, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(cells), add_table(cells), rtol=0, atol=1e-6)


def test_a_table_made_in_inference_mode_can_be_used_in_training():
    with torch.inference_mode():
        table = sine_position_embedding(11, 13, 8, torch.float32, CPU)
    assert sine_position_embedding(11, 13, 8, torch.float32, CPU) is table  # the test is about the cached one
    weight = torch.ones(8, requires_grad=True)
    (weight * table).sum().backward()  # saves the table for backward, which an inference tensor refuses
    torch.testing.assert_close(weight.grad, table.sum(0))


def test_tables_carry_no_graph():
    learnable = torch.ones((), requires_grad=True)
    cached = cache_table(lambda number: learnable * number)
    assert not cached(2).requires_grad


def test_fake_tensors_are_not_cached():
    with FakeTensorMode():
        fake = sine_position_embedding(17, 3, 8, torch.float32, CPU)
    assert isinstance(fake, FakeTensor)
    real = sine_position_embedding(17, 3, 8, torch.float32, CPU)
    assert type(real) is torch.Tensor
    torch.testing.assert_close(real.double(), embed_by_formula(17, 3, 8), rtol=0, atol=2e-6)


def test_an_error_in_the_function_reaches_the_caller():
    def broken(number: int) -> torch.Tensor:
        raise ValueError(number)

    with pytest.raises(ValueError, match="7"):
        cache_table(broken)(7)
