"""Prompts with hidden answers: as long as asked for, with the answer in its place, and scored as said."""

from __future__ import annotations

import re

import pytest

from longattn import InvalidInput
from longattn.evaluation import RULER_TASKS, Question, passkey, ruler


def encode(text: str) -> list[int]:
    return list(text.encode())


def decode(ids: tuple[int, ...]) -> str:
    return bytes(ids).decode()


@pytest.mark.parametrize("length", [400, 1000, 5001])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_passkey_stands_at_its_depth(length: int, depth: float) -> None:
    question = passkey(encode, length, depth, seed=3)
    text, (key,) = decode(question.prompt), question.answers
    assert length - 40 < len(question.prompt) + question.new_tokens <= length
    assert re.fullmatch(r"\d{5}", key)
    assert text.count(key) == 2 and text.endswith("What is the pass key? The pass key is")
    filler_before = text[: text.index("The pass key is")].count("green")
    filler = text.count("green")
    assert abs(filler_before - depth * filler) <= 1
    assert question == passkey(encode, length, depth, seed=3) != passkey(encode, length, depth, seed=4)


@pytest.mark.parametrize("task", RULER_TASKS)
def test_tasks_fit_and_hold_their_answers(task: str) -> None:
    for length in (9000, 20000):
        question = ruler(task, encode, length, seed=0)
        text = decode(question.prompt)
        assert length * 0.97 - 400 < len(question.prompt) + question.new_tokens <= length
        assert all(answer in text for answer in question.answers)
        assert question.recall(" ".join(question.answers)) == 1.0 and question.recall("nothing") == 0.0
        assert question == ruler(task, encode, length, seed=0) != ruler(task, encode, length, seed=1)


def test_keys_of_many_needles_differ() -> None:
    text = decode(ruler("niah_multikey_2", encode, 20000, seed=0).prompt)
    keys = re.findall(r"magic numbers for (\S+) is: (\d{7})", text)
    assert len(keys) > 200 and len({key for key, _ in keys}) == len(keys)
    asked = re.findall(r"special magic number for (\S+) mentioned", text)
    assert dict(keys)[asked[0]] == ruler("niah_multikey_2", encode, 20000, seed=0).answers[0]


def test_variables_follow_their_chain() -> None:
    question = ruler("vt", encode, 6000, seed=5)
    text, chain = decode(question.prompt), question.answers
    first = re.search(rf"VAR {chain[0]} = (\d+)\.", text)
    assert first and f"assigned the value {first[1]} in" in text
    places = [text.index(f"VAR {name} =") for name in chain]
    assert places == sorted(places)
    assert all(f"VAR {b} = VAR {a}." in text for a, b in zip(chain, chain[1:], strict=False))


def test_common_and_frequent_words_are_the_most_frequent() -> None:
    question = ruler("cwe", encode, 20000, seed=1)
    words = re.findall(r"\d+\. (\S+)", decode(question.prompt))
    by_count = sorted(set(words), key=words.count, reverse=True)
    assert set(by_count[:10]) == set(question.answers) and words.count(by_count[10]) == 3
    question = ruler("fwe", encode, 6000, seed=1)
    words = re.findall(r"\b[a-z]{6}\b", decode(question.prompt).split("\n")[1])
    by_count = sorted(set(words), key=words.count, reverse=True)
    assert set(by_count[:3]) == set(question.answers)


def test_scores() -> None:
    question = Question((1,), ("12345",), 8)
    assert question.recall("The pass key is 12345.") == 1.0
    assert question.characters(" 12945 and") == 0.8 and question.characters("") == 0.0
    assert Question((1,), ("Ab", "cd"), 8).recall("xxaBxx") == 0.5


def test_bad_input() -> None:
    for call in (
        lambda: passkey(encode, 100, 0.5, 0),
        lambda: passkey(encode, 1000, 1.5, 0),
        lambda: ruler("niah", encode, 1000, 0),
        *(lambda task=task: ruler(task, encode, 60, 0) for task in RULER_TASKS),
    ):
        with pytest.raises(InvalidInput):
            call()
