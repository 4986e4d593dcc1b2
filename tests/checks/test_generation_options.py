"""Every generation option is right on trees, or refused with the reason, wherever it comes from."""

import warnings

import pytest
import torch
from peft import LoraConfig
from test_config import make
from test_trainer import train
from tiny import EOS, PAD, make_tokenizer, spread_reward
from transformers import GenerationConfig, Qwen2ForCausalLM, SynthIDTextWatermarkingConfig

from treerpo_trl import TreeRPOTrainer
from treerpo_trl.checks import generation_tables as options
from treerpo_trl.growth import TreeShape, grow
from treerpo_trl.growth.backends import TransformersBackend


SHAPE = TreeShape((2, 2, 2), 4, 12)
PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 5]]
DECIDE = (
    "is in no table of checks/generation_tables.py. Each segment of a tree is a call of its own: does the option do "
    "on trees what it does in GRPO (RIGHT), does the tree set it (TREE_SETS), or is it refused (REFUSED)?"
)


def check_tables(fields: set[str], *tables) -> None:
    """Each field is in one table, and no table has another."""
    public = {name for name in fields if not name.startswith("_")}
    names = [name for table in tables for name in table]
    for name in sorted(public - set(names)):
        pytest.fail(f"{name} {DECIDE}")
    assert len(names) == len(set(names)), "an option is in two tables"
    assert set(names) <= public, f"no such options: {sorted(set(names) - public)}"


def test_every_option_of_transformers_is_in_one_table():
    check_tables(set(vars(GenerationConfig())), options.RIGHT, options.TREE_SETS, options.REFUSED)


@pytest.mark.vllm
def test_every_option_of_vllm_is_in_one_table():
    vllm = pytest.importorskip("vllm")
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    colocated = [options.VLLM_RIGHT, options.VLLM_TREE_SETS, options.VLLM_REFUSED]
    fields = set(vllm.SamplingParams.__struct_fields__)
    check_tables(fields, *colocated)
    server_only = set(CompletionRequest.model_fields) - fields
    check_tables(server_only, options.SERVER_RIGHT, options.SERVER_REFUSED)


def config_of(eos: int, **given) -> GenerationConfig:
    fixed = {"do_sample": False, "eos_token_id": [eos], "pad_token_id": PAD, "disable_compile": True}
    return GenerationConfig(**{**fixed, **given})


def plain(model, eos: int = EOS, tokenizer=None, **given) -> list[list[int]]:
    """What one call of `generate` makes of each prompt, up to the end."""
    width = max(map(len, PROMPTS))
    input_ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    config = config_of(eos, max_new_tokens=SHAPE.max_completion_length, **given)
    output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config, tokenizer=tokenizer)
    completions = output[:, width:].tolist()
    return [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in completions]


def paths(model, eos: int = EOS, fork_caches: bool = True, tokenizer=None, **given) -> list[list[int]]:
    """The only path of each tree, all of whose siblings are the same."""
    backend = TransformersBackend(model, config_of(eos, **given), [eos], PAD, 64, tokenizer, fork_caches)
    found = []
    for tree in grow(PROMPTS, SHAPE, backend):
        (path,) = {tuple(tree.completion_ids(leaf)) for leaf in tree.leaves}
        found.append(list(path))
    return found


COMMON = 16  # which the model writes early in each completion
SAMPLED = {"do_sample": True, "top_k": 0}


@pytest.mark.parametrize(
    "given",
    [
        {"repetition_penalty": 2.0},
        {"no_repeat_ngram_size": 2},
        {"forced_eos_token_id": EOS},
        {"exponential_decay_length_penalty": (2, 1.7)},
        {"exponential_decay_length_penalty": (5, 1.7)},
        {"watermarking_config": {"bias": 8.0, "context_width": 2}},
        {"eos": COMMON, "min_length": 11},
        {"eos": COMMON, "min_new_tokens": 3},
        {"eos": COMMON, "min_new_tokens": 6},
        {"eos": COMMON, "min_new_tokens": 12},
        {"eos": COMMON, "min_new_tokens": 3, "min_length": 11},
    ],
    ids=str,
)
def test_a_greedy_path_is_what_one_call_makes(model, given):
    expected = plain(model, **given)
    assert paths(model, **given) == expected
    assert expected != plain(model, given.get("eos", EOS))


def test_a_greedy_path_is_what_one_call_makes_without_forks(model):
    given = {"eos": COMMON, "min_new_tokens": 6, "repetition_penalty": 2.0}
    assert paths(model, fork_caches=False, **given) == plain(model, **given)


