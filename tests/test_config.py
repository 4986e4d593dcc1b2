"""TreeRPOConfig: what is derived, what is refused, and that TRL's parser reads it."""

import math

import pytest
from trl import TrlParser

from treerpo_trl import TreeRPOConfig, rows
from treerpo_trl.checks import compatibility
from treerpo_trl.credit import ESTIMATORS


def make(**options) -> TreeRPOConfig:
    """The paper's credit, if no other is named, so that a batch may hold a single tree."""
    defaults = {"output_dir": "out", "bf16": False, "report_to": "none", "advantage_estimator": "treerpo"}
    return TreeRPOConfig(**{**defaults, **options})


def test_defaults_fit_trls_default_batch():
    config = TreeRPOConfig("out", bf16=False, report_to="none")
    assert (config.branching_factor, config.max_depth, config.segment_length) == ([2, 2], 2, 128)
    assert (config.num_generations, config.max_completion_length) == (4, 256)
    assert (config.advantage_estimator, config.prune_threshold) == ("optimal_baseline", 0.1)
    assert (config.loss_weighting, config.min_advantage, config.split_rule) == ("token", 0.0, "length")
    assert (config.loss_type, config.epsilon) == ("dapo", 0.2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"branching_factor": 4, "max_depth": 1}, ([4], 1, 128, 4, 128)),
        ({"branching_factor": [4, 2]}, ([4, 2], 2, 128, 8, 256)),
        ({"branching_factor": (2, 4), "segment_length": 10}, ([2, 4], 2, 10, 8, 20)),
        ({"max_completion_length": 511}, ([2, 2], 2, 256, 4, 511)),
        ({"max_completion_length": 15, "segment_length": 10}, ([2, 2], 2, 10, 4, 15)),
        ({"num_generations": 4}, ([2, 2], 2, 128, 4, 256)),
    ],
)
def test_the_tree_is_derived(options, expected):
    config = make(**options, per_device_train_batch_size=8)
    derived = (
        config.branching_factor, config.max_depth, config.segment_length, config.num_generations,
        config.max_completion_length,
    )  # fmt: skip
    assert derived == expected


@pytest.mark.parametrize(
    "options",
    [
        {"branching_factor": [4, 4], "per_device_train_batch_size": 16},
        {"branching_factor": 8, "max_depth": 1},
        {"branching_factor": 8, "max_depth": 1, "per_device_train_batch_size": 2, "steps_per_generation": 4},
        {"split_rule": "uncertainty", "num_trunks": 4},
    ],
)
def test_a_single_tree_a_batch_is_refused_where_trees_are_compared(options, monkeypatch):
    with pytest.raises(ValueError, match=r"rows holds a single tree .*'optimal_baseline' .*Use a smaller tree, or"):
        make(**options, advantage_estimator="optimal_baseline")
    make(**options)
    larger = {"steps_per_generation": 8, "gradient_accumulation_steps": 8}
    make(**{**options, **larger}, advantage_estimator="optimal_baseline")
    monkeypatch.setenv("WORLD_SIZE", "2")  # the other tree may be another process's
    monkeypatch.setattr(TreeRPOConfig, "world_size", 2)
    make(**options, advantage_estimator="optimal_baseline")


