"""Evaluation against plain computations: Pass@1, lengths, truncation, chat prompts, nothing left changed."""

import copy
import math
import random
from dataclasses import FrozenInstanceError

import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from treerpo_trl.evaluation import Response, TransformersSampler, evaluate, respond, summarize


MAX_NEW_TOKENS = 12
ALPHABET = "abcdefgh"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + m['content'] }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<end>", *ALPHABET, "u"])}
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def dataset():
    rng = random.Random(0)
    prompts = ["".join(rng.choices(ALPHABET, k=rng.randint(1, 7))) for _ in range(10)]
    return Dataset.from_dict({"prompt": prompts, "answer": [rng.choice(ALPHABET) for _ in prompts]})


def share_of_answer(completions, answer, **kwargs):
    """A reward in [0, 1] that depends on the whole response and on the problem."""
    return [text.count(gold) / MAX_NEW_TOKENS for text, gold in zip(completions, answer, strict=True)]


class Recorder:
    """A reward function that keeps what it was called with."""

    __name__ = "recorder"

    def __init__(self, rewards=None):
        self.calls, self.rewards = [], rewards

    def __call__(self, **kwargs):
        self.calls.append(kwargs)
        return [0.0] * len(kwargs["prompts"]) if self.rewards is None else self.rewards(kwargs)

    def gathered(self, key):
        return [item for call in self.calls for item in call[key]]


def run(model, tokenizer, dataset, reward_funcs, **options):
    options = {"max_new_tokens": MAX_NEW_TOKENS, "progress_bar": False} | options
    return evaluate(model, tokenizer, dataset, reward_funcs, **options)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_agrees_with_one_unpadded_prompt_at_a_time(model, tokenizer, dataset, batch_size):
    rewards, lengths, truncated = [], [], 0
    for row in dataset:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        response = []
        while len(response) < MAX_NEW_TOKENS and (not response or response[-1] != tokenizer.eos_token_id):
            path = torch.cat([ids, torch.tensor([response], dtype=torch.long)], dim=1)
            with torch.no_grad():
                response.append(int(model(path).logits[0, -1].argmax()))
        rewards += share_of_answer([tokenizer.decode(response, skip_special_tokens=True)], [row["answer"]])
        lengths.append(len(response))
        truncated += response[-1] != tokenizer.eos_token_id
    result = run(model, tokenizer, dataset, share_of_answer, temperature=0, batch_size=batch_size)
    assert result.pass_at_1 == pytest.approx(sum(rewards) / len(rewards))
    assert result.mean_length == pytest.approx(sum(lengths) / len(lengths))
    assert result.truncated == pytest.approx(truncated / len(dataset))
    assert (result.num_problems, result.num_samples) == (10, 1)


def test_sampling_follows_the_policy_at_the_temperature(model, tokenizer):
    # A generation config made for chatting must not bend the distribution that is measured.
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.1, repetition_penalty=3.0)
    try:
        recorder = Recorder()
        run(model, tokenizer, [{"prompt": ALPHABET}], recorder, num_samples=4000, max_new_tokens=1, temperature=2.0,
            batch_size=4000)  # fmt: skip
    finally:
        model.generation_config.update(do_sample=False, top_k=50, top_p=1.0, repetition_penalty=1.0)
    drawn = torch.tensor(recorder.gathered("completion_ids")).flatten()
    with torch.no_grad():
        logits = model(tokenizer(ALPHABET, return_tensors="pt")["input_ids"]).logits[0, -1]
    expected = (logits / 2.0).softmax(dim=-1)
    seen = torch.bincount(drawn, minlength=len(tokenizer)) / 4000
    assert (seen - expected).abs().max() < 0.04


def test_sampled_results_agree_with_what_the_reward_function_saw(model, tokenizer, dataset):
    recorder = Recorder(lambda call: share_of_answer(**call))
    result = run(model, tokenizer, dataset, recorder, num_samples=3, batch_size=7)
    ids = recorder.gathered("completion_ids")
    assert len(ids) == 30
    assert recorder.gathered("prompts") == [prompt for prompt in dataset["prompt"] for _ in range(3)]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    assert recorder.gathered("completions") == texts
    rewards = share_of_answer(texts, recorder.gathered("answer"))
    assert result.pass_at_1 == pytest.approx(sum(rewards) / 30)
    assert result.mean_length == pytest.approx(sum(map(len, ids)) / 30)
    assert result.truncated == pytest.approx(sum(row[-1] != tokenizer.eos_token_id for row in ids) / 30)
    assert all(tokenizer.eos_token_id not in row[:-1] for row in ids)
    by_problem = [rewards[start : start + 3] for start in range(0, 30, 3)]
    assert result.problem_scores == pytest.approx([sum(several) / 3 for several in by_problem])


