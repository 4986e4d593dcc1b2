"""Trees of every split rule from a transformers model: right tokens, right statistics, and what they cost."""

import pytest
import torch
from test_backend_transformers import FAMILIES, PROMPTS, count_positions
from tiny import EOS, PAD, make_tokenizer, tiny_config
from transformers import AutoModelForCausalLM, GenerationConfig

from treerpo_trl.growth import Delimiters, ForkShape, TreeShape, Wave, grow
from treerpo_trl.growth.backends import TransformersBackend
from treerpo_trl.tree import ROOT, Tree


TOKENIZER = make_tokenizer()
# What the models write most, and two texts that they write now and then.
LONGEST = 14
SHAPES = {
    "length": TreeShape((2, 2, 2), 5, LONGEST),
    "delimiter": TreeShape((2, 2, 2), 5, LONGEST, Delimiters(("3", "=", "b"), 1)),
    "delimiter, long": TreeShape((2, 2), 9, LONGEST, Delimiters(("+", "5a", "h"), 3)),
    "forks": ForkShape(2, 2, 2, num_rounds=2, min_segment_length=1, max_completion_length=LONGEST),
    "forks, apart": ForkShape(1, 3, 1, num_rounds=1, min_segment_length=3, max_completion_length=LONGEST),
}


def config_of(**options) -> GenerationConfig:
    return GenerationConfig(
        **{"do_sample": True, "eos_token_id": [EOS], "pad_token_id": PAD, "disable_compile": True, **options}
    )


def make_backend(model, max_rows=64, fork_caches=True, statistics=("surprisal", "score_norm"), **options):
    return TransformersBackend(
        model, config_of(**options), [EOS], PAD, max_rows, TOKENIZER, fork_caches, statistics=statistics
    )


def grow_trees(model, shape, prompts=PROMPTS, seed=0, **options) -> list[Tree]:
    torch.manual_seed(seed)
    with torch.no_grad():
        return grow(prompts, shape, make_backend(model, **options))


def make(name: str):
    torch.manual_seed(0)
    config = FAMILIES.get(name) or tiny_config(initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def sharp_model():
    return make("qwen2")


def plain(model, **options) -> list[list[int]]:
    """What one call of `generate` makes of each prompt alone, up to its end."""
    completions = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        config = config_of(do_sample=False, max_new_tokens=LONGEST, **options)
        (output,) = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, tokenizer=TOKENIZER
        ).tolist()
        new = output[len(prompt) :]
        completions.append(new[: new.index(EOS) + 1] if EOS in new else new)
    return completions


@pytest.mark.parametrize(
    ("family", "rule", "fork_caches"),
    [
        ("llama", "length", True),
        ("llama", "delimiter", True),
        ("llama", "forks", False),
        ("mistral_sliding_window", "delimiter", True),
        ("mistral_sliding_window", "forks", True),
        ("gpt2", "delimiter", False),
        ("gpt2", "forks, apart", True),
        ("qwen2", "forks", True),
    ],
)
def test_greedy_paths_are_what_generate_writes(family, rule, fork_caches):
    """Whatever the cuts and forks, of prompts of several lengths, five rows at a time."""
    model = make(family)
    trees = grow_trees(model, SHAPES[rule], do_sample=False, fork_caches=fork_caches, max_rows=5)
    for tree, expected in zip(trees, plain(model), strict=True):
        assert [tree.completion_ids(leaf) for leaf in tree.leaves] == [expected] * len(tree.leaves)
        assert all(tree.nodes[leaf].ended == (expected[-1] == EOS) for leaf in tree.leaves)
    nodes = [node for tree in trees for node in tree.nodes[1:]]
    assert rule == "length" or len({len(node.token_ids) for node in nodes}) > 2


def plain_statistics(model, tree: Tree, temperature: float) -> dict[str, dict[int, list[float]]]:
    """Name -> node -> numbers of its tokens, from one pass over each path."""
    found: dict[str, dict[int, list[float]]] = {"surprisal": {}, "entropy": {}, "score_norm": {}}
    for leaf in tree.leaves:
        ids = torch.tensor([[*tree.prompt_ids, *tree.completion_ids(leaf)]])
        with torch.no_grad():
            log_probs = (model(input_ids=ids).logits[0, :-1].double() / temperature).log_softmax(-1)
        one_hot = torch.nn.functional.one_hot(ids[0, 1:], log_probs.size(-1))
        numbers = {
            "surprisal": -(log_probs * one_hot).sum(-1),
            "entropy": -(log_probs.exp() * log_probs).sum(-1),
            "score_norm": (one_hot - log_probs.exp()).square().sum(-1),
        }
        start = len(tree.prompt_ids) - 1
        for node in tree.path(leaf):
            end = start + len(tree.nodes[node].token_ids)
            for name, values in numbers.items():
                found[name][node] = values[start:end].tolist()
            start = end
    return found


