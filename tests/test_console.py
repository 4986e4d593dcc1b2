"""The terminal view shows steps, values, advantages and what was pruned."""

import io

from conftest import make_tokenizer
from rich.console import Console

from treerpo_trl.credit import assign
from treerpo_trl.tree import ROOT, Segment, Tree
from treerpo_trl.views import print_tree


def test_a_tree_is_printed_step_by_step():
    tokenizer = make_tokenizer()

    def segment(text, ended=False):
        return Segment(tuple(tokenizer(text)["input_ids"]) + ((1,) if ended else ()), ended)

    tree = Tree.from_prompt(tokenizer("3+4=")["input_ids"])
    tree = tree.grow({ROOT: [segment("7\n"), segment("8", ended=True)]})
    tree = tree.grow({1: [segment("a", ended=True), segment("b", ended=True)]})
    stream = io.StringIO()
    print_tree(assign(tree, {2: 0.0, 3: 1.0, 4: None}), tokenizer, Console(file=stream, width=100))
    assert stream.getvalue().splitlines() == [
        "3+4=  V=0.50",
        "├── V=1.00  7\\n  A=+2.00",
        "│   ├── V=1.00  a<eos>  pruned  reward 1",
        "│   └── V=none  b<eos>  pruned  reward none",
        "└── V=0.00  8<eos>  A=-2.00  reward 0",
    ]


def test_what_a_model_wrote_is_not_taken_for_markup_or_control():
    class Decoder:
        def decode(self, token_ids, skip_special_tokens=True):
            return "[red]x[/red]\x1b[31m"

    tree = Tree.from_prompt([5]).grow({ROOT: [Segment((6,), True), Segment((7,), True)]})
    stream = io.StringIO()
    print_tree(assign(tree, {1: 0.0, 2: 1.0}), Decoder(), Console(file=stream, width=100))
    assert "[red]x[/red]\\x1b[31m" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
