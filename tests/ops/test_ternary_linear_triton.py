"""Triton's products with ternary weights, in the interpreter, against the reference.

On a machine with a GPU, TRITON_INTERPRET=0 runs the same tests on it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("triton")

import triton

from difflut_lab import REGISTRY
from difflut_lab.ops import chosen_kernels, use_kernels
from difflut_lab.ops.dot.triton import FLOATS, GATHERED, HALVES, fitting
from difflut_lab.ops.kernel.triton import stored
from difflut_lab.ops.ternary_linear import (
    layout,
    pack_codes,
    quantize_activations,
    reference,
    ternary_conv2d,
    ternary_linear,
)
from difflut_lab.ops.ternary_linear import triton as fast
from difflut_lab.ternary import pack

INTERPRETED = os.environ["TRITON_INTERPRET"] != "0"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

pytestmark = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU")

# M, K, O: up to four tokens are multiplied one by one
SIZES = [(1, 1, 1), (1, 127, 65), (3, 17, 3), (4, 300, 17), (5, 16, 1), (17, 127, 127), (127, 33, 17)]
# M may be any below: B, C, H, W, O, kernel, stride, padding, groups
CONVOLUTIONS = {
    "3x3": (2, 3, 7, 5, 17, (3, 3), (1, 1), (1, 1), 1),
    "1x1": (1, 17, 3, 1, 3, (1, 1), (1, 1), (0, 0), 1),
    "stride": (3, 4, 9, 8, 5, (3, 3), (2, 2), (1, 1), 1),
    "rectangle": (2, 3, 6, 7, 4, (3, 2), (1, 2), (0, 1), 1),
    "wide_padding": (1, 1, 2, 3, 2, (5, 3), (2, 1), (4, 2), 1),
    "groups": (2, 6, 5, 4, 4, (3, 3), (1, 1), (1, 1), 2),
    "depthwise": (2, 5, 4, 6, 5, (3, 3), (2, 1), (1, 1), 5),
}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that nobody has written holds NaN, or the largest integer."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    use_kernels("auto")


def weight(outputs: int, length: int, bias: bool, skew: bool) -> tuple[Tensor, dict[str, Any]]:
    """Codes ``(O, K)``, and the tensors of a packed layer that has them."""
    codes = torch.randint(-1, 2, (outputs, length), dtype=torch.int8, device=DEVICE)
    return codes, {
        "codes": pack_codes(codes),
        "scale": torch.rand(outputs, device=DEVICE) + 0.5,
        "bias": torch.randn(outputs, device=DEVICE) if bias else None,
        "skew": torch.randn(outputs, device=DEVICE) if skew else None,
    }


def linear(module: Any, x: Tensor, tensors: dict[str, Any], bits: int | None) -> Tensor:
    y: Tensor = module.linear(x, **tensors, group_size=None, activation_bits=bits)
    return y


def conv2d(module: Any, x: Tensor, tensors: dict[str, Any], kind: str, bits: int | None) -> Tensor:
    _, channels, _, _, outputs, kernel, stride, padding, groups = CONVOLUTIONS[kind]
    y: Tensor = module.conv2d(
        x,
        **tensors,
        weight_shape=(outputs, channels // groups, *kernel),
        stride=stride,
        padding=padding,
        groups=groups,
        group_size=None,
        activation_bits=bits,
    )
    return y


def image(kind: str, bias: bool = True, skew: bool = False) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Inputs of a convolution, its codes and its tensors."""
    batch, channels, height, width, outputs, kernel, _, _, groups = CONVOLUTIONS[kind]
    codes, tensors = weight(outputs, channels // groups * kernel[0] * kernel[1], bias, skew)
    return torch.randn(batch, channels, height, width, device=DEVICE), codes, tensors


def double(tensors: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tensor.double() if tensor is not None and tensor.dtype == torch.float32 else tensor
        for name, tensor in tensors.items()
    }


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    """The largest error is a fraction of the largest value."""
    assert got.shape == want.shape
    assert float((got.double() - want.double()).abs().max()) <= tolerance * float(want.abs().max())


@pytest.mark.parametrize(("bias", "skew"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("size", SIZES)
def test_linear_equals_the_reference(size: tuple[int, int, int], bias: bool, skew: bool) -> None:
    x = torch.randn(size[0], size[1], device=DEVICE)
    _, tensors = weight(size[2], size[1], bias, skew)
    assert_near(linear(fast, x, tensors, None), linear(reference, x.double(), double(tensors), None), 1e-5)
    assert_near(linear(fast, x, tensors, 8), linear(reference, x, tensors, 8), 1e-5)


@pytest.mark.parametrize(("bias", "skew"), [(False, False), (True, True)])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution_equals_the_reference(kind: str, bias: bool, skew: bool) -> None:
    x, _, tensors = image(kind, bias, skew)
    assert_near(conv2d(fast, x, tensors, kind, None), conv2d(reference, x.double(), double(tensors), kind, None), 1e-5)
    assert_near(conv2d(fast, x, tensors, kind, 8), conv2d(reference, x, tensors, kind, 8), 1e-5)


@pytest.mark.parametrize("skew", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_sums_of_integers_are_exact(size: tuple[int, int, int], skew: bool) -> None:
    # with a largest magnitude of 127 the step is 1
    x = torch.randint(-127, 128, size[:2], device=DEVICE).float()
    x[:, 0] = 127
    codes, tensors = weight(size[2], size[1], False, skew)
    tensors |= {name: torch.ones_like(tensors[name]) for name in ("scale", "skew") if tensors[name] is not None}
    wanted = functional.linear(x.double(), codes.double() + codes.double().abs() * skew)
    assert torch.equal(linear(fast, x, tensors, 8).double(), wanted)


@pytest.mark.parametrize("skew", [False, True])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_sums_of_convolutions_are_exact(kind: str, skew: bool) -> None:
    x, codes, tensors = image(kind, False, skew)
    x = torch.randint_like(x, -127, 128)
    x[:, 0, 0, 0] = 127
    tensors |= {name: torch.ones_like(tensors[name]) for name in ("scale", "skew") if tensors[name] is not None}
    _, channels, _, _, outputs, kernel, stride, padding, groups = CONVOLUTIONS[kind]
    values = (codes + codes.abs() * skew).double().view(outputs, channels // groups, *kernel)
    wanted = functional.conv2d(x.double(), values, None, stride, padding, 1, groups).round()
    assert torch.equal(conv2d(fast, x, tensors, kind, 8).double(), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [None, 8])
def test_half_precision(dtype: torch.dtype, bits: int | None) -> None:
    for size in ((3, 127, 17), (33, 127, 17)):
        x = torch.randn(size[0], size[1], device=DEVICE).to(dtype)
        _, tensors = weight(size[2], size[1], True, True)
        y = linear(fast, x, tensors, bits)
        assert y.dtype == stored(dtype)
        assert_near(y, linear(reference, x.float(), tensors, bits), 1e-2)
    x, _, tensors = image("3x3")
    x = x.to(dtype)
    y = conv2d(fast, x, tensors, "3x3", bits)
    assert y.dtype == stored(dtype)
    assert_near(y, conv2d(reference, x.float(), tensors, "3x3", bits), 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_levels_are_those_of_the_reference(dtype: torch.dtype) -> None:
    x = torch.randn(70, 300, device=DEVICE) * torch.logspace(-6, 4, 70, device=DEVICE)[:, None]
    # halves between two levels, zeros, and what is below the smallest normal number
    x[0] = torch.arange(300, device=DEVICE) % 128 - 0.5
    x[0, 0] = 127
    x[1] = 0
    x[2] = torch.randn(300, device=DEVICE) * 1e-40
    x = x.to(dtype)
    levels = torch.empty(70, 304, dtype=torch.int8, device=DEVICE)
    step = fast._rounded(x, levels)
    wanted, wanted_step = quantize_activations(x.float())
    assert torch.equal(levels[:, :300].float(), wanted)
    assert torch.equal(levels[:, 300:], torch.zeros_like(levels[:, 300:]))
    assert torch.equal(step[:, None], wanted_step)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("strange", [torch.nan, torch.inf])
def test_strange_values(strange: float) -> None:
    x = torch.randn(7, 20, device=DEVICE)
    x[2, 3] = strange
    _, tensors = weight(5, 20, True, False)
    for bits in (None, 8):
        y, wanted = (linear(module, x, tensors, bits) for module in (fast, reference))
        assert torch.equal(y.isfinite(), wanted.isfinite())
        assert torch.equal(y.isfinite().all(dim=1), torch.arange(7, device=DEVICE) != 2)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("kind", ["3x3", "1x1", "groups", "depthwise"])
def test_any_layout_gives_the_same(kind: str, bits: int | None) -> None:
    x, _, tensors = image(kind)
    first = conv2d(fast, x, tensors, kind, bits)
    wide = torch.zeros(*x.shape[:3], 2 * x.shape[3], device=DEVICE)
    wide[..., ::2] = x
    last = x.contiguous(memory_format=torch.channels_last)
    for other in (last, wide[..., ::2], x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        y = conv2d(fast, other, tensors, kind, bits)
        assert torch.equal(y, first)
        assert y.is_contiguous(memory_format=layout(other))


def test_is_deterministic() -> None:
    x, _, tensors = image("3x3")
    rows = torch.randn(3, 300, device=DEVICE)
    _, own = weight(5, 300, True, True)
    for run in (lambda: conv2d(fast, x, tensors, "3x3", None), lambda: linear(fast, rows, own, None)):
        assert torch.equal(run(), run())


@pytest.mark.parametrize(("tokens", "outputs"), [(0, 3), (3, 0)])
def test_nothing_to_do(tokens: int, outputs: int) -> None:
    _, tensors = weight(outputs, 9, True, False)
    assert linear(fast, torch.randn(tokens, 9, device=DEVICE), tensors, 8).shape == (tokens, outputs)
    options: dict[str, Any] = {"weight_shape": (outputs, 1, 3, 3), "stride": (1, 1), "padding": (0, 0), "groups": 1}
    x = torch.randn(tokens, 1, 5, 4, device=DEVICE)
    y = fast.conv2d(x, **tensors, **options, group_size=None, activation_bits=8)
    assert y.shape == (tokens, outputs, 3, 2)


@pytest.mark.parametrize("bits", [None, 8])
def test_behind_the_public_ops(bits: int | None) -> None:
    use_kernels("triton")
    _, tensors = weight(5, 20, True, False)
    x = torch.randn(2, 3, 20, device=DEVICE, dtype=torch.float16)

    def run(x: Tensor) -> Tensor:
        codes, scale = tensors["codes"], tensors["scale"]
        y = ternary_linear(x, codes, scale, tensors["bias"], activation_bits=bits)
        images = y.view(2, 1, 3, 5).contiguous(memory_format=torch.channels_last)
        return ternary_conv2d(images, codes[:4], scale[:4], weight_shape=(4, 1, 4, 5), padding=(2, 1))

    y = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    assert y.dtype == x.dtype
    assert chosen_kernels() == {"ternary_linear": "triton"}
    use_kernels("reference")
    assert_near(y, run(x), 1e-2)


def test_declines_with_a_reason() -> None:
    use_kernels("triton")
    codes = pack_codes(torch.ones(3, 20, device=DEVICE))
    x = torch.randn(2, 20, device=DEVICE)
    ternary_linear(x, codes, torch.rand(3, 4, device=DEVICE), group_size=5)
    assert chosen_kernels() == {"ternary_linear": "reference (scales differ by group)"}
    ternary_linear(x.double(), codes, torch.rand(3, device=DEVICE))
    assert chosen_kernels() == {"ternary_linear": "reference (computes in float64)"}


@pytest.mark.parametrize("blocks", [HALVES, GATHERED, FLOATS])
def test_there_is_a_block_for_every_batch(blocks: Any) -> None:
    configs = [
        triton.Config({"TOKENS": tokens, "OUTPUTS": outputs, "INPUTS": inputs}, num_warps=warps)
        for tokens, outputs, inputs, warps in blocks
    ]
    for skewed in (False, True):
        found = [fitting(configs, size, skewed) for size in range(24)]
        assert all(config.kwargs["TOKENS"] == 16 for config in found[3])
        assert all(set(map(str, few)) <= set(map(str, more)) for few, more in itertools.pairwise(found))
        assert found[0] and (skewed or found[-1] == configs)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("name", ["ternary_mlp", "ternary_resnet"])
def test_packed_models_equal_the_reference(name: str, bits: int | None) -> None:
    options: dict[str, Any] = {"widths": [20, 12]}
    if name == "ternary_resnet":
        options = {"depth": 20, "widths": [4, 8, 8], "blocks": [1, 1, 1], "stem": "cifar"}
    model: nn.Module = REGISTRY.get_model(name)(input_shape=(3, 8, 8), num_classes=10, activation_bits=bits, **options)
    packed = pack(model.to(DEVICE))
    x = torch.randn(5, 3, 8, 8, device=DEVICE)
    results = []
    for kernels in ("triton", "reference"):
        use_kernels(kernels)
        with torch.no_grad():
            results.append(packed(x))
        assert chosen_kernels() == {"ternary_linear": kernels}
    # an activation between two levels may fall on either side
    assert_near(results[0], results[1], 1e-5 if INTERPRETED or bits is None else 1e-2)
