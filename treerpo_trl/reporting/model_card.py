"""The model card of a trained model: TRL's metadata made exact, and a text that says how the model was trained."""

from __future__ import annotations

import json
import os
import re
import tempfile
import textwrap
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..credit import ESTIMATORS


PAPER = {
    "title": "TreeRPO: Tree Relative Policy Optimization",
    "id": "2506.05183",
    # docstyle-ignore
    "citation": textwrap.dedent("""\
        @article{yang2025treerpo,
            title        = {{TreeRPO: Tree Relative Policy Optimization}},
            author       = {Zhicheng Yang and Zhijiang Guo and Yinya Huang and Yongxin Wang and Yiwei Wang and
                            Xiaodan Liang and Jing Tang},
            year         = 2025,
            eprint       = {arXiv:2506.05183},
        }"""),
}

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
PACKAGES = {
    "treerpo_trl": "treerpo-trl",
    "TRL": "trl",
    "Transformers": "transformers",
    "PyTorch": "torch",
    "PEFT": "peft",
    "Datasets": "datasets",
    "Tokenizers": "tokenizers",
}


def write_model_card(trainer: Any, write_draft: Callable[[], None]) -> None:
    """Write `README.md` into the output folder; only the main process does.

    Args:
        trainer (`TreeRPOTrainer`): Whose model the card is for.
        write_draft: Writes TRL's card into `trainer.args.output_dir`.
    """
    if not trainer.is_world_process_zero():
        return
    output_dir = trainer.args.output_dir
    draft = _draw_up(trainer.args, write_draft)
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapter = model.active_peft_config if hasattr(model, "active_peft_config") else None
    data = make_metadata(draft.data.to_dict(), adapter, trainer._paper["id"])
    name = data.model_name or Path(output_dir).absolute().name
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=name,
        repo=trainer.hub_model_id or name,
        introduction=introduce(data, adapter, trainer._name, trainer._paper),
        method=trainer._name,
        comparison=describe_comparison(trainer.args.advantage_estimator),
        adapter=adapter,
        base_model=data.base_model,
        is_chat=takes_messages(trainer.train_dataset, trainer.processing_class),
        max_new_tokens=trainer.args.max_completion_length,
        badges=re.findall(r"^\[<img .*\)", draft.text, re.MULTILINE),  # links to the run on W&B, Trackio, Comet
        settings={**list_settings(trainer), **list_adapter_settings(adapter)},
        versions=find_versions(),
        citation=trainer._paper["citation"],
    )
    # A push in the background may be reading the card: it finds the old one or the new one, whole.
    unfinished = Path(output_dir) / "_README.md"  # files with this prefix are not pushed
    card.save(unfinished)
    os.replace(unfinished, Path(output_dir) / "README.md")


def _draw_up(args: Any, write_draft: Callable[[], None]) -> ModelCard:
    """TRL's card, written where no push can find it."""
    output_dir = args.output_dir
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        try:
            write_draft()
        finally:
            args.output_dir = output_dir
        return ModelCard.load(Path(folder) / "README.md")


def make_metadata(draft: dict[str, Any], adapter: Any, paper_id: str) -> ModelCardData:
    """TRL's metadata with what it leaves out or cannot know, and without what is not on the Hub.

    Args:
        draft: TRL's.
        adapter (`peft.PeftConfig` or `None`): Of the adapter that was trained, if one was.
        paper_id: arXiv's number of the method's paper.
    """
    base_model = draft.get("base_model")
    base_model = base_model if _is_hub_id(base_model) else None
    datasets = draft.get("datasets") or []
    datasets = [name for name in ([datasets] if isinstance(datasets, str) else datasets) if _is_hub_id(name)]
    tags = {*draft.get("tags", []), f"arxiv:{paper_id}"}
    relation = "adapter" if adapter else "finetune"
    return ModelCardData(
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        datasets=datasets or None,
        library_name="peft" if adapter else "transformers",
        model_name=draft.get("model_name"),
        pipeline_tag="text-generation",
        tags=sorted(tags | ({_method_of(adapter).lower()} if adapter else set())),
    )


def introduce(data: ModelCardData, adapter: Any, method: str, paper: dict[str, str]) -> str:
    """What the model is: from what, by which method, on which data."""
    subject = f"This {_method_of(adapter)} adapter" if adapter else "This language model"
    if data.base_model:
        base = f"[{data.base_model}](https://huggingface.co/{data.base_model})"
        subject = f"{subject} for {base}" if adapter else f"{subject} comes from {base} and"
    names = [f"[{name}](https://huggingface.co/datasets/{name})" for name in data.datasets or []]
    on_data = f" on {', '.join(names)}" if names else ""
    home = find_home("treerpo-trl")
    package = f"[treerpo_trl]({home})" if home else "treerpo_trl"
    return (
        f"{subject} was trained{on_data} with {method} ([{paper['title']}](https://arxiv.org/abs/{paper['id']})) by "
        f"{package}, which is built on [TRL](https://github.com/huggingface/trl)."
    )


