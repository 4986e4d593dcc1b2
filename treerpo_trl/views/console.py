"""In the terminal: a scored tree (what each step says, what it is worth, whether it is trained), and completions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.text import Text
from rich.tree import Tree as RichTree

from ..credit import ScoredTree
from ..tree import ROOT
from .text import Tokenizer, decode, leaf_answer, pieces, visible, visible_texts


def print_tree(scored: ScoredTree, tokenizer: Tokenizer, console: Console | None = None) -> None:
    """Print a tree; see [`render_tree`].

    Args:
        scored: A tree with its values, such as one of `trainer.last_trees`.
        tokenizer: Decodes the steps.
        console: Where to print; the terminal by default.
    """
    (console or Console()).print(render_tree(scored, tokenizer))


def render_tree(scored: ScoredTree, tokenizer: Tokenizer) -> RichTree:
    """The prompt and below it every step: its value as a colour (red 0, green 1), its text, advantage and length.

    Steps that are not trained are dimmed; leaves end with their reward and final answer. Where a response forks, the
    rest of it is marked "as drawn", the new continuations "fork".
    """
    root = RichTree(
        Text.assemble(_text(scored, ROOT, tokenizer), "  ", _value(scored, ROOT), "  ", _length(scored, ROOT))
    )
    _add_children(root, scored, ROOT, lambda node: _label(scored, node, tokenizer))
    return root


@contextmanager
def completions_visible(trainer: Any, print_table: Callable[..., None]) -> Iterator[None]:
    """Within it a trainer prints no completions; then they are printed, with what does not print made visible.

    Args:
        trainer: A GRPOTrainer, whose table holds texts as a model wrote them, terminal escapes included.
        print_table: TRL's function for it.
    """
    count, trainer.num_completions_to_print = trainer.num_completions_to_print, 0
    try:
        yield
    finally:
        trainer.num_completions_to_print = count
    if trainer.log_completions and trainer.accelerator.is_main_process:
        names = ("prompt", "completion", "rewards", "advantages")
        columns = [visible_texts(trainer._logs[name]) for name in names]
        extra = visible_texts(trainer._logs["extra"])
        print_table(*columns, trainer.state.global_step, count, extra=extra)


def _add_children(branch: RichTree, scored: ScoredTree, node: int, label: Callable[[int], Text]) -> None:
    for child in scored.tree.children[node]:
        _add_children(branch.add(label(child)), scored, child, label)


def _label(scored: ScoredTree, node: int, tokenizer: Tokenizer) -> Text:
    label = Text.assemble(
        _value(scored, node), "  ", (_origin(scored, node), "italic"), *_texts(scored, node, tokenizer)
    )
    if scored.kept[node]:
        label.append(f"  A={scored.advantages[node]:+.2f}", style="bold")
    else:
        label.append("  no value" if scored.values[node] is None else "  pruned", style="italic")
        label.stylize("dim")
    label.append(f"  {_length(scored, node)}")
    if node in scored.rewards:
        reward, answer = scored.rewards[node], leaf_answer(scored.tree, node, tokenizer)
        label.append("  reward " + ("none" if reward is None else f"{reward:g}"))
        label.append("" if answer is None else f"  answer {visible(answer)}")
    return label


def _origin(scored: ScoredTree, node: int) -> str:
    """Where a fork cut a response in two: whether the node is the rest of it or a new continuation."""
    nodes = scored.tree.nodes
    if nodes[node].is_rest:
        return "(as drawn) "
    siblings = scored.tree.children[nodes[node].parent]
    return "(fork) " if any(nodes[sibling].is_rest for sibling in siblings) else ""


def _value(scored: ScoredTree, node: int) -> Text:
    value = scored.values[node]
    if value is None:
        return Text("V=none", style="dim")
    share = min(max(value, 0.0), 1.0)
    red, green = round(220 * (1 - share)), round(180 * share)
    return Text(f"V={value:.2f}", style=Style(color=f"rgb({red},{green},40)"))


def _length(scored: ScoredTree, node: int) -> str:
    return f"{len(scored.tree.nodes[node].token_ids)} tok"


def _text(scored: ScoredTree, node: int, tokenizer: Tokenizer) -> str:
    return visible(decode(tokenizer, scored.tree.nodes[node].token_ids))


def _texts(scored: ScoredTree, node: int, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """What the model wrote and what tools answered, with a style each."""
    texts = map(visible, pieces(tokenizer, scored.tree.nodes[node]))
    return [(text, "cyan italic" if index % 2 else "") for index, text in enumerate(texts)]
