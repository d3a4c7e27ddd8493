"""The CPU kernels of packed layers: every instruction set that the machine has gives the bits of the reference."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from difflut_lab.ops import chosen_kernels, explain, use_kernels
from difflut_lab.ops.convolve import cpu as convolve
from difflut_lab.ops.dot.cpu import kinds
from difflut_lab.ops.ternary_linear import (
    NO_AVX2,
    cpu,
    pack_codes,
    reference,
    ternary_conv2d,
    ternary_linear,
    ways,
)
from difflut_lab.ternary import TernaryConv2d, TernaryLinear, pack

if not kinds():
    pytest.skip("needs AVX2", allow_module_level=True)

# M, K, O
SIZES = [(1, 1, 1), (1, 1000, 3), (2, 16, 4), (3, 127, 33), (7, 255, 5), (33, 257, 70), (127, 64, 31), (600, 20, 40)]
# B, C, H, W, O, kernel, stride, padding
IMAGES = [
    (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0)),
    (2, 16, 8, 8, 16, (3, 3), (1, 1), (1, 1)),
    (3, 5, 9, 6, 33, (3, 2), (2, 1), (1, 0)),
    (2, 20, 5, 7, 70, (1, 1), (2, 2), (0, 0)),
    (1, 2, 20, 37, 3, (5, 7), (1, 3), (2, 3)),
    (2, 3, 3, 3, 4, (3, 3), (1, 2), (4, 3)),
    (5, 40, 4, 4, 17, (3, 3), (1, 1), (1, 1)),
]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory of torch's that nobody has written holds NaN, or the largest integer; nothing has been tried yet."""
    monkeypatch.delenv("DIFFLUT_LAB_KERNELS", raising=False)
    torch.use_deterministic_algorithms(True)
    ways.forget()
    use_kernels("cpu")
    yield
    torch.use_deterministic_algorithms(False)
    use_kernels("auto")


def parameters(outputs: int, length: int, skewed: bool) -> dict[str, Any]:
    return {
        "codes": pack_codes(torch.randint(-1, 2, (outputs, length))),
        "scale": torch.rand(outputs) + 0.5,
        "bias": torch.randn(outputs),
        "skew": torch.randn(outputs) if skewed else None,
    }


def linear_reference(x: Tensor, tensors: dict[str, Any], bits: int | None = 8) -> Tensor:
    return reference.linear(x, **tensors, group_size=None, activation_bits=bits)


def linear_ways(x: Tensor, tensors: dict[str, Any], skewed: bool) -> dict[str, Tensor]:
    """All ways to compute a product; two scales with the fastest instructions only, since all are compiled."""
    allowed = kinds(False)[-1:] if skewed else kinds(False)
    results = {f"rows, {kind}": cpu.linear_by_rows(x, **tensors, kind=kind) for kind in allowed}
    allowed = kinds()[-2:] if skewed else kinds()
    results |= {f"panels, {kind}": cpu.linear_by_panels(x, **tensors, kind=kind) for kind in allowed}
    return results | {"float": cpu.linear_by_floats(x, **tensors)}


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_way_gives_the_bits_of_the_reference(size: tuple[int, int, int], skewed: bool) -> None:
    tokens, length, outputs = size
    x, tensors = torch.randn(tokens, length) * 3, parameters(outputs, length, skewed)
    wanted = linear_reference(x, tensors)
    for name, got in linear_ways(x, tensors, skewed).items():
        assert torch.equal(got, wanted), name
    assert torch.equal(ternary_linear(x, **tensors, activation_bits=8), wanted)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(tokens=st.integers(0, 70), length=st.integers(1, 300), outputs=st.integers(1, 70), skewed=st.booleans())
def test_any_size(tokens: int, length: int, outputs: int, skewed: bool) -> None:
    x, tensors = torch.randn(tokens, length), parameters(outputs, length, skewed)
    assert torch.equal(ternary_linear(x, **tensors, activation_bits=8), linear_reference(x, tensors))
    double = {
        name: tensor.double() if tensor is not None and name != "codes" else tensor for name, tensor in tensors.items()
    }
    wanted = linear_reference(x.double(), double, None)
    got = ternary_linear(x, **tensors)
    assert got.shape == wanted.shape
    # of the largest sum that the rounded terms may have
    terms = (tensors["scale"].abs().max() + 3) * x.abs().sum(dim=1, keepdim=True)
    assert ((got - wanted).abs() <= 1e-6 * terms + 1e-6).all()


