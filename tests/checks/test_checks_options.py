"""Options of the wrong type, out of range, misspelt or of earlier versions: an error with the value and the fix."""

import copy
import dataclasses
import inspect
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_config import make
from transformers.utils import is_torch_bf16_gpu_available
from trl import GRPOConfig

from treerpo_trl import TreeRPOConfig
from treerpo_trl.checks.command_line import TreeRPOParser
from treerpo_trl.checks.moved_options import MOVED
from treerpo_trl.checks.options import WHOLE_NUMBERS
from treerpo_trl.checks.split_rule import FORK_OPTIONS
from treerpo_trl.checks.tree_shape import shapes_of


# A configuration in which every whole number of ours may be 8.
FITTING = {"branching_factor": 8, "max_depth": 1, "log_trees": True}
FORKS = {"split_rule": "uncertainty", "num_trunks": 2, "per_device_train_batch_size": 144}


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_whole_numbers_of_any_type_are_taken_as_ints(name):
    depth = {"branching_factor": 2} if name == "max_depth" else {"max_depth": 1}
    fitting = {**FITTING, **depth, "per_device_train_batch_size": 256}
    if name == "max_completion_length":
        fitting["segment_length"] = 8
    if name in {*FORK_OPTIONS, "min_segment_length"}:
        fitting = FORKS
    for number in (8, np.int64(8), np.int32(8), torch.tensor(8)):
        assert type(getattr(make(**{**fitting, name: number}), name)) is int


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
@pytest.mark.parametrize(
    ("value", "fix"),
    [("8", "{}=8"), (8.0, "{}=8"), (np.float64(8), "{}=8"), (8.5, "a whole number"), (math.nan, "a whole number"),
     ("eight", "a whole number"), (True, "a whole number"), (np.True_, "a whole number"), ([8], "a whole number")],
    ids=["text", "float", "numpy float", "fraction", "nan", "word", "flag", "numpy flag", "list"],
)  # fmt: skip
def test_what_is_no_whole_number_is_refused_with_the_one_that_is_meant(name, value, fix):
    with pytest.raises(TypeError, match=rf"{name} is .*, of type \w+; use {fix.format(name)}$"):
        make(**{**FITTING, name: value})


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_negative_numbers_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is -1"):
        make(**{**FITTING, name: -1})


@pytest.mark.parametrize("name", [name for name, is_optional in WHOLE_NUMBERS.items() if not is_optional])
def test_a_number_that_has_to_be_set_is_not_none(name):
    with pytest.raises(TypeError, match=f"{name} is None"):
        make(**{name: None})


