"""torch_compile=True: a model is not compiled anew for every layout of packed rows, and computes the same."""

import pytest
import torch
from families import make_model, random_rows
from torch._dynamo.utils import counters

from treerpo_trl.prefix_sharing import forward_shared, install


@pytest.fixture
def dynamo():
    """A compiler that has compiled nothing, and leaves nothing behind."""
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@pytest.mark.slow
def test_new_layouts_are_not_compiled_anew(dynamo):
    """With the attention of every layer compiled, training took eight times as long to start."""
    model = make_model("qwen2")
    install(model)
    compiled = torch.compile(model, backend="eager")
    graphs = []
    for seed in range(6):
        rows = random_rows(seed, "all")
        results = []
        for one in (model, compiled):
            model.zero_grad()
            outputs = forward_shared(one, rows.input_ids, rows.attention_mask, rows.needed)
            (outputs.log_probs * rows.needed).sum().backward()
            results.append([outputs.log_probs.detach(), *(p.grad.clone() for p in model.parameters())])
        for plain, same in zip(*results, strict=True):
            torch.testing.assert_close(same, plain, atol=1e-5, rtol=1e-4)
        graphs.append(dynamo["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[2] == graphs[-1]  # from the second length on, lengths are dynamic
