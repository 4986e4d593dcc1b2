"""Datasets that are too small, malformed, endless or strange: refused before training, with the row and the fix."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from test_trainer import chat, train
from tiny import coin_reward, make_tokenizer, spread_reward
from transformers import AutoModelForCausalLM, AutoTokenizer

from treerpo_trl import TreeRPOTrainer


def stream_of(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def make_trainer(model, args, dataset, **kwargs):
    return TreeRPOTrainer(model, coin_reward, args, train_dataset=dataset, processing_class=make_tokenizer(), **kwargs)


@pytest.mark.parametrize(
    ("make_dataset", "message"),
    [
        (lambda rows: None, "train_dataset is None"),
        (lambda rows: rows.select([]), "has 0 rows, but one generation batch takes 2 prompts"),
        (lambda rows: rows.select([0]), "has 1 rows, but one generation batch takes 2 prompts"),
        (lambda rows: rows.rename_column("prompt", "question"), "no 'prompt'"),
        (lambda rows: rows.rename_column("answer", "image"), "column 'image', but TreeRPOTrainer does not support"),
    ],
)
def test_unusable_datasets_are_refused_at_construction(model, make_args, dataset, make_dataset, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model, make_args(), make_dataset(dataset))


@pytest.mark.parametrize("as_chat", [False, True])
def test_a_prompt_longer_than_the_model_allows_is_refused_at_construction(model, make_args, dataset, as_chat):
    rows = Dataset.from_dict({"prompt": ["1=", "2=", "7+" * 80]})
    message = r"a prompt has 16\d tokens, but the model's context of 128 leaves 116 for it .*max_completion_length=12"
    with pytest.raises(ValueError, match=message):
        make_trainer(model, make_args(), chat(rows) if as_chat else rows)


def test_a_prompt_longer_than_the_model_allows_is_refused_in_a_stream(model, make_args):
    stream = stream_of([{"prompt": "7+" * 80}] * 8)
    trainer = make_trainer(model, make_args(), stream)
    with pytest.raises(ValueError, match="a prompt has 160 tokens"):
        trainer.train()


def test_completions_that_fill_the_context_are_refused(model, make_args, dataset):
    with pytest.raises(ValueError, match=r"max_completion_length=150 leaves no room .* context of 128 tokens"):
        make_trainer(model, make_args(segment_length=50), dataset)


def test_an_empty_prompt_is_refused(model, make_args):
    rows = Dataset.from_dict({"prompt": ["1=", ""]})
    with pytest.raises(ValueError, match="has no tokens; remove empty prompts"):
        make_trainer(model, make_args(), rows)


@pytest.mark.parametrize("rows", [[], [{"prompt": "1="}]])
def test_a_stream_with_less_than_a_batch_is_refused(model, make_args, rows):
    with pytest.raises(ValueError, match=rf"has {len(rows)} rows, but one generation batch takes 2 prompts"):
        make_trainer(model, make_args(), stream_of(rows))


def test_a_stream_that_ends_is_read_again(model, make_args, dataset):
    """Five rows make two batches of two prompts; the fifth row waits for nothing."""
    trainer = train(model, make_args(max_steps=5), stream_of(dataset.select(range(5))))
    assert trainer.state.global_step == 5 and trainer.state.epoch > 2


def test_a_stream_that_breaks_passes_its_error_on(model, make_args, dataset):
    def rows():
        yield from dataset
        raise RuntimeError("the connection was closed")

    trainer = make_trainer(model, make_args(max_steps=40), IterableDataset.from_generator(rows))
    with pytest.raises(RuntimeError, match="the connection was closed"):
        trainer.train()


@pytest.mark.parametrize(
    ("prompts", "place"),
    [
        (["1=", None, "3="], r"\[1\]\['prompt'\] is None"),
        ([1, 2, 3], r"\[0\]\['prompt'\] is 1;"),
        ([[{"role": "user", "content": "1="}], []], r"\[1\]\['prompt'\] is \[\]"),
        ([[{"content": "1="}]] * 2, r"\[0\]\['prompt'\] is \[\{'content': '1='\}\]"),
        ([["1=", "2="]] * 2, r"\[0\]\['prompt'\] is \['1=', '2='\]"),
    ],
    ids=["none", "number", "no messages", "no role", "texts"],
)
@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset", "stream", "dict"])
def test_what_is_no_prompt_is_refused_with_its_row(model, make_args, dataset, prompts, place, name):
    rows = Dataset.from_dict({"prompt": prompts})
    datasets = {
        "train_dataset": {"dataset": rows},
        "stream": {"dataset": stream_of(rows)},
        "eval_dataset": {"dataset": dataset, "eval_dataset": rows},
        "dict": {"dataset": dataset, "eval_dataset": {"hard": rows}},
    }[name]
    expected = {"stream": "train_dataset", "dict": r"eval_dataset\['hard'\]"}.get(name, name)
    with pytest.raises(ValueError, match=expected + place + ".* a prompt is a text, or a list of messages"):
        make_trainer(model, make_args(), **datasets)


def test_evaluation_data_are_checked_before_training(model, make_args, dataset):
    with pytest.raises(ValueError, match=r"eval_dataset has the columns \['question', 'answer'\], but no 'prompt'"):
        make_trainer(model, make_args(), dataset, eval_dataset=dataset.rename_column("prompt", "question"))
    with pytest.raises(ValueError, match=r"a prompt has 160 tokens, but the model's context of 128 leaves 116"):
        make_trainer(model, make_args(), dataset, eval_dataset=Dataset.from_dict({"prompt": ["7+" * 80]}))


def test_one_row_is_enough_for_batches_of_one_prompt(model, make_args, dataset):
    trainer = train(model, make_args(per_device_train_batch_size=8, max_steps=3), dataset.select([0]))
    assert trainer.state.global_step == 3 and len(trainer.last_trees) == 1


@pytest.mark.slow
def test_any_unicode_goes_through_unchanged(llama_path, make_args, tmp_path):
    """Prompts, columns and completions: other scripts, emoji, marks that change direction, joiners, a NUL."""
    texts = ["日本語 🧮 1+1=", "e\u0301 \u202e 2=", "👩\u200d👩\u200d👧 =", "\0\x1b[31m=", "ﷺ" * 20, "\u2028\n="]
    rows = Dataset.from_dict({"prompt": texts, "note": texts})
    seen = []

    def reward(prompts, completions, note, **kwargs):
        assert prompts == note
        seen.extend(prompts)
        return spread_reward(completions)

    model = AutoModelForCausalLM.from_pretrained(llama_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(llama_path)
    args = make_args(max_steps=3, log_completions=True, num_completions_to_print=1, log_trees=True)
    trainer = TreeRPOTrainer(model, reward, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert set(seen) == set(texts)
    assert {tokenizer.decode(scored.tree.prompt_ids) for scored in trainer.last_trees} <= set(texts)