@pytest.mark.parametrize("branching", [np.int64(4), [np.int64(2), 4], np.array([2, 4]), (2, np.int32(4))])
def test_branching_factors_of_numpy_are_taken(branching):
    config = make(branching_factor=branching, per_device_train_batch_size=64)
    assert config.branching_factor in ([4, 4], [2, 4]) and all(type(n) is int for n in config.branching_factor)


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.5), -1, -math.inf, None])
def test_thresholds(value):
    threshold = make(prune_threshold=value).prune_threshold
    assert threshold == value and type(threshold) in (float, type(None))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prune_threshold": "0.1"}, TypeError, "prune_threshold is '0.1', of type str; use prune_threshold=0.1"),
        ({"prune_threshold": "none"}, TypeError, "prune_threshold is 'none', of type str; use a number"),
        ({"prune_threshold": True}, TypeError, "prune_threshold is True, of type bool; use a number"),
        ({"prune_threshold": math.nan}, ValueError, "prune_threshold is nan; use a number"),
        ({"prune_threshold": math.inf}, ValueError, "prune_threshold is inf, .*nothing would be trained"),
        ({"log_trees": "false"}, TypeError, "log_trees is 'false', of type str; use log_trees=True"),
        ({"log_trees": 1}, TypeError, "log_trees is 1, of type int; use"),
        ({"temperature": 0}, ValueError, "temperature is 0, but siblings have to differ.* use temperature=1.0"),
        ({"temperature": -0.5}, ValueError, "temperature is -0.5"),
        ({"temperature": math.nan}, ValueError, "temperature is nan"),
        ({"temperature": math.inf}, ValueError, "temperature is inf"),
        ({"temperature": "0.6"}, TypeError, "temperature is '0.6', of type str; use temperature=0.6"),
        ({"temperature": None}, TypeError, "temperature is None, of type NoneType; use a number"),
        ({"top_p": 0}, ValueError, r"top_p is 0; use a share of probability in \(0, 1\]"),
        ({"top_p": 95}, ValueError, "top_p is 95"),
        ({"top_k": -1}, ValueError, "top_k is -1; use a number of tokens, or 0"),
        ({"top_k": 2.0}, TypeError, "top_k is 2.0, of type float; use top_k=2"),
        ({"min_p": 1.5}, ValueError, "min_p is 1.5"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty is 0"),
        ({"advantage_estimator": "treerpo2"}, ValueError, "'treerpo2' is not one of .*; did you mean 'treerpo'"),
        ({"advantage_estimator": "Group_Std"}, ValueError, "did you mean 'group_std'"),
        ({"advantage_estimator": "centred"}, ValueError, "did you mean 'centered'"),
        ({"advantage_estimator": None}, ValueError, "advantage_estimator=None does not work"),
        ({"loss_weighting": "nodes"}, ValueError, "did you mean 'node'"),
        ({"loss_type": "dapoo"}, ValueError, "'dapoo' is not one of the choices; did you mean 'dapo'"),
        ({"loss_type": "zzz"}, ValueError, r"'zzz' is not one of the choices\. Use loss_type='dapo' or"),
        ({"importance_sampling_level": "tokens"}, ValueError, "did you mean 'token'"),
        ({"scale_rewards": "groups"}, ValueError, "did you mean 'group'"),
        ({"prefix_sharing": "autoo"}, ValueError, "did you mean 'auto'"),
        ({"use_vllm": True, "vllm_importance_sampling_mode": "token_masks"}, ValueError, "did you mean 'token_mask'"),
    ],
)  # fmt: skip
def test_wrong_values_are_told_with_the_fix(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_a_choice_of_trl_that_trees_refuse_is_no_misspelling():
    for name, value in {
        "loss_type": "grpo",
        "scale_rewards": "batch",
        "importance_sampling_level": "sequence",
    }.items():
        with pytest.raises(ValueError, match=f"{name}='{value}' does not work with trees: ") as error:
            make(**{name: value})
        assert "did you mean" not in str(error.value)


@pytest.mark.parametrize("scale_rewards", ["group", True, "none", False])
def test_what_says_the_same_thing_twice_is_taken(scale_rewards):
    estimator = "group_std" if scale_rewards in ("group", True) else "centered"
    config = make(scale_rewards=scale_rewards, advantage_estimator=estimator)
    assert config.scale_rewards == {"group_std": "group", "centered": "none"}[estimator]
    assert make(top_k=-1, use_vllm=True).top_k == -1
    assert make(prefix_sharing=1).prefix_sharing is True and make(prefix_sharing=0).prefix_sharing is False


# Shapes for a number of leaves


@given(st.integers(2, 600))
def test_shapes_have_that_many_leaves(leaves):
    shapes = shapes_of(leaves)
    assert 1 <= len(shapes) <= 3
    for shape in shapes:
        assert math.prod(shape) == leaves and min(shape) >= 2
    is_prime = all(leaves % factor for factor in range(2, leaves))
    assert is_prime == (shapes == [[leaves]])


@pytest.mark.parametrize(
    ("leaves", "shapes"),
    [(16, "[4, 4] or [2, 2, 2, 2] or [4, 2, 2]"), (12, "[4, 3] or [3, 2, 2]"), (9, "[3, 3]")],
)
def test_another_number_of_leaves_is_told_with_trees_that_have_it(leaves, shapes):
    with pytest.raises(ValueError) as error:
        make(num_generations=leaves)
    assert f"For {leaves} leaves set branching_factor={shapes}, without max_depth" in str(error.value)
    for shape in shapes.split(" or "):
        options = {"num_generations": leaves, "per_device_train_batch_size": leaves}
        assert make(branching_factor=[int(n) for n in shape.strip("[]").split(", ")], **options)
    with pytest.raises(ValueError, match=r"For 7 leaves set branching_factor=7, max_depth=1$"):
        make(num_generations=7)
    with pytest.raises(ValueError, match=r"num_generations is 1; leave num_generations unset or set it to 4$"):
        make(num_generations=1)


# Names


@pytest.mark.parametrize("name", MOVED)
def test_options_of_earlier_versions_are_told_where_they_went(name):
    assert name not in {field.name for field in dataclasses.fields(GRPOConfig)}
    with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}': {name} is an option of earlier ver"):
        make(**{name: 1})


