"""Score norms measured while sampling: those of a plain forward pass, whatever the way the tokens came."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import EOS, PAD, tiny_config
from transformers import AutoModelForCausalLM, GenerationConfig

from treerpo_trl.growth import TreeShape, grow
from treerpo_trl.growth.backends import TransformersBackend
from treerpo_trl.growth.backends.token_statistics import TokenStatistics
from treerpo_trl.tree import Segment, Tree


PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 5]]  # padded on the left
SHAPE = TreeShape((2, 3, 2), 4, 11)


@pytest.fixture(scope="module")
def sharp_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(initializer_range=0.3)).eval()


def grow_trees(model, with_score_norms=True, max_rows=64, fork_caches=True, seed=0, **options) -> list[Tree]:
    given_options = {"do_sample": True, "eos_token_id": [EOS], "pad_token_id": PAD, "disable_compile": True, **options}
    backend = TransformersBackend(
        model, GenerationConfig(**given_options), [EOS], PAD, max_rows, fork_caches=fork_caches,
        statistics=("score_norm",) if with_score_norms else (),
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.no_grad():
        return grow(PROMPTS, SHAPE, backend)


def plain_norms(model, tree: Tree, temperature: float) -> dict[int, float]:
    """Node -> sum over its tokens of |onehot - p|^2, from one sequence a leaf."""
    norms: dict[int, float] = {}
    for leaf in tree.leaves:
        ids = torch.tensor([[*tree.prompt_ids, *tree.completion_ids(leaf)]])
        with torch.no_grad():
            probs = (model(input_ids=ids).logits[0, :-1].double() / temperature).softmax(-1)
        squares = (torch.nn.functional.one_hot(ids[0, 1:], probs.size(-1)) - probs).square().sum(-1)
        start = len(tree.prompt_ids) - 1
        for node in tree.path(leaf):
            end = start + len(tree.nodes[node].token_ids)
            norms[node] = squares[start:end].sum().item()
            start = end
    return norms


@pytest.mark.parametrize("fork_caches", [True, False])
@pytest.mark.parametrize("max_rows", [64, 5])
@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 2.0}, {"temperature": 0.6, "top_k": 3}, {}])
def test_score_norms_are_those_of_a_plain_pass(sharp_model, fork_caches, max_rows, options):
    """With left padding, early ends, chunks, forks and prefills, temperature; a filter changes what is drawn only."""
    trees = grow_trees(sharp_model, max_rows=max_rows, fork_caches=fork_caches, **options)
    for tree in trees:
        expected = plain_norms(sharp_model, tree, options.get("temperature", 1.0))
        found = {node: tree.nodes[node].score_norm for node in range(1, len(tree.nodes))}
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert any(len(node.token_ids) < 4 and node.ended for tree in trees for node in tree.nodes[1:])


@pytest.mark.parametrize("seed", range(2))
def test_measuring_draws_the_same_tokens(sharp_model, seed):
    measured, plain = (
        grow_trees(sharp_model, with_score_norms, seed=seed, top_p=0.9, max_rows=7)
        for with_score_norms in (True, False)
    )
    assert [[node.token_ids for node in tree.nodes] for tree in measured] == [
        [node.token_ids for node in tree.nodes] for tree in plain
    ]
    assert all(node.score_norm is None for tree in plain for node in tree.nodes)


def measure(logits_TV: torch.Tensor, drawn_T: list[int], temperature: float | None = None) -> float:
    """The score norm of one row that draws these tokens."""
    norms, ids = TokenStatistics(["score_norm"], temperature), torch.tensor([[2]])
    for logits, token in zip(logits_TV, drawn_T, strict=True):
        assert norms(ids, logits[None]) is not None
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    (segment,) = norms.attach([Segment(tuple(drawn_T), False)], ids)
    return segment.score_norms and sum(segment.score_norms)


def test_golden_score_norms():
    """p = 1/4, 1/4, 1/2: 1 - 2/4 + 6/16 = 7/8 for the first, 1 - 1 + 6/16 for the last token; both in turn."""
    logits = torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert measure(logits, [0]) == pytest.approx(7 / 8)
    assert measure(logits.repeat(2, 1), [0, 2]) == pytest.approx(7 / 8 + 3 / 8)
    assert measure(logits * 3, [0], temperature=3.0) == pytest.approx(7 / 8)


@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=6), st.integers(0, 5))
def test_the_norm_of_a_sure_token_is_small_and_never_negative(logits, token):
    """1 - 2 p + sum p^2 as it stands loses all digits next to p = 1, in single precision."""
    token %= len(logits)
    exact = torch.tensor(logits).double().softmax(-1)
    exact[token] = -(exact.sum() - exact[token])
    expected = exact.square().sum().item()
    assert measure(torch.tensor([logits]), [token]) == pytest.approx(expected, rel=1e-3, abs=1e-13)
