"""The model card says how the model was trained, and nothing that is not known."""

import contextlib
import io
import os
import re
from email.message import Message
from pathlib import Path

import pytest
from byte_llama import make_byte_tokenizer
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig
from tiny import spread_reward
from trl import GRPOTrainer

from treerpo_trl import TreeRPOTrainer
from treerpo_trl.reporting import model_card
from treerpo_trl.reporting.model_card import find_home, introduce, make_metadata, takes_messages


CHAT = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"{i}?"}] for i in range(32)]})
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def make_trainer(model, tokenizer, dataset, make_args):
    def make(train_dataset=dataset, path=None, rewards=spread_reward, peft_config=None, **options) -> TreeRPOTrainer:
        processing_class = make_byte_tokenizer() if path else tokenizer
        args = make_args(**options)
        return TreeRPOTrainer(
            path or model, rewards, args, train_dataset, processing_class=processing_class, peft_config=peft_config
        )

    return make


def write_card(trainer: TreeRPOTrainer, **options) -> ModelCard:
    trainer.create_model_card(**options)
    return ModelCard.load(Path(trainer.args.output_dir) / "README.md")


def read_table(card: ModelCard) -> dict[str, str]:
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", card.text, re.MULTILINE))


def run_quick_start(card: ModelCard, **folders: str) -> str:
    """What the card's code prints with folders in place of names."""
    [code] = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    for name, folder in folders.items():
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', f'"{folder}"')
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, {})
    return output.getvalue()


def test_the_table_is_the_configuration(make_trainer):
    def length_reward(completions, **kwargs):
        return [len(completion) / 99 for completion in completions]

    trainer = make_trainer(
        rewards=[spread_reward, length_reward], reward_weights=[0.75, 0.25], branching_factor=[4, 2], max_depth=2,
        segment_length=6, max_completion_length=11, advantage_estimator="centered", prune_threshold=0.2,
        loss_weighting="node", loss_type="bnpo", beta=0.001, temperature=0.6, learning_rate=1e-6,
        lr_scheduler_type="constant", per_device_train_batch_size=8, gradient_accumulation_steps=4,
        steps_per_generation=8, num_iterations=3,
    )  # fmt: skip
    trainer.state.global_step = 7
    assert read_table(write_card(trainer)) == {
        "Setting": "Value",
        "Split rule": "`length`",
        "Branching factor, by depth": "4, 2",
        "Depth": "2",
        "Segment length": "6 tokens",
        "Longest response": "11 tokens",
        "Leaves": "8",
        "Advantage estimator": "`centered`",
        "Prune threshold": "0.2",
        "Loss": "`bnpo`, weighted by node",
        "KL coefficient (beta)": "0.001",
        "Temperature": "0.6",
        "Learning rate": "1e-06, constant",
        "Prompts a batch": "8",
        "Updates a batch": "6",
        "Steps trained": "7",
        "Rewards": "`spread_reward` (weight 0.75), `length_reward` (weight 0.25)",
    }


def test_the_table_says_after_which_texts_trees_branched(make_trainer):
    trainer = make_trainer(
        split_rule="delimiter", step_delimiters=["\n\n", "a|b", "`"], min_segment_length=2, max_completion_length=30
    )
    table = read_table(write_card(trainer))
    assert table["Split rule"] == "`delimiter`" and table["Branching factor, by depth"] == "2, 2, 2"
    assert table["Step delimiters"] == r'`"\n\n"`, `"a\|b"`, ``"`"``'
    assert table["Segment length"] == "2 to 4 tokens; the last has no limit of its own"
    assert (table["Longest response"], table["Leaves"]) == ("30 tokens", "8")


