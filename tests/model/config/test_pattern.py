"""The pattern string: what it means, and what it says when it means nothing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amfm.model.config.kinds import CORE
from amfm.model.config.pattern import MAX_BLOCKS, SHOWN_AROUND, Pattern, explain_d, parse_pattern

HUNYUAN_LETTERS = {"A": "*", "F": "E", "D": "-"}
SPELLINGS = {kind.symbol: [kind.symbol] for kind in CORE}
for hunyuan, megatron in HUNYUAN_LETTERS.items():
    SPELLINGS[megatron].append(hunyuan)


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("M", "M"),
        ("(MF)*8 AF", "ME" * 8 + "*E"),
        ("((ME)x8 *E)x7 ME", ("ME" * 8 + "*E") * 7 + "ME"),
        ("(ME)*E", "ME*E"),
        ("(ME)* E", "ME*E"),
        ("*E-D A\nF", "*E--*E"),
        ("((M)x2(E)x3)x2", "MMEEE" * 2),
        ("(M*)*2", "M*M*"),
        ("( M & A ) E", ("(M&*)", "E")),
        ("((M&*)-)x2", ("(M&*)", "-") * 2),
        ("(M&*)*2", ("(M&*)",) * 2),
        ("({retnet}&W&*)|M", ("({retnet}&W&*)", "M")),
    ],
)
def test_repetition_and_both_alphabets_expand(text, letters):
    assert parse_pattern(text).letters == tuple(letters)


def test_turbos_preset_has_the_published_counts():
    assert parse_pattern("((MF)*8 AF)*7 MF").counts() == {"M": 57, "*": 7, "E": 64}
    assert parse_pattern("((ME)x8 *E)x7 ME") == parse_pattern("((MF)*8 AF)*7 MF")


def test_a_d_that_megatron_would_read_otherwise_is_named():
    assert "pattern MDMD/MD/MD: D is read as Hunyuan's dense feed-forward" in str(explain_d("MDMD/MD/MD"))
    assert "sparse attention" in str(explain_d("M*D"))
    for plain in ("M-M-/M-", "AMDF", "(AMFD)x2", "{gated_deltanet}M"):
        assert explain_d(plain) is None


def test_piece_cuts_are_block_indices():
    pattern = parse_pattern("ME | (*E|)x2 -")
    assert pattern == Pattern(tuple("ME*E*E-"), (2, 4, 6))
    assert pattern.canonical() == "ME|*E|*E|-"
    assert pattern.pieces() == (("M", "E"), ("*", "E"), ("*", "E"), ("-",))


@pytest.mark.parametrize(
    ("text", "position", "rule"),
    [
        ("", 1, "at least one block"),
        ("  ", 1, "at least one block"),
        ("MEQ", 3, "no block is called 'Q'"),
        ("Me", 2, "no block is called 'e'"),
        ("M*8", 2, "must follow ')'"),
        ("Mx8", 2, "must follow ')'"),
        ("(ME) *8", 6, "must follow ')'"),
        ("(ME)* 8", 7, "a number must follow directly"),
        ("(ME)x", 5, "no block is called 'x'"),
        ("(ME)x8x2", 7, "must follow ')'"),
        ("(ME)x0", 6, "a repetition of 0"),
        ("(ME", 1, "never closed"),
        ("M(E(M)", 2, "never closed"),
        ("ME)", 3, "nothing to close"),
        ("M()", 2, "empty parentheses"),
        ("|M", 1, "needs a block before it"),
        ("M||E", 3, "needs a block before it"),
        ("ME|", 3, "needs a block after it"),
        ("/ME", 1, "there are none"),
        ("ME/", 3, "needs blocks after it"),
        ("ME//E", 3, "needs blocks after it"),
        ("ME/*E/*-", 6, "write /*E for each of the 2"),
        ("ME/*|E", 5, "stays with the last stage"),
        ("(ME/E)x2", 4, "stands outside of parentheses"),
        ("ME|/E", 3, "needs a block after it"),
        ("8", 1, "a number must follow directly"),
        ("(M)x99999", 5, f"more than {MAX_BLOCKS}"),
        ("(M)x" + "9" * 5000, 5, f"more than {MAX_BLOCKS}"),
        ("((M)x4096)x2", 12, f"more than {MAX_BLOCKS}"),
        ("(M)x²", 4, "no block is called 'x'"),
        ("M&*", 2, "are the only ones in parentheses"),
        ("((M&*)&W)", 7, "are the only ones in parentheses"),
        ("(M&*", 1, "never closed"),
        ("(M&)", 4, "stands between two mixers"),
        ("(&M)", 2, "stands between two mixers"),
        ("(M*&W)", 3, "one letter or {name} on each side"),
        ("(M&|)", 4, "one letter or {name} on each side"),
        ("(M&E)", 4, "'E' reads each on its own"),
        ("(M& D)", 5, "'-' reads each on its own"),
        ("(*&A)", 4, "of different kinds"),
        ("(M&q)", 4, "no block is called 'q'"),
        ("(M&{Re})", 4, "braces hold the name"),
    ],
)
def test_bad_pattern_names_position_and_rule(text, position, rule):
    with pytest.raises(ValueError, match="pattern, character") as caught:
        parse_pattern(text)
    message = str(caught.value)
    head, shown, caret = message.split("\n")
    assert head.startswith(f"pattern, character {position}: ") and rule in head, message
    around = position - 1 + SHOWN_AROUND
    assert shown == "  " + text[:around] and caret == "  " + " " * (position - 1) + "^"


def test_depths_stand_behind_the_main_blocks():
    pattern = parse_pattern("(ME)x2 | M / (A)x2 F / **E")
    assert (pattern.letters, pattern.piece_cuts) == (tuple("MEMEM"), (4,))
    assert (pattern.depth_letters, pattern.num_depths) == (tuple("**E"), 2)
    assert pattern.canonical() == "MEME|M/**E/**E"
    assert parse_pattern(pattern.canonical()) == pattern


def spelled(items):
    """A pattern's text and its expansion out of nested (letters | (group, times)) lists."""
    text, letters = "", ""
    for item in items:
        if isinstance(item, str):
            text += item
            letters += HUNYUAN_LETTERS.get(item, item)
        else:
            group, times, sign = item
            group_text, group_letters = spelled(group)
            text += f"({group_text}){sign}{times} "
            letters += group_letters * times
    return text, letters


