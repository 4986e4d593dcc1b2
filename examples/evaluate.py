# /// script
# dependencies = [
#     "treerpo-trl[math]",
# ]
# ///
r"""Evaluate a model on math benchmarks, or on any dataset with any reward functions, and compare two such runs.

The paper's four benchmarks, as it measures them; `--engine vllm` needs `treerpo-trl[math,vllm]`:

    python examples/evaluate.py \
        --model_name_or_path Qwen/Qwen2.5-Math-1.5B \
        --dataset_name math500 aime24 minerva olympiadbench \
        --reward_funcs boxed_math_accuracy_reward \
        --num_samples 8 --temperature 0.6 --max_completion_length 1152 \
        --engine vllm --output_dir eval/base

Any dataset of the Hub, local folder or file, with the options of `train.py`:

    python examples/evaluate.py \
        --model_name_or_path Qwen2.5-0.5B-TreeRPO-LoRA \
        --dataset_name data/problems.parquet \
        --dataset_prompt_column prompt --dataset_solution_column reward_model.ground_truth \
        --reward_funcs accuracy_reward --num_samples 4 --output_dir eval/mine

Every response is a line of OUTPUT_DIR/DATASET.jsonl. A run that was killed goes on when it is started again, and one
that is complete is only summed up. Two runs on the same problems are compared with a paired test:

    python examples/evaluate.py compare eval/base eval/mine
    python examples/evaluate.py compare eval/base/math500.jsonl eval/mine/math500.jsonl

The last line printed is JSON with the numbers.
"""

import json
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# First, so that packages which are installed and not used say nothing.
from treerpo_trl.evaluation import Sampler, TransformersSampler, eos_token_ids_of, respond


# isort: split
from accelerate import PartialState
from benchmarks import (
    BENCHMARKS,
    Benchmark,
    ResponseFile,
    any_of_solutions,
    find_benchmark,
    fingerprint_folder,
    fingerprint_problems,
    load_problems,
    name_of,
)
from command_line import ScriptParser
from evaluate_arguments import BATCH_SIZES, EvaluationArguments
from evaluate_report import cells_of_run, run_comparison, show, summarize_all, to_json
from peft import PeftConfig, PeftModel
from tqdm.auto import tqdm
from train import TreeRPOScriptArguments, load_reward_funcs
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.peft_utils import find_adapter_config_file


def find_base_model(args: EvaluationArguments) -> str | None:
    """The model that the adapters at model_name_or_path belong on, or None if it is a whole model."""
    name = args.model_name_or_path
    if find_adapter_config_file(name, revision=args.model_revision) is None:
        return None
    base = (
        args.base_model_name_or_path
        or PeftConfig.from_pretrained(name, revision=args.model_revision).base_model_name_or_path
    )
    if not base:
        raise ValueError(
            f"model_name_or_path is '{name}', adapters whose adapter_config.json names no base model; set "
            "base_model_name_or_path"
        )
    if base.startswith((".", "/", "~")) and not Path(base).expanduser().exists():
        raise ValueError(
            f"model_name_or_path is '{name}', adapters on the base model '{base}', but there is no such folder; set "
            "base_model_name_or_path"
        )
    return base


def load_tokenizer(args: EvaluationArguments, base: str | None) -> Any:
    """The tokenizer saved with the model, else, of adapters, that of the base model."""
    options = {"trust_remote_code": args.trust_remote_code}
    try:
        return AutoTokenizer.from_pretrained(args.model_name_or_path, revision=args.model_revision, **options)
    except (OSError, ValueError):
        if base is None:
            raise
        return AutoTokenizer.from_pretrained(base, **options)


def load_model(args: EvaluationArguments, base: str | None) -> Any:
    """The model, or the base model with the adapters on it."""
    model = AutoModelForCausalLM.from_pretrained(
        base or args.model_name_or_path,
        revision=args.model_revision if base is None else "main",
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )
    if base is not None:
        model = PeftModel.from_pretrained(model, args.model_name_or_path, revision=args.model_revision)
    return model.eval()


class VLLMSampler:
    """A [`~treerpo_trl.evaluation.Sampler`] that calls vLLM. Each response has a seed of its own.

    Args:
        args: the command line.
        base: what `find_base_model` found; adapters are merged into it.
        tokenizer: the tokenizer.
    """

    def __init__(self, args: EvaluationArguments, base: str | None, tokenizer: Any):
        from vllm import LLM, SamplingParams

        model, revision = args.model_name_or_path, args.model_revision
        if base is not None:
            self.folder = tempfile.TemporaryDirectory()  # kept as long as the engine
            model, revision = self.folder.name, "main"
            load_model(args, base).merge_and_unload().save_pretrained(model)
            tokenizer.save_pretrained(model)
        try:
            generation_config = GenerationConfig.from_pretrained(model, revision=revision)
        except OSError:  # it has none
            config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=args.trust_remote_code)
            generation_config = GenerationConfig.from_model_config(config)
        self.llm = LLM(
            model,
            revision=revision,
            dtype=args.dtype,
            trust_remote_code=args.trust_remote_code,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_len=args.vllm_max_model_length,
            generation_config="vllm",  # nothing of the model's may bend its distribution
        )
        self.make_params: Callable[[int], Any] = lambda seed: SamplingParams(
            temperature=args.temperature,
            top_p=args.top_p,
            max_tokens=args.max_completion_length,
            stop_token_ids=eos_token_ids_of(generation_config, tokenizer),
            detokenize=False,
            seed=seed,
        )

    def __call__(self, prompt_ids: list[list[int]], seed: int) -> tuple[list[list[int]], list[bool]]:
        """See [`~treerpo_trl.evaluation.Sampler`]."""
        params = [self.make_params((seed + row) % 2**63) for row in range(len(prompt_ids))]
        prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]
        outputs = [output.outputs[0] for output in self.llm.generate(prompts, params, use_tqdm=False)]
        return [list(output.token_ids) for output in outputs], [output.finish_reason == "stop" for output in outputs]


