"""Trees at the edges: those that end at once or never, tokens that end or pad, templates, contexts, sizes."""

import pytest
import torch
from datasets import Dataset
from test_trainer import chat, train
from tiny import EOS, make_tokenizer, spread_reward, tiny_config
from torch import nn
from transformers import GenerationConfig, Qwen2ForCausalLM

from treerpo_trl import TreeRPOTrainer
from treerpo_trl.credit import ESTIMATORS


def with_end_bias(model: Qwen2ForCausalLM, bias: float) -> Qwen2ForCausalLM:
    """The model, with this much added to the logit of the end-of-sequence token."""
    head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[EOS] = bias
    model.lm_head = head
    return model


def test_where_every_branch_ends_at_once_nothing_is_trained(model, make_args, dataset):
    """The first token of each completion is the end; the text is empty, and all completions are the same one."""
    texts = []

    def reward(completions, **kwargs):
        texts.extend(completions)
        return spread_reward(completions)

    model = with_end_bias(model, 1e4)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = TreeRPOTrainer(model, reward, make_args(), train_dataset=dataset, processing_class=make_tokenizer())
    trainer.train()
    assert texts == [""] * 4  # each of two trees a step is one trajectory
    for scored in trainer.last_trees:
        assert [node.token_ids for node in scored.tree.nodes[1:]] == [(EOS,), (EOS,)]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(value == value for log in trainer.state.log_history for value in log.values() if value is not None)


def test_where_nothing_ever_ends_trees_are_complete(model, make_args, dataset):
    trainer = train(with_end_bias(model, -1e4), make_args(), dataset)
    for scored in trainer.last_trees:
        assert len(scored.tree.nodes) == 1 + 2 + 4 + 8
        assert not any(node.ended for node in scored.tree.nodes)
        assert all(len(scored.tree.completion_ids(leaf)) == 12 for leaf in scored.tree.leaves)
    assert trainer.state.log_history[0]["completions/min_length"] == 12


def test_each_of_several_end_tokens_ends_a_branch(model, make_args, dataset):
    model.generation_config = GenerationConfig(eos_token_id=[EOS, 5, 6])
    trainer = train(model, make_args(max_steps=4), dataset)
    nodes = [node for scored in trainer.last_trees for node in scored.tree.nodes[1:]]
    assert all((node.token_ids[-1] in (EOS, 5, 6)) == node.ended for node in nodes)
    assert not any(token in (EOS, 5, 6) for node in nodes for token in node.token_ids[:-1])
    assert {node.token_ids[-1] for node in nodes if node.ended} > {EOS}


@pytest.mark.parametrize("pad_token", ["<eos>", None])
def test_padding_with_the_end_token_loses_no_end(model, make_args, dataset, pad_token):
    """`None` is made the end-of-sequence token by TRL. The gradient with such a tokenizer is tested elsewhere."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = pad_token
    trainer = train(model, make_args(), dataset, processing_class=tokenizer)
    ended = [node for scored in trainer.last_trees for node in scored.tree.nodes if node.ended]
    assert ended and all(node.token_ids[-1] == EOS for node in ended)
    assert not any(EOS in node.token_ids[:-1] for scored in trainer.last_trees for node in scored.tree.nodes)


def test_a_tokenizer_without_an_end_token_is_refused(model, make_args, dataset):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"has no end-of-sequence token.*set its eos_token"):
        TreeRPOTrainer(model, spread_reward, make_args(), train_dataset=dataset, processing_class=tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<eos>{{ m['content'] * 3 }}{% endfor %}{% if add_generation_prompt %}<eos>{% endif %}",
        "{{ messages[-1]['content'] }}",
        "{% for m in messages %}{{ '\n' * 40 }}{{ m['content'] }}{% endfor %}",
    ],
    ids=["ends in it", "no generation prompt", "long"],
)  # fmt: skip
def test_unusual_chat_templates_train(model, make_args, dataset, template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    trainer = train(model, make_args(), chat(dataset), processing_class=tokenizer)
    prompts = [scored.tree.prompt_ids for scored in trainer.last_trees]
    expected = [
        tuple(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False))
        for row in chat(dataset)
    ]
    assert set(prompts) <= set(expected)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only one message is allowed') }}", "only one message is allowed"),
        ("{% for m in messages %}{% endfor %}", "has no tokens; remove empty prompts"),
        (None, "has no chat template"),
    ],
)
def test_a_template_that_fails_does_so_at_construction(model, make_args, dataset, template, message):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(Exception, match=message):
        TreeRPOTrainer(model, spread_reward, make_args(), train_dataset=chat(dataset), processing_class=tokenizer)


def test_a_prompt_may_fill_the_context_to_the_last_token(make_args):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(tiny_config(initializer_range=0.2, max_position_embeddings=15))
    full, one_more = (Dataset.from_dict({"prompt": [prompt] * 4}) for prompt in ("7+1", "7+1="))
    train(model, make_args(), full)
    with pytest.raises(ValueError, match="a prompt has 4 tokens, but the model's context of 15 leaves 3 for it"):
        TreeRPOTrainer(model, spread_reward, make_args(), train_dataset=one_more, processing_class=make_tokenizer())


def test_segments_of_one_token(model, make_args, dataset):
    trainer = train(model, make_args(segment_length=1), dataset)
    assert all(len(node.token_ids) == 1 for scored in trainer.last_trees for node in scored.tree.nodes[1:])


@pytest.mark.slow
def test_a_tree_of_4096_leaves(model, make_args, dataset):
    args = make_args(branching_factor=8, max_depth=4, segment_length=2, per_device_train_batch_size=4096, max_steps=1)
    trainer = train(with_end_bias(model, -1e4), args, dataset)
    (scored,) = trainer.last_trees
    assert len(scored.tree.leaves) == 4096
    assert any(scored.kept[leaf] for leaf in scored.tree.leaves)


@pytest.mark.parametrize("branching", ["2", 2.0, True, None, [], [2, "3"]])
def test_a_branching_factor_that_is_no_whole_number_is_refused(make_args, branching):
    with pytest.raises(TypeError, match=r"branching_factor is .*give a whole number, or a list with one for each"):
        make_args(branching_factor=branching)


@pytest.mark.parametrize("branching", [1, [2, 1, 2]])
@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "optimal_baseline"])
def test_a_branching_factor_below_two_is_refused_with_the_reason(make_args, branching, estimator):
    message = f"below 2, but advantage_estimator='{estimator}' compares the nodes of one tree.*'optimal_baseline'"
    with pytest.raises(ValueError, match=message):
        make_args(branching_factor=branching, advantage_estimator=estimator)


@pytest.mark.parametrize("branching", [0, -2, [2, 0, 2]])
@pytest.mark.parametrize("estimator", ["treerpo", "optimal_baseline"])
def test_a_branching_factor_below_one_is_refused_with_the_reason(make_args, branching, estimator):
    with pytest.raises(ValueError, match="below 1; a node that goes on has children"):
        make_args(branching_factor=branching, advantage_estimator=estimator)