def test_the_table_says_how_trees_forked(make_trainer):
    trainer = make_trainer(
        split_rule="uncertainty", num_trunks=2, forks_per_trunk=3, continuations_per_fork=1, fork_rounds=1,
        uncertainty_measure="entropy", min_segment_length=5, max_completion_length=40, segment_length=None,
        max_depth=None,
    )  # fmt: skip
    table = read_table(write_card(trainer))
    assert list(table.items())[1:8] == [
        ("Split rule", "`uncertainty` (entropy)"),
        ("Trunks", "2"),
        ("Forks of a trunk and what grew from it", "at most 3 a round"),
        ("Rounds of forks", "1"),
        ("Continuations of a fork", "1"),
        ("Between forks", "at least 5 tokens"),
        ("Longest response", "40 tokens"),
    ]
    assert table["Leaves"] == "at most 8" and not {"Depth", "Segment length", "Step delimiters"} & set(table)


@pytest.mark.parametrize("threshold", [None, -1.0])
def test_a_threshold_that_prunes_nothing_is_none(threshold, make_trainer):
    assert read_table(write_card(make_trainer(prune_threshold=threshold)))["Prune threshold"] == "none"


def test_the_text_names_the_method_its_paper_and_the_versions(make_trainer):
    text = write_card(make_trainer(), model_name="mine").text
    assert text.startswith("\n# mine\n")
    assert "with TreeRPO ([TreeRPO: Tree Relative Policy Optimization](https://arxiv.org/abs/2506.05183))" in text
    assert "@article{yang2025treerpo," in text and "title   = {{TRL: Transformers Reinforcement Learning}}" in text
    for name in ("treerpo_trl", "TRL", "Transformers", "PyTorch", "PEFT", "Datasets", "Tokenizers"):
        assert re.search(rf"^- {name}: \d+\.\d+", text, re.MULTILINE), name


def test_what_is_not_known_is_not_claimed(make_trainer, tmp_path):
    """A model made in code or loaded from a folder, and data from a file, have no page on the Hub."""
    Dataset.from_dict({"prompt": ["1="]}).to_parquet(tmp_path / "rows.parquet")
    card = write_card(make_trainer(), dataset_name=str(tmp_path / "rows.parquet"))
    assert "None" not in card.content and str(tmp_path) not in card.content
    assert "This language model was trained with TreeRPO" in card.text
    assert {"base_model", "base_model_relation", "datasets", "license", "licence"}.isdisjoint(card.data.to_dict())


@pytest.mark.parametrize("name", ["rows.parquet", "data/rows"])
def test_a_relative_path_is_not_a_dataset_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert make_metadata({"datasets": name}, None, "1").datasets == [name]
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).touch()
    assert make_metadata({"datasets": name}, None, "1").datasets is None


def test_the_metadata_is_what_the_hubs_classes_read(make_trainer):
    """That the Hub itself takes it only the Hub can tell; `test_hub.py` holds what it is asked."""
    trainer = make_trainer()
    trainer.model.config._name_or_path = "Qwen/Qwen2.5-0.5B-Instruct"
    data = write_card(trainer, model_name="mine", dataset_name="trl-lib/DeepMath-103K", tags=["math"]).data
    assert data.to_dict() == {
        "base_model": "Qwen/Qwen2.5-0.5B-Instruct",
        "base_model_relation": "finetune",
        "datasets": ["trl-lib/DeepMath-103K"],
        "library_name": "transformers",
        "model_name": "mine",
        "pipeline_tag": "text-generation",
        "tags": ["arxiv:2506.05183", "generated_from_trainer", "math", "treerpo", "trl"],
    }
    assert ModelCardData(**data.to_dict()).to_dict() == data.to_dict()


def test_base_model_and_data_are_linked(make_trainer):
    trainer = make_trainer()
    trainer.model.config._name_or_path = "Qwen/Qwen2.5-0.5B-Instruct"
    text = write_card(trainer, dataset_name="trl-lib/DeepMath-103K").text
    assert "comes from [Qwen/Qwen2.5-0.5B-Instruct](https://huggingface.co/Qwen/Qwen2.5-0.5B-Instruct) and was" in text
    assert "trained on [trl-lib/DeepMath-103K](https://huggingface.co/datasets/trl-lib/DeepMath-103K) with" in text