@pytest.mark.parametrize(
    ("family", "rule", "measure", "options"),
    [
        ("llama", "forks", "surprisal", {"temperature": 1.0}),
        ("mistral_sliding_window", "forks", "entropy", {"temperature": 1.7, "max_rows": 5}),
        ("qwen2", "forks", "surprisal", {"temperature": 0.6, "top_k": 5, "fork_caches": False}),
        ("gpt2", "delimiter", "entropy", {}),
        ("qwen2", "delimiter", "surprisal", {"temperature": 1.7, "max_rows": 5}),
        ("mistral_sliding_window", "length", "entropy", {"temperature": 0.6}),
    ],
)
def test_statistics_are_those_of_a_plain_pass(family, rule, measure, options):
    """Of every node, also where it was cut; a filter changes what is drawn only."""
    model = make(family)
    trees = grow_trees(model, SHAPES[rule], statistics=(measure, "score_norm"), **options)
    for tree in trees:
        expected = plain_statistics(model, tree, options.get("temperature", 1.0))
        for index, node in enumerate(tree.nodes[1:], start=1):
            assert node.uncertainties == pytest.approx(expected[measure][index], rel=1e-3, abs=1e-4)
            assert node.score_norms == pytest.approx(expected["score_norm"][index], rel=1e-3, abs=1e-4)
    nodes = [node for tree in trees for node in tree.nodes[1:]]
    assert any(node.is_rest for node in nodes) == ("forks" in rule)
    assert any(node.ended and len(node.token_ids) < 5 for node in nodes)


def test_forks_are_at_the_least_certain_tokens_of_a_plain_pass(sharp_model):
    shape = ForkShape(1, 1, 1, num_rounds=1, min_segment_length=1, max_completion_length=LONGEST)
    for tree in grow_trees(sharp_model, shape, suppress_tokens=[EOS], statistics=("entropy",)):
        trunk = next(leaf for leaf in tree.leaves if tree.nodes[leaf].is_rest)
        numbers = plain_statistics(sharp_model, tree, 1.0)["entropy"]
        whole = [number for node in tree.path(trunk) for number in numbers[node]]
        assert len(tree.nodes[1].token_ids) == max(range(1, LONGEST), key=whole.__getitem__)


def test_rows_of_one_call_end_at_limits_of_their_own(sharp_model):
    """And have not ended, unless they drew the end at the limit or above it."""
    limits = (1, 3, 6, 2, 6)
    prompts = [[5], [6, 7], [8], [9, 10, 11], [12]]
    trees = [Tree.from_prompt(prompt) for prompt in prompts]
    wave = Wave(tuple((index, ROOT) for index in range(5)), 8, limits, is_last=True)
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = make_backend(sharp_model, max_rows=16).extend(trees, wave)
    for limit, group in zip(limits, drawn, strict=True):
        for segment in group:
            assert len(segment.token_ids) == limit or (segment.ended and len(segment.token_ids) < limit)
            assert segment.ended == (segment.token_ids[-1] == EOS) and EOS not in segment.token_ids[:-1]
            assert len(segment.uncertainties) == len(segment.score_norms) == len(segment.token_ids)
    assert any(segment.ended for group in drawn for segment in group)
    assert {len(segment.token_ids) for segment in drawn[2]} > {6}


def text_of(tree: Tree, node: int) -> str:
    return TOKENIZER.decode(tree.nodes[node].token_ids)


@pytest.mark.parametrize("max_rows", [64, 3])
def test_delimiters_end_segments_and_nothing_else(sharp_model, max_rows):
    shape = SHAPES["delimiter, long"]
    trees = grow_trees(sharp_model, shape, prompts=PROMPTS * 4, temperature=2.0, max_rows=max_rows)
    ends = 0
    for tree in trees:
        for index, node in enumerate(tree.nodes[1:], start=1):
            text, is_last = text_of(tree, index), tree.depths[index] == shape.max_depth
            by_delimiter = text.endswith(shape.delimiters.texts) and len(node.token_ids) >= 3
            is_full = len(node.token_ids) == shape.segment_length or tree.lengths[index] == LONGEST
            assert node.ended == (node.token_ids[-1] == EOS)
            assert is_last or node.ended or by_delimiter or is_full
            ends += by_delimiter and not is_last and not is_full
            for end in range(3, 0 if is_last else len(node.token_ids)):
                assert not TOKENIZER.decode(node.token_ids[:end]).endswith(shape.delimiters.texts)
    assert ends > 5


