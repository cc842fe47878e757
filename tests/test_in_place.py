"""backends/sglang/in_place.py: changes are written where SGLang's loader put the whole tensor.

And the emulation of FP8 on a CPU follows them. Not covered: GPUs.
"""

from types import SimpleNamespace

import pytest
import torch
from test_delta import DTYPES, random, same

from backends import delta, delta_gather
from backends.sglang import buckets, in_place
from fp8_quant import quantize_blockwise

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


def load_bucket(engine, named, base: int, version: int) -> None:
    header, flat = buckets.pack(named)
    header = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    message = [("header", header), ("bytes", flat), ("v", torch.tensor([base, version]))]
    buckets.load_bucket(engine, message)


def test_half_of_an_update_is_the_base_of_none():
    engine = Loads(lambda held, tensor: held.copy_(tensor))
    weight, sent = torch.zeros(16, 96, dtype=torch.bfloat16), delta.Sent()
    load_bucket(engine, delta_gather.compare([("a", weight)], sent), -1, 0)
    weight[0, :9] += 1
    ((entry, coded),) = delta_gather.compare([("a", weight)], sent)
    with pytest.raises((RuntimeError, ValueError)):
        load_bucket(engine, [(entry, coded[:-3])], 0, 1)
    with pytest.raises(RuntimeError, match="send all of it"):
        load_bucket(engine, [(entry, coded)], 1, 2)


@pytest.mark.parametrize(
    "load, is_base", [(lambda held, x: held.copy_(x), True), (in_halves, False)]
)
def test_an_update_without_changes_is_no_base_of_what_is_kept(load, is_base):
    """It writes the parameters, and not the copies of what is loaded whole."""
    engine, weight, sent = Loads(load), torch.zeros(16, 96, dtype=torch.bfloat16), delta.Sent()
    load_bucket(engine, delta_gather.compare([("a", weight)], sent), -1, 0)
    load_bucket(engine, [("a", weight + 1)], buckets.NO_CHANGES, 1)
    weight[0, :9] += 1
    changes = delta_gather.compare([("a", weight)], sent)
    if is_base:
        return load_bucket(engine, changes, 1, 2)
    with pytest.raises(RuntimeError, match="send all of it"):
        load_bucket(engine, changes, 1, 2)


@pytest.mark.parametrize(
    "name, dtype, is_noted",
    [("a", DTYPES[0], True), ("a", torch.bfloat16, False), ("a_scale_inv", torch.float32, True)],
)
def test_only_what_the_emulation_reads_is_noted_as_written(name, dtype, is_noted):
    engine, sent = Loads(lambda held, tensor: held.copy_(tensor)), delta.Sent()
    engine.held = torch.nn.Parameter(torch.zeros(16, 96).to(dtype), requires_grad=False)
    weight = random((16, 96), dtype)
    load_bucket(engine, delta_gather.compare([(name, weight)], sent), -1, 0)
    delta.as_integers(weight)[3, 5] ^= 1
    load_bucket(engine, delta_gather.compare([(name, weight)], sent), 0, 1)
    written = in_place.take_written(engine.held)
    assert [part.tolist() for part in written] == ([[3 * 96 + 5]] if is_noted else [])


def test_changes_of_another_part_leave_a_parameter_unwritten():
    """An engine rank's slice: what lies beside it is another rank's."""
    engine, sent = Loads(lambda held, tensor: held.copy_(tensor[16:])), delta.Sent()
    engine.held = torch.nn.Parameter(torch.zeros(16, 96).to(DTYPES[0]), requires_grad=False)
    weight = random((32, 96), DTYPES[0])
    load_bucket(engine, delta_gather.compare([("a", weight)], sent), -1, 0)
    delta.as_integers(weight)[3, 5] ^= 1
    load_bucket(engine, delta_gather.compare([("a", weight)], sent), 0, 1)
    assert in_place.take_written(engine.held) == []


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