def test_a_resolved_configuration_resolves_to_itself():
    config = make(branching_factor=[2, 4], segment_length=10, max_completion_length=15)
    names = ["branching_factor", "max_depth", "segment_length", "num_generations", "max_completion_length"]
    resolved = {name: getattr(config, name) for name in names}
    again = make(**resolved)
    assert {name: getattr(again, name) for name in names} == resolved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 9}, r"makes 4 leaves, but num_generations is 9; leave .* or set it to 4"),
        ({"branching_factor": [2, 2], "max_depth": 3}, r"\[2, 2\] has 2 numbers, but max_depth is 3"),
        ({"branching_factor": [2, 1]}, r"\[2, 1\] has a number below 2"),
        ({"branching_factor": 1}, r"\[1, 1\] has a number below 2"),
        ({"max_depth": 0}, "max_depth is 0; a tree is at least 1 deep"),
        ({"segment_length": 0}, "segment_length is 0"),
        ({"max_frontier_rows": 0}, "max_frontier_rows is 0"),
        ({"segment_length": 10, "max_completion_length": 21}, "is 21, but 2 segments of 10 tokens .* 11 to 20"),
        ({"segment_length": 10, "max_completion_length": 10}, "is 10, but 2 segments of 10 tokens .* 11 to 20"),
        ({"per_device_train_batch_size": 6}, r"\(6\) x steps_per_generation \(1\) = 6 .*num_generations \(4.*=2"),
        ({"generation_batch_size": 24, "per_device_train_batch_size": 2, "branching_factor": 3}, r"\(9\)"),
        ({"advantage_estimator": "gae"}, "advantage_estimator='gae' .*='treerpo' or 'bernoulli_std'"),
        ({"prefix_sharing": "always"}, "prefix_sharing='always' .*='auto' or True or False"),
        ({"loss_weighting": "row"}, "loss_weighting='row' .*='token' or 'node'"),
        ({"loss_type": "grpo"}, "loss_type='grpo' .* average over each row.*='dapo' or 'bnpo'"),
        ({"loss_type": "sapo"}, "loss_type='sapo'"),
        ({"loss_type": "luspo"}, "loss_type='luspo'"),
        ({"loss_type": "vespo"}, "loss_type='vespo'"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' .*='token'"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold=0.5"),
        ({"scale_rewards": "none"}, "scale_rewards='none' .*'centered'"),
        ({"scale_rewards": False}, "scale_rewards=False .*'centered'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "normalize_then_sum"),
        ({"use_transformers_continuous_batching": True}, "starts each call with an empty cache"),
        ({"use_vllm": True, "vllm_importance_sampling_mode": "sequence_mask"}, "='token_mask' or 'token_truncate'"),
        ({"use_vllm": True, "vllm_structured_outputs_regex": "a+"}, "each segment would have to match it anew"),
        ({"use_vllm": True, "generation_kwargs": {"seed": 1}}, "seed=1, .* draw all siblings alike"),
        ({"use_vllm": True, "generation_kwargs": {"max_tokens": 9}}, "max_tokens=9, .* set segment_length"),
        ({"use_vllm": True, "generation_kwargs": {"frequency_penalty": 1.0}}, "use repetition_penalty"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"generation_kwargs": {"num_beams": 4}}, "num_beams=4, .* sampled independently"),
        ({"generation_kwargs": {"max_new_tokens": 9}}, "max_new_tokens=9, .* set segment_length"),
        ({"generation_kwargs": '{"num_return_sequences": 2}'}, "num_return_sequences=2, .* set branching_factor"),
    ],
)  # fmt: skip
def test_inconsistent_configurations_name_the_values_and_the_fix(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_bnpo_takes_whole_trees_only():
    """A micro-batch is what it normalizes by, and of a tree the first one owns nearly all tokens."""
    make(loss_type="bnpo", per_device_train_batch_size=16)
    options = {"steps_per_generation": 8, "loss_type": "bnpo"}
    for size in (2, 6):
        message = rf"'bnpo' .*per_device_train_batch_size={size}, .* trees of 4 leaves.*='dapo'.*multiple of 4"
        with pytest.raises(ValueError, match=message):
            make(**options, per_device_train_batch_size=size)


@pytest.mark.parametrize("threshold", [1, 1.0, 2.0, float("inf")])
def test_a_threshold_that_no_group_exceeds_is_refused(threshold):
    message = rf"prune_threshold is {threshold:g}, .*nothing would be trained.* 0.1; None"
    with pytest.raises(ValueError, match=message):
        make(prune_threshold=threshold)


def test_a_threshold_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match=r"prune_threshold is '0\.1', of type str; use prune_threshold=0\.1"):
        make(prune_threshold="0.1")
    with pytest.raises(ValueError, match="prune_threshold is nan"):
        make(prune_threshold=float("nan"))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_estimator_takes_a_threshold_that_nothing_exceeds(estimator):
    with pytest.raises(ValueError, match=r"never exceeds.*, so nothing would be trained"):
        make(prune_threshold=math.inf, advantage_estimator=estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("threshold", [None, -1.0, -float("inf"), 0, 0.999])
def test_a_threshold_that_some_group_exceeds_is_taken(threshold, estimator):
    make(prune_threshold=threshold, advantage_estimator=estimator)
    make(prune_threshold=5.0, advantage_estimator="centered")  # of rewards on another scale


def test_vllm_is_corrected_token_by_token():
    assert make(use_vllm=True).vllm_importance_sampling_mode == "token_mask"
    make(use_vllm=True, vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_clip_max=2.0)
    make(use_vllm=True, vllm_importance_sampling_correction=False, vllm_importance_sampling_mode="sequence_mask")


def test_a_colocated_engine_has_a_place_for_every_row():
    options = {"use_vllm": True, "per_device_train_batch_size": 64}
    with pytest.raises(ValueError, match=r"\(64\) x steps_per_generation \(65\) .* = 4160 rows, .* takes 4096"):
        make(**options, steps_per_generation=65)
    with pytest.raises(ValueError, match="= 8192 rows"):
        make(**options, steps_per_generation=64, vllm_tensor_parallel_size=2)
    make(**options, steps_per_generation=64)
    make(**options, steps_per_generation=65, vllm_mode="server")


def test_every_allowed_loss_weighting_exists():
    assert tuple(rows.LOSS_WEIGHTINGS) == compatibility.LOSS_WEIGHTINGS


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "cispo", "dr_grpo"])
def test_token_level_losses_are_allowed(loss_type):
    assert make(loss_type=loss_type).loss_type == loss_type