def describe_comparison(estimator: str) -> str:
    """What a step is trained against."""
    chosen = ESTIMATORS[estimator]
    if chosen.of_group is not None:
        return "its siblings"
    return "its tree" if chosen.of_tree is not None else "the other trees of the batch"


def takes_messages(dataset: Any, processing_class: Any) -> bool:
    """Whether prompts are chat messages rather than strings.

    The examples of a stream without column types are not read for this: then it is whether there is a chat template.
    """
    prompt = (getattr(dataset, "features", None) or {}).get("prompt")
    if prompt is None:
        return getattr(processing_class, "chat_template", None) is not None
    return getattr(prompt, "dtype", None) not in ("string", "large_string")


def list_settings(trainer: Any) -> dict[str, str]:
    """How the model was trained, as rows of a table."""
    args = trainer.args
    updates = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
    rewards = zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True)
    prunes = ESTIMATORS[args.advantage_estimator].prunes
    threshold = args.prune_threshold if prunes else None
    return {
        **list_tree_settings(args),
        **({"Tools": ", ".join(f"`{tool.__name__}`" for tool in trainer.tools)} if trainer.tools else {}),
        "Longest response": f"{args.max_completion_length} tokens",
        "Leaves": f"{'at most ' * (args.split_rule == 'uncertainty')}{args.num_generations}",
        "Advantage estimator": f"`{args.advantage_estimator}`",
        "Prune threshold": "none" if threshold is None or threshold < 0 else f"{threshold:g}",
        "Loss": f"`{args.loss_type}`, weighted by {args.loss_weighting}",
        "KL coefficient (beta)": f"{args.beta:g}",
        "Temperature": f"{args.temperature:g}",
        "Learning rate": f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}",
        "Prompts a batch": str(args.generation_batch_size // args.num_generations),
        "Updates a batch": f"{updates:g}",
        "Steps trained": str(trainer.state.global_step),
        "Rewards": ", ".join(f"`{name}` (weight {weight:g})" for name, weight in rewards),
    }


def list_tree_settings(args: Any) -> dict[str, str]:
    """Where trees branch, as rows of a table."""
    least = args.min_segment_length
    if args.split_rule == "uncertainty":
        return {
            "Split rule": f"`uncertainty` ({args.uncertainty_measure})",
            "Trunks": str(args.num_trunks),
            "Forks of a trunk and what grew from it": f"at most {args.forks_per_trunk} a round",
            "Rounds of forks": str(args.fork_rounds),
            "Continuations of a fork": str(args.continuations_per_fork),
            "Between forks": f"at least {least} tokens",
        }
    settings = {
        "Split rule": f"`{args.split_rule}`",
        "Branching factor, by depth": ", ".join(map(str, args.branching_factor)),
        "Depth": str(args.max_depth),
        "Segment length": f"{args.segment_length} tokens",
    }
    if args.split_rule == "turn":
        settings["Segment length"] = "a turn; the last goes on to the answer"
    if args.split_rule == "delimiter":
        settings["Segment length"] = f"{least} to {args.segment_length} tokens; the last has no limit of its own"
        settings["Step delimiters"] = ", ".join(map(_quote, args.step_delimiters))
    return settings


def _quote(text: str) -> str:
    """A text in quotes as code, which a table of Markdown shows as it is."""
    code = json.dumps(text, ensure_ascii=False).replace("|", "\\|")
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", code)), default=0))
    return f"{fence}{code}{fence}"


def list_adapter_settings(adapter: Any) -> dict[str, str]:
    """The adapter's shape, as rows of a table; none for a full model."""
    if adapter is None:
        return {}
    modules = adapter.target_modules
    values = {
        "rank": getattr(adapter, "r", None),
        "alpha": getattr(adapter, "lora_alpha", None),
        "dropout": getattr(adapter, "lora_dropout", None),
        "modules": modules if isinstance(modules, str) or modules is None else ", ".join(sorted(modules)),
    }
    given = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
        if value is not None
    ]
    return {"Adapter": "; ".join([_method_of(adapter), *given])}


def find_versions() -> dict[str, str]:
    """Versions of the packages that had a part in training, as far as they are installed."""
    found = {}
    for name, package in PACKAGES.items():
        try:
            found[name] = metadata(package)["Version"]
        except PackageNotFoundError:  # run from its sources
            continue
    return found


def find_home(package: str) -> str | None:
    """The first address that a package names in its metadata (`project.urls`)."""
    try:
        addresses = metadata(package).get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    return addresses[0].partition(",")[2].strip() if addresses else None


def _is_hub_id(name: Any) -> bool:
    """Whether a model or dataset was loaded from the Hub, not from a folder or file."""
    if not isinstance(name, str) or not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _method_of(adapter: Any) -> str:
    return {"LORA": "LoRA"}.get(adapter.peft_type.value, adapter.peft_type.value)
