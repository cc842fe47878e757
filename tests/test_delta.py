"""backends/delta.py and backends/delta_gather.py: changes are found, coded and merged exactly.

What the engine makes of them is in test_in_place.py, whole runs are in test_delta_runs.py, layouts
in test_layouts.py. Not covered: GPUs.
"""

from types import SimpleNamespace

import pytest
import torch

from backends import delta, delta_gather
from backends.huggingface.names import Rule

DTYPES = [torch.float8_e4m3fn, torch.bfloat16, torch.float32]


def random(shape, dtype, seed=0) -> torch.Tensor:
    """Random bytes: every pattern, NaN too."""
    generator = torch.Generator().manual_seed(seed)
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    flat = torch.randint(256, (nbytes,), generator=generator, dtype=torch.uint8)
    return flat.view(dtype).view(shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# --- coding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "positions",
    [
        [],
        [0],
        [0, 1, 2, 3],
        [253, 254, 255, 256, 511, 512],  # gaps around what a byte holds
        [65533, 65534, 65535, 131070],
        [0, 3_000_000_000, 3_000_000_001],  # beyond 2^31
        [7, 5_000_000_000_000],
    ],
)
def test_what_is_coded_comes_back(positions, dtype):
    positions, values = torch.tensor(positions, dtype=torch.int64), random((len(positions),), dtype)
    coded = delta.encode(positions, values)
    assert delta.count(coded) == len(positions)
    got = delta.decode(coded, dtype)
    assert got[0].tolist() == positions.tolist() and same(got[1], values)


def test_positions_cost_a_byte_or_two():
    generator = torch.Generator().manual_seed(1)
    for share, most in ((0.01, 1.5), (0.0003, 2.3)):
        positions = (torch.rand(2_000_000, generator=generator) < share).nonzero().flatten()
        coded = delta.encode(positions, torch.zeros(len(positions), dtype=torch.uint8))
        assert (len(coded) - delta.HEAD_BYTES) / len(positions) - 1 < most


# --- what has changed -----------------------------------------------------------------------------


def merged(changes: delta.Changes, before: list) -> list[torch.Tensor]:
    """The tensors with the changes written into them, in the order of their names."""
    flat = torch.cat([delta.as_integers(tensor).flatten() for tensor in before])
    flat[changes.positions] = changes.values
    parts = flat.split(changes.sizes.tolist())
    return [part.view(x.dtype).view(x.shape) for part, x in zip(parts, before)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [64, 65, 71, 1001])