@pytest.mark.parametrize("tokens", [1, 5, 64, 65, 200])
def test_floats(tokens: int) -> None:
    for length, outputs in ((1000, 3), (127, 300), (4096, 130)):
        x, tensors = torch.randn(tokens, length), parameters(outputs, length, True)
        double = {name: tensor if name == "codes" else tensor.double() for name, tensor in tensors.items()}
        wanted = linear_reference(x.double(), double, None)
        error = (ternary_linear(x, **tensors) - wanted).abs().max()
        assert error <= 1e-6 * wanted.abs().max()


def test_weights_are_never_floats_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FLOATS", 1 << 12)
    x, tensors = torch.randn(100, 128), parameters(100, 128, False)
    sizes = []
    unpacked = cpu._weights

    def record(*arguments: Any) -> Tensor:
        weights = unpacked(*arguments)
        sizes.append(tuple(weights.shape))
        return weights

    monkeypatch.setattr(cpu, "_weights", record)
    got = ternary_linear(x, **tensors)
    assert sizes == [(32, 128)] * 3 + [(4, 128)]
    torch.testing.assert_close(got, linear_reference(x, tensors, None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_every_convolution_gives_the_bits_of_the_reference(image: Any, skewed: bool, monkeypatch: Any) -> None:
    batch, channels, height, width, outputs, kernel, stride, padding = image
    shape = (outputs, channels, *kernel)
    x, tensors = (
        torch.randn(batch, channels, height, width),
        parameters(outputs, channels * kernel[0] * kernel[1], skewed),
    )
    options = {"stride": stride, "padding": padding}
    wanted = reference.conv2d(x, **tensors, weight_shape=shape, **options, groups=1, group_size=None, activation_bits=8)
    for kind in kinds()[-2:] if skewed else kinds():
        for scratch in (convolve.SCRATCH, 1):
            monkeypatch.setattr(convolve, "SCRATCH", scratch)
            got = convolve.convolve(x, **tensors, kernel=kernel, **options, kind=kind)
            assert torch.equal(got, wanted), kind
    for layout in (torch.contiguous_format, torch.channels_last):
        inputs = x.contiguous(memory_format=layout)
        assert torch.equal(ternary_conv2d(inputs, **tensors, weight_shape=shape, **options, activation_bits=8), wanted)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_groups_and_floats(groups: int, bits: int | None) -> None:
    x, tensors = torch.randn(2, 6, 7, 5), parameters(12, 6 // groups * 9, True)
    options: dict[str, Any] = {"weight_shape": (12, 6 // groups, 3, 3), "stride": (2, 1), "padding": (1, 1)}
    got = ternary_conv2d(x, **tensors, **options, groups=groups, activation_bits=bits)
    wanted = reference.conv2d(x, **tensors, **options, groups=groups, group_size=None, activation_bits=bits)
    if bits:
        assert torch.equal(got, wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_sums_are_exact() -> None:
    # with a largest magnitude of 127 the step is 1, and with a scale of 1 outputs are the sums
    x = torch.randint(-127, 128, (40, 1000)).float()
    x[:, 0] = 127
    codes = torch.randint(-1, 2, (37, 1000))
    codes[0] = x[0].sign()
    tensors = {"codes": pack_codes(codes), "scale": torch.ones(37), "bias": torch.zeros(37), "skew": torch.ones(37)}
    wanted = x.double() @ (codes + codes.abs()).double().t()
    for name, got in linear_ways(x, tensors, True).items():
        assert torch.equal(got.double(), wanted), name


@pytest.mark.parametrize("length", [64, 100])
def test_levels_are_those_of_a_division(length: int) -> None:
    # quotients at halves, and one number above and below
    step = torch.tensor([1.0, 0.3, 1e-30, 3e30, 7.7, 1e-38])
    halves = (torch.arange(length) % 253 - 126.5).clamp(min=-126.5)
    exact = (halves * step.view(-1, 1)).float()
    near = [exact, *(torch.nextafter(exact, exact.sign() * limit) for limit in (torch.inf, -torch.inf))]
    x = torch.cat([torch.cat([127 * step.view(-1, 1), values], dim=1) for values in near])
    x = torch.cat([x, torch.zeros(1, length + 1), torch.full((1, length + 1), 1e-45)])
    # a code for each input alone
    codes = torch.eye(length + 1)
    tensors: dict[str, Any] = {
        "codes": pack_codes(codes),
        "scale": torch.ones(length + 1),
        "bias": torch.zeros(length + 1),
        "skew": None,
    }
    wanted = linear_reference(x, tensors)
    for name, got in linear_ways(x, tensors, True).items():
        assert torch.equal(got, wanted), name
    image = x.view(len(x), length + 1, 1, 1)
    got = convolve.convolve(image, **tensors, kernel=(1, 1), stride=(1, 1), padding=(0, 0))
    assert torch.equal(got.view_as(wanted), wanted)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("tokens", [1, 9, 70])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_spoils_its_token_alone(value: float, tokens: int, bits: int | None) -> None:
    x, tensors = torch.randn(tokens, 100), parameters(20, 100, True)
    x[tokens // 2, 31] = value
    wanted = linear_reference(x, tensors, bits)
    spoiled = ~wanted.isfinite()
    assert spoiled[tokens // 2].any() and int(spoiled.sum()) <= 20
    results = {"op": ternary_linear(x, **tensors, activation_bits=bits)}
    if bits:
        results |= linear_ways(x, tensors, True)
    for name, got in results.items():
        assert torch.equal(got.isnan(), wanted.isnan()), name
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)
    image = x.view(tokens, 25, 2, 2)
    options: dict[str, Any] = {"weight_shape": (20, 25, 2, 2), "stride": (1, 1), "padding": (0, 0)}
    got = ternary_conv2d(image, **tensors, **options, activation_bits=bits)
    assert torch.equal(got.isnan().flatten(1), wanted.isnan())


@pytest.mark.parametrize("bits", [None, 8])
def test_threads_change_nothing(bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("difflut_lab.ops.threads.cpu"), "SHARE", 1)
    x, tensors = torch.randn(50, 130), parameters(150, 130, True)
    image, filters = torch.randn(9, 10, 7, 6), parameters(40, 90, True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            found = [ternary_linear(x, **tensors, activation_bits=bits)]
            if bits:
                found += linear_ways(x, tensors, True).values()
                found.append(convolve.convolve(image, **filters, kernel=(3, 3), stride=(1, 1), padding=(1, 1)))
            results.append(found)
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(result, results[0], strict=True))


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(dtype: torch.dtype, bits: int | None) -> None:
    x, tensors = torch.randn(6, 50).to(dtype), parameters(9, 50, False)
    got = ternary_linear(x, **tensors, activation_bits=bits)
    assert got.dtype == dtype and chosen_kernels()["ternary_linear"] == "cpu"
    assert torch.equal(got, ternary_linear(x.float(), **tensors, activation_bits=bits).to(dtype))


@pytest.mark.parametrize("bits", [None, 8])
def test_any_layout(bits: int | None) -> None:
    x, tensors = torch.randn(6, 50), parameters(9, 50, True)
    wanted = ternary_linear(x, **tensors, activation_bits=bits)
    wide = torch.zeros(6, 100)
    wide[:, ::2] = x
    strided: dict[str, Any] = {name: torch.stack([tensor, tensor], dim=-1)[..., 0] for name, tensor in tensors.items()}
    for inputs in (x.t().contiguous().t(), wide[:, ::2]):
        assert torch.equal(ternary_linear(inputs, **tensors, activation_bits=bits), wanted)
        assert torch.equal(ternary_linear(inputs, **strided, activation_bits=bits), wanted)
    assert torch.equal(ternary_linear(x.view(2, 3, 50), **tensors, activation_bits=bits), wanted.view(2, 3, 9))
    assert torch.equal(ternary_linear(x[0], **tensors, activation_bits=bits), wanted[0])


def test_nothing_is_fine() -> None:
    tensors = parameters(9, 50, True)
    for bits in (None, 8):
        assert ternary_linear(torch.empty(0, 50), **tensors, activation_bits=bits).shape == (0, 9)
        got = ternary_conv2d(torch.empty(0, 50, 3, 3), **tensors, weight_shape=(9, 50, 1, 1), activation_bits=bits)
        assert got.shape == (0, 9, 3, 3)


def test_long_sums_are_left_to_the_reference() -> None:
    length = 140_000
    x, tensors = torch.full((1, length), 127.0), parameters(1, length, False)
    tensors["codes"] = pack_codes(torch.ones(1, length))
    assert torch.equal(ternary_linear(x, **tensors, activation_bits=8), linear_reference(x, tensors))
    assert explain() == []


def test_explain_says_what_was_tried() -> None:
    assert explain() == []
    x, tensors = torch.randn(5, 50), parameters(9, 50, False)
    for tokens in (1, 5, 5, 4):
        ternary_linear(x[:tokens], **tensors, activation_bits=8)
    ternary_conv2d(x.view(1, 50, 5, 1), **tensors, weight_shape=(9, 50, 1, 1), activation_bits=8)
    trials = explain()
    assert [trial.what for trial in trials] == [
        "linear 50 -> 9, 1 tokens, 1 threads",
        "linear 50 -> 9, 5 to 8 tokens, 1 threads",
        "linear 50 -> 9, 3 to 4 tokens, 1 threads",
        "conv2d of 50 x 5 x 1, 9 x 50 x 1 x 1, 1 x 1, 0 x 0 (image, weight, stride, padding), 1 images, 1 threads",
    ]
    assert [set(trial.milliseconds) for trial in trials] == [
        {"rows", "float"},
        {"rows", "panels", "float"},
        {"rows", "panels", "float"},
        {"bytes", "float"},
    ]
    for trial in trials:
        assert trial.milliseconds[trial.way] == min(trial.milliseconds.values())
        assert f"{trial.way} (" in str(trial)


def test_a_processor_without_avx2_has_the_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(import_module("difflut_lab.ops.ternary_linear"), "_has_avx2", lambda: False)
    caplog.set_level(logging.INFO, "difflut_lab.ops.dispatch")
    x, tensors = torch.randn(5, 50), parameters(9, 50, False)
    assert torch.equal(ternary_linear(x, **tensors, activation_bits=8), linear_reference(x, tensors))
    assert chosen_kernels() == {"ternary_linear": f"reference ({NO_AVX2})"}
    assert caplog.records[0].getMessage() == f"kernels of ternary_linear: reference ({NO_AVX2})"


def test_float64_grouped_scales_and_long_sums_have_the_reference() -> None:
    x, tensors = torch.randn(5, 50), parameters(9, 50, False)
    ternary_linear(x.double(), **tensors)
    assert chosen_kernels() == {"ternary_linear": "reference (computes in float64)"}
    ternary_linear(x, tensors["codes"], torch.rand(9, 5), group_size=10)
    assert chosen_kernels() == {"ternary_linear": "reference (scales differ by group)"}
    # 127 times as much is more than 2^24
    x, tensors = torch.randn(1, 132_105), parameters(1, 132_105, False)
    assert torch.equal(ternary_linear(x, **tensors, activation_bits=8), linear_reference(x, tensors))
    assert chosen_kernels() == {"ternary_linear": "reference (float32 does not hold sums of so many levels)"}


@pytest.mark.parametrize("bits", [None, 8])
def test_packed_layers_take_the_kernels(bits: Any) -> None:
    use_kernels("auto")
    model = nn.Sequential(
        TernaryConv2d(3, 5, 3, quantizer="ttq", activation_bits=bits),
        nn.Flatten(),
        TernaryLinear(80, 6, activation_bits=bits),
    )
    pack(model)(torch.randn(2, 3, 6, 6))
    assert chosen_kernels() == {"ternary_linear": "cpu"}
