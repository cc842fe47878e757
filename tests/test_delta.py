"""backends/delta.py and backends/sglang/in_place.py: changes are coded, merged and written exactly.

The whole path, in real runs, is in test_loop_sync.py and test_layouts.py. Not covered: GPUs.
"""

from types import SimpleNamespace

import pytest
import torch

from backends import delta, delta_gather
from backends.huggingface.names import Rule
from backends.sglang import buckets, in_place
from fp8_quant import quantize_blockwise

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
    assert len(changes.positions) == (changed if is_few else 0)
    assert changes.are_few(changes.counts_of_all()).tolist() == [is_few]
    assert changes.are_few(changes.counts_of_all(), shards=64).tolist() == [is_few]
    assert not len(sent.changes([("a", weight)]).positions)  # it is kept as it was sent


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


# --- in the engine --------------------------------------------------------------------------------


class Merged(torch.nn.Module):
    """As an engine's rank 1 of 2 holds it: q above k in one layer, each rank its own half."""

    def __init__(self):
        super().__init__()
        zeros = torch.zeros(4, 60, dtype=torch.bfloat16).to(torch.float8_e4m3fn)
        self.qk = torch.nn.Parameter(zeros, requires_grad=False)
        self.down = torch.nn.Parameter(torch.zeros(4, 30, dtype=torch.bfloat16))
        self.norm = torch.nn.Parameter(torch.zeros(60, dtype=torch.float32))
        self.scaled = torch.nn.Parameter(torch.zeros(60, dtype=torch.bfloat16))
        self.loaded = []

    def load_weights(self, named):
        for name, tensor in named:
            self.loaded.append(name)
            if name in "qk":
                at = "qk".index(name) * 2
                self.qk.data[at : at + 2].copy_(tensor.narrow(0, 2, 2))
            elif name == "down":
                self.down.data.copy_(tensor.narrow(1, 30, 30))
            elif name == "norm":
                self.norm.data.copy_(tensor)
            else:
                self.scaled.data.copy_(tensor * 2)  # no copy of what came


SHAPES = {"q": (4, 60), "k": (4, 60), "down": (4, 60), "norm": (60,), "scaled": (60,)}


def tensors(seed: int) -> list:
    fp8 = torch.float8_e4m3fn
    return [
        (name, torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)).bfloat16().to(
            fp8 if name in "qk" else torch.bfloat16
        ))
        for i, (name, shape) in enumerate(SHAPES.items())
    ]  # fmt: skip


def test_changes_land_where_the_whole_tensor_did(monkeypatch):
    monkeypatch.setattr(delta, "MOST_BYTES", 1.0)
    engine, expected = Merged(), Merged()
    places, sent = in_place.places_of(engine), delta.Sent()
    places.begin(0, base=-1)
    places.load_whole(engine, tensors(1))
    delta_gather.compare(tensors(1), sent)
    engine.loaded.clear()
    places.begin(1, base=0)
    nudged = [(name, tensor.clone()) for name, tensor in tensors(1)]
    for (_, tensor), (_, other) in zip(nudged, tensors(2)):
        as_integers, every = delta.as_integers, slice(1, None, 4)
        as_integers(tensor).view(-1)[every] = as_integers(other).view(-1)[every]
    for entry, coded in delta_gather.compare(nudged, sent):
        places.write_changes(engine, delta.names_in(entry), coded)
    expected.load_weights(nudged)
    assert engine.loaded == ["scaled"]  # the only one that is not held as it came
    for (name, held), (_, right) in zip(engine.named_parameters(), expected.named_parameters()):
        assert same(held.data, right.data), name


class Loads(torch.nn.Module):
    """Holds one tensor of 16 x 96, written as `load` says: load(parameter, tensor)."""

    def __init__(self, load, shape=(16, 96)):
        super().__init__()
        self.held = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
        self.load = load

    def load_weights(self, named):
        for _, tensor in named:
            self.load(self.held.data, tensor)


def in_halves(held, tensor):
    held[:8].copy_(tensor[:8])
    held[8:].copy_(tensor[8:].float().bfloat16())  # no box of what came


def through_a_buffer(held, tensor):
    held.copy_(torch.empty_like(tensor).copy_(tensor) * 1)


