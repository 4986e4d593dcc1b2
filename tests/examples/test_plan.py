"""`python -m treerpo_trl.plan`: its tokens are those of trees that grow, its memory that of the documentation."""

import pytest
from places import EXAMPLES
from transformers import AutoConfig, AutoModelForCausalLM

from treerpo_trl import TreeRPOConfig, plan
from treerpo_trl.growth import ForkShape, TreeShape, shape_of


EXAMPLE_MODEL = str(EXAMPLES / "base_model")


def printed(capsys, *arguments):
    assert plan.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("branching", "sampled"), [((4, 4, 4), 64 * (4 + 16 + 64)), ((2,), 64 * 2), ((3, 2), 64 * (3 + 6))]
)
def test_each_segment_is_drawn_and_trained_once(branching, sampled):
    shape = TreeShape(branching, 64, len(branching) * 64)
    cost = plan.tree_cost(shape, 5, 100)
    assert (cost.sampled, cost.prefilled, cost.trained) == (5 * sampled, 500, 5 * (100 + sampled))


def test_the_last_segment_may_be_shorter():
    assert plan.tree_cost(TreeShape((2, 2), 64, 100), 1, 0).sampled == 2 * 64 + 4 * 36


def test_a_depth_of_one_draws_what_grpo_draws():
    shape = TreeShape((8,), 64, 64)
    tree, flat = plan.tree_cost(shape, 3, 10), plan.flat_cost(shape, 3, 10)
    assert tree.sampled == flat.sampled
    assert flat.trained - tree.trained == 3 * 7 * 10  # the prompt, which its rows share


def test_a_fork_draws_half_a_response_on_average():
    assert plan.tree_cost(ForkShape(2, 3, 1, 1, 1, 100), 1, 0).sampled == 2 * 100 + 6 * 50


def test_arithmetic_is_what_was_measured():
    """One prompt of 64 tokens, segments of 64, on two busy cores: 0.34 and 0.41 of GRPO's time."""
    for branching, measured in [((4, 4, 4), 0.34), ((8, 8), 0.41)]:
        shape = TreeShape(branching, 64, 64 * len(branching))
        tree, flat = plan.tree_cost(shape, 1, 64), plan.flat_cost(shape, 1, 64)
        assert tree.arithmetic / flat.arithmetic == pytest.approx(measured, abs=0.1)


def test_a_model_is_measured_without_its_weights():
    config = AutoConfig.from_pretrained(EXAMPLE_MODEL)
    size = plan.ModelSize.of(EXAMPLE_MODEL)
    assert size.num_parameters == AutoModelForCausalLM.from_pretrained(EXAMPLE_MODEL).num_parameters()
    head = config.hidden_size // config.num_attention_heads
    assert size.cache_bytes == 4 * config.num_hidden_layers * config.num_key_value_heads * head


def test_memory_of_the_engines():
    """The documentation's table, for 7.6 billion parameters and 8 GPUs."""
    found = {name.split(" ")[0].rstrip(","): size for name, size in plan.training_bytes(7_600_000_000, 8).items()}
    rounded = {name: round(size / 1e9) for name, size in found.items()}
    assert rounded == {"multi_gpu": 152, "deepspeed_zero1": 42, "deepspeed_zero2": 28, "deepspeed_zero3": 15}
    assert plan.training_bytes(100, 1) == {"single_gpu": 1600}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"branching_factor": [2]},
        {"branching_factor": [2], "max_depth": 1},
        {"branching_factor": [4, 4, 4], "segment_length": 24},
        {"max_completion_length": 100},
        {"split_rule": "uncertainty", "max_completion_length": 60},
        {"num_trunks": 6, "forks_per_trunk": 2, "continuations_per_fork": 2, "max_completion_length": 99},
    ],
)
def test_the_tree_is_the_one_that_the_config_grows(options, tmp_path):
    words = [
        word
        for name, value in options.items()
        for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
    ]
    rule = {"split_rule": "uncertainty"} if "num_trunks" in options else {}
    config = TreeRPOConfig(str(tmp_path), bf16=False, per_device_train_batch_size=960, **options, **rule)
    assert plan.make_shape(plan._parser().parse_args(words)) == shape_of(config)


def test_the_table(capsys):
    out = printed(capsys, "--branching_factor", 4, 4, "--segment_length", 64, "--num_prompts", 8, "--num_gpus", 2,
                  "--model", EXAMPLE_MODEL)  # fmt: skip
    for text in ("completions of a step", "128", "deepspeed_zero3", "keys and values"):
        assert text in out
    assert "0." in out.split("arithmetic of the step")[1]
    assert "keys and values" not in printed(capsys, "--num_trunks", 1, "--max_completion_length", 300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_prompts", "6", "--num_gpus", "4"], "num_prompts 6 cannot be divided among 4 GPUs"),
        (["--branching_factor", "2", "0"], "branching_factor [2, 0] has a number below 1"),
        (["--segment_length", "0"], "segment_length is 0; give 1 or more"),
        (["--branching_factor", "2", "--num_trunks", "2"], "give one"),
        (["--branching_factor", "2", "--split_rule", "uncertainty"], "give one"),
        (["--split_rule", "length", "--num_trunks", "2"], "leave it out, or split_rule='length'"),
        (["--segment_length", "4", "--max_completion_length", "100"], "max_completion_length"),
        (["--model", str(EXAMPLES / "nope")], "there is no folder"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_what_cannot_be_is_told(capsys, arguments, message):
    assert plan.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_by_hand():
    """2 x 2 leaves below a prompt of 3 tokens: 2 + 4 segments of 5; and 4 rows of 13."""
    shape = TreeShape((2, 2), 5, 10)
    assert (plan.tree_cost(shape, 1, 3).trained, plan.flat_cost(shape, 1, 3).trained) == (33, 52)
