"""Packed codes, and the reference of products with them against loops in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from difflut_lab.ops import use_kernels
from difflut_lab.ops.ternary_linear import (
    pack_base3,
    pack_codes,
    quantize_activations,
    ternary_conv2d,
    ternary_linear,
    unpack_base3,
    unpack_codes,
)

DTYPES = [torch.int8, torch.int64, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _reference() -> Any:
    use_kernels("reference")
    yield
    use_kernels("auto")


def draw_codes(*shape: int) -> Tensor:
    return torch.randint(-1, 2, shape, dtype=torch.int8)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(outputs=st.integers(0, 20), length=st.integers(0, 300), dtype=st.sampled_from(DTYPES))
def test_codes_survive_packing(outputs: int, length: int, dtype: torch.dtype) -> None:
    codes = draw_codes(outputs, length)
    words = pack_codes(codes.to(dtype))
    assert words.dtype == torch.int32 and words.shape == (outputs, -(-length // 16))
    assert torch.equal(unpack_codes(words, length), codes)
    octets = pack_base3(codes.to(dtype))
    assert octets.dtype == torch.uint8 and octets.shape == (outputs, -(-length // 5))
    assert torch.equal(unpack_base3(octets, length), codes)


@pytest.mark.parametrize("length", [1, 3, 15, 16, 17, 127, 1000])
def test_the_bits_are_those_that_are_documented(length: int) -> None:
    codes = draw_codes(3, length)
    words = pack_codes(codes)
    for o, k in itertools.product(range(3), range(words.shape[1] * 16)):
        bits = int(words[o, k // 16]) >> 2 * (k % 16) & 3
        assert bits - 1 == (int(codes[o, k]) if k < length else 0)


def test_any_layout_of_codes() -> None:
    codes = draw_codes(40, 7)
    assert torch.equal(pack_codes(codes.t()), pack_codes(codes.t().contiguous()))
    words = pack_codes(draw_codes(7, 80))
    assert torch.equal(unpack_codes(words.t().contiguous().t(), 80), unpack_codes(words, 80))


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"codes: 33 of them take 3 words, not 2"):
        unpack_codes(pack_codes(draw_codes(2, 32)), 33)
    with pytest.raises(ValueError, match=r"codes: 6 of them take 2 bytes, not 1"):
        unpack_base3(pack_base3(draw_codes(2, 5)), 6)
    with pytest.raises(ValueError, match=r"codes: a byte of 243 is no 5 codes"):
        unpack_base3(torch.tensor([[243]], dtype=torch.uint8), 5)


def test_levels() -> None:
    x = torch.tensor([[0.0, 2.54, -1.27, 0.01], [0.0, 0.0, 0.0, 0.0], [1e-45, 0.0, -1e-45, 0.0]])
    levels, step = quantize_activations(x)
    assert levels.tolist() == [[0, 127, -64, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(step, torch.tensor([[0.02], [0.0], [0.0]]))
    assert (step > 0).all()
    # halves go to the even level
    levels, _ = quantize_activations(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert levels.tolist() == [[127, 0, 2, 2, 0, -2]]


def brute(x: Tensor, weight: Tensor, bias: Tensor, bits: int | None) -> Tensor:
    """Products, one output after the other, in float64."""
    x = x.double()
    if bits is not None:
        step = x.abs().amax(dim=1, keepdim=True) / 127
        x = (x / step).round() * step
    y = torch.empty(len(x), len(weight), dtype=torch.float64)
    for t, o in itertools.product(range(len(x)), range(len(weight))):
        y[t, o] = sum(float(x[t, k]) * float(weight[o, k]) for k in range(x.shape[1])) + float(bias[o])
    return y


def drawn(tokens: int, length: int, outputs: int, groups: int = 0) -> dict[str, Any]:
    shape = (outputs, groups) if groups else (outputs,)
    return {
        "x": torch.randn(tokens, length),
        "codes": draw_codes(outputs, length),
        "scale": torch.rand(shape) + 0.5,
        "skew": torch.randn(shape),
        "bias": torch.randn(outputs),
    }


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("group_size", [None, 1, 7, 50])
@pytest.mark.parametrize(("tokens", "length", "outputs"), [(1, 1, 1), (3, 17, 3), (2, 50, 5)])
def test_linear_is_what_a_loop_computes(
    tokens: int, length: int, outputs: int, group_size: int | None, bits: int | None
) -> None:
    case = drawn(tokens, length, outputs, -(-length // group_size) if group_size else 0)
    factors = [case[name] if group_size else case[name].unsqueeze(1) for name in ("scale", "skew")]
    per_input = [factor.repeat_interleave(group_size or length, dim=1)[:, :length].double() for factor in factors]
    codes = case["codes"].double()
    weight = per_input[0] * codes + per_input[1] * codes.abs()
    got = ternary_linear(
        case["x"],
        pack_codes(case["codes"]),
        case["scale"],
        case["bias"],
        case["skew"],
        group_size=group_size,
        activation_bits=bits,
    )
    torch.testing.assert_close(got.double(), brute(case["x"], weight, case["bias"], bits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize(("groups", "group_size"), [(1, None), (1, 2), (2, None), (2, 2), (4, None)])
def test_convolution_is_what_a_loop_computes(groups: int, group_size: int | None, bits: int | None) -> None:
    channels, outputs, kernel, stride, padding = 4, 8, (3, 2), (2, 1), (1, 0)
    inputs = channels // groups
    case = drawn(2, inputs * 6, outputs, -(-inputs // group_size) if group_size else 0)
    x = torch.randn(2, channels, 5, 4)
    codes = case["codes"].view(outputs, inputs, 6)
    weight = torch.zeros(codes.shape, dtype=torch.float64)
    for o, i in itertools.product(range(outputs), range(inputs)):
        place = (o, i // group_size) if group_size else (o,)
        weight[o, i] = case["scale"][place].double() * codes[o, i] + case["skew"][place].double() * codes[o, i].abs()
    values = x.double()
    if bits is not None:
        step = values.abs().amax(dim=(1, 2, 3), keepdim=True) / 127
        values = (values / step).round() * step
    padded = torch.nn.functional.pad(values, (0, 0, 1, 1))
    want = torch.zeros(2, outputs, 3, 3, dtype=torch.float64)
    for b, o, row, column in itertools.product(range(2), range(outputs), range(3), range(3)):
        first = o // (outputs // groups) * inputs
        patch = padded[b, first : first + inputs, 2 * row : 2 * row + 3, column : column + 2]
        want[b, o, row, column] = (patch * weight[o].view(inputs, 3, 2)).sum() + case["bias"][o]
    got = ternary_conv2d(
        x,
        pack_codes(case["codes"]),
        case["scale"],
        case["bias"],
        case["skew"],
        weight_shape=(outputs, inputs, *kernel),
        stride=stride,
        padding=padding,
        groups=groups,
        group_size=group_size,
        activation_bits=bits,
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_sums_that_float32_does_not_hold_are_exact() -> None:
    length = 140_000
    codes, x = torch.ones(1, length, dtype=torch.int8), torch.full((1, length), 127.0)
    codes[0, :3], x[0, 3:6] = -1, 126.0
    y = ternary_linear(x.double(), pack_codes(codes), torch.ones(1).double(), activation_bits=8)
    assert y.item() == 127 * (length - 6) - 3


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(kernels: str, bits: int | None, dtype: torch.dtype) -> None:
    use_kernels(kernels)
    case = drawn(3, 20, 5)
    codes, scale, bias, skew = pack_codes(case["codes"]), case["scale"], case["bias"], case["skew"]
    operators = torch.ops.difflut_lab
    for x in (case["x"].to(dtype), torch.randn(20, 3).to(dtype).t()):
        for more in ((bias, skew), (None, None)):
            torch.library.opcheck(operators.ternary_linear.default, (x, codes, scale, *more, None, bits))
    drawn_image = torch.randn(2, 5, 6, 4).to(dtype)
    for image in (drawn_image, drawn_image.contiguous(memory_format=torch.channels_last)):
        where = ([5, 5, 2, 2], [2, 1], [1, 0], 1, None, bits)
        torch.library.opcheck(operators.ternary_conv2d.default, (image, codes, scale, bias, None, *where))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation_bits": 4}, r"activation_bits=4: must be 8 or None"),
        ({"codes": torch.zeros(5, 3, dtype=torch.int32)}, r"codes: must be int32 \(O, 2\) for 20 inputs, not"),
        ({"codes": torch.zeros(5, 2)}, r"codes: must be int32"),
        ({"scale": torch.ones(4)}, r"scale: must have shape \(5,\), not \(4,\)"),
        ({"skew": torch.ones(5, 1)}, r"skew: must have shape \(5,\), not \(5, 1\)"),
        ({"bias": torch.ones(6)}, r"bias: must have shape \(5,\), not \(6,\)"),
        ({"group_size": 8}, r"scale: must have shape \(5, 3\), not \(5,\)"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    case = {"codes": pack_codes(draw_codes(5, 20)), "scale": torch.ones(5)} | change
    with pytest.raises(ValueError, match=said):
        ternary_linear(torch.randn(2, 20), **case)
    with pytest.raises(ValueError, match=said):
        ternary_conv2d(torch.randn(2, 20, 3, 3), weight_shape=(5, 20, 1, 1), **case)


@pytest.mark.parametrize("shape", [(20, 3, 3), (2, 19, 3, 3)])
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    codes = pack_codes(draw_codes(5, 20))
    with pytest.raises(ValueError, match=r"x: must have shape \(B, 20, H, W\)"):
        ternary_conv2d(torch.randn(shape), codes, torch.ones(5), weight_shape=(5, 20, 1, 1))