@pytest.mark.parametrize(
    "load, shape, is_kept",
    [
        (lambda held, tensor: held.copy_(tensor), (16, 96), False),
        (
            lambda held, tensor: held.copy_(tensor.t()),
            (96, 16),
            False,
        ),  # as triton_kernel's experts
        (lambda held, x: held.copy_(x.view(4, 4, 96).transpose(0, 1)), (4, 4, 96), False),
        (lambda held, tensor: held.t().copy_(tensor.t()), (16, 96), False),
        (in_halves, (16, 96), True),
        (through_a_buffer, (16, 96), True),
        (lambda held, tensor: held.index_copy_(0, torch.arange(16), tensor), (16, 96), True),
        (lambda held, tensor: held.copy_(tensor[3]), (16, 96), True),
        (lambda held, tensor: held.copy_(tensor[3].expand(16, 96)), (16, 96), True),
    ],
)
def test_what_no_loader_says_plainly_is_loaded_whole(load, shape, is_kept):
    """A tensor whose writes were not copies of its boxes is kept, and loaded when it changes."""
    engine, expected, sent = Loads(load, shape), Loads(load, shape), delta.Sent()
    weight = random((16, 96), torch.uint8).view(16, 96).to(torch.bfloat16)
    places = in_place.places_of(engine)
    places.begin(0, base=-1)
    places.load_whole(engine, delta_gather.compare([("a", weight)], sent))
    assert bool(places.kept) == is_kept
    weight.view(-1)[::50] += 1
    weight[3] += 1
    places.begin(1, base=0)
    for entry, coded in delta_gather.compare([("a", weight)], sent):
        places.write_changes(engine, delta.names_in(entry), coded)
    expected.load_weights([("a", weight)])
    assert same(engine.held.data, expected.held.data)


def test_without_changes_to_come_everything_counts_as_written():
    parameter = torch.zeros(2)
    in_place.Places().begin(1, base=-1)
    assert in_place.take_written(parameter) == []
    in_place.written_all()
    assert in_place.take_written(parameter) is None


def test_changes_of_another_version_are_refused():
    places = in_place.Places()
    places.begin(3, base=-1)
    places.begin(4, base=3)
    places.begin(4, base=3)  # the next bucket
    with pytest.raises(RuntimeError, match="holds version 4, and changes of version 3 came"):
        places.begin(5, base=3)


def test_a_version_has_one_base():
    places = in_place.Places()
    places.begin(3, base=-1)
    places.begin(4, base=3)
    for base in (2, 4):
        with pytest.raises(RuntimeError, match="send all of it"):
            places.begin(4, base=base)


def test_half_of_an_update_is_the_base_of_none():
    engine = Loads(lambda held, tensor: held.copy_(tensor))
    weight, sent = torch.zeros(16, 96, dtype=torch.bfloat16), delta.Sent()

    def load(named, base, version):
        header, flat = buckets.pack(named)
        header = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        message = [("header", header), ("bytes", flat), ("v", torch.tensor([base, version]))]
        buckets.load_bucket(engine, message)

    load(delta_gather.compare([("a", weight)], sent), -1, 0)
    weight[0, :9] += 1
    ((entry, coded),) = delta_gather.compare([("a", weight)], sent)
    with pytest.raises((RuntimeError, ValueError)):
        load([(entry, coded[:-3])], 0, 1)
    with pytest.raises(RuntimeError, match="send all of it"):
        load([(entry, coded)], 1, 2)


def test_changes_of_what_never_came_are_refused():
    with pytest.raises(RuntimeError, match="the whole tensor never did"):
        in_place.Places().write_changes(None, ["a"], torch.empty(0, dtype=torch.uint8))


# --- the emulation of FP8 on a CPU ----------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="backends/cpu is for machines without a GPU")
@pytest.mark.parametrize("experts", [None, 3])
@pytest.mark.parametrize("change", ["few codes", "a scale", "many codes"])
def test_fp32_copies_follow_the_codes(experts, change):
    from backends.cpu import sglang as cpu

    shape = (256, 130)
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    pairs = [quantize_blockwise(weight) for weight in weights]
    codes, scales = (torch.stack(list(x.view(torch.uint8) for x in xs)) for xs in zip(*pairs))
    codes = codes.view(torch.float8_e4m3fn)
    scales = torch.stack([scale for _, scale in pairs])
    if experts is None:
        codes, scales = codes[0].clone(), scales[0].clone()
    layer = SimpleNamespace(weight=codes, weight_scale_inv=scales)
    names = ["weight"] if experts is None else ["w13_weight", "w2_weight"]
    for name in names:
        setattr(layer, name, codes)
        setattr(layer, f"{name}_scale_inv", scales)
    held = cpu.dequantize(codes, scales)
    layer.__dict__["_dequantized"] = held if experts is None else [held, held.clone()]
    positions = torch.tensor([0, 129, codes.numel() - 1])
    if change == "many codes":
        positions = torch.arange(0, codes.numel(), 50)
    delta.as_integers(codes).view(-1)[positions] ^= 1
    in_place.WRITTEN.clear()
    in_place.WRITTEN[codes.untyped_storage().data_ptr()] = [positions]
    if change == "a scale":
        scales.view(-1)[0] *= 2
        in_place.WRITTEN[scales.untyped_storage().data_ptr()] = [torch.tensor([0])]
    cpu._update_dequantized(None, layer)
    if change != "few codes":  # all are made again when they are used
        assert "_dequantized" not in layer.__dict__
        return
    kept = layer.__dict__["_dequantized"]
    kept = kept if experts is None else kept[0]
    assert torch.equal(kept, cpu.dequantize(codes, scales))