def test_what_to_use_instead_is_there():
    """Every name of an option in the advice is one of GRPOConfig."""
    options = {field.name for field in dataclasses.fields(GRPOConfig)}
    for advice in MOVED.values():
        used = advice.split("use ", 1)[-1].split("=")[0].split(",")[0].split(" ")[0]
        assert not advice.startswith("use ") or used in options, advice


@pytest.mark.parametrize(
    ("name", "hint"),
    [("max_dept", "did you mean max_depth?"), ("segmentlength", "did you mean segment_length?"), ("zzz", "'zzz'$")],
)
def test_a_misspelt_option_is_told_with_the_nearest(name, hint):
    with pytest.raises(TypeError, match=rf"got an unexpected keyword argument .*{hint}"):
        make(**{name: 1})


def test_the_command_line_and_yaml_tell_it_too(tmp_path):
    parser = TreeRPOParser((TreeRPOConfig,))
    flags = ["--output_dir", "out", "--bf16", "false"]
    with pytest.raises(ValueError, match=r"\['--max_prompt_length', '9'\] max_prompt_length is an option of earlier"):
        parser.parse_args_and_config([*flags, "--max_prompt_length", "9"])
    with pytest.raises(ValueError, match="branchingfactor, did you mean branching_factor"):
        parser.parse_args_and_config([*flags, "--branchingfactor", "9"])
    path = tmp_path / "config.yaml"
    path.write_text("output_dir: out\nbf16: false\nwarmup_ratio: 0.1\n")
    with pytest.raises(ValueError, match=r"Unknown arguments from config file.* use warmup_steps"):
        parser.parse_args_and_config(["--config", str(path)])
    with pytest.raises(ValueError, match=r"not used by the HfArgumentParser: \['--zzz', '1'\]$"):
        parser.parse_args_and_config([*flags, "--zzz", "1"])
    with pytest.raises(ValueError, match="num_generations is 9"):
        parser.parse_args_and_config([*flags, "--num_generations", "9"])
    (config,) = parser.parse_args_and_config([*flags, "--segment_length", "9"])
    assert config.segment_length == 9


def test_the_configuration_is_still_a_dataclass_like_any_other():
    config = make()
    assert list(inspect.signature(TreeRPOConfig).parameters) == [
        field.name for field in dataclasses.fields(TreeRPOConfig) if field.init
    ]
    for copied in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert copied.to_dict() == config.to_dict()
    assert TreeRPOConfig("elsewhere", bf16=False).output_dir == "elsewhere"


# Precision


@pytest.mark.skipif(is_torch_bf16_gpu_available(), reason="has an accelerator for bfloat16")
def test_bfloat16_without_an_accelerator_is_told_with_whence_it_comes():
    with pytest.raises(ValueError, match=r"bf16 is on, which is TRL's default, .* use_cpu=True .* bf16=False"):
        TreeRPOConfig("out", report_to="none")
    with pytest.raises(ValueError, match=r"^bf16 is True, but no accelerator"):
        TreeRPOConfig("out", report_to="none", bf16=True)
    with pytest.raises(ValueError, match=r"^bf16 is False and bf16_full_eval is True, but no accelerator"):
        TreeRPOConfig("out", report_to="none", bf16=False, bf16_full_eval=True)
    assert TreeRPOConfig("out", report_to="none", use_cpu=True).bf16 is True
    with pytest.raises(ValueError, match="At most one of fp16 and bf16"):
        TreeRPOConfig("out", report_to="none", bf16=True, fp16=True, use_cpu=True)
