"""The memory meter on cases whose answer is known."""

import pytest
import torch
from gradient_copies import base_alone, copies_over_base
from peak_memory import peak_bytes

MB = 1 << 20


def empty(megabytes):
    return torch.empty(megabytes * MB, dtype=torch.uint8)


def test_what_is_freed_does_not_count_and_the_highest_point_does():
    def run():
        first = empty(3)
        del first
        second, third = empty(5), empty(1)
        del second, third
        return empty(4)

    assert peak_bytes(run) == 6 * MB


def test_memory_inside_of_an_operation_counts():
    """A convolution of few channels unfolds its input, which no tensor of ours shows."""
    weight, x = torch.randn(4, 4, 3, 3, dtype=torch.float64), torch.randn(1, 4, 256, 256, dtype=torch.float64)
    (out,) = torch.nn.functional.conv2d(x, weight)
    assert peak_bytes(lambda: torch.nn.functional.conv2d(x, weight)) > 5 * out.nbytes


def with_copies(count):
    """AdamW, with so many more copies of the gradients while it steps."""

    def stepper(base, retention):
        def step():
            parameters = [p for group in base.param_groups for p in group["params"]]
            copies = [p.grad.clone() for p in parameters for _ in range(count)]
            base.step()
            copies.clear()

        return step

    return stepper


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_step_with_more_copies_of_the_gradients(count):
    assert copies_over_base(with_copies(count)) == pytest.approx(count, abs=0.002)


def test_retention_gradients_beside_those_of_the_task_are_one_copy():
    """What a step has to hold, whoever does it."""

    def stepper(base, retention):
        parameters = [p for group in base.param_groups for p in group["params"]]

        def step():
            task = [p.grad for p in parameters]
            base.zero_grad()
            retention().backward()
            for p, t in zip(parameters, task, strict=True):
                p.grad.add_(t)
            base.step()

        return step

    assert copies_over_base(stepper) == pytest.approx(1.0, abs=0.005)
    assert copies_over_base(base_alone) == 0.0
