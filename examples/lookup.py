"""A small task for agents: follow a chain of keys through a table that only a tool can read, with a verifier.

The question is a key, `a`. The tool gives what a key leads to, another key or a digit, and the answer is the digit at
the end of the chain:

    look_up(a) = k
    look_up(k) = 7
    7

Every problem has a table of its own, so nothing but the tool helps. The chat template is Qwen3's. Its fixed parts are
tokens, as are letters and digits, so that a dialogue has some 40 tokens and a tiny model can hold it.
"""

import json
import random
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from problems import draw_split
from tiny_llama import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer


KEYS = "abcdefghijkl"
MIN_HOPS, MAX_HOPS = 2, 3
NUM_CHAINS = 3  # in a table
MAX_COMPLETION_LENGTH = 64
CONTEXT_LENGTH = 128
TEMPLATE = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"key": "', '"}}\n</tool_call>'
RESPONSE = "user\n<tool_response>\n", "\n</tool_response>"
BATCH_SIZE, CLEAN_STEPS, NOISY_STEPS, SLIP_RATE = 48, 300, 100, 0.25


class Table:
    """An environment: a table that can be read by key. `copy.deepcopy` copies it for a branch."""

    def reset(self, table: str, **kwargs: Any) -> None:
        """
        Lay out the table of a problem.

        Args:
            table: JSON, key -> what it leads to.
        """
        self.entries: dict[str, str] = json.loads(table)

    def look_up(self, key: str) -> str:
        """
        Look up a key.

        Args:
            key: The key.

        Returns:
            What it leads to.
        """
        return self.entries.get(key, "nothing")


def sample_table(rng: random.Random) -> dict[str, str]:
    """Chains over distinct keys, the first of which starts at the first key."""
    keys, entries = rng.sample(KEYS, len(KEYS)), {}
    for _ in range(NUM_CHAINS):
        chain = [keys.pop() for _ in range(rng.randint(MIN_HOPS, MAX_HOPS))]
        entries |= dict(zip(chain, [*chain[1:], rng.choice("0123456789")], strict=True))
    return entries


def follow(table: dict[str, str]) -> list[str]:
    """What the look-ups of a right solution give, beginning with the first key of the table."""
    found = [table[next(iter(table))]]
    while found[-1] in table:
        found.append(table[found[-1]])
    return found


def make_dataset(num_problems: int, seed: int, held_out: bool = False) -> Dataset:
    """Problems with the columns `prompt` (chat messages), `table` (JSON) and `answer`."""
    rng = random.Random(seed)
    tables = draw_split(lambda: sample_table(rng), json.dumps, held_out, "look-ups")
    rows: dict[str, list[Any]] = {"prompt": [], "table": [], "answer": []}
    for _ in range(num_problems):
        table = next(tables)
        rows["prompt"].append([{"role": "user", "content": next(iter(table))}])
        rows["table"].append(json.dumps(table))
        rows["answer"].append(follow(table)[-1])
    return Dataset.from_dict(rows)


def correctness_reward(completions: list[list[dict[str, Any]]], answer: list[str], **kwargs: Any) -> list[float]:
    """TRL reward function: 1.0 if the last message is the answer, else 0.0."""
    return [float(messages[-1]["content"] == gold) for messages, gold in zip(completions, answer, strict=True)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and one for each fixed part of a dialogue."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE.read_text(),
        padding_side="left",
    )
    system = render(fast, "?").split("<|im_start|>")[1].split("<|im_end|>")[0]
    fast.add_tokens([system, "user\n", "assistant\n", *CALL, *RESPONSE, "nothing"])
    return fast


def render(tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """The text of a prompt, up to where the model goes on."""
    messages = [{"role": "user", "content": question}]
    text: str = tokenizer.apply_chat_template(
        messages, tools=[Table().look_up], add_generation_prompt=True, tokenize=False
    )
    return text


def make_demonstrations(tokenizer: PreTrainedTokenizerFast, slip_rates: list[float], seed: int) -> Dataset:
    """Dialogues of the training split as token ids, one a slip rate; `completion_mask` is 1 where the model writes.

    In that share of the turns it takes a wrong key, or answers with any digit.
    """
    rng = random.Random(seed)
    tables = draw_split(lambda: sample_table(rng), json.dumps, False, "look-ups")
    rows: dict[str, list[list[int]]] = {"input_ids": [], "completion_mask": []}
    for slip_rate in slip_rates:
        table = next(tables)
        ids: list[int] = []
        mask: list[int] = []

        def write(text: str, bit: int, ids: list[int] = ids, mask: list[int] = mask) -> None:
            ids += (tokens := tokenizer(text)["input_ids"])
            mask += [bit] * len(tokens)

        value = next(iter(table))
        write(render(tokenizer, value), 0)
        for _ in range(MAX_HOPS + 1):
            slips = rng.random() < slip_rate
            if value.isdigit() or value == "nothing" or (slips and rng.random() < 0.5):
                write((rng.choice("0123456789") if slips or value == "nothing" else value) + "<|im_end|>", 1)
                break
            key = rng.choice(KEYS) if slips else value
            value = table.get(key, "nothing")
            write(key.join(CALL) + "<|im_end|>", 1)
            write(f"\n<|im_start|>{value.join(RESPONSE)}<|im_end|>\n<|im_start|>assistant\n", 0)
        rows["input_ids"].append(ids)
        rows["completion_mask"].append(mask)
    return Dataset.from_dict(rows)


def make_base_model(output_dir: Path, seed: int = 0) -> None:
    """Train a tiny Llama on such dialogues, and save it with its tokenizer: it knows the tool, but slips often."""
    set_seed(seed)
    tokenizer = make_tokenizer()
    model: LlamaForCausalLM = make_model(tokenizer, CONTEXT_LENGTH)
    slip_rates = [0.0] * (BATCH_SIZE * CLEAN_STEPS) + [SLIP_RATE] * (BATCH_SIZE * NOISY_STEPS)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            str(output_dir),
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            per_device_train_batch_size=BATCH_SIZE,
            num_train_epochs=1,
            completion_only_loss=True,
            train_sampling_strategy="sequential",  # the slips must come last
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
            seed=seed,
        ),
        train_dataset=make_demonstrations(tokenizer, slip_rates, seed),
        processing_class=tokenizer,
    )
    trainer.train()
    model.config.use_cache = True  # the trainer turned it off
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
