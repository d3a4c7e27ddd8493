"""What holds for every part that is a module: gradients, checkpoints, devices, repetition."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from difflut_lab.testing.subject import Subject, normal, shape_of

STEPS = 3
Forward = Callable[[Any, Tensor], Tensor]
Loss = Callable[[Tensor, int], Tensor]


def call(module: Any, x: Tensor) -> Tensor:
    """The module as it is."""
    output: Tensor = module(x)
    return output


def run(subject: Subject, what: str, module: Any, x: Tensor, forward: Forward = call) -> Tensor:
    """A forward, which must give a tensor and leave its input alone."""
    before = x.detach().clone()
    with subject.doing(what):
        output = forward(module, x)
    subject.require(isinstance(output, Tensor), f"{what} gave {shape_of(output)}, not a tensor.")
    subject.require(
        torch.equal(before, x.detach()),
        f"{what} changed its input in place, which other parts may still read. Work on a copy.",
    )
    return output


def to_random_targets(y: Tensor, step: int) -> Tensor:
    """The mean squared distance from targets that are others in each step."""
    return (y - normal(*y.shape, seed=step).to(y)).square().mean()


def train(
    subject: Subject,
    module: nn.Module,
    x: Tensor,
    steps: int = STEPS,
    loss: Loss = to_random_targets,
    reaches_input: bool = True,
) -> Tensor:
    """Train a few steps; gradients must be finite and reach everything that is trained.

    Parameters
    ----------
    subject : Subject
        For messages.
    module : Module
        What is trained.
    x : Tensor
        Inputs.
    steps : int
        How many.
    loss : callable
        The loss of outputs in a step.
    reaches_input : bool
        Whether the input must get a gradient as well, for the parts below to learn by.

    Returns
    -------
    Tensor
        The outputs of the last step.
    """
    module.train()
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.Adam(list(trained.values()), lr=0.05) if trained else None
    reached: set[str] = set()
    for step in range(steps):
        inputs = x.clone().requires_grad_(reaches_input)
        y = run(subject, "a training forward", module, inputs)
        subject.require(bool(torch.isfinite(y).all()), f"step {step} of training gave outputs that are not finite.")
        subject.require(
            y.requires_grad,
            "outputs in training mode have no gradient: nothing can be trained. Do not detach or round them without a "
            "straight-through gradient.",
        )
        if optimizer:
            optimizer.zero_grad()
        with subject.doing("the backward of a training step"):
            loss(y, step).backward()
        for name, tensor in [*trained.items(), ("the input", inputs)]:
            if tensor.grad is None:
                continue
            subject.require(
                bool(torch.isfinite(tensor.grad).all()),
                f"the gradient of {_named(name, tensor)} is not finite in step {step} of training.",
            )
            if tensor.grad.any():
                reached.add(name)
        if optimizer:
            optimizer.step()
    for name, parameter in trained.items():
        kind = "no gradient" if parameter.grad is None else "a gradient of zeros only"
        subject.require(
            name in reached,
            f"{_named(name, parameter)} got {kind} in {steps} steps of training. Use it in the forward, without "
            "detach and with operations that have a gradient; if it is not to be trained, make it a buffer "
            "(register_buffer).",
        )
    subject.require(
        "the input" in reached or not reaches_input,
        f"its input of shape {shape_of(x)} got no gradient other than zero in {steps} steps of training, so that "
        "nothing below could learn.",
    )
    return y.detach()


def check_registered_tensors(subject: Subject, module: nn.Module) -> None:
    """Tensors kept as plain attributes are neither saved nor moved."""
    for path, child in module.named_modules():
        for name, value in vars(child).items():
            held = value if isinstance(value, list | tuple) else [value]
            if name.startswith("__") or not any(isinstance(entry, Tensor) for entry in held):
                continue
            where = f"{path}.{name}" if path else name
            subject.fail(
                f"'{where}' is a tensor in a plain attribute: checkpoints lose it and .to(device) leaves it behind. "
                f'Keep it with self.register_buffer("{name}", tensor).'
            )


def check_round_trip(
    subject: Subject,
    module: nn.Module,
    fresh: nn.Module,
    x: Tensor,
    modes: Mapping[str, Forward],
    differently: str = "",
) -> None:
    """The state_dict of a trained part, loaded into a freshly built one, must make it the same.

    Parameters
    ----------
    subject : Subject
        For messages.
    module, fresh : Module
        The trained part, and one that was built anew.
    x : Tensor
        Inputs to compare them on.
    modes : mapping
        Forwards to compare, by what messages call them.
    differently : str
        In what the new one differs.
    """
    load(subject, fresh, module, differently)
    for name, forward in modes.items():
        wanted = run(subject, f"a forward {name}", module, x, forward)
        got = run(subject, f"a forward {name} of a part that a checkpoint was loaded into", fresh, x, forward)
        subject.require(
            got.shape == wanted.shape and torch.equal(got, wanted),
            f"loaded from a checkpoint into a part built anew{differently}, it gives other outputs {name}: something "
            "that it computes with is not in its state_dict. Keep it as a parameter, or as a buffer with "
            "self.register_buffer(name, tensor).",
        )


def load(subject: Subject, fresh: nn.Module, module: nn.Module, differently: str = "") -> None:
    """Load the state_dict of a part into one built anew, by way of a file as a checkpoint does."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    try:
        fresh.load_state_dict(torch.load(file, weights_only=True))
    except Exception as error:  # what a part's own hooks and extra state may raise
        said = " ".join(str(error).split())
        raise AssertionError(
            f"{subject.kind} '{subject.label}': the state_dict of a trained part does not load into a part built anew"
            f"{differently}, as it would from a checkpoint: {said} Make all parameters and buffers in __init__."
        ) from error


