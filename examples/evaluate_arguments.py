"""The command line of `evaluate.py`: its options, and what it refuses before anything is loaded."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from benchmarks import BENCHMARKS, name_of

from treerpo_trl.evaluation import check_sampling


ENGINES = ("transformers", "vllm")
BATCH_SIZES = {"transformers": 64, "vllm": 1024}  # vLLM makes its own batches of what it is given


def option(text: str, default: Any = None) -> Any:
    """A field of the command line."""
    return field(default=default, metadata={"help": text})


@dataclass
class EvaluationArguments:
    """The command line, or the YAML file given with `--config`. The names are those of `train.py` and TRL."""

    model_name_or_path: str | None = option(
        "Model of the Hub, or a local folder. PEFT adapters are loaded onto their base."
    )
    base_model_name_or_path: str | None = option("Model to load adapters onto, instead of the one that they name.")
    model_revision: str = option("Branch, tag or commit of the model.", "main")
    dtype: str = option("Type of the weights: `auto`, `bfloat16`, `float16` or `float32`.", "auto")
    attn_implementation: str | None = option("Attention of transformers, such as `flash_attention_2`.")
    trust_remote_code: bool = option("Whether to run code that comes with the model.", False)
    dataset_name: list[str] = field(
        default_factory=lambda: list(BENCHMARKS),
        metadata={"help": f"One or more of {', '.join(BENCHMARKS)}, datasets of the Hub, local folders or files."},
    )
    dataset_config: str | None = option("Configuration of those datasets of the Hub that are not benchmarks.")
    dataset_test_split: str | None = option(
        "Split of those datasets, or a slice such as `test[:100]`. Default: `test`; `train` for local files."
    )
    dataset_prompt_column: str | None = option("Their column of prompts; dots reach into structs. Default: `prompt`.")
    dataset_solution_column: str | None = option(
        "Their column of right answers; dots reach into structs, each answer of a list counts. Default: no change."
    )
    system_prompt: str | None = option(
        "System message, instead of the dataset's. An empty one means no system message."
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy_reward"],
        metadata={"help": "Verifiers, named as in train.py. Several are summed."},
    )
    num_samples: int = option("Responses per problem.", 1)
    pass_at_k: list[int] | None = field(
        default=None, metadata={"help": "Values of k for pass@k and majority@k. Default: num_samples."}
    )
    temperature: float = option("Sampling temperature, 0 for greedy decoding.", 1.0)
    top_p: float = option("Share of the probability mass to sample from; 1 for all.", 1.0)
    max_completion_length: int = option("Maximum number of tokens of a response.", 1024)
    batch_size: int | None = option(f"Responses sampled at once. The default depends on the engine: {BATCH_SIZES}.")
    engine: str = option(f"Engine that samples the responses: {' or '.join(ENGINES)}.", "transformers")
    vllm_tensor_parallel_size: int = option("GPUs that share the model under vLLM.", 1)
    vllm_gpu_memory_utilization: float = option("Share of the GPU's memory that vLLM takes.", 0.9)
    vllm_max_model_length: int | None = option(
        "Maximum tokens of prompt and response under vLLM. Default: the model's."
    )
    seed: int = option("Seed of the sampling.", 0)
    output_dir: str = option("Folder for the responses and summary.json.", "evaluation-output")

    def check(self) -> None:
        """Refuse what cannot run, before anything is loaded."""
        if self.model_name_or_path is None:
            raise ValueError("model_name_or_path is not set; give a model of the Hub or a local folder")
        if self.model_name_or_path.startswith((".", "/", "~")) and not Path(self.model_name_or_path).exists():
            path = Path(self.model_name_or_path).absolute()
            raise FileNotFoundError(
                f"model_name_or_path is '{self.model_name_or_path}', but there is no folder {path}"
            )
        if self.engine not in ENGINES:
            raise ValueError(f"engine is '{self.engine}'; use one of {', '.join(ENGINES)}")
        if PartialState().num_processes > 1:
            raise ValueError(
                f"there are {PartialState().num_processes} processes, which would write one file; start the script "
                "with python, and use vllm_tensor_parallel_size for several GPUs"
            )
        check_sampling(self.temperature, self.top_p, self.max_completion_length)
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}; set it to 1 or more")
        for k in self.pass_at_k or []:
            if not 1 <= k <= self.num_samples:
                raise ValueError(
                    f"pass_at_k is {k}, but num_samples is {self.num_samples}; sample more, or choose a k in "
                    f"1..{self.num_samples}"
                )
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; set it to 1 or more")
        names = [name_of(name) for name in self.dataset_name]
        if len(set(names)) < len(names):
            raise ValueError(f"dataset_name holds {', '.join(names)}; each name may be there once, rename a file")