def test_what_looks_at_some_tokens_looks_at_the_whole_path(model):
    """The tokens are those that the model would write, also where they lie in two segments."""
    before = plain(model)
    across = [tuple(ids[3:5]) for ids in before]
    first = sorted({ids[0] for ids in before})
    for given in (
        {"suppress_tokens": first},
        {"begin_suppress_tokens": first},
        {"bad_words_ids": [list(pair) for pair in across]},
        {"sequence_bias": dict.fromkeys(across, -100.0)},
    ):
        expected = plain(model, **given)
        assert paths(model, **given) == expected != before


@pytest.mark.parametrize(
    "sharp",
    [{"temperature": 1e-5}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"epsilon_cutoff": 0.999}, {"top_h": 1e-6}],
    ids=str,
)
def test_sampling_so_sharp_that_one_token_is_left_draws_what_one_call_draws(model, sharp):
    assert paths(model, **{**SAMPLED, **sharp}) == plain(model)


def test_typical_tokens_are_those_of_one_call(model):
    given = {**SAMPLED, "typical_p": 1e-6, "renormalize_logits": True, "remove_invalid_values": True}
    assert paths(model, **given) == plain(model, **given) != plain(model)


def test_a_stop_string_ends_a_completion_though_it_lies_in_two_segments(model, tokenizer):
    across = tokenizer.decode(plain(model)[0][3:5])
    drawn = paths(model, tokenizer=tokenizer, stop_strings=[across])
    called = plain(model, tokenizer=tokenizer, stop_strings=[across])
    assert drawn[0] == plain(model)[0][:5] == called[0][:5] and set(called[0][5:]) <= {PAD}
    assert drawn[1:] == called[1:]


# What a configuration asks for ---------------------------------------------------------------------------------------


def test_what_trees_set_or_refuse_is_an_error_with_the_reason():
    for name, why in (options.TREE_SETS | options.REFUSED).items():
        with pytest.raises(ValueError, match=f"generation_kwargs has {name}=7, which .*: {why.reason}; {why.fix}"):
            make(generation_kwargs={name: 7})
        make(generation_kwargs={name: None})
        for harmless in why.harmless:
            make(generation_kwargs={name: harmless})


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_what_trees_refuse_of_vllm_is_an_error_with_the_reason(mode):
    refused = options.VLLM_TREE_SETS | options.VLLM_REFUSED
    refused |= options.SERVER_REFUSED if mode == "server" else {}
    for name, why in refused.items():
        with pytest.raises(ValueError, match=f"generation_kwargs has {name}=7, which .*: {why.reason}; {why.fix}"):
            make(use_vllm=True, vllm_mode=mode, generation_kwargs={name: 7})
        for harmless in why.harmless:
            make(use_vllm=True, vllm_mode=mode, generation_kwargs={name: harmless})


def test_options_that_are_right_are_taken():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make(generation_kwargs=dict.fromkeys(options.RIGHT, 1))
        make(use_vllm=True, generation_kwargs=dict.fromkeys(options.VLLM_RIGHT, 1))
        make(
            use_vllm=True,
            vllm_mode="server",
            generation_kwargs=dict.fromkeys(options.VLLM_RIGHT | options.SERVER_RIGHT, 1),
        )


def test_a_watermark_that_remembers_is_refused():
    config = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2])
    with pytest.raises(ValueError, match=r"remembers contexts.*; use a WatermarkingConfig"):
        make(generation_kwargs={"watermarking_config": config})


def test_misspelt_options_are_told():
    with pytest.warns(
        UserWarning, match="'repetition_penality', .* no effect, as in TRL. Did you mean 'repetition_pen"
    ):
        make(generation_kwargs={"repetition_penality": 2.0})
    with pytest.raises(ValueError, match="'suppress_tokens', which is no option of vLLM"):
        make(use_vllm=True, generation_kwargs={"suppress_tokens": [5]})
    with pytest.raises(ValueError, match="'priority', which is no option of vLLM"):  # but of a request to a server
        make(use_vllm=True, generation_kwargs={"priority": 1})


def test_greedy_siblings_are_refused():
    with pytest.raises(ValueError, match="temperature is 0, but siblings have to differ"):
        make(use_vllm=True, temperature=0.0)
    with pytest.raises(ValueError, match="temperature is 0, so all siblings would be the same"):
        make(use_vllm=True, generation_kwargs={"temperature": 0})