def load_sampler(args: EvaluationArguments, base: str | None, tokenizer: Any) -> Sampler:
    """The engine with the model."""
    if args.engine == "vllm":
        return VLLMSampler(args, base, tokenizer)
    model = load_model(args, base).to(PartialState().device)
    return TransformersSampler(
        model,
        tokenizer,
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_completion_length,
    )


def settings_of(
    args: EvaluationArguments, base: str | None, benchmark: Benchmark, problems: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """All that the responses depend on, for the first line of their file."""
    names = ("model_name_or_path", "model_revision", "dtype", "attn_implementation", "reward_funcs", "num_samples")
    names += ("temperature", "top_p", "max_completion_length", "engine", "seed", "vllm_max_model_length")
    folders = {"model_files": args.model_name_or_path, "base_model_files": base}
    return {
        **{name: getattr(args, name) for name in names},
        **{key: fingerprint_folder(Path(name)) for key, name in folders.items() if name and Path(name).is_dir()},
        "base_model_name_or_path": base,
        "batch_size": args.batch_size or BATCH_SIZES[args.engine],
        "dataset_name": benchmark.dataset_name,
        "dataset_test_split": benchmark.split,
        "dataset_prompt_column": benchmark.prompt_column,
        "dataset_solution_column": benchmark.solution_column,
        "system_prompt": benchmark.system_prompt,
        "problems": fingerprint_problems(problems),
        "num_responses": len(problems) * args.num_samples,
    }


def evaluate_all(args: EvaluationArguments) -> dict[str, list[dict[str, Any]]]:
    """The records of every response, by dataset: those in the files, and those that are still to be sampled."""
    args.check()
    verifier: list[Any] = load_reward_funcs(TreeRPOScriptArguments(reward_funcs=args.reward_funcs))
    base = find_base_model(args)
    columns = (args.dataset_test_split, args.dataset_prompt_column, args.dataset_solution_column, args.system_prompt)
    runs = {}
    for name in args.dataset_name:
        benchmark = find_benchmark(name, *columns)
        problems = load_problems(benchmark, None if name in BENCHMARKS else args.dataset_config, args.reward_funcs)
        settings = settings_of(args, base, benchmark, problems)
        file = ResponseFile(Path(args.output_dir) / f"{name_of(name)}.jsonl", settings)
        runs[name_of(name)] = (problems, settings, file)
    if any(len(file.records) < settings["num_responses"] for _, settings, file in runs.values()):
        tokenizer = load_tokenizer(args, base)
        sampler = load_sampler(args, base, tokenizer)
        for name, (problems, settings, file) in runs.items():
            seed = args.seed + zlib.crc32(name.encode())  # else all datasets would draw with the same random numbers
            has_solutions = settings["dataset_solution_column"] is not None
            functions = [any_of_solutions(function) for function in verifier] if has_solutions else verifier
            with tqdm(total=settings["num_responses"], initial=len(file.records), desc=name, unit="response") as bar:
                for batch in respond(
                    sampler, tokenizer, problems, functions, num_samples=args.num_samples,
                    batch_size=settings["batch_size"], seed=seed, num_done=file.num_batches,
                ):  # fmt: skip
                    file.append(batch)
                    bar.update(len(batch))
    return {name: file.records for name, (_, _, file) in runs.items()}


def main(args: EvaluationArguments) -> None:
    """Sample what is not sampled yet, sum up, show."""
    records = evaluate_all(args)
    ks = [k for k in args.pass_at_k or [args.num_samples] if k > 1]
    summary = summarize_all(records, args.num_samples, ks)
    show(str(args.model_name_or_path), {name: cells_of_run(numbers, ks) for name, numbers in summary.items()})
    text = json.dumps(to_json(summary))
    (Path(args.output_dir) / "summary.json").write_text(text + "\n")
    print(text)


def make_parser() -> ScriptParser:
    """The parser of the command line and of the YAML file given with `--config`."""
    return ScriptParser(
        (EvaluationArguments,),
        usage="evaluate.py --model_name_or_path MODEL [--dataset_name DATASET ...] [options]\n"
        "       evaluate.py --config FILE.yaml [options]\n"
        "       evaluate.py compare FIRST SECOND",
        description="Evaluate a model on math benchmarks or on any dataset; or compare two such runs on the same "
        "problems, by a paired test (`compare`, with two files or two folders of responses).",
        needed={"a model of the Hub, a local folder, or adapters": ["model_name_or_path"]},
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        run_comparison(sys.argv[2:])
    else:
        main(*make_parser().parse_args_and_config())
