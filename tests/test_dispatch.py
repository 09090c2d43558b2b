"""Which kernel runs what, decided from made-up facts: a CPU can ask for a GPU's decisions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asymconv import asymmetry, comparison, dispatch, record
from asymconv.dispatch import WINS, Facts, decide, hopeless, pairs_of, shape_of
from asymconv.kernels import RUNGS, get_rung
from asymconv.measure import convolution_flags
from asymconv.problem import CONTRACT, ConvShape
from asymconv.real_layers import BATCHES, LAYERS

HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)


def facts(shape: ConvShape = CONTRACT, **changes: object) -> Facts:
    """A float32 NCHW call on an H100 with TF32 allowed, but for the changes."""
    return Facts(
        device="cuda",
        capability=HOPPER,
        dtype=torch.float32,
        layout="NCHW",
        tf32=True,
        input_shape=shape.input_shape,
        weight_shape=shape.weight_shape,
        bias_shape=(shape.out_channels,) if shape.bias else None,
        stride=shape.stride,
        padding=shape.padding,
        dilation=shape.dilation,
        groups=shape.groups,
    )._replace(**changes)


def number(decision: dispatch.Decision) -> str | None:
    return decision.rung.number if decision.rung else None


CASES = {
    "the contract": (facts(), "k07", "TF32 allowed"),
    "the contract with a bias": (facts(CONTRACT.with_(bias=True)), "k07", ""),
    "TF32 forbidden": (facts(tf32=False), "k08", "TF32 forbidden"),
    "on a CPU": (facts(device="cpu", capability=None), None, "this is on cpu"),
    "tensors on several devices": (facts(device="several"), None, "several"),
    "half precision": (facts(dtype=torch.float16), None, "float16"),
    "several dtypes": (facts(dtype=None), None, "several dtypes"),
    "channels_last": (facts(layout="channels_last"), None, "channels_last: rungs read"),
    "strided": (facts(layout="strided"), None, "nothing is copied"),
    "few pixels": (facts(CONTRACT.with_(batch=1, height=66, width=130)), None, "output pixels"),
    "narrow": (facts(CONTRACT.with_(width=140)), "k07", "faster here"),
    "too narrow": (facts(CONTRACT.with_(width=34, height=9000)), None, "fill its strips of 128"),
    "wide for k08": (facts(CONTRACT.with_(width=60, height=9000), tf32=False), "k08", "forbidden"),
    "narrow for both": (facts(CONTRACT.with_(width=34, height=9000), tf32=False), None, "of 64"),
    "an image's channels": (facts(CONTRACT.with_(in_channels=3)), None, "3 input channels"),
    "many channels": (facts(CONTRACT.with_(in_channels=128)), None, "128 input channels"),
    "few filters": (facts(CONTRACT.with_(out_channels=19)), None, "19 output channels"),
    "1×1": (facts(CONTRACT.with_(kernel=(1, 1))), None, "3×3"),
    "stride": (facts(CONTRACT.with_(stride=(2, 2))), None, "stride"),
    "dilation": (facts(CONTRACT.with_(dilation=(2, 2))), None, "dilation"),
    "groups": (facts(CONTRACT.with_(groups=2)), None, "group"),
    "no batch": (facts(input_shape=(64, 512, 1024)), None, "no batch"),
    "an empty batch": (facts(CONTRACT.with_(batch=0)), None, "an empty batch"),
    "channels that do not match": (facts(input_shape=(8, 32, 512, 1024)), None, "no batch"),
    "no groups": (facts(groups=0), None, "no batch"),
}


@pytest.mark.parametrize("name", CASES)
def test_decisions(name: str) -> None:
    given_, runs, why = CASES[name]
    decision = decide(given_)
    assert number(decision) == runs
    assert why in decision.reason
    assert decision.machine is None, "nothing is wrong with the machine"
    if runs:
        assert decision.shape == shape_of(given_)


@pytest.mark.parametrize("capability", [AMPERE, TURING, (10, 0)])
def test_another_gpu_is_named_once_where_it_matters(capability: tuple[int, int]) -> None:
    decision = decide(facts(capability=capability))
    assert decision.rung is None
    assert (
        decision.machine
        == f"k07 was measured on sm_90, this GPU is sm_{''.join(map(str, capability))}"
    )
    assert decide(facts(CONTRACT.with_(kernel=(1, 1)), capability=capability)).machine is None


def test_forced_rungs_are_tried_in_order() -> None:
    strided = facts(CONTRACT.with_(stride=(2, 2)))
    assert number(decide(strided, ("k07", "k05", "k06", "k04"))) == "k06"
    assert number(decide(strided._replace(tf32=False), ("k07", "k05", "k06", "k04"))) == "k04"
    assert number(decide(facts(capability=AMPERE), ("k07", "k06"))) == "k06"
    cpu = facts(device="cpu", capability=None)
    assert number(decide(cpu, ("k07", "k05"))) == "k07", "its text runs there"
    refused = decide(facts(layout="channels_last"), ("k07", "k05"))
    assert refused.rung is None and "channels_last" in refused.reason
    nowhere = decide(strided, ("k07", "k05"))
    assert nowhere.rung is None
    assert "k07: " in nowhere.reason and "k05: " in nowhere.reason


def test_always_ends_with_its_block() -> None:
    assert dispatch.forced() is None
    with dispatch.always():
        assert dispatch.forced() == ("k07", "k06", "k08", "k05", "k04", "k03", "k02", "k01")
        with dispatch.always("k05"):
            assert dispatch.forced() == ("k05",)
        with pytest.raises(RuntimeError, match="within"), dispatch.always("k01"):
            raise RuntimeError("within")
        assert dispatch.forced()[0] == "k07"
    assert dispatch.forced() is None


def test_flags_decide_the_class_of_rounding() -> None:
    with convolution_flags("tf32"):
        assert dispatch.tf32_allowed()
    with convolution_flags("fp32"):
        assert not dispatch.tf32_allowed()
    torch.backends.cudnn.allow_tf32 = True  # the legacy setting
    assert dispatch.tf32_allowed()
    torch.backends.cudnn.allow_tf32 = False
    assert not dispatch.tf32_allowed()
    torch.backends.cudnn.allow_tf32 = True
    with torch.backends.cudnn.flags(enabled=False):
        assert not dispatch.tf32_allowed(), "what runs without cuDNN does not round"


def test_facts_of_tensors() -> None:
    x, weight = torch.rand(2, 4, 8, 16), torch.rand(6, 4, 3, 3)
    arguments = ((1, 1), (0, 0), (1, 1), 1)
    seen = dispatch.facts_of(x, weight, None, *arguments)
    assert seen[:4] == ("cpu", None, torch.float32, "NCHW")
    assert shape_of(seen) == ConvShape(2, 4, 8, 16, 6)

    def layout(x: torch.Tensor, weight: torch.Tensor = weight) -> str:
        return dispatch.facts_of(x, weight, None, *arguments).layout

    last = torch.channels_last
    assert layout(x.to(memory_format=last)) == "channels_last"
    assert layout(x, weight.to(memory_format=last)) == "channels_last"
    assert layout(x[..., ::2]) == "strided"
    assert layout(x.transpose(2, 3)) == "strided"
    assert layout(x[1:]) == "NCHW", "a part that is whole needs no copy"
    assert layout(x.to_sparse()) == "torch.sparse_coo"
    assert dispatch.facts_of(x.double(), weight, None, *arguments).dtype is None
    assert dispatch.facts_of(x.to("meta"), weight, None, *arguments).device == "several"
    assert dispatch.facts_of(x, weight, torch.rand(6).double(), *arguments).dtype is None


def test_pairs() -> None:
    weight = (6, 4, 3, 5)
    assert pairs_of(weight, 2, 1, (1, 2)) == ((2, 2), (1, 1), (1, 2))
    assert pairs_of(weight, 1, "valid", 1) == ((1, 1), (0, 0), (1, 1))
    assert pairs_of(weight, 1, "same", (2, 1)) == ((1, 1), (2, 2), (2, 1))
    assert pairs_of(weight, 2, "same", 1) is None, "PyTorch refuses it"
    assert pairs_of((6, 4, 2, 3), 1, "same", 1) is None, "one side has more"
    assert pairs_of(weight, 1, "else", 1) is None


PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))
SIZES = st.one_of(st.integers(0, 20), st.sampled_from([64, 128, 375, 512, 1024, 1242, 2**17]))


@given(
    device=st.sampled_from(["cuda", "cpu", "several", "meta"]),
    capability=st.sampled_from([HOPPER, AMPERE, TURING, (12, 0)]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64, None]),
    layout=st.sampled_from(["NCHW", "NCHW", "NCHW", "channels_last", "strided"]),
    tf32=st.booleans(),
    input_shape=st.lists(SIZES, min_size=2, max_size=5).map(tuple),
    weight_shape=st.one_of(
        st.lists(SIZES, min_size=2, max_size=5).map(tuple),
        st.tuples(SIZES, SIZES, st.just(3), st.just(3)),
    ),
    bias=st.booleans(),
    stride=st.one_of(st.just((1, 1)), PAIRS),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.one_of(st.just((1, 1)), PAIRS),
    groups=st.integers(0, 4),
    forced=st.one_of(st.none(), st.just(tuple(r.number for r in reversed(RUNGS)))),
)
@example(
    "cuda",
    HOPPER,
    torch.float32,
    "NCHW",
    True,
    CONTRACT.input_shape,
    CONTRACT.weight_shape,
    False,
    (1, 1),
    (0, 0),
    (1, 1),
    1,
    None,
)
@settings(max_examples=400, deadline=None)
def test_any_facts_have_a_decision_that_holds(
    device, capability, dtype, layout, tf32, input_shape, weight_shape, bias, stride, padding,
    dilation, groups, forced,
) -> None:  # fmt: skip
    bias_shape = weight_shape[:1] if bias else None
    made_up = Facts(
        *(device, capability if device == "cuda" else None, dtype, layout, tf32),
        *(input_shape, weight_shape, bias_shape, stride, padding, dilation, groups),
    )
    decision = decide(made_up, forced)
    assert decision.reason and "\n" not in decision.reason
    if decision.rung is None:
        return
    rung, shape = decision.rung, decision.shape
    assert rung.refuses(shape) is None
    assert (shape.input_shape, shape.weight_shape) == (input_shape, weight_shape)
    assert dtype == torch.float32 and layout == "NCHW"
    assert tf32 or rung.precision == "fp32", "no rung rounds more coarsely than the flags allow"
    assert (device == "cuda" and rung.runs_on(capability)) or device == "cpu"
    if forced is None:
        assert not hopeless(input_shape, weight_shape, stride, padding, dilation, groups)


@given(
    batch=st.integers(1, 8),
    channels=st.integers(1, 130),
    filters=st.integers(1, 130),
    height=st.sampled_from([64, 375, 512]),
    width=st.sampled_from([100, 140, 1000, 1024, 1242]),
    tf32=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_what_is_hopeless_is_never_served(batch, channels, filters, height, width, tf32) -> None:
    shape = ConvShape(batch, channels, height, width, filters, padding=1)
    lost = hopeless(shape.input_shape, shape.weight_shape, 1, "same", 1, 1)
    assert lost == all(decide(facts(shape, tf32=flag)).rung is None for flag in (True, False))


def test_sizes_that_only_pytorch_understands_are_hopeless() -> None:
    assert hopeless(CONTRACT.input_shape, CONTRACT.weight_shape, 2, "same", 1, 1)
    assert hopeless((64, 512, 1024), CONTRACT.weight_shape, 1, 0, 1, 1)
    assert not hopeless(CONTRACT.input_shape, CONTRACT.weight_shape, 1, "valid", 1, 1)


class TestRecords:
    """The constants against what was measured."""

    def test_each_win_was_measured_on_the_contract(self) -> None:
        ladder = record.load(record.LADDER)
        for win in WINS:
            assert win.misses(CONTRACT) is None
            peer = ladder["nn.Conv2d" if win.tf32 else "nn.Conv2d, strict fp32"]
            assert peer.median / ladder[win.rung].median >= 1.1
            assert get_rung(win.rung).precision == ("tf32" if win.tf32 else "fp32")

    @pytest.mark.skipif(
        not comparison.LAYERS_RECORD.exists(), reason="layers.json is still to be recorded"
    )
    def test_layers(self) -> None:
        layers = comparison.load_layers()
        measured = {(r.data, r.network, r.shape, r.tf32, r.training) for r in layers.rows}
        assert measured == {
            (layer.data, layer.network, layer.shape.with_(batch=n), layer.tf32, training)
            for layer in LAYERS
            for n in BATCHES
            for training in (False, True)
        }
        for rung, source_hash in layers.rungs.items():
            assert get_rung(rung).source_hash == source_hash, f"{rung} changed since"
        for row in layers.rows:
            where = f"{row.network}, {row.shape}, training {row.training}"
            decision = decide(facts(row.shape, tf32=row.tf32))
            assert (decision.rung.name if decision.rung else "") == row.runs, where
            assert not decision.rung or decision.rung.number in layers.rungs, where
            assert row.ratio >= 0.97 or not row.runs, where
            if row.runs and not row.training:
                assert row.ratio >= 1.8, where
        assert any("forced" in call.what for call in layers.overheads)
        for call in layers.overheads:
            if not call.what.startswith(tuple(comparison.DETOURS)):
                assert call.ours - call.theirs <= 15, call

    def test_no_row_is_slower(self) -> None:
        rows = comparison.load_layers().rows
        assert min(row.ratio for row in rows) >= 0.97
        assert min(row.ratio for row in rows if row.runs) >= 1.05, (
            "clearly faster where a rung runs"
        )

    @pytest.mark.parametrize("series", ["aspect", "strips", "pitch", "batch"])
    def test_decisions_are_what_the_series_of_shapes_showed(self, series: str) -> None:
        """A rung runs where it was faster, and where it was twice as fast it runs."""
        for row in asymmetry.load()[series].rows:
            if row.shape.out_channels != CONTRACT.out_channels:
                continue
            at = {t.name: t.median for t in row.timings if not t.defines}
            for win in WINS:
                peer = at["nn.Conv2d" if win.tf32 else "nn.Conv2d, strict fp32"]
                faster = peer / at[get_rung(win.rung).name]
                served = decide(facts(row.shape, tf32=win.tf32)).rung
                assert (served is not None) == (faster >= 2), (row.shape, win.rung, faster)


def test_the_list_of_layers_has_every_kind() -> None:
    shapes = [layer.shape for layer in LAYERS]
    assert {s.kernel for s in shapes} >= {(1, 1), (3, 3), (5, 5), (7, 7)}
    assert {s.stride for s in shapes} == {(1, 1), (2, 2)}
    assert {s.dilation for s in shapes} == {(1, 1), (2, 2)}
    assert any(s.groups == s.in_channels for s in shapes), "depthwise"
    assert any(1 < s.groups < s.in_channels for s in shapes), "grouped"
    assert len({layer.data for layer in LAYERS}) == 6
    names = [(layer.data, layer.network, layer.tf32) for layer in LAYERS]
    assert len(set(names)) == len(names)
    assert {s.batch for s in shapes} == {1}
    served = [number(decide(facts(s))) for s in shapes]
    assert served.count("k07") >= 5