def check_repeats(subject: Subject, build: Callable[[], nn.Module], x: Tensor, **training: Any) -> None:
    """Two trainings from one seed must be equal bit for bit; ``training`` is handed on to ``train``."""
    first, again = build(), build()
    for name, value in first.state_dict().items():
        subject.require(
            _same(value, again.state_dict()[name]),
            f"two parts built alike start with another '{name}'. Draw everything random from a generator of its own, "
            'difflut_lab.seeding.generator(self.seed, "purpose").',
        )
    outputs = [train(subject, module, x, **training) for module in (first, again)]
    states = [module.state_dict() for module in (first, again)]
    differing = [name for name, value in states[0].items() if not _same(value, states[1][name])]
    subject.require(
        not differing and torch.equal(*outputs),
        f"two trainings from the same seed differ{' in ' + ', '.join(differing) if differing else ''}. Draw everything "
        "random from a generator of its own, and sum in a fixed order: no scatter_add_ or index_add_ with duplicates.",
    )


def check_evaluates(subject: Subject, module: nn.Module, x: Tensor, forward: Forward = call) -> Tensor:
    """In eval mode a forward changes nothing and treats every sample by itself; gives the outputs."""
    module.eval()
    before = copy.deepcopy(module.state_dict())
    first = run(subject, "a forward in eval mode", module, x, forward)
    again = run(subject, "a forward in eval mode", module, x, forward)
    subject.require(
        torch.equal(first, again),
        "two forwards of the same input differ in eval mode. What is random acts where self.training is true only.",
    )
    for name, value in module.state_dict().items():
        subject.require(
            _same(value, before[name]),
            f"a forward in eval mode changed '{name}'. Counters and statistics move where self.training is true only.",
        )
    for sample in (0, len(x) - 1):
        alone = run(subject, "a forward of a single sample in eval mode", module, x[sample : sample + 1], forward)
        subject.require(
            alone.shape == first[sample : sample + 1].shape
            and torch.allclose(alone, first[sample : sample + 1], rtol=1e-4, atol=1e-6),
            f"in eval mode the output of sample {sample} depends on the other samples of its batch: alone it has shape "
            f"{shape_of(alone)} or other values.",
        )
    return first


def check_moves(subject: Subject, module: nn.Module, x: Tensor, *, trains: bool = True) -> None:
    """It must follow .to(dtype) and .to(device)."""
    for device in devices():
        there = x.to(device)
        with subject.doing(f".to('{device}')"):
            module.to(device)
        y = run(subject, f"a forward on {device}", module.eval(), there)
        subject.require(
            y.device == there.device,
            f"its outputs are on {y.device} after .to('{device}'). Make tensors on the device of the input, or keep "
            "them as buffers.",
        )
        if trains:
            train(subject, module, there, steps=1)
        module.to("cpu")
    with subject.doing(".to(torch.float64)"):
        module.to(torch.float64)
    y = run(subject, "a forward in float64", module.eval(), x.double())
    subject.require(
        y.dtype == torch.float64,
        f"its outputs are {y.dtype} for inputs of float64, after .to(torch.float64). Take the dtype of the input.",
    )
    if trains:
        y = train(subject, module, x.double(), steps=1)
        subject.require(y.dtype == torch.float64, f"in training its outputs are {y.dtype} for inputs of float64.")
    with subject.doing(".to('meta')"):
        module.to("meta")
    for name, tensor in module.state_dict().items():
        subject.require(tensor.is_meta, f"'{name}' did not follow .to('meta').")


def check_schedulable(subject: Subject, module: nn.Module) -> None:
    """What a schedule may move must be a number that is there under its name."""
    for name in getattr(module, "SCHEDULABLE", ()):
        value = getattr(module, name, None)
        subject.require(
            isinstance(value, int | float) and not isinstance(value, bool),
            f"SCHEDULABLE names '{name}', but self.{name} is {value!r}. Keep a plain number there, which the forward "
            "reads anew each time.",
        )


def devices() -> list[str]:
    """Devices other than the CPU to check on."""
    return ["cuda"] if torch.cuda.is_available() else []


def _same(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor):
        return bool(first == second)
    # thresholds are NaN until they are fitted
    return first.shape == second.shape and torch.equal(torch.nan_to_num(first), torch.nan_to_num(second))


def _named(name: str, tensor: Tensor) -> str:
    what = "its input" if name == "the input" else f"the parameter '{name}'"
    return f"{what} of shape {shape_of(tensor)}"
