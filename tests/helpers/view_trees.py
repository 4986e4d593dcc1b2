"""Trees for the tests of views: random ones, and small ones whose every number is known."""

import random

from hypothesis import strategies as st
from random_trees import any_forests, leaf_rewards

from treerpo_trl.credit import ScoredTree, assign
from treerpo_trl.growth import Backend, Shape, TreeShape, grow
from treerpo_trl.tree import ROOT, Segment, Tree
from treerpo_trl.views import tree_records


REWARDS = st.lists(st.one_of(st.floats(0, 1), st.none()), min_size=1, max_size=7)
END = "<eos>"
WORDS = [
    "the",
    "sum",
    "of",
    "$x^2$",
    "and",
    "\\frac{1}{2}",
    "is",
    "therefore",
    "most\n\n",
    "we",
    "get",
    "triangle",
    "$ABC$",
]
LONG = "A long step goes on and on. " * 20
HOSTILE = [
    '</script><script>window.pwned = "script"</script>',
    '<img src="x" onerror="window.pwned = \'img\'"><svg onload="window.pwned = 1">',
    "<!-- <script> --!> ]]> {{script}} {{trees}} &lt;b&gt; &amp;",
    "\u2028window.pwned = 2\u2029\x1b[31m\x00\x85\u202egnp.\ufeff",
    "<!--links-->mine<!--/links-->",
]


class Texts:
    """A tokenizer whose tokens are whole texts; `END` is its only special token."""

    def __init__(self):
        self.texts = [END]

    def encode(self, text: str, num_tokens: int = 1) -> tuple[int, ...]:
        """The text in so many tokens, cut wherever it falls; a final `END` is a token of its own."""
        body, ended = text.removesuffix(END), text.endswith(END)
        length = -(-len(body) // num_tokens)
        pieces = [body[index * length : (index + 1) * length] for index in range(num_tokens)]
        start = len(self.texts)
        self.texts += pieces
        return (*range(start, len(self.texts)), *([0] if ended else []))

    def decode(self, token_ids, skip_special_tokens=False):
        return "".join(self.texts[token] for token in token_ids if token or not skip_special_tokens)


@st.composite
def scored_forests(draw) -> tuple[Shape, list[ScoredTree]]:
    """A shape and random trees grown to it, with random rewards, some of them missing."""
    shape, trees = draw(any_forests())
    return shape, [assign(tree, leaf_rewards(tree, draw(REWARDS))) for tree in trees]


def make_tree(texts: Texts, prompt: str, groups: dict[int, list[str]], rewards: list[float | None]) -> ScoredTree:
    """A tree from what its steps say: parent -> its children's texts. A step that ends in `END` ended."""
    tree = Tree.from_prompt(texts.encode(prompt))
    for parent, group in groups.items():
        tree = tree.grow({parent: [Segment(texts.encode(text), text.endswith(END)) for text in group]})
    return assign(tree, dict(zip(tree.leaves, rewards, strict=True)))


def example_records(step: int = 10) -> list[dict]:
    """Four trees of branching (2, 2): all kept, all pruned, partly kept, and hostile with an unscorable leaf."""
    texts = Texts()
    trees = [
        make_tree(
            texts,
            "What is 3 + 4?\n",
            {ROOT: ["Add them.\n", f"It is 9.{END}"], 1: [f"So \\boxed{{7}}.{END}", "So 8"]},
            [1.0, 0.0, 0.0],
        ),
        make_tree(texts, "What is 1?", {ROOT: [LONG, "Short."], 1: ["a", "b"], 2: ["c", "d"]}, [1.0, 1.0, 1.0, 1.0]),
        make_tree(texts, "What is 2?", {ROOT: ["x", "y"], 1: ["xa", "xb"], 2: ["ya", "yb"]}, [1.0, 0.0, 0.5, 0.5]),
        make_tree(texts, HOSTILE[0], {ROOT: HOSTILE[1:3], 1: HOSTILE[3:5], 2: HOSTILE[:2]}, [None, 1.0, 0.0, 0.0]),
    ]
    return tree_records(trees, texts, step, shape=TreeShape((2, 2), 9, 18))


class TextBackend(Backend):
    """Segments of so many characters, cut into so many tokens; some end."""

    def __init__(self, texts: Texts, characters: int, end_probability: float):
        self.texts, self.characters, self.end_probability = texts, characters, end_probability
        self.random = random.Random(characters)

    def extend(self, trees, wave) -> list[list[Segment]]:
        return [[self._draw(most, wave.is_last) for _ in range(wave.num_children)] for most in wave.max_tokens]

    def _draw(self, max_tokens: int, is_last: bool) -> Segment:
        ended = self.random.random() < (0.8 if is_last else self.end_probability)
        words = self.random.choices(WORDS, k=self.characters // 6)
        text = " ".join(words)[: self.characters] + (f" so $\\boxed{{{len(words)}}}$.{END}" if ended else "")
        return Segment(self.texts.encode(text, max_tokens - ended), ended)


def random_records(
    shape: TreeShape, num_trees: int = 1, step: int = 10, characters: int = 12, end_probability: float = 0.0
) -> list[dict]:
    """Trees of a shape, rewarded with 0 or 1, whose steps have about so many characters."""
    texts, draw = Texts(), random.Random(num_trees)
    prompts = [texts.encode(f"Prompt number {index}: what is {index} + 1?") for index in range(num_trees)]
    scored = []
    for tree in grow(prompts, shape, TextBackend(texts, characters, end_probability)):
        luck = draw.random()
        scored.append(assign(tree, {leaf: float(draw.random() < luck) for leaf in tree.leaves}))
    return tree_records(scored, texts, step, shape=shape)