def test_length_of_correct_responses(model, tokenizer, dataset):
    recorder = Recorder(lambda call: [float(len(ids) % 2) for ids in call["completion_ids"]])
    result = run(model, tokenizer, dataset, recorder, num_samples=5)
    odd = [len(ids) for ids in recorder.gathered("completion_ids") if len(ids) % 2]
    assert result.mean_length_correct == pytest.approx(sum(odd) / len(odd)) != result.mean_length
    assert math.isnan(run(model, tokenizer, dataset, lambda prompts, **_: [0.9] * len(prompts)).mean_length_correct)


def test_top_p_samples_from_the_most_likely_tokens(model, tokenizer):
    recorder = Recorder()
    run(model, tokenizer, [{"prompt": ALPHABET}], recorder, num_samples=500, max_new_tokens=1, top_p=0.5,
        batch_size=500)  # fmt: skip
    with torch.no_grad():
        probabilities = model(tokenizer(ALPHABET, return_tensors="pt")["input_ids"]).logits[0, -1].softmax(dim=-1)
    likely = probabilities.sort(descending=True)
    nucleus = likely.indices[likely.values.cumsum(0) - likely.values < 0.5].tolist()
    assert {ids[0] for ids in recorder.gathered("completion_ids")} == set(nucleus)


def responses_of(model, tokenizer, dataset, **options):
    sampler = TransformersSampler(model, tokenizer, temperature=1.0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS)
    options = {"num_samples": 3, "batch_size": 7, "seed": 0} | options
    return list(respond(sampler, tokenizer, dataset, share_of_answer, **options))


def test_a_resumed_run_draws_what_an_unbroken_one_does(model, tokenizer, dataset):
    whole = responses_of(model, tokenizer, dataset)
    assert [len(batch) for batch in whole] == [7, 7, 7, 7, 2]
    order = [(response.problem, response.sample) for batch in whole for response in batch]
    assert order == [(problem, sample) for problem in range(10) for sample in range(3)]
    for num_done in range(6):
        torch.manual_seed(num_done)
        assert responses_of(model, tokenizer, dataset, num_done=num_done) == whole[num_done:]


def test_no_two_batches_draw_with_the_same_random_numbers(model, tokenizer):
    alike = [{"prompt": "ab", "answer": "a"}] * 8
    drawn = [
        tuple(response.text for response in batch)
        for seed in (0, 1)
        for batch in responses_of(model, tokenizer, alike, num_samples=1, batch_size=2, seed=seed)
    ]
    assert len(set(drawn)) == 8


def test_any_engine_may_sample(tokenizer, dataset):
    """One that knows token ids only."""

    def echo(prompt_ids, seed):
        return [ids[::-1] for ids in prompt_ids], [len(ids) % 2 == 0 for ids in prompt_ids]

    batches = respond(echo, tokenizer, dataset, share_of_answer, num_samples=2, batch_size=4, seed=0)
    responses = [response for batch in batches for response in batch]
    for response in responses:
        row = dataset[response.problem]
        assert response.text == row["prompt"][::-1]
        assert response.length == len(row["prompt"])
        assert response.finished == (len(row["prompt"]) % 2 == 0)
        assert response.reward == row["prompt"].count(row["answer"]) / MAX_NEW_TOKENS
    result = summarize(responses, 10, 2)
    assert result.mean_length == pytest.approx(sum(map(len, dataset["prompt"])) / 10)
    assert result.truncated == sum(len(prompt) % 2 for prompt in dataset["prompt"]) / 10


def test_summary_of_known_responses():
    rewards = [[1.0, 0.0], [None, None], [1.0, None], [2.0, 0.5]]
    responses = [
        Response(problem, sample, "", 10 * problem + sample, sample == 0, reward)
        for problem, several in enumerate(rewards)
        for sample, reward in enumerate(several)
    ]
    result = summarize(responses, 4, 2)
    assert result.problem_scores == (0.5, None, 1.0, 1.25)
    assert result.pass_at_1 == pytest.approx(2.75 / 3)
    assert result.pass_at_k == 1.0 and summarize(responses[1:], 4, 2).pass_at_k == pytest.approx(2 / 3)
    assert result.mean_length == 15.5
    assert result.mean_length_correct == pytest.approx((0 + 20 + 30) / 3)
    assert result.truncated == 0.5


