"""The terminal view shows steps, values, advantages, lengths, answers and what was pruned."""

import io

from rich.console import Console
from tiny import make_tokenizer
from view_trees import Texts, make_tree

from treerpo_trl.credit import assign
from treerpo_trl.tree import ROOT, Segment, Tree
from treerpo_trl.views import print_tree


def printed(scored, tokenizer, **options) -> str:
    stream = io.StringIO()
    print_tree(scored, tokenizer, Console(file=stream, width=100, **options))
    return stream.getvalue()


def test_a_tree_is_printed_step_by_step():
    tokenizer = make_tokenizer()

    def segment(text, ended=False):
        return Segment(tuple(tokenizer(text)["input_ids"]) + ((1,) if ended else ()), ended)

    tree = Tree.from_prompt(tokenizer("3+4=")["input_ids"])
    tree = tree.grow({ROOT: [segment("7\n"), segment("8", ended=True)]})
    tree = tree.grow({1: [segment("a", ended=True), segment("b", ended=True)]})
    assert printed(assign(tree, {2: 0.0, 3: 1.0, 4: None}), tokenizer).splitlines() == [
        "3+4=  V=0.50  4 tok",
        "├── V=1.00  7\\n  A=+2.00  2 tok",
        "│   ├── V=1.00  a<eos>  pruned  2 tok  reward 1  answer a",
        "│   └── V=none  b<eos>  no value  2 tok  reward none  answer b",
        "└── V=0.00  8<eos>  A=-2.00  2 tok  reward 0  answer 8",
    ]


def test_an_answer_in_a_box_may_span_steps():
    texts = Texts()
    scored = make_tree(texts, "?", {ROOT: ["so \\boxed{1", "x<eos>"], 1: ["2} it is<eos>", "3<eos>"]}, [1.0, 0.0, 0.0])
    assert "2} it is<eos>  A=+2.00  2 tok  reward 1  answer 12" in printed(scored, texts)


def test_what_a_model_wrote_is_not_taken_for_markup_or_control():
    class Decoder:
        def decode(self, token_ids, skip_special_tokens=True):
            return "[red]x[/red]\x1b[31m :bomb: \x9b31m\u202e"

    tree = Tree.from_prompt([5]).grow({ROOT: [Segment((6,), True), Segment((7,), True)]})
    shown = printed(assign(tree, {1: 0.0, 2: 1.0}), Decoder(), no_color=True, highlight=False)
    # Of the prompt and, of each step, its text and its answer.
    assert shown.count("[red]x[/red]\\x1b[31m :bomb: \\x9b31m\\u202e") == 5
    assert not set("\x1b\x9b\u202e") & set(shown)
    # In colour, the only escapes are those of rich: none follows a text.
    coloured = printed(assign(tree, {1: 0.0, 2: 1.0}), Decoder(), force_terminal=True, color_system="truecolor")
    assert coloured.count("\\x1b[31m") == 5
    assert "\x1b[31m" not in coloured


def test_where_a_response_forks_its_rest_is_told_from_new_continuations():
    """Also in a later round, where the piece above a fork is itself the rest of another."""
    tokenizer = make_tokenizer()

    def segment(text):
        return Segment(tuple(tokenizer(text)["input_ids"]), True)

    cut, before = Tree.from_prompt(tokenizer("3=")["input_ids"]).grow({ROOT: [segment("abcd")]}).cut({1: [1]})
    cut, again = cut.grow({before[1, 1]: [segment("e")]}).cut({2: [2]})
    tree = cut.grow({again[2, 2]: [segment("f"), segment("gh")]})
    shown = printed(assign(tree, dict.fromkeys(tree.leaves, 1.0), "parent"), tokenizer)
    assert [line.split("  A=")[0] for line in shown.splitlines()[1:]] == [
        "└── V=1.00  a",
        "    ├── V=1.00  (as drawn) bc",
        "    │   ├── V=1.00  (as drawn) d",
        "    │   ├── V=1.00  (fork) f",
        "    │   └── V=1.00  (fork) gh",
        "    └── V=1.00  (fork) e",
    ]
