"""Delimiters in tokens of every make: several, parts of one, bytes of a character."""

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny import make_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from treerpo_trl.growth import Delimiters
from treerpo_trl.growth.delimiters import DelimiterFinder


def make_byte_tokenizer(*merged: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE: one token a byte, and the texts given, whose every beginning is a token too."""
    letters = dict(zip(pre_tokenizers.ByteLevel.alphabet(), range(256), strict=False))
    tokens, merges = {letter: index for index, letter in enumerate(sorted(letters))}, []
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in merged:
        ((letters_of_text, _),) = split.pre_tokenize_str(text)
        for end in range(1, len(letters_of_text)):
            merges.append((letters_of_text[:end], letters_of_text[end]))
            tokens.setdefault(letters_of_text[: end + 1], len(tokens))
    tokenizer = Tokenizer(models.BPE(tokens, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def make_metaspace_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """As of Llama 2: spaces belong to the words after them, and a decoded text loses the one it begins with."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[0])


def lengths(tokenizer, text: str, *delimiters: str, fewest: int = 1) -> list[int]:
    """Tokens of each segment that a text is cut into, the last one whether it ends with a delimiter or not."""
    finder, ids = DelimiterFinder(Delimiters(delimiters, fewest), tokenizer), tokenizer(text)["input_ids"]
    found = []
    while ids:
        found.append(finder.find(ids) or len(ids))
        ids = ids[found[-1] :]
    return found


BYTES = make_byte_tokenizer(".\n\nSo", "\n\n", "é", " the")


@pytest.mark.parametrize(
    ("text", "delimiters", "fewest", "expected"),
    [
        ("ab\n\ncd", ["\n\n"], 1, [3, 2]),  # one token
        ("ab\ncd\n", ["\n"], 1, [3, 3]),
        ("a;;b", [";;"], 1, [3, 1]),  # spans tokens
        ("a;;;;b", [";;"], 1, [3, 2, 1]),  # none is counted twice
        ("a;b;", [";;"], 1, [4]),
        ("x.\n\nSoy", ["\n\n"], 1, [2, 1]),  # lies inside a token, which is never cut
        ("x.\n\nSoy", [".\n"], 1, [2, 1]),
        ("x.\n\nSo\n\n", ["So\n"], 1, [3]),  # begins inside a token, ends inside another
        ("\n\n\n\na", ["\n\n"], 1, [1, 1, 1]),  # the first token
        ("a\n\n", ["\n\n"], 1, [2]),  # the last token
        ("a;b;c;d", [";"], 3, [4, 3]),  # fewer tokens than asked for do not end there
        (";;;;", [";"], 3, [3, 1]),
        ("a\nb;c", ["\n", ";"], 1, [2, 2, 1]),  # any of several texts
        ("a::b:c", ["::", ":"], 1, [2, 1, 2, 1]),
        ("é|é", ["é"], 1, [1, 2]),
        ("a。b", ["。"], 1, [4, 1]),  # three tokens of one byte each
        ("a。。b", ["。。"], 1, [7, 1]),
        ("a。b", ["a。b"], 1, [5]),
        ("a、b。c", ["。"], 1, [8, 1]),  # another character begins with the same byte
        ("🎲🎲x", ["🎲"], 1, [4, 4, 1]),
        ("see the end", [" the"], 1, [4, 4]),
        ("a<eos>b", ["<eos>"], 1, [2, 1]),  # special tokens have a text
        ("a<eos>b", [">b"], 1, [3]),
    ],
)
def test_golden_segments_of_byte_level_tokens(text, delimiters, fewest, expected):
    assert lengths(BYTES, text, *delimiters, fewest=fewest) == expected


def test_only_the_segments_own_tokens_count():
    """A delimiter of which the first half stands in the parent does not end the child."""
    finder = DelimiterFinder(Delimiters((";;",), 1), BYTES)
    ids = BYTES("a;;b")["input_ids"]
    assert finder.find(ids) == 3
    assert finder.find(ids[:2]) is None and finder.find(ids[2:]) is None
    # Nor does half a character.
    finder, ids = DelimiterFinder(Delimiters(("。",), 1), BYTES), BYTES("。")["input_ids"]
    assert finder.find(ids[:2]) is None and finder.find(ids[2:]) is None and finder.find(ids) == 3


@pytest.mark.parametrize(
    ("delimiter", "expected"),
    [(". ", 3), (" so", 3), (" x", 1), ("x. s", 3), (" ", 1), (" so it", 4), ("it so", 5), ("so x", None)],
)
def test_a_space_that_decoders_strip_from_a_beginning_counts(delimiter, expected):
    tokenizer = make_metaspace_tokenizer("<unk>", "▁x", ".", "▁so", "▁it")
    assert tokenizer.decode([1, 2, 3, 4, 3]) == "x. so it so"
    assert DelimiterFinder(Delimiters((delimiter,), 1), tokenizer).find([1, 2, 3, 4, 3]) == expected


@given(st.lists(st.sampled_from(["a", ";", "。", "、", "é", " the", "\n\n", ".\n\nSo", "\n", "🎲"]), max_size=8),
       st.sampled_from([";", "。", "\n\n", "é;", "a。", "、、", "\n"]), st.integers(1, 3))  # fmt: skip
@hypothesis_settings(max_examples=200)
def test_a_segment_ends_with_the_first_token_after_which_its_text_has_the_delimiter(pieces, delimiter, fewest):
    """The plain rule, on the whole text: after which token is there one delimiter more than before it?"""
    ids = BYTES("".join(pieces))["input_ids"]

    def ends(count: int) -> int:
        text = BYTES.decode(ids[:count])
        return sum(text.startswith(delimiter, start) for start in range(len(text)))

    expected = next((end for end in range(fewest, len(ids) + 1) if ends(end) > ends(end - 1)), None)
    assert DelimiterFinder(Delimiters((delimiter,), fewest), BYTES).find(ids) == expected


def test_long_segments_are_not_decoded_as_a_whole():
    """The cost of a token does not grow with the segment's length."""
    asked = []

    class Watched:
        def decode(self, token_ids, **options):
            asked.append(len(token_ids))
            return make_tokenizer().decode(token_ids, **options)

    finder, ids = DelimiterFinder(Delimiters(("\n\n",), 1), Watched()), make_tokenizer()("a\n" * 40)["input_ids"]
    assert finder.find(ids) is None
    assert max(asked) <= 10
    asked.clear()
    assert not finder.is_end(ids[:-1])  # ends with "a", which is known to complete nothing
    assert asked == []