@pytest.mark.parametrize("rule", ["delimiter", "forks"])
def test_stop_strings_end_a_path_of_every_rule(sharp_model, rule):
    """They may begin above a segment or a fork; where one is a delimiter, too, the path is over."""
    stops = ["3", "ab", "5"]
    trees = grow_trees(sharp_model, SHAPES[rule], prompts=PROMPTS * 4, temperature=2.0, stop_strings=stops)
    stopped = 0
    for tree in trees:
        for leaf in tree.leaves:
            ids = tree.completion_ids(leaf)
            text, is_stop = TOKENIZER.decode(ids), TOKENIZER.decode(ids).endswith(tuple(stops))
            assert tree.nodes[leaf].ended == (is_stop or ids[-1] == EOS)
            assert not any(stop in text[:-1] for stop in stops)
            stopped += is_stop
    assert stopped > 10


@pytest.mark.parametrize("pad", [PAD, EOS])
def test_a_delimiter_that_comes_with_the_end_ends_the_path(sharp_model, pad):
    """The end of sequence is a text, too: a segment that it completes has ended and does not branch."""
    shape = TreeShape((3, 3), 6, LONGEST, Delimiters(("<eos>", "2"), 1))
    backend = TransformersBackend(sharp_model, config_of(temperature=2.0, pad_token_id=pad), [EOS], pad, 64, TOKENIZER)
    torch.manual_seed(0)
    with torch.no_grad():
        trees = grow(PROMPTS * 3, shape, backend)
    nodes = [node for tree in trees for node in tree.nodes[1:]]
    assert any(node.ended for tree in trees for node in (tree.nodes[child] for child in tree.children[ROOT]))
    for node in nodes:
        assert node.ended == (node.token_ids[-1] == EOS) and EOS not in node.token_ids[:-1]


def test_a_fork_costs_one_prefill_of_its_prefix(sharp_model):
    """No trunk is decoded again: forks cost their prefixes once, and each new token one position."""
    shape = ForkShape(2, 2, 3, num_rounds=1, min_segment_length=1, max_completion_length=LONGEST)
    prompts = [[5, 6, 7, 8], [9, 10, 11, 5]]
    calls = count_positions(model := make("qwen2"))
    trees = grow_trees(model, shape, prompts, suppress_tokens=[EOS])
    decoded = 2 * 2 * LONGEST  # the trunks, whose first token is drawn from the prompts' last
    prefilled = len(prompts) * 3
    prefixes, longest = [], []
    for tree in trees:
        forks = [index for index in range(1, len(tree.nodes)) if tree.children[index]]
        assert len(forks) == 4
        prefixes += [len(tree.prompt_ids) + tree.lengths[fork] for fork in forks]
        longest += [LONGEST - tree.lengths[fork] for fork in forks]
    # Prefixes are padded to the longest, and rows are decoded until the last has ended.
    most = decoded + prefilled + len(prefixes) * (max(prefixes) - 1) + len(longest) * 3 * max(longest)
    assert sum(calls) <= most
    assert decoded + prefilled < sum(calls)
    steps = [call for call in calls if call == len(longest) * 3]
    assert len(steps) == max(longest)


def test_a_branch_of_delimited_segments_is_prefilled_once(sharp_model):
    shape = TreeShape((2, 4), 6, LONGEST, Delimiters(("3",), 1))
    calls = count_positions(model := make("qwen2"))
    (tree,) = grow_trees(model, shape, [[5, 6, 7]], suppress_tokens=[EOS])
    first, second = tree.children[ROOT]
    lengths = [3 + tree.lengths[child] for child in (first, second)]
    assert calls[0] == 2  # the prompt but its last token
    prefill = calls.index(2 * (max(lengths) - 1), 1)
    assert calls[1:prefill] == [2] * (prefill - 1) and prefill - 1 <= 6
    assert set(calls[prefill + 1 :]) == {8}
