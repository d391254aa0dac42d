"""The segmenter by a language model: the model may place the cuts, and whatever else it changes is rejected."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from structcot.errors import ConfigError, ServerError, StructcotError
from structcot.server import Server
from structcot.structure.llm import LlmSegmenter, SegmentError, UnfaithfulEcho, chunks, cuts_of_echo, separator_for
from structcot.structure.segmenters import Segmenter, Step
from structcot.tags import read_answer
from structcot.traces import read_lines, read_trace
from tests.faulty_server import (
    WORDS_OF_AN_ERROR,
    Behaviour,
    FaultyServer,
    cuts_short,
    echoes,
    hangs_up,
    refuses,
    says,
    sends,
    with_separators,
)

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
THOUGHT = """Okay, let's find x in 3x = 12.

Dividing gives x = 4. I'm not sure it helps.
Wait, let me double-check: 3 * 4 = 12. Good.

Alternatively, I could guess.  So the answer is 4.\n"""
STARTS = ("Dividing", "Wait", "Alternatively", "So the")
CHINESE = "首先,我们解方程 3x = 12。两边除以三,得到 x = 4。让我检查一下:3*4 = 12,对。所以答案是 4。"
PLAIN_TEXT = st.text(st.sampled_from("ab.# \n\t\u3000\u2028<>CUT2。错\U0001f914\ud83d"), max_size=60)
MARKED_TEXT = st.one_of(
    PLAIN_TEXT, st.text(max_size=60), st.lists(st.sampled_from(["<<<CUT>>>", "<<<CUT 2>>>", "<<<", " ", "a"])).map("".join)
)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def segmenter(server: FaultyServer, **options: Any) -> LlmSegmenter:
    client = Server(url=server.url, model="a-model", max_retries=2, timeout_seconds=5.0, sleep=lambda _: None)
    return LlmSegmenter(client, **options)


def cut_before(*words: str) -> Callable[[str], list[int]]:
    return lambda text: [match.start() for match in re.finditer("|".join(words) or "(?!)", text) if match.start()]


def pieces(text: str, steps: list[Step]) -> list[str]:
    assert "".join(text[step.start : step.end] for step in steps) == text
    assert all(step.start < step.end == after.start for step, after in pairwise(steps))
    return [text[step.start : step.end] for step in steps]


def places_to_cut(text: str) -> list[int]:
    """Where a sign follows white space and another sign stands somewhere before."""
    return [place for place in range(1, len(text)) if text[place - 1].isspace() and not text[place].isspace() and text[:place].strip()]


# What the model may do


def test_steps_are_pieces_of_the_text_with_the_types_that_their_first_sentences_tell() -> None:
    with FaultyServer(echoes(cut_before(*STARTS))) as server:
        cut: Segmenter = segmenter(server)
        steps = cut(THOUGHT)
    assert [piece.split()[0].strip(",") for piece in pieces(THOUGHT, steps)] == ["Okay", "Dividing", "Wait", "Alternatively", "So"]
    # The doubt in the second sentence of the second step is not what the step does.
    assert [step.type for step in steps] == ["initializing", "initializing", "verification", "new-approach", "conclusion"]
    assert len(server.requests) == 1


def test_chinese_is_cut_where_there_is_no_white_space() -> None:
    with FaultyServer(echoes(cut_before("两边", "让我", "所以"))) as server:
        steps = segmenter(server)(CHINESE)
    assert [piece[:2] for piece in pieces(CHINESE, steps)] == ["首先", "两边", "让我", "所以"]
    assert [step.type for step in steps][2:] == ["verification", "conclusion"]


def test_the_model_is_asked_for_the_boundaries_of_the_definition_and_sees_the_text_as_it_is() -> None:
    with FaultyServer(echoes(cut_before())) as server:
        segmenter(server)(f"{THOUGHT} <<<CUT>>> <<<CUT 2>>>")
    system, user = server.requests[0]["messages"]
    assert user == {"role": "user", "content": f"{THOUGHT} <<<CUT>>> <<<CUT 2>>>"}
    assert system["role"] == "system"
    for words in ("<<<CUT 3>>>", "backtracks", "validates", "reflects", "new approach", "conclusion", "linear sequence of thoughts"):
        assert words in system["content"]
    assert "part of a longer" not in system["content"]


@pytest.mark.parametrize("text", ["", " ", "\n\n\u3000"])
def test_a_text_without_a_word_needs_no_model(text: str) -> None:
    with FaultyServer(refuses(500)) as server:
        assert "".join(pieces(text, segmenter(server)(text))) == text
    assert not server.requests


@pytest.mark.parametrize(
    ("echo", "cuts"),
    [
        ("a b c", []),
        ("a\n###\nb c", [2]),
        ("###a b###c###", [5]),
        ("\n\n a###b###\n###\n\nc \n", [2, 5]),
        ("a b\n\n\n  c", None),
        ("a ### b c", [2]),
    ],
)
def test_white_space_counts_save_beside_separators_and_at_the_ends(echo: str, cuts: list[int] | None) -> None:
    if cuts is None:
        with pytest.raises(UnfaithfulEcho):
            cuts_of_echo(" a b  c ", echo, "###")
    else:
        text = "a b  c"
        assert cuts_of_echo(text, echo.replace("b c", "b  c"), "###") == cuts
        assert cuts_of_echo(f" {text} ", echo.replace("b c", "b  c"), "###") == [cut + 1 for cut in cuts]


@given(MARKED_TEXT)
def test_no_separator_can_be_mistaken_for_text(text: str) -> None:
    separator = separator_for(text)
    assert separator not in text
    # Nor does one arise where the text meets it.
    for place in range(len(text) + 1):
        assert f"{text[:place]}{separator}{text[place:]}".split(separator) == [text[:place], text[place:]]


@given(MARKED_TEXT, st.data())
def test_a_faithful_echo_gives_the_cuts_of_the_model(text: str, data: st.DataObject) -> None:
    places = places_to_cut(text)
    cuts = sorted(data.draw(st.sets(st.sampled_from(places)))) if places else []
    separator = separator_for(text)
    assert cuts_of_echo(text, with_separators(text, cuts, separator), separator) == cuts


@given(MARKED_TEXT.filter(str.strip), st.data())
def test_a_changed_echo_is_always_rejected(text: str, data: st.DataObject) -> None:
    separator = separator_for(text)
    places = places_to_cut(text)
    cuts = data.draw(st.sets(st.sampled_from(places))) if places else set()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    instead = data.draw(st.text(st.sampled_from("ab #。\n"), max_size=5))
    changed = text[:start] + instead + text[end:]
    kept = [cut if cut < start else cut + len(changed) - len(text) for cut in cuts if cut < start or cut >= end]
    assume(separator not in changed)
    echo = with_separators(changed, kept, separator)
    if same_save_for_space_at(changed, text, kept):
        assert all(0 < cut < len(text) for cut in cuts_of_echo(text, echo, separator))
        return
    with pytest.raises(UnfaithfulEcho) as caught:
        cuts_of_echo(text, echo, separator)
    assert 0 <= caught.value.place <= len(text)


@given(MARKED_TEXT.filter(str.strip), st.data())
def test_an_echo_with_a_sign_lost_or_changed_or_more_is_rejected_wherever_the_cuts_are(text: str, data: st.DataObject) -> None:
    separator = separator_for(text)
    places = places_to_cut(text)
    cuts = sorted(data.draw(st.sets(st.sampled_from(places)))) if places else []
    place = data.draw(st.sampled_from([number for number, sign in enumerate(text) if not sign.isspace()]))
    instead = data.draw(st.sampled_from(["", "!", f"{text[place]}!"]).filter(lambda sign: sign != text[place]))
    shift = len(instead) - 1
    changed = text[:place] + instead + text[place + 1 :]
    assume(separator not in changed)
    with pytest.raises(UnfaithfulEcho):
        cuts_of_echo(text, with_separators(changed, [cut + shift * (cut > place) for cut in cuts], separator), separator)


def same_save_for_space_at(changed: str, text: str, cuts: list[int]) -> bool:
    """Whether a change touched only white space beside cuts and at the ends: tried as a pattern, which the package does not use."""
    places = [0, *sorted(cuts), len(changed)]
    parts = [changed[start:end].strip() for start, end in pairwise(places)]
    return re.fullmatch(r"\s*".join(["", *map(re.escape, parts), ""]), text) is not None


@settings(max_examples=60)
@given(MARKED_TEXT, st.data())
def test_through_a_server_the_steps_join_to_the_text_and_have_its_cuts(text: str, data: st.DataObject) -> None:
    places = places_to_cut(text)
    cuts = sorted(data.draw(st.sets(st.sampled_from(places)))) if places else []
    with FaultyServer(echoes(lambda _: cuts)) as server:
        steps = segmenter(server)(text)
    assert [step.start for step in steps] == ([0, *cuts] if text else [])
    pieces(text, steps)


# What the model may not do


def drops_a_word(echo: str) -> str:
    return echo.replace(" 4. ", " ", 1)


def mends_a_sign(echo: str) -> str:
    return echo.replace("let's", "let’s")


def joins_paragraphs(echo: str) -> str:
    return echo.replace("12.\n\nDiv", "12.\nDiv")


def introduces(echo: str) -> str:
    return f"Here is the text:\n{echo}"


def goes_on(echo: str) -> str:
    return f"{echo}\nI hope this helps!"


def fences(echo: str) -> str:
    return f"```\n{echo}\n```"


def stops_early(echo: str) -> str:
    return echo[:-20]


def misspells_a_separator(echo: str) -> str:
    return echo.replace("<<<CUT>>>", "<<<CUT>>", 1)


def says_an_error(_: str) -> str:
    return WORDS_OF_AN_ERROR


def says_nothing(_: str) -> str:
    return ""


CHANGES = (
    drops_a_word,
    mends_a_sign,
    joins_paragraphs,
    introduces,
    goes_on,
    fences,
    stops_early,
    misspells_a_separator,
    says_an_error,
    says_nothing,
)


@pytest.mark.parametrize("change", CHANGES)
def test_an_echo_with_a_change_is_asked_for_again_and_then_raised(change: Callable[[str], str]) -> None:
    cut = cut_before("Wait", "Alternatively", "So the")
    with FaultyServer(echoes(cut, change), echoes(cut)) as server:
        assert len(segmenter(server)(THOUGHT)) == 4
    first, second = (request["messages"] for request in server.requests)
    assert second[1] == first[1]
    assert second[0]["content"].startswith(first[0]["content"] + "\n\nYour last copy was not the text: ")
    with FaultyServer(echoes(cut, change)) as server, pytest.raises(SegmentError, match="in 2 attempts; at character") as caught:
        segmenter(server, attempts=2)(THOUGHT)
    assert len(server.requests) == 2
    assert isinstance(caught.value, StructcotError)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            drops_a_word,
            "at character 51 after '12.\\n\\nDividing gives x = ' the text goes on with \"4. I'm not sure it helps\", the copy with \"I'm",
        ),
        (mends_a_sign, "the text goes on with \"'s find x in 3x = 12.\\n\\nD\", the copy with '’s find"),
        (introduces, "at character 0 the text goes on with \"Okay, let's"),
        (goes_on, "the text goes on with its end, the copy with 'I hope this helps!'"),
        (says_nothing, 'at character 0 the text goes on with "Okay, let\'s find x in 3x", the copy with its end'),
    ],
)
def test_the_error_shows_where_the_copy_first_differs(change: Callable[[str], str], words: str) -> None:
    with FaultyServer(echoes(cut_before("Wait"), change)) as server, pytest.raises(SegmentError) as caught:
        segmenter(server, attempts=1)(THOUGHT)
    assert words in str(caught.value)


def test_an_echo_that_ran_out_of_tokens_is_named_as_such() -> None:
    with FaultyServer(says(THOUGHT[:30], "length")) as server, pytest.raises(SegmentError, match="cut short by max_tokens"):
        segmenter(server)(THOUGHT)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "behaviour", [refuses(429, Retry_After="1"), refuses(500), hangs_up, cuts_short, sends(b'{"choices": []}'), sends(b"{")]
)
def test_a_server_that_fails_is_asked_again_and_its_error_is_no_step(behaviour: Behaviour) -> None:
    with FaultyServer(behaviour, echoes(cut_before("Wait"))) as server:
        assert len(segmenter(server)(THOUGHT)) == 2
    with FaultyServer(behaviour) as server, pytest.raises(ServerError):
        segmenter(server)(THOUGHT)
    assert len(server.requests) == 3


@pytest.mark.parametrize("options", [{"max_characters": 3}, {"attempts": 0}])
def test_options_that_cannot_work_are_refused(options: dict[str, int]) -> None:
    with FaultyServer(refuses(500)) as server, pytest.raises(ConfigError, match=next(iter(options))):
        segmenter(server, **options)


# Long texts


def numbered_words(seed: int, number: int) -> str:
    """A text in which every word is another, with gaps of all kinds."""
    rng = random.Random(seed)
    gaps = (" ", " ", " ", ". ", "\n", "\n\n", ".\n\n \n", "。", " " * 30)
    return "".join(f"w{place:03}{rng.choice(gaps)}" for place in range(number))


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 80), st.integers(12, 200), st.data())
def test_chunks_neither_add_nor_lose_a_cut(seed: int, number: int, size: int, data: st.DataObject) -> None:
    text = numbered_words(seed, number)
    cuts = data.draw(st.sets(st.sampled_from([match.start() for match in re.finditer("w", text)])))
    words = {text[cut : cut + 4] for cut in cuts}
    with FaultyServer(echoes(lambda part: [match.start() for match in re.finditer(r"w\d{3}", part) if match[0] in words])) as server:
        steps = segmenter(server, max_characters=size)(text)
    assert {step.start for step in steps} == cuts | {0}
    pieces(text, steps)


@given(MARKED_TEXT, st.integers(4, 30))
def test_chunks_cover_the_text_once_and_have_a_bounded_size(text: str, size: int) -> None:
    before = 0
    for context, start, end in chunks(text, size):
        assert context <= start == before < end
        assert len(text[context:start].rstrip()) + end - start <= size
        assert text[context:start].strip() or not text[:start].strip()
        before = end
    assert before == len(text)


def test_chunks_end_at_blank_lines_before_sentences_before_words() -> None:
    text = "One two. Three.\n\nFour. Five six. Seven eight nine ten eleven twelve"
    cut = [text[start:end] for _, start, end in chunks(text, 28)]
    assert cut[:2] == ["One two. Three.\n\n", "Four. Five six. "]
    assert "".join(cut) == text
    assert all(piece.endswith(" ") for piece in cut[1:-1])


def test_a_chunk_is_sent_with_the_sentence_before_it_and_a_word_that_it_is_a_part() -> None:
    text = f"{'One. ' * 12}\n\nTwo two. Wait, three.\n\nFour."
    with FaultyServer(echoes(cut_before("Two", "Four"))) as server:
        steps = segmenter(server, max_characters=80)(text)
    sent = [request["messages"][1]["content"] for request in server.requests]
    assert [text[step.start : step.start + 4] for step in steps] == ["One.", "Two ", "Four"]
    assert len(sent) == 2
    assert sent[1] == f"{'One. ' * 4}\n\nTwo two. Wait, three.\n\nFour."
    assert all("part of a longer one" in request["messages"][0]["content"] for request in server.requests)


def test_a_false_copy_of_a_chunk_is_placed_in_the_whole_text() -> None:
    text = numbered_words(3, 60)
    word = text.index("w047")
    changes = echoes(cut_before(), lambda echo: echo.replace("w047", "v047"))
    with FaultyServer(changes) as server, pytest.raises(SegmentError, match=f"at character {word} "):
        segmenter(server, max_characters=60)(text)


def test_real_thoughts_are_cut_where_the_model_says() -> None:
    files = sorted((DATA / "traces").rglob("*.jsonl")) if DATA.is_dir() else []
    if not files:
        pytest.skip("the traces of shared/data are not here")
    words = ("Wait", "Alternatively", "But")
    with FaultyServer(echoes(cut_before(*words))) as server:
        cut = segmenter(server, max_characters=3000)
        for source, line in islice(read_lines(str(files[0])), 10):
            thought = read_answer(read_trace(source, line).text).thought
            steps = cut(thought)
            pieces(thought, steps)
            assert [step.start for step in steps] == [0, *(place for place in cut_before(*words)(thought) if thought[:place].strip())]
