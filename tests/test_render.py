"""Rendering: tokens are those of apply_chat_template, labels are the assistant's text and its end of turn, for any template."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from structcot.data.records import Record, Rejected
from structcot.data.render import END, IGNORE, NONE, PROMPT, SOLUTION, THOUGHT, RenderedSample, load_tokenizer, render_records
from structcot.data.turns import default_system_prompt, thought_length
from structcot.errors import ModelError
from tests import chat_tokenizers as chat
from tests.chat_tokenizers import conversation, data_config, qwen_tokenizer, tiny_tokenizer

TINY = tiny_tokenizer()
THOUGHT_TEXT = "<|begin_of_thought|>\n\nSo 2 + 2 = 4.\n\n<|end_of_thought|>"
SOLUTION_TEXT = "\n\n<|begin_of_solution|>\n\n4\n\n<|end_of_solution|>"


def render(record: Record, tokenizer=TINY, **options: object) -> RenderedSample | Rejected:
    (result,) = render_records([record], tokenizer, data_config(**options))
    return result


def rendered(record: Record, tokenizer=TINY, **options: object) -> RenderedSample:
    result = render(record, tokenizer, **options)
    assert isinstance(result, RenderedSample), result
    return result


def reason(record: Record, tokenizer=TINY, **options: object) -> str:
    result = render(record, tokenizer, **options)
    assert isinstance(result, Rejected), "the record should have been rejected"
    assert result.source == record.source
    return result.reason


def own_tokens(record: Record, tokenizer=TINY) -> list[int]:
    turns = [{"role": message.role, "content": message.content} for message in record.messages]
    return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]


def trained_texts(sample: RenderedSample, tokenizer=TINY) -> list[str]:
    """Decoded text of each unbroken stretch of labels."""
    places = np.flatnonzero(sample.labels_T != IGNORE)
    stretches = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    return [tokenizer.decode(sample.labels_T[stretch]) for stretch in stretches if len(stretch)]


def text_of_kind(sample: RenderedSample, kind: int, tokenizer=TINY) -> str:
    return tokenizer.decode(sample.labels_T[sample.kinds_T == kind])


def check_shift(sample: RenderedSample) -> None:
    assert (sample.tokens_T.dtype, sample.labels_T.dtype, sample.kinds_T.dtype) == (np.int32, np.int32, np.uint8)
    assert len(sample.tokens_T) == len(sample.labels_T) == len(sample.kinds_T)
    supervised = sample.labels_T != IGNORE
    np.testing.assert_array_equal(sample.labels_T[:-1][supervised[:-1]], sample.tokens_T[1:][supervised[:-1]])
    assert sample.labels_T[-1] == IGNORE
    np.testing.assert_array_equal(sample.kinds_T != NONE, supervised)


# What is trained on


def test_one_turn_token_by_token():
    sample = rendered(conversation("Q", "A."))
    tokens = TINY.convert_ids_to_tokens(sample.tokens_T.tolist())
    labels = [TINY.convert_ids_to_tokens([index])[0] if index >= 0 else None for index in sample.labels_T.tolist()]
    assert tokens[-5:] == ["Ċ", "A", ".", "<|im_end|>", "Ċ"]
    assert labels[-5:] == ["A", ".", "<|im_end|>", None, None]
    assert sample.kinds_T[-5:].tolist() == [SOLUTION, SOLUTION, END, NONE, NONE]
    assert not sample.kinds_T[:-5].any()
    assert sample.tokens_T.tolist() == own_tokens(conversation("Q", "A."))


def test_thought_and_solution():
    for tokenizer in (TINY, qwen_tokenizer()):
        sample = rendered(conversation("Q", THOUGHT_TEXT + SOLUTION_TEXT), tokenizer)
        # The last token of the closing tag may also hold the newlines after it; it counts as thought.
        assert text_of_kind(sample, THOUGHT, tokenizer).strip() == THOUGHT_TEXT
        assert text_of_kind(sample, SOLUTION, tokenizer).strip() == SOLUTION_TEXT.strip()
        assert text_of_kind(sample, END, tokenizer) == "<|im_end|>"


@pytest.mark.parametrize(
    ("text", "thought"),
    [
        ("<think>a</think>b", "<think>a</think>"),
        ("a</think>b", "a</think>"),
        ("a <|end_of_thought|> b </think>", "a <|end_of_thought|>"),
        ("<think>a b", "<think>a b"),
        ("a b", ""),
        ("<|begin_of_thought|>a</think>b<|end_of_thought|>c", "<|begin_of_thought|>a</think>b<|end_of_thought|>"),
        (
            "<think>\n\n</think>\n\n<|begin_of_thought|>a<|end_of_thought|>b",
            "<think>\n\n</think>\n\n<|begin_of_thought|>a<|end_of_thought|>",
        ),
        ("<think>\n\n</think>\n\nb", "<think>\n\n</think>"),
        ("<think>a</think>b<think>c</think>", "<think>a</think>"),
    ],
)
def test_thought_length(text, thought):
    assert text[: thought_length(text)] == thought


def test_train_on():
    record = conversation("Q", "first", "R", THOUGHT_TEXT + "second", system="S")
    assert trained_texts(rendered(record)) == ["first<|im_end|>", THOUGHT_TEXT + "second<|im_end|>"]
    last = rendered(record, train_on="last-assistant")
    assert trained_texts(last) == [THOUGHT_TEXT + "second<|im_end|>"]
    everything = rendered(record, train_on="all")
    assert trained_texts(everything) == [TINY.decode(everything.tokens_T[1:])]
    assert text_of_kind(everything, SOLUTION) == "firstsecond"
    assert text_of_kind(everything, PROMPT).endswith("user\nR<|im_end|>\n<|im_start|>assistant\n\n")
    for sample in (last, everything):
        check_shift(sample)


def test_assistant_turns_of_a_prompt_are_context():
    record = conversation("Q", "first", "R", "second", prompt_messages=3)
    assert trained_texts(rendered(record)) == ["second<|im_end|>"]


def test_first_token_that_merges_with_the_header_is_not_trained_on():
    sample = rendered(conversation("Q", "\nA"))
    assert sample.merged_start
    assert trained_texts(sample) == ["A<|im_end|>"]
    assert not rendered(conversation("Q", "A")).merged_start


def test_padding_token_is_no_source_of_labels():
    record = conversation("Q", "A", "R", "B")
    usual, same = rendered(record), rendered(record, tiny_tokenizer(pad="<|im_end|>"))
    np.testing.assert_array_equal(usual.labels_T, same.labels_T)
    assert trained_texts(same) == ["A<|im_end|>", "B<|im_end|>"]


def test_records_keep_their_order_among_rejected_ones():
    records = [
        replace(conversation(*turns), source=f"a:{line}")
        for line, turns in enumerate([("Q", "A"), ("Q", "<|im_end|>"), ("Q", "B"), ("Q", "B" * 300), ("Q", "C")])
    ]
    results = render_records(records, TINY, data_config(max_length=100))
    assert [result.source for result in results] == [record.source for record in records]
    assert [isinstance(result, Rejected) for result in results] == [False, True, False, True, False]
    for record, result in zip(records, results, strict=True):
        if isinstance(result, RenderedSample):
            assert trained_texts(result) == [record.messages[-1].content + "<|im_end|>"]


def test_nothing_to_render():
    assert render_records([], TINY, data_config()) == []


# Any conversation

PIECES = st.sampled_from(
    ["\n", "\n\n", " ", "  ", "\t", "é", "e\u0301", "🙂", "中", "\u200b", "\ufeff", "\r\n", "<think>", "</think>", "<|im_", "A", "42", "."]
)
TEXTS = st.lists(
    PIECES | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5), min_size=1, max_size=12
).map("".join)
TURNS = TEXTS.filter(lambda text: text.strip() and not any(token in text for token in chat.SPECIAL))
CONVERSATIONS = st.lists(st.tuples(TURNS, TURNS), min_size=1, max_size=3).map(lambda pairs: [text for pair in pairs for text in pair])


def check_conversation(turns: list[str], system: str | None, tokenizer) -> None:
    record = conversation(*turns, system=system)
    sample = rendered(record, tokenizer)
    assert sample.tokens_T.tolist() == own_tokens(record, tokenizer)
    check_shift(sample)
    texts = trained_texts(sample, tokenizer)
    assert len(texts) == len(turns) // 2
    merged = False
    for content, trained in zip(turns[1::2], texts, strict=True):
        expected = unicodedata.normalize("NFC", content) if tokenizer is not TINY else content
        expected += "<|im_end|>"
        assert expected.endswith(trained)
        assert not expected.removesuffix(trained).strip()
        merged |= expected != trained
    assert sample.merged_start == merged


@settings(max_examples=150)
@given(CONVERSATIONS, st.none() | TURNS)
def test_any_conversation(turns, system):
    check_conversation(turns, system, TINY)


@settings(max_examples=150)
@given(CONVERSATIONS, st.none() | TURNS)
def test_any_conversation_with_qwen(turns, system):
    check_conversation(turns, system, qwen_tokenizer())


def real_conversations() -> list[Record]:
    traces = chat.SHARED / "traces"
    if not traces.exists():
        pytest.skip("real traces are not at hand (../shared/data/traces)")
    rows = [json.loads(line) for line in (traces / "paper_outputs.jsonl").open()][::4]
    records = [conversation(row["question"], row["response"]) for row in rows]
    rows = [json.loads(line) for line in (traces / "r1_distill.jsonl").open()][::4]
    records += [conversation(row["problem"]["problem"], row["solution"]) for row in rows]
    first, second = records[0].messages, records[-1].messages
    return [*records, replace(records[0], messages=(*first, *second))]


def test_real_traces_with_qwen():
    tokenizer, records = qwen_tokenizer(), real_conversations()
    for record, sample in zip(records, render_records(records, tokenizer, data_config(max_length=100_000)), strict=True):
        assert isinstance(sample, RenderedSample), sample
        assert sample.tokens_T.tolist() == own_tokens(record, tokenizer)
        check_shift(sample)
        contents = [message.content for message in record.messages if message.role == "assistant"]
        expected = [unicodedata.normalize("NFC", content).lstrip("\n") + "<|im_end|>" for content in contents]
        assert [text.lstrip("\n") for text in trained_texts(sample, tokenizer)] == expected
        ends = sample.labels_T[sample.kinds_T == END]
        assert ends.tolist() == [151645] * len(contents)
        opened = contents[0].lstrip().startswith(("<|begin_of_thought|>", "<think>"))
        assert (np.count_nonzero(sample.kinds_T == THOUGHT) > 0) or not opened


# Templates


@pytest.mark.parametrize(
    ("template", "trained"),
    [
        (chat.CHATML, [" A \n<|im_end|>", "B<|im_end|>"]),
        (chat.CHATML_GENERATION, [" A \n<|im_end|>", "B<|im_end|>"]),
        (chat.CHATML_DEFAULT_SYSTEM, [" A \n<|im_end|>", "B<|im_end|>"]),
        (chat.NO_GENERATION_PROMPT, [" A \n<|im_end|>", "B<|im_end|>"]),
        (chat.LLAMA3, ["A<|eot_id|>", "B<|eot_id|>"]),
        (chat.MISTRAL, ["  A \n</s>", " B</s>"]),
        (chat.OPENS_THOUGHT, [" A \n<|im_end|>", "B<|im_end|>"]),
    ],
)
def test_templates(template, trained):
    tokenizer, record = tiny_tokenizer(template), conversation("Q", " A \n", "R", "B")
    sample = rendered(record, tokenizer)
    assert sample.tokens_T.tolist() == own_tokens(record, tokenizer)
    assert trained_texts(sample, tokenizer) == trained
    assert sample.prompt_differs == (template == chat.OPENS_THOUGHT)
    check_shift(sample)


def test_beginning_of_text_is_written_by_the_template_alone():
    tokenizer = tiny_tokenizer(chat.LLAMA3)
    begin = tokenizer.convert_tokens_to_ids("<|begin_of_text|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    assert tokenizer("Q")["input_ids"][0] == begin, "the tokenizer would add one more"
    sample = rendered(conversation("Q", "A"), tokenizer)
    assert np.flatnonzero(sample.tokens_T == begin).tolist() == [0]
    assert sample.tokens_T.tolist() == own_tokens(conversation("Q", "A"), tokenizer)


def test_template_that_strips_earlier_thoughts():
    tokenizer = tiny_tokenizer(chat.QWEN3)
    record = conversation("Q", "<think>\nHm.\n</think>\n\nA", "R", "<think>\nSo.\n</think>\n\nB")
    assert "message 2 differently as the last turn than within the conversation" in reason(record, tokenizer)
    assert 'data.train_on = "last-assistant"' in reason(record, tokenizer)
    sample = rendered(record, tokenizer, train_on="last-assistant")
    assert trained_texts(sample, tokenizer) == ["<think>\nSo.\n</think>\n\nB<|im_end|>"]
    # An empty thought that the template writes after its generation prompt is the model's to write.
    assert trained_texts(rendered(conversation("Q", "A"), tokenizer), tokenizer) == ["<think>\n\n</think>\n\nA<|im_end|>"]


def test_generation_prompt_that_opens_the_thought():
    tokenizer = tiny_tokenizer(chat.OPENS_THOUGHT)
    same = rendered(conversation("Q", "<think>\nHm.</think>A"), tokenizer)
    assert not same.prompt_differs
    assert trained_texts(same, tokenizer) == ["Hm.</think>A<|im_end|>"]
    assert text_of_kind(same, THOUGHT, tokenizer) == "Hm.</think>"
    other = rendered(conversation("Q", "<think> Hm.</think>A"), tokenizer)
    assert other.prompt_differs
    assert trained_texts(other, tokenizer) == ["<think> Hm.</think>A<|im_end|>"]


@pytest.mark.parametrize("template", [chat.DROPS_THOUGHT, chat.CHANGES_TEXT])
def test_template_that_changes_the_text(template):
    record = conversation("Q", "<think>2 + 2</think>It is 4.")
    assert reason(record, tiny_tokenizer(template)) == "the chat template drops or changes text of the assistant turn (message 2)"


def test_template_without_end_of_turn(tmp_path):
    tokenizer = tiny_tokenizer(chat.NO_END_OF_TURN)
    assert "closes an assistant turn with no end-of-turn token; the model would never learn to stop" in reason(
        conversation("Q", "A"), tokenizer
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no end-of-turn token"):
        load_tokenizer(tmp_path)


def test_special_token_before_the_text_is_no_end_of_turn():
    template = chat.CHATML.replace("message['content'] + '<|im_end|>'", "'<|eot_id|>' + message['content']")
    assert "no end-of-turn token" in reason(conversation("Q", "A"), tiny_tokenizer(template))


def test_template_that_refuses():
    assert "only user and assistant roles are supported" in reason(conversation("Q", "A", system="S"), tiny_tokenizer(chat.MISTRAL))


def test_default_system_prompt():
    assert default_system_prompt(tiny_tokenizer(chat.CHATML_DEFAULT_SYSTEM)) == "You are a small model."
    for template in (chat.CHATML, chat.LLAMA3, chat.MISTRAL, chat.QWEN3, chat.OPENS_THOUGHT):
        assert default_system_prompt(tiny_tokenizer(template)) == ""
    assert default_system_prompt(qwen_tokenizer()) == "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def test_load_tokenizer(tmp_path):
    good, bare, broken = tmp_path / "good", tmp_path / "bare", tmp_path / "broken"
    TINY.save_pretrained(good)
    assert trained_texts(rendered(conversation("Q", "A"), load_tokenizer(good))) == ["A<|im_end|>"]
    tiny_tokenizer(template=None).save_pretrained(bare)
    with pytest.raises(ModelError, match="has no chat template; use the instruction-tuned model"):
        load_tokenizer(bare)
    TINY.save_pretrained(broken)
    (broken / "tokenizer.json").write_bytes((broken / "tokenizer.json").read_bytes()[:1000])
    with pytest.raises(ModelError, match="broken: the tokenizer cannot be loaded"):
        load_tokenizer(broken)
    with pytest.raises(ModelError, match="nowhere: is no directory; fetch the model first"):
        load_tokenizer(tmp_path / "nowhere")


# Control tokens


def test_control_tokens_are_rejected_by_name():
    for turns, where in ((("Q <|im_end|>", "A"), "message 1 (user)"), (("Q", "A <|im_end|>B"), "message 2 (assistant)")):
        assert f'{where} holds the control token "<|im_end|>" at offset 2' in reason(conversation(*turns))
    assert "message 1 (system)" in reason(conversation("Q", "A", system="</s>"))
    # The tags of thought and solution are the assistant's to write, even where they are special tokens.
    special = (*chat.SPECIAL, "<think>", "</think>")
    sample = rendered(conversation("Q", "<think>a</think>b"), tokenizer := tiny_tokenizer(special=special))
    assert trained_texts(sample, tokenizer) == ["<think>a</think>b<|im_end|>"]
    assert text_of_kind(sample, SOLUTION, tokenizer) == "b"


def check_control_text(turns: list[str], tokenizer, end: str) -> RenderedSample:
    sample = rendered(conversation(*turns, system="S"), tokenizer, control_tokens="text")
    check_shift(sample)
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert np.count_nonzero(sample.tokens_T == end_id) == 1 + len(turns), "the template's own end-of-turn tokens and no other"
    assert trained_texts(sample, tokenizer) == [turn + end for turn in turns[1::2]]
    for turn in turns:
        plain = np.array(tokenizer(turn, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        assert (np.lib.stride_tricks.sliding_window_view(sample.tokens_T, len(plain)) == plain).all(axis=1).any()
    return sample


def test_control_tokens_as_text():
    turns = ["What is <|im_end|>?", "<think>It is <|im_end|>.</think>After <|im_start|>assistant comes <|im_end|>"]
    sample = check_control_text(turns, TINY, "<|im_end|>")
    assert text_of_kind(sample, THOUGHT) == "<think>It is <|im_end|>.</think>"
    check_control_text(turns, qwen_tokenizer(), "<|im_end|>")
    check_control_text(["Q", "a\ue000b<|eot_id|>"], tiny_tokenizer(chat.LLAMA3), "<|eot_id|>")
    check_control_text(["<|im_end|>", "<|im_end|>"], qwen_tokenizer(), "<|im_end|>")


@settings(max_examples=100)
@given(CONVERSATIONS)
def test_without_control_tokens_both_ways_agree(turns):
    from structcot.data.render import _encode_pieces
    from structcot.data.turns import chat_template, lay_out

    record = conversation(*turns)
    for tokenizer in (TINY, qwen_tokenizer()):
        template = chat_template(tokenizer)
        pieces = _encode_pieces(lay_out(record.messages, template).text, template)
        usual, forced = rendered(record, tokenizer), rendered(record, tokenizer, control_tokens="text")
        assert pieces.tokens_T.tolist() == usual.tokens_T.tolist() == forced.tokens_T.tolist()


# Too long


def test_overlong_error_and_drop():
    record = conversation("Q", "A" * 200)
    length = len(own_tokens(record))
    error, drop = render(record, max_length=50), render(record, max_length=50, overlong="drop")
    assert error == Rejected(source=record.source, reason=f"{length} tokens, data.max_length is 50", tokens=length)
    assert drop == replace(error, dropped=True)
    assert isinstance(render(record, max_length=length), RenderedSample)
    assert isinstance(render(record, max_length=length - 1), Rejected)


def test_truncation_ends_every_turn():
    record = conversation("Q", THOUGHT_TEXT + SOLUTION_TEXT, "R" * 20, "Second, with some more text.")
    whole = rendered(record)
    ends = (np.flatnonzero(whole.kinds_T == END) + 1).tolist()
    starts = [int(np.flatnonzero(whole.labels_T != IGNORE)[0]) + 1, ends[0] + 1 + np.argmax(whole.kinds_T[ends[0] :] != NONE).item()]
    for max_length in range(2, len(whole.tokens_T)):
        sample = render(record, max_length=max_length, overlong="truncate")
        if max_length < starts[0] + 2:
            assert isinstance(sample, Rejected), "no room for a token of the text and the end of the turn"
            assert sample.reason == f"no token of an assistant's text is left to train on within data.max_length = {max_length}"
            continue
        assert isinstance(sample, RenderedSample)
        check_shift(sample)
        assert sample.truncated
        length = len(sample.tokens_T)
        assert sample.tokens_T[:-1].tolist() == whole.tokens_T[: length - 1].tolist()
        assert (sample.tokens_T[-1], sample.kinds_T[-2]) == (whole.tokens_T[ends[0]], END)
        in_prompt = ends[0] < max_length - 1 <= starts[1]
        assert length == (ends[0] + 1 if in_prompt else min(max_length, ends[1] + 1))
    assert not rendered(record, max_length=len(whole.tokens_T), overlong="truncate").truncated


def test_truncated_solution_and_thought_keep_their_kinds():
    record = conversation("Q", THOUGHT_TEXT + SOLUTION_TEXT)
    whole = rendered(record)
    sample = rendered(record, max_length=len(whole.tokens_T) - 5, overlong="truncate")
    assert sample.kinds_T[:-2].tolist() == whole.kinds_T[: len(sample.kinds_T) - 2].tolist()
    assert sample.kinds_T[-2:].tolist() == [END, NONE]


@pytest.mark.parametrize("length", [8, 100])
def test_text_that_is_far_too_long_is_not_encoded_whole(length):
    record, giant = conversation("Q", "word " * 1000), conversation("Q", "word " * 1_000_000)
    short, long = (render(each, max_length=length) for each in (record, giant))
    assert isinstance(short, Rejected)
    assert short.tokens == len(own_tokens(record))
    assert isinstance(long, Rejected)
    assert long.reason.startswith("more than ")
    assert long.tokens < 100_000
    if length == 100:
        assert rendered(giant, max_length=length, overlong="truncate").tokens_T.tolist() == (
            rendered(record, max_length=length, overlong="truncate").tokens_T.tolist()
        )
