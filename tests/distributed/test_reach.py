"""How much of the model retention reaches is the same however many processes share it, and one of them says it."""

import pytest


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2", "fsdp1"])
def test_one_process_warns_of_the_whole_model(processes, parallel):
    (message,), nothing = processes.run(2, "reach.warned", parallel=parallel)
    assert "in 4.7% of the trainable elements" in message
    assert nothing == []