@pytest.mark.parametrize(("given", "resolved"), [("auto", "auto"), ("true", True), (False, False), ("False", False)])
def test_prefix_sharing_is_read_from_python_and_the_command_line(given, resolved):
    assert make(prefix_sharing=given).prefix_sharing == resolved


@pytest.mark.parametrize(
    ("estimator", "rows", "fix"), [("treerpo", 8, 12), ("optimal_baseline", 8, 24), ("treerpo", 40, 48)]
)
def test_the_fix_of_a_batch_that_does_not_fit_works(estimator, rows, fix):
    """One tree is a batch, but not for an estimator that compares trees."""
    options = {
        "branching_factor": [3, 4],
        "per_device_train_batch_size": rows,
        "steps_per_generation": 5,
        "advantage_estimator": estimator,
    }
    with pytest.raises(ValueError, match=f"Use steps_per_generation=6, or per_device_train_batch_size={fix}$"):
        make(**options)
    make(**{**options, "steps_per_generation": 6})
    make(**{**options, "per_device_train_batch_size": fix, "steps_per_generation": 1})


def test_the_command_line(tmp_path):
    parser = TrlParser((TreeRPOConfig,))
    flags = ["--output_dir", "out", "--bf16", "false", "--per_device_train_batch_size", "16"]
    (config,) = parser.parse_args_and_config([*flags, "--branching_factor", "4", "2", "--segment_length", "16"])
    assert (config.branching_factor, config.max_completion_length) == ([4, 2], 32)
    (config,) = parser.parse_args_and_config([*flags, "--branching_factor", "2", "--prune_threshold", "0.2"])
    assert (config.branching_factor, config.prune_threshold) == ([2, 2], 0.2)
    (config,) = parser.parse_args_and_config([*flags, "--prune_threshold", "-1"])  # it has no word for None
    assert config.prune_threshold == -1


@pytest.mark.parametrize(("yaml", "expected"), [("8", [8, 8]), ("[4, 2]", [4, 2])])
def test_yaml(tmp_path, yaml, expected):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"branching_factor: {yaml}\nmax_depth: 2\nprune_threshold: null\nper_device_train_batch_size: 128\n"
        "output_dir: out\nbf16: false\n"
    )
    (config,) = TrlParser((TreeRPOConfig,)).parse_args_and_config(["--config", str(path)])
    assert (config.branching_factor, config.prune_threshold) == (expected, None)


def test_the_papers_setting():
    config = TreeRPOConfig.paper("out", bf16=False)
    assert (config.branching_factor, config.segment_length) == ([8, 8, 8], 384)
    assert (config.num_generations, config.max_completion_length) == (512, 1152)
    assert (config.temperature, config.beta, config.entropy_coef, config.epsilon) == (0.6, 0.001, 0.001, 0.2)
    assert (config.advantage_estimator, config.prune_threshold) == ("treerpo", 0.1)
    assert (config.learning_rate, config.lr_scheduler_type, config.weight_decay) == (1e-6, "constant", 0.01)
    assert config.use_bias_correction_kl is False
    rows = 8 * config.per_device_train_batch_size * config.steps_per_generation
    assert rows == 128 * 512  # 128 prompts a step
    assert config.steps_per_generation == 2 * config.gradient_accumulation_steps  # two updates a batch
    assert config.max_steps == 300 * 2
    assert TreeRPOConfig.paper("out", bf16=False, learning_rate=1e-5).learning_rate == 1e-5
    with pytest.raises(ValueError, match=r"num_processes=3 .* use powers of two"):
        TreeRPOConfig.paper("out", num_processes=3, bf16=False)


@pytest.mark.parametrize(
    ("overrides", "max_steps"),
    [({}, 600), ({"num_train_epochs": 2}, -1), ({"num_train_epochs": 2, "max_steps": 9}, 9)],
)
def test_epochs_replace_the_papers_steps(overrides, max_steps):
    """transformers ignores num_train_epochs where max_steps is set."""
    assert TreeRPOConfig.paper("out", bf16=False, **overrides).max_steps == max_steps