@pytest.mark.parametrize("is_chat", [True, False])
def test_the_quick_start_of_an_adapter_whose_base_is_a_folder(is_chat, make_trainer, llama_path, dataset):
    """It asks for the folder, and runs with it."""
    trainer = make_trainer(CHAT if is_chat else dataset, path=llama_path, peft_config=LoraConfig(**LORA))
    card = write_card(trainer, model_name="mine")
    assert (card.data.library_name, card.data.base_model) == ("peft", None)
    assert {"lora", "treerpo"} <= set(card.data.tags)
    assert read_table(card)["Adapter"] == "LoRA; rank 4; alpha 8; dropout 0; modules q_proj, v_proj"
    assert "This LoRA adapter was trained" in card.text and "in place of `BASE_MODEL`" in card.text
    trainer.save_model(trainer.args.output_dir)
    assert run_quick_start(card, mine=trainer.args.output_dir, BASE_MODEL=llama_path).endswith("\n")


def test_an_adapters_base_is_linked_if_it_is_on_the_hub():
    lora = LoraConfig(**LORA)
    data = make_metadata({"base_model": "Qwen/Qwen2.5-0.5B"}, lora, "2506.05183")
    assert (data.base_model, data["base_model_relation"]) == ("Qwen/Qwen2.5-0.5B", "adapter")
    text = introduce(data, lora, "TreeRPO", TreeRPOTrainer._paper)
    assert text.startswith("This LoRA adapter for [Qwen/Qwen2.5-0.5B](https://huggingface.co/Qwen/Qwen2.5-0.5B) was")


def test_prompts_are_told_apart_by_their_type(dataset):
    """An untyped stream is not read for it: then the chat template tells."""
    with_template, without = make_byte_tokenizer(), make_byte_tokenizer()
    without.chat_template = None
    for tokenizer in (with_template, without):
        assert takes_messages(CHAT, tokenizer) and takes_messages(CHAT.to_iterable_dataset(), tokenizer)
        assert not takes_messages(dataset, tokenizer)
    stream = CHAT.to_iterable_dataset().map(lambda row: row)
    assert stream.features is None
    assert takes_messages(stream, with_template) and not takes_messages(stream, without)


def test_links_to_the_run_are_kept(make_trainer, monkeypatch):
    monkeypatch.setattr("trl.trainer.base_trainer.get_comet_experiment_url", lambda: "https://comet.com/me/run")
    assert re.search(r"^\[<img .*\]\(https://comet\.com/me/run\)$", write_card(make_trainer()).text, re.MULTILINE)


def test_the_package_is_linked_if_it_says_where_it_lives(monkeypatch):
    assert "by treerpo_trl, which" in introduce(ModelCardData(), None, "TreeRPO", TreeRPOTrainer._paper) or find_home(
        "treerpo-trl"
    )
    message = Message()
    message["Project-URL"] = "Repository, https://example.org/treerpo"
    monkeypatch.setattr(model_card, "metadata", lambda package: message)
    text = introduce(ModelCardData(), None, "TreeRPO", TreeRPOTrainer._paper)
    assert "by [treerpo_trl](https://example.org/treerpo), which" in text


def test_the_card_is_replaced_whole(make_trainer, monkeypatch):
    """A push in the background reads the folder meanwhile: it must find neither TRL's card nor half of ours."""
    trainer = make_trainer()
    before = write_card(trainer).content
    readme, seen = Path(trainer.args.output_dir) / "README.md", []
    replace, draft = os.replace, GRPOTrainer.create_model_card

    def watched_draft(*args):
        draft(*args)
        seen.append(readme.read_text())

    def watched_replace(source, target):
        seen.append(readme.read_text())
        replace(source, target)

    monkeypatch.setattr(GRPOTrainer, "create_model_card", watched_draft)
    monkeypatch.setattr(os, "replace", watched_replace)
    trainer.state.global_step = 7
    after = write_card(trainer).content
    assert seen == [before, before]
    assert "| Steps trained | 7 |" in after
    assert os.listdir(trainer.args.output_dir) == ["README.md"]


def test_only_the_main_process_writes(make_trainer, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()
    assert not (Path(trainer.args.output_dir) / "README.md").exists()