def test_changes_are_those_against_what_was_sent(dtype, n):
    sent, before = delta.Sent(), random((n,), dtype)
    assert sent.changes([("a", before)]) is None
    now = before.clone()
    places = sorted({0, n // 2, n - 1})
    delta.as_integers(now)[places] ^= 1
    for expected in (places, []):  # the second time nothing has changed
        changes = sent.changes([("a", now)])
        assert changes.positions.tolist() == expected
        assert same(changes.values.view(dtype), now[expected])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_may_begin_anywhere_in_its_parameter(monkeypatch, dtype):
    """The gate of a merged layer with an odd number of elements: up begins at no whole word."""
    monkeypatch.setattr(delta, "LAID_OUT_BYTES", 0)
    merged = random((2, 101), dtype)
    sent = delta.Sent()
    sent.changes([("up", merged[1])])
    delta.as_integers(merged)[1, 7] ^= 1
    assert sent.changes([("up", merged[1])]).positions.tolist() == [7]


@pytest.mark.parametrize("together", [0, 20, 2**20])
def test_tensors_that_are_compared_together_are_told_apart(monkeypatch, together):
    monkeypatch.setattr(delta, "LAID_OUT_BYTES", together)
    monkeypatch.setattr(delta, "MOST_BYTES", 1.0)
    shapes = {"a": (3,), "b": (2, 5), "c": (1,), "d": (40,), "e": (2,)}
    before = [random(shape, torch.uint8, i) for i, shape in enumerate(shapes.values())]
    now = [tensor.clone() for tensor in before]
    now[1][1, 4] ^= 1
    now[3][::7] ^= 1
    sent = delta.Sent()
    assert sent.changes(list(zip(shapes, before))) is None
    changes = sent.changes(list(zip(shapes, now)))
    assert changes.counts().tolist() == [0, 1, 0, 6, 0]
    assert all(map(same, merged(changes, before), now))
    chosen = torch.tensor([True, False, False, True, True])
    few = changes.only(chosen)
    assert few.names == ["a", "d", "e"] and few.counts().tolist() == [0, 6, 0]
    assert all(map(same, merged(few, [before[0], *before[3:]]), [now[0], *now[3:]]))


def test_an_update_that_has_not_ended_is_followed_by_a_whole_one():
    sent, named = delta.Sent(), [("a", torch.zeros(4))]
    assert sent.begin() == -1
    sent.changes(named)
    sent.version = 7
    assert sent.begin() == 7
    assert sent.begin() == -1 and sent.changes(named) is None


@pytest.mark.parametrize("names", ["a", "ab"])
def test_what_was_sent_is_a_copy(names):
    sent = delta.Sent()
    named = [(name, torch.zeros(99, dtype=torch.bfloat16)) for name in names]
    sent.changes(named)
    named[0][1][2] = 1.0
    assert sent.changes(named).positions.tolist() == [2]


def test_small_tensors_that_change_too_much_are_told_apart_at_once():
    sent = delta.Sent()
    named = [(name, torch.zeros(999, dtype=torch.uint8)) for name in "abc"]
    sent.changes(named)
    named[1][1][:] = 1
    named[2][1][5] = 1
    changes = sent.changes(named)
    assert changes.too_many.tolist() == [False, True, False]
    assert changes.positions.tolist() == [2 * 999 + 5]


@pytest.mark.parametrize("changed, is_whole", [(8, False), (9, True)])
def test_a_tensor_goes_whole_where_changes_have_more_than_a_quarter_of_its_bytes(changed, is_whole):
    """Of 100 bytes each change counts three: its own, and two for its position."""
    sent, weight = delta.Sent(), torch.zeros(100, dtype=torch.uint8)
    assert delta_gather.compare([("a", weight)], sent) == [("a", weight)]
    weight[:changed] = 1
    (entry, tensor), *more = delta_gather.compare([("a", weight)], sent)
    assert not more and entry == ("a" if is_whole else f"{delta.CHANGES}a")
    assert tensor.nbytes <= 1.01 * weight.nbytes + delta.HEAD_BYTES


@pytest.mark.parametrize("changed, is_few", [(2_000, True), (200_000, False)])
def test_no_positions_are_kept_of_what_goes_whole(monkeypatch, changed, is_few):
    """Changes of a large tensor are counted piece by piece; beyond the bound nobody needs them."""
    monkeypatch.setitem(delta.PIECE_BYTES, "cpu", 2**16)
    monkeypatch.setattr(delta, "LAID_OUT_BYTES", 2**10)
    sent, weight = delta.Sent(), torch.zeros(2**20, dtype=torch.uint8)
    sent.changes([("a", weight)])
    weight[-changed:] = 1
    changes = sent.changes([("a", weight)])
    first = 2**20 - changed if is_few else 2**20
    assert torch.equal(changes.positions, torch.arange(first, 2**20))
    assert changes.are_few(changes.counts_of_all()).tolist() == [is_few]
    assert changes.are_few(changes.counts_of_all(), shards=64).tolist() == [is_few]
    again = sent.changes([("a", weight)])  # it is kept as it was sent
    assert not len(again.positions) and not again.too_many.any()


@pytest.mark.parametrize("changed, entries", [(0, []), (1, ["a"])])
def test_changes_of_a_tiny_tensor_are_longer_than_it_is(changed, entries):
    """A scale of one block: the head of the coded changes alone has 18 bytes."""
    sent, scale = delta.Sent(), torch.zeros(12, dtype=torch.uint8)
    delta_gather.compare([("a", scale)], sent)
    scale[:changed] = 1
    assert [name for name, _ in delta_gather.compare([("a", scale)], sent)] == entries


def test_what_has_not_changed_is_not_named():
    sent = delta.Sent()
    named = [(name, torch.zeros(100, dtype=torch.uint8)) for name in "abc"]
    delta_gather.compare(named, sent)
    assert delta_gather.compare(named, sent) == []
    named[1][1][7] = 1
    ((entry, _),) = delta_gather.compare(named, sent)
    assert delta.names_in(entry) == ["b"]


@pytest.mark.parametrize("rows, vocab", [(8, None), (8, 7)])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("copies", [1, 2])
def test_changes_of_shards_become_those_of_the_tensors(monkeypatch, dim, rows, vocab, copies):
    """vocab: of 8 rows the last pads the vocabulary, and does not exist in the whole tensor.

    copies: as of experts, ranks 0 and 1 hold one tensor, and 2 and 3 another.
    """
    if vocab and dim == 1:
        pytest.skip("a vocabulary is split by rows")
    monkeypatch.setattr(delta, "MOST_BYTES", 10.0)  # however much has changed
    names = ["lm_head.weight"] if vocab else [f"{i}" for i in range(copies)]
    befores = [random((rows, 6), torch.bfloat16, seed) for seed in range(copies)]
    nows = [random((rows, 6), torch.bfloat16, seed + 10) for seed in range(copies)]
    parts = []
    for before, now in list(zip(befores, nows))[: len(names)]:
        now[::2] = before[::2]
        for old, new in zip(before.chunk(2, dim), now.chunk(2, dim)):
            sent = delta.Sent()
            sent.changes([("first", torch.zeros(3).bfloat16()), ("a", old)])
            parts.append(sent.changes([("first", torch.ones(3).bfloat16()), ("a", new)]))
    shards = [
        SimpleNamespace(names=names, rule=Rule(("a",), tp_dim=dim), local=tensor)
        for tensor in (torch.zeros(3, 1), befores[0].chunk(2, dim)[0])
    ]
    if vocab:
        shards[0].names = ["first"]
    changes = delta_gather._merge(parts, shards, 2, vocab)
    wholes = [before[:vocab].clone().contiguous() for before in befores][: len(names)]
    firsts = [torch.zeros(6).bfloat16() for _ in names]
    got = merged(changes, [*firsts, *wholes])[len(names) :]
    assert all(map(same, got, (now[:vocab] for now in nows)))
    assert (changes.positions.diff() > 0).all()