def test_several_eos_ids_and_padding_that_equals_eos(model, tokenizer, dataset, monkeypatch):
    end = tokenizer.convert_tokens_to_ids("<end>")
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, end])
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    recorder = Recorder()
    result = run(model, tokenizer, dataset, recorder, num_samples=20)
    ids = recorder.gathered("completion_ids")
    finished = [row[-1] in (tokenizer.eos_token_id, end) for row in ids]
    assert {row[-1] for row in ids} >= {tokenizer.eos_token_id, end}
    assert all(not {tokenizer.eos_token_id, end} & set(row[:-1]) for row in ids)
    assert all(len(row) == MAX_NEW_TOKENS for row, done in zip(ids, finished, strict=True) if not done)
    assert result.truncated == pytest.approx(1 - sum(finished) / len(finished))


def test_chat_prompts_are_rendered_and_scored_as_messages(model, tokenizer, dataset):
    chats = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in dataset]
    plain = [{"prompt": f"u{row['prompt']}a", "answer": row["answer"]} for row in dataset]
    recorder = Recorder()
    run(model, tokenizer, chats, recorder, temperature=0)
    expected = Recorder()
    run(model, tokenizer, plain, expected, temperature=0)
    assert recorder.gathered("prompts") == [row["prompt"] for row in chats]
    assert recorder.gathered("completions") == [
        [{"role": "assistant", "content": text}] for text in expected.gathered("completions")
    ]


def test_seed_decides_and_the_callers_randomness_is_untouched(model, tokenizer, dataset):
    before = torch.get_rng_state()
    first, second, other = Recorder(), Recorder(), Recorder()
    run(model, tokenizer, dataset, first, seed=1)
    torch.manual_seed(99)
    run(model, tokenizer, dataset, second, seed=1)
    torch.set_rng_state(before)
    run(model, tokenizer, dataset, other, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.gathered("completion_ids") == second.gathered("completion_ids")
    assert first.gathered("completion_ids") != other.gathered("completion_ids")


def test_modes_are_put_back_also_after_an_error(model, tokenizer, dataset):
    def failing(**kwargs):
        assert not model.training
        raise RuntimeError("judge is down")

    model.train()
    model.model.layers[0].eval()
    try:
        with pytest.raises(RuntimeError, match="judge is down"):
            run(model, tokenizer, dataset, failing)
        assert model.training
        assert not model.model.layers[0].training
    finally:
        model.eval()


def test_several_reward_functions_are_summed_and_none_is_left_out(model, tokenizer, dataset):
    def first_problem_only(prompts, **kwargs):
        return [1.0 if prompt == dataset[0]["prompt"] else None for prompt in prompts]

    def half(prompts, **kwargs):
        return [0.5] * len(prompts)

    def unscorable(prompts, **kwargs):
        return [None] * len(prompts)

    assert run(model, tokenizer, dataset, first_problem_only, num_samples=2).pass_at_1 == 1.0
    assert run(model, tokenizer, dataset, [first_problem_only, half]).pass_at_1 == pytest.approx((1.5 + 9 * 0.5) / 10)
    nothing = run(model, tokenizer, dataset, unscorable)
    assert math.isnan(nothing.pass_at_1)
    assert nothing.problem_scores == (None,) * 10
    assert run(model, tokenizer, dataset, first_problem_only).problem_scores == (1.0, *(None,) * 9)


def test_reward_functions_may_log_as_under_trl(model, tokenizer, dataset):
    def logging(prompts, log_extra, log_metric, trainer_state, **kwargs):
        log_extra("length", [0] * len(prompts))
        log_metric("constant", 1.0)
        return [1.0] * len(prompts)

    assert run(model, tokenizer, dataset, logging).pass_at_1 == 1.0


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "empty"),
        ([{"question": "a"}], {}, "question.*prompt"),
        ([{"prompt": "a"}], {"num_samples": 0}, "num_samples is 0"),
        ([{"prompt": "a"}], {"temperature": -1.0}, "temperature is -1.0"),
        ([{"prompt": "a"}], {"top_p": 0.0}, "top_p is 0.0"),
        ([{"prompt": "a"}], {"batch_size": 0}, "batch_size is 0"),
        ([{"prompt": "a"}], {"max_new_tokens": 0}, "0 tokens"),
    ],
)
def test_unusable_requests_are_named(model, tokenizer, rows, options, message):
    with pytest.raises(ValueError, match=message):
        run(model, tokenizer, rows, Recorder(), **options)


def test_missing_rewards_are_named(model, tokenizer, dataset):
    with pytest.raises(ValueError, match="recorder returned 1 rewards for 10 completions"):
        run(model, tokenizer, dataset, Recorder(lambda call: [1.0]))


def test_result_is_immutable(model, tokenizer, dataset):
    result = run(model, tokenizer, dataset, share_of_answer)
    with pytest.raises(FrozenInstanceError):
        result.pass_at_1 = 1.0