def test_an_end_token_that_the_trainer_does_not_know_is_refused(model, make_args, dataset):
    with pytest.raises(ValueError, match=r"eos_token_id=\[1, 5\], but \[5\] end no completion: .* knows \[1\]"):
        train(model, make_args(generation_kwargs={"eos_token_id": [EOS, 5]}), dataset)
    model.generation_config.eos_token_id = [EOS, 5]
    train(model, make_args(generation_kwargs={"eos_token_id": 5}), dataset)


def test_stop_strings_that_evaluation_cannot_find_are_refused(model, make_args, dataset):
    given = {"eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ValueError, match=r"stop_strings=\['3'\], but evaluation cannot.* instead of 'steps'"):
        TreeRPOTrainer(
            model, spread_reward, make_args(**given, generation_kwargs={"stop_strings": ["3"]}), train_dataset=dataset,
            eval_dataset=dataset, processing_class=make_tokenizer(),
        )  # fmt: skip


# What comes with a model ---------------------------------------------------------------------------------------------


def trees_of(model, args, dataset, **own) -> tuple[list, list[str]]:
    """The trees of the last step of a model with these options of its own, and the warnings about them."""
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, **own)
    before = model.generation_config
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = train(model, args, dataset)
    assert model.generation_config is before and all(getattr(before, name) == value for name, value in own.items())
    told = [str(warning.message) for warning in caught if "generation_config has" in str(warning.message)]
    return [scored.tree for scored in trainer.last_trees], told


@pytest.fixture
def expected(model_path, make_args, dataset):
    """The trees of a model without options of its own."""
    model = Qwen2ForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    return trees_of(model, make_args(max_steps=1), dataset)[0]


def test_options_that_only_say_how_to_compute_are_left_out_in_silence(model, make_args, dataset, expected):
    own = {
        "use_cache": False, "cache_implementation": "static", "return_dict_in_generate": True, "output_scores": True,
        "output_logits": True, "output_hidden_states": True, "max_length": 7, "max_new_tokens": 2, "do_sample": True,
        "num_return_sequences": 3, "prefill_chunk_size": 1,
    }  # fmt: skip
    assert trees_of(model, make_args(max_steps=1), dataset, **own) == (expected, [])


def test_options_that_do_not_work_on_trees_are_left_out_with_a_warning(model, make_args, dataset, expected):
    own = {"num_beams": 4, "max_time": 1e-9, "guidance_scale": 3.0, "token_healing": True, "num_beam_groups": 2}
    own |= {"encoder_repetition_penalty": 9.0, "prompt_lookup_num_tokens": 3, "dola_layers": "high"}
    trees, told = trees_of(model, make_args(max_steps=1), dataset, **own)
    assert trees == expected
    for name, value in own.items():
        (message,) = [message for message in told if f"has {name}={value!r}, which does not work on trees" in message]
        assert f"Trees are grown without it. Set model.generation_config.{name} = None" in message
    assert len(told) == len(own)


def test_a_configuration_that_overrules_the_model_silences_the_warning(model, make_args, dataset, expected):
    args = make_args(max_steps=1, generation_kwargs={"num_beams": 1})
    assert trees_of(model, args, dataset, num_beams=4) == (expected, [])


def test_options_of_the_model_that_are_right_on_trees_act_as_in_grpo(model, make_args, dataset):
    (*trees,), told = trees_of(
        model, make_args(max_steps=1), dataset, suppress_tokens=[COMMON], min_new_tokens=11, forced_eos_token_id=EOS,
        begin_suppress_tokens=[6],
    )  # fmt: skip
    assert told == []
    for tree in trees:
        assert len(tree.leaves) == 8  # the forced end is that of a completion
        for leaf in tree.leaves:
            ids = tree.completion_ids(leaf)
            assert ids[-1] == EOS and EOS not in ids[:-1] and len(ids) == 12
            assert COMMON not in ids and ids[0] != 6


def test_options_of_a_model_under_an_adapter_are_left_out_and_come_back(model, make_args, dataset):
    args = make_args()  # the second step is the first to move each weight of the adapter
    model.generation_config.num_beams = 2
    with pytest.warns(UserWarning, match="num_beams=2, which does not work on trees"):
        trainer = train(model, args, dataset, peft_config=LoraConfig(target_modules=["q_proj"]))
    assert trainer.model.generation_config.num_beams == model.generation_config.num_beams == 2
    assert "generation_config" not in vars(trainer.model)