letter = st.sampled_from([spelling for spellings in SPELLINGS.values() for spelling in spellings])
nested = st.recursive(
    st.lists(letter, min_size=1, max_size=4),
    lambda inner: st.lists(letter | st.tuples(inner, st.integers(1, 3), st.sampled_from("*x")), min_size=1, max_size=4),
    max_leaves=6,
)


@settings(max_examples=75, deadline=None)
@given(nested)
def test_any_nesting_expands_and_its_canonical_form_reads_back(items):
    text, letters = spelled(items)
    pattern = parse_pattern(text)
    assert "".join(pattern.letters) == letters
    assert parse_pattern(pattern.canonical()) == pattern
    assert sum(pattern.counts().values()) == len(letters)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ME*-AFD|()x12 q", max_size=12))
def test_any_text_is_a_pattern_or_a_message_with_a_caret(text):
    try:
        pattern = parse_pattern(text)
    except ValueError as error:
        assert str(error).endswith("^")
    else:
        assert parse_pattern(pattern.canonical()) == pattern
        assert all(pattern.pieces())


def test_parentheses_nest_as_deep_as_anyone_writes_them_and_no_deeper():
    assert parse_pattern("(" * 64 + "M" + ")" * 64).letters == ("M",)
    with pytest.raises(ValueError, match="character 65: more than 64 parentheses in each other"):
        parse_pattern("(" * 5000)
