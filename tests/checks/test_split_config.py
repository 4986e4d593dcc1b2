"""The options of each split rule: what is derived, and what is refused wherever it comes from."""

import re

import numpy as np
import pytest
import yaml
from test_config import make
from test_generation_options import trees_of
from tiny import EOS
from transformers import Qwen2ForCausalLM
from trl import TrlParser

from treerpo_trl import TreeRPOConfig
from treerpo_trl.checks.command_line import TreeRPOParser
from treerpo_trl.checks.generation_tables import UNEVEN_REFUSED
from treerpo_trl.growth import Delimiters, ForkShape, TreeShape
from treerpo_trl.growth.from_config import shape_of, statistics_of


FORKS = {"split_rule": "uncertainty", "num_trunks": 2, "forks_per_trunk": 2, "per_device_train_batch_size": 6}
LONE = {"split_rule": "uncertainty", "advantage_estimator": "optimal_baseline", "per_device_train_batch_size": 4}
DELIMITED = {"split_rule": "delimiter"}

REFUSED = [
    ({"split_rule": "delimeter", "step_delimiters": ["a"]}, "'delimeter' is not one of .* did you mean 'delimiter'"),
    ({"split_rule": "entropy"}, "Use split_rule='length' or 'delimiter' or 'uncertainty'"),
    # Options of another rule.
    ({"step_delimiters": ["."]}, "step_delimiters is .* no effect with split_rule='length'; .*='delimiter'"),
    ({**FORKS, "step_delimiters": ["."]}, "step_delimiters .* with split_rule='uncertainty'; .*='delimiter'"),
    ({"num_trunks": 2}, "num_trunks is 2, which has no effect with split_rule='length'; .*='uncertainty'"),
    ({**DELIMITED, "forks_per_trunk": 3}, "forks_per_trunk is 3, .* with split_rule='delimiter'"),
    ({"continuations_per_fork": 2}, "continuations_per_fork is 2"),
    ({"fork_rounds": 2}, "fork_rounds is 2"),
    ({"uncertainty_measure": "entropy"}, "uncertainty_measure is 'entropy', which has no effect"),
    ({"min_segment_length": 5}, "min_segment_length is 5, .*; .* split_rule='delimiter' or 'uncertainty'"),
    ({**FORKS, "branching_factor": 4}, "branching_factor is 4, .*='uncertainty'; .*='length' or 'delimiter'"),
    ({**FORKS, "branching_factor": [2, 2]}, r"branching_factor is \[2, 2\], which has no effect"),
    ({**FORKS, "max_depth": 2}, "max_depth is 2, which has no effect"),
    ({**FORKS, "segment_length": 64}, "segment_length is 64, which has no effect"),
    # Out of range.
    ({**DELIMITED, "min_segment_length": 0}, "min_segment_length is 0; a segment has at least one token"),
    ({**DELIMITED, "segment_length": 4, "min_segment_length": 5}, "is 5, .* segment_length=4 tokens; lower it"),
    ({**DELIMITED, "segment_length": 4, "max_completion_length": 0}, "max_completion_length is 0; a completion has"),
    ({**FORKS, "max_completion_length": -3}, "max_completion_length is -3; a completion has at least one token"),
    ({**DELIMITED, "step_delimiters": []}, r"step_delimiters is \[\]; give one text or more"),
    ({**DELIMITED, "step_delimiters": ["a", ""]}, r"is \['a', ''\]; give one text or more, none of them empty"),
    ({**DELIMITED, "step_delimiters": ["\\n\\n"]}, r"a backslash and a letter, .* \$'\\n\\n' in a shell"),
    ({**FORKS, "num_trunks": 0}, "num_trunks is 0; use 1 or more"),
    ({**FORKS, "forks_per_trunk": 0}, "forks_per_trunk is 0; use 1 or more, or another split_rule for no forks"),
    ({**FORKS, "continuations_per_fork": -1}, "continuations_per_fork is -1"),
    ({**FORKS, "fork_rounds": 0}, "fork_rounds is 0"),
    ({**FORKS, "uncertainty_measure": "surprise"}, "did you mean 'surprisal'"),
    # Against each other.
    ({"split_rule": "uncertainty"}, "num_trunks is 1, but advantage_estimator='treerpo' .* Use num_trunks=2"),
    ({**LONE, "advantage_estimator": "treerl"}, "='treerl' compares the nodes .*='optimal_baseline'"),
    ({**FORKS, "num_generations": 8}, r"2 x \(1 \+ 2 x 1 x 1\) = 6 leaves, but num_generations is 8; .* set it to 6"),
    ({**FORKS, "min_segment_length": 10, "max_completion_length": 19}, "is 19, but a fork .*=10 .*; use 20 or more"),
    ({**FORKS, "per_device_train_batch_size": 8}, r"multiple of num_generations \(6"),
]  # fmt: skip
FROM_PYTHON = [
    ({**DELIMITED, "step_delimiters": None}, TypeError, "step_delimiters is None; give a list of texts"),
    ({**DELIMITED, "step_delimiters": [1]}, TypeError, r"step_delimiters is \[1\]; give a list of texts"),
    ({**FORKS, "num_trunks": 2.0}, TypeError, "num_trunks is 2.0, of type float; use num_trunks=2"),
    ({**FORKS, "fork_rounds": True}, TypeError, "fork_rounds is True, of type bool; use a whole number"),
    ({**FORKS, "min_segment_length": None}, TypeError, "min_segment_length is None"),
    ({**FORKS, "branching_factor": np.array([4, 2])}, ValueError, r"is \[4, 2\], which has no effect"),
    (
        {**FORKS, "use_vllm": True, "uncertainty_measure": "entropy"}, ValueError,
        "uncertainty_measure='entropy' does not work with use_vllm=True: .* Use uncertainty_measure='surprisal'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_a_rule_cannot_have_is_refused_with_the_fix(options, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        make(**options)


@pytest.mark.parametrize(("options", "error", "message"), FROM_PYTHON)
def test_what_is_of_the_wrong_type_is_refused_with_the_fix(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.parametrize(("options", "message"), [case for case in REFUSED[::3] if [] not in case[0].values()])
def test_yaml_and_the_command_line_refuse_it_as_well(options, message, tmp_path):
    given = {"output_dir": "out", "bf16": False, **options}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    flags = []
    for name, value in given.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    for arguments in (["--config", str(tmp_path / "run.yaml")], flags):
        with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
            TreeRPOParser((TreeRPOConfig,)).parse_args_and_config(arguments)


@pytest.mark.parametrize(
    ("options", "leaves", "longest", "shape"),
    [
        (DELIMITED, 4, 256, TreeShape((2, 2), 128, 256, Delimiters(("\n\n",), 1))),
        (
            {**DELIMITED, "branching_factor": [4, 2], "segment_length": 100, "max_completion_length": 1000,
             "step_delimiters": ["\n", ". "], "min_segment_length": 9},
            8, 1000, TreeShape((4, 2), 100, 1000, Delimiters(("\n", ". "), 9)),
        ),
        ({**DELIMITED, "step_delimiters": "\n"}, 4, 256, TreeShape((2, 2), 128, 256, Delimiters(("\n",), 1))),
        ({**DELIMITED, "step_delimiters": ("\\nabla",)}, 4, 256,
         TreeShape((2, 2), 128, 256, Delimiters(("\\nabla",), 1))),
        (FORKS, 6, 384, ForkShape(2, 2, 1, 1, 1, 384)),
        (LONE, 2, 384, ForkShape(1, 1, 1, 1, 1, 384)),
        (
            {**FORKS, "num_trunks": np.int64(3), "forks_per_trunk": 3, "continuations_per_fork": 2, "fork_rounds": 2,
             "min_segment_length": 4, "max_completion_length": 64, "per_device_train_batch_size": 39},
            39, 64, ForkShape(3, 3, 2, 2, 4, 64),
        ),
        ({**FORKS, "branching_factor": [2], "max_completion_length": 2}, 6, 2, ForkShape(2, 2, 1, 1, 1, 2)),
    ],
)  # fmt: skip
def test_the_tree_is_derived_and_a_resolved_configuration_resolves_to_itself(options, leaves, longest, shape):
    config = make(**options)
    assert (config.num_generations, config.max_completion_length, shape_of(config)) == (leaves, longest, shape)
    own = {name: getattr(config, name) for name in TreeRPOConfig.__annotations__}
    again = make(**own, per_device_train_batch_size=config.per_device_train_batch_size)
    assert {name: getattr(again, name) for name in own} == own and shape_of(again) == shape


def test_what_is_measured_is_what_is_asked_for():
    assert statistics_of(make(), False) == () and statistics_of(make(**DELIMITED), True) == ("score_norm",)
    assert statistics_of(make(**FORKS), False) == ("surprisal",)
    assert statistics_of(make(**FORKS, uncertainty_measure="entropy"), True) == ("entropy", "score_norm")


def test_delimiters_from_the_command_line_and_yaml(tmp_path):
    flags = ["--output_dir", "out", "--bf16", "false", "--split_rule", "delimiter"]
    (config,) = TrlParser((TreeRPOConfig,)).parse_args_and_config([*flags, "--step_delimiters", "\n\n", ". ", "wait"])
    assert config.step_delimiters == ["\n\n", ". ", "wait"]
    (config,) = TrlParser((TreeRPOConfig,)).parse_args_and_config(flags)
    assert config.step_delimiters == ["\n\n"]
    path = tmp_path / "run.yaml"
    for written, expected in (('["\\n\\n", ". "]', ["\n\n", ". "]), ('"\\n"', ["\n"]), ("So", ["So"])):
        path.write_text(f"output_dir: out\nbf16: false\nsplit_rule: delimiter\nstep_delimiters: {written}\n")
        (config,) = TrlParser((TreeRPOConfig,)).parse_args_and_config(["--config", str(path)])
        assert config.step_delimiters == expected


UNEVEN = {
    "min_new_tokens": 3, "min_length": 4, "forced_eos_token_id": EOS, "exponential_decay_length_penalty": (2, 1.5)
}  # fmt: skip


@pytest.mark.parametrize("options", [DELIMITED, FORKS])
def test_options_that_count_tokens_are_refused_where_segments_end_anywhere(options):
    assert set(UNEVEN) == set(UNEVEN_REFUSED)
    for name, value in UNEVEN.items():
        make(generation_kwargs={name: value})
        with pytest.raises(ValueError, match=rf"{name}=.* counts tokens, .*; remove it, or set split_rule='length'"):
            make(**options, generation_kwargs={name: value})
    make(**options, generation_kwargs={"min_new_tokens": 0, "min_length": 0})


@pytest.mark.parametrize(
    "options",
    [
        {"split_rule": "delimiter", "step_delimiters": ["3", "="]},
        {"split_rule": "uncertainty", "num_trunks": 2, "forks_per_trunk": 1, "continuations_per_fork": 3,
         "branching_factor": 2, "max_depth": None, "segment_length": None, "max_completion_length": 12},
    ],
)  # fmt: skip
def test_options_that_count_tokens_and_come_with_the_model_are_left_out(model_path, make_args, dataset, options):
    found = []
    for own in ({}, UNEVEN):
        model = Qwen2ForCausalLM.from_pretrained(model_path)
        found.append(trees_of(model, make_args(max_steps=1, **options), dataset, **own))
    (expected, silent), (trees, told) = found
    assert trees == expected and silent == []
    assert len(told) == len(UNEVEN)
    for name in UNEVEN:
        assert any(f"has {name}=" in message and "Trees are grown without it" in message for message in told)
