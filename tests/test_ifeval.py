"""Every instruction of IFEval with answers that follow it and answers that do not, and what strict and loose mean."""

import pytest

from r1fast import rewards
from r1fast.rewards.ifeval import KINDS, followed, sentences
from r1fast.rewards.pool import RewardPool

CASES = {  # kind: (arguments, answers that follow, answers that do not)
    "keywords:existence": ({"keywords": ["rain", "sun"]}, ["Sun after RAIN"], ["rain alone"]),
    "keywords:frequency": (
        {"keyword": "go", "frequency": 2, "relation": "at least"}, ["go, Go", "gogo"], ["go"],
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, ["concatenate", "dog"], ["A Cat sat"]),
    "keywords:letter_frequency": (
        {"letter": "a", "let_frequency": 3, "let_relation": "less than"}, ["Anna"], ["banana", "AAA"],
    ),
    "language:response_language": (
        {"language": "de"},
        ["Das ist ein ganz gewöhnlicher deutscher Satz."], ["This is an English sentence, surely."],
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "at least"},
        ["One. Two! Three?", "A 3.5 b. See. And a last"], ["Dr. No came. He went."],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["One\n***\nTwo", "***\nOne\n***\nTwo"], ["One\n\nTwo", "One\n***\n***\nTwo", "1***2***3"],
    ),
    "length_constraints:number_words": (
        {"num_words": 3, "relation": "less than"}, ["two words"], ["now three words"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "second"},
        ["First.\n\nSecond, here.", 'First.\n\n"Second" it is.'], ["Second.\n\nFirst.", "One.\n\nSecond.\n\nThird."],
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, ["[name] of [place]"], ["[name] only"]),
    "detectable_content:postscript": (
        {"postscript_marker": "P.S."}, ["Dear all.\nP.S. Bye", "p. s. so"], ["No postscript", "PS: no"],
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2}, ["* one\n* two", "- one\n  - two"], ["* one", "* a\n* b\n- c", "**bold**\n* one"],
    ),
    "detectable_format:constrained_response": ({}, ["My answer is maybe."], ["My answer is unclear.", "yes"]),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2}, ["*one* and *two*", "*one*, *two*, *three*"], ["*one*", "no * stars"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb"], ["Section 1\na", "section 1 section 2"],
    ),
    "detectable_format:json_format": (
        {}, ['{"a": [1]}', '```json\n{"a": 1}\n```', "```\n[]\n```"], ["{a: 1}", "Here: {}"],
    ),
    "detectable_format:title": ({}, ["<<Poem of joy>>\nText"], ["<Poem>", "<<  >>", "<<two\nlines>>"]),
    "combination:two_responses": (
        {}, ["One ****** Two"], ["One", "Same ****** Same", "1 ****** ****** 2", "1******2******3"],
    ),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hi."}, ["say hi. Hi!"], ["Hi! Say hi."]),
    "startend:end_checker": ({"end_phrase": "Any questions?"}, ['All done. "any questions?"'], ["Any questions? No."]),
    "startend:quotation": ({}, ['"quoted"'], ['"', '"open', "plain"]),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["BIG and LOUD", "I am A"], ["LOUD only", "Two Words"],
    ),
    "change_case:english_capital": (
        {}, ["THIS IS SAID IN CAPITAL LETTERS, ALL OF IT."], ["This is not.", "ALL BUT one WORD"],
    ),
    "change_case:english_lowercase": ({}, ["this is said in small letters, all of it."], ["Not this one.", "12345"]),
    "punctuation:no_comma": ({}, ["none here."], ["one, here"]),
}  # fmt: skip


def test_all_kinds_have_cases():
    assert CASES.keys() == KINDS.keys() and len(KINDS) == 25


@pytest.mark.parametrize("name", CASES)
def test_what_follows_an_instruction_and_what_does_not(name):
    if name.startswith(("language", "change_case:english")):
        pytest.importorskip("langdetect", reason="the extra `eval` is not installed")
    arguments, good, bad = CASES[name]
    reference = {"instruction_id_list": [name], "kwargs": [{**arguments, "unused": None}]}
    for text in good:
        assert followed(text, reference, loose=False) == [True], text
        thought = f"<think> {bad[0]} </think> {text}"
        assert followed(thought, reference, loose=False) == [True], "the answer alone counts"
    for text in [*bad, "", "  \n"]:
        assert followed(text, reference, loose=False) == [False], text


def test_loose_forgives_a_first_and_a_last_line_and_asterisks():
    quoted = {"instruction_id_list": ["startend:quotation"], "kwargs": [{}]}
    said = ('Sure, here it is:\n"so"', '"so"\nHope it helps', 'Sure:\n"so"\nBye', '**"so"**', 'Sure:\n*"so"*\nBye')
    for text in said:
        assert followed(text, quoted, loose=False) == [False] and followed(text, quoted, loose=True) == [True], text
    assert followed('Sure:\n\nwell:\n"so"', quoted, loose=True) == [False]


def test_the_four_rewards():
    reference = {
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation", "detectable_format:title"],
        "kwargs": [{}, {}, {}],
    }
    text = 'Sure:\n"<<Title>> no comma"'
    values = {name: rewards.get(name).attempt(text, reference).value for name in rewards.names() if "ifeval" in name}
    assert values == {
        **{"ifeval": 0.0, "ifeval_loose": 1.0, "ifeval_instructions": pytest.approx(2 / 3)},
        "ifeval_loose_instructions": 1.0,
    }


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("text", "a mapping with `instruction_id_list`"),
        ({"instruction_id_list": ["no:such"], "kwargs": [{}]}, "there is no instruction 'no:such'"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "shorter"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["("]}]}, "missing )"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{}]}, "keywords"),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": 3, "relation": "about"}],
            },
            "not 'about'",
        ),
    ],
)
def test_a_reference_that_makes_no_sense_is_a_failure_and_no_zero(reference, says):
    assert says in (rewards.get("ifeval").attempt("some text", reference).error or "")


def test_a_pattern_that_takes_for_ever_is_ended():
    reference = {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["(a+)+b"]}]}
    with RewardPool(workers=1, deadline=1.0) as pool:
        (found,) = pool.run([("ifeval", "a" * 60, reference)])
    assert found.error is not None


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("One", 1), ("One.", 1), ("One. Two", 2), ("At 3 p.m. today. So.", 2), ("Mr. X left. He ran!", 2),
     ("Pi is 3.14. Yes?!", 2),
     ("你好。再见。", 2), ('He said "go." Then went.', 2)],
)  # fmt: skip
def test_sentences(text, count):
    assert sentences(text) == count
