"""Prompts whose answer is hidden in a long text: the passkey task, and RULER's tasks over words and numbers.

A prompt is made of pieces of token ids, so that it comes as near to the length asked for as its pieces let it, whatever
the tokenizer; a tokenizer of bytes will do.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from longattn.errors import InvalidInput

__all__ = ["RULER_TASKS", "Question", "passkey", "ruler"]

Encode = Callable[[str], Sequence[int]]

_FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_PASSKEY_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there.\n"
)
_ADJECTIVES = """
able amber ample ancient arctic ashen autumn awake azure bare bitter bleak blind bold brave brief bright brisk broad
bronze calm careful cheap clean clear clever cloudy coarse cold copper coral crisp crooked curious damp daring dark dear
deep dense distant dizzy double dry dull dusty eager early eastern empty even faint fair famous fancy fast fierce final
fine firm flat fond formal frail free fresh frosty full gentle giant glad golden grand gray great green happy hard heavy
hidden high hollow honest humble icy idle inner iron ivory jolly keen kind large late lazy lean light little lively lone
long loud low lucky mad major merry mild minor misty modest narrow nimble noble north odd old open orange outer pale
patient plain polite proud pure quick quiet rapid rare raw ready red rich rough round royal rusty sad safe salty scarce
sharp short shy silent silver simple slim slow small smooth soft solid sour spare steady steep still stout strange
strict strong sudden sunny sweet swift tall tame tender thick thin tidy tiny tough true upper vague vast warm weak wet
white whole wide wild wise wooden worn young
""".split()
_NOUNS = """
acorn anchor angle anvil apple apron arch arrow attic badge bakery balcony banner barn barrel basin basket bay beach
beacon bean bear bell belt bench berry bird blanket board boat bolt book boot bottle bowl branch bread brick bridge
broom brush bucket button cabin cable camel candle canoe canvas canyon card carpet cart castle cedar cellar chain chair
chalk chapel chest chimney circle clay cliff clock cloth cloud coast coat coin column comet cook cord corner cottage
cotton cradle crane creek crow crown cup curtain dagger dam deer desk diary dish dock dome donkey door dove drawer dress
drum duck eagle easel elbow elm engine falcon farm feather fence fern ferry field fig finger flag flask flute forest
fork fort fountain fox frame garden gate giraffe glacier glove goat goose grain grape guitar hammer harbor harp hat hawk
hedge helmet heron hill hinge honey hook horn horse hotel house island ivy jacket jar jewel jungle kettle key kite knife
knot ladder lake lamp lantern leaf ledger lemon letter library lily lion lizard lock loom lute magnet maple market
marsh mask meadow melon mill mirror mitten monk moon moss moth motor mountain mouse museum nail napkin needle nest net
notebook oak oar oasis olive onion orchard otter oven owl oyster paddle palace panda paper parade parrot path pearl pen
pencil pepper piano pillow pilot pine pipe planet plate plum pocket pond pony potato prairie prism pulley pump quarry
quilt rabbit raft rail ranch raven ribbon ridge ring river road robin rocket roof rope rose saddle sail salmon sand
scarf school seal shelf shell shield ship shoe shovel silk sled smith snail sofa spade sparrow spear spider spoon spring
squirrel stable stair star statue stone stool storm stove stream street sugar swan sword table tailor teapot temple tent
thread throne tiger timber toad tower trail train tree trumpet tunnel turtle valley vase velvet village vine violin
wagon wall walnut wave well whale wheat wheel whistle willow window wolf wool yard zebra
""".split()

_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_NEEDLE_TASK = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize them. I will quiz you about "
    "the {kind} afterwards.\n"
)
_NEEDLE_QUESTION = (
    "\nWhat is the special magic {single} for {key} mentioned in the provided text? The special magic {single} for "
    "{key} mentioned in the provided text is"
)


@dataclass(frozen=True)
class Question:
    """A prompt, what its answer must contain, and how many tokens that may take."""

    prompt: tuple[int, ...]
    answers: tuple[str, ...]
    new_tokens: int

    def recall(self, answer: str) -> float:
        """The share of what must be there that is, whatever the case (RULER's string match)."""
        given = answer.lower()
        return sum(wanted.lower() in given for wanted in self.answers) / len(self.answers)

    def characters(self, answer: str) -> float:
        """The share of the first wanted answer's characters that stand in their places, spaces before it aside."""
        wanted, given = self.answers[0], answer.lstrip()
        return sum(a == b for a, b in zip(wanted, given, strict=False)) / len(wanted)


def passkey(encode: Encode, length: int, depth: float, seed: object, *, digits: int = 5) -> Question:
    """A number in the midst of sentences that say nothing (Mohtashami and Jaggi, arXiv 2305.16300, section 4.2).

    Args:
        encode: text to ids, without special tokens.
        length: tokens of prompt and answer together, at most.
        depth: where the number stands: 0 at the start, 1 at the end.
        seed: of the number; any value with a `repr`.

    Raises:
        InvalidInput: a length too short for the task, or a depth outside [0, 1].
    """
    if not 0.0 <= depth <= 1.0:
        raise InvalidInput("depth", "a number in [0, 1]", depth)
    key = str(_rng(seed).randrange(10 ** (digits - 1), 10**digits))
    task = list(encode(_PASSKEY_TASK))
    needle = list(encode(f" The pass key is {key}. Remember it. {key} is the pass key."))
    question = list(encode("\nWhat is the pass key? The pass key is"))
    room = length - len(task) - len(needle) - len(question) - _tokens_of(encode, key)
    filler = _filler(encode, room, length)
    at = round(depth * len(filler))
    pieces = [task, *filler[:at], needle, *filler[at:], question]
    return Question(_joined(pieces), (key,), _tokens_of(encode, key))


def ruler(task: str, encode: Encode, length: int, seed: object) -> Question:
    """One of RULER's tasks that need no other text (Hsieh et al., arXiv 2404.06654, appendix B), in words of our own.

    niah_single_1: a number for a word among sentences that say nothing. niah_multikey_2: the number of one word among
    as many lines of the kind as fit. niah_multikey_3: the same with UUIDs for UUIDs. vt: which variables a chain of
    assignments gives a value. cwe: the ten words that are most common in a list. fwe: the three most frequent of
    made-up words, drawn by Zipf's law.

    Args:
        task: one of RULER_TASKS. Others as in `passkey`.

    Raises:
        InvalidInput: no such task, or a length too short for it.
    """
    if task not in RULER_TASKS:
        raise InvalidInput("task", f"one of {', '.join(RULER_TASKS)}", repr(task))
    return _MAKERS[task](encode, length, _rng((task, length, seed)))


def _single(encode: Encode, length: int, rng: random.Random) -> Question:
    key, value = next(_word_pairs(rng)), str(rng.randrange(10**6, 10**7))
    task = list(encode(_NEEDLE_TASK.format(kind="numbers")))
    needle = list(encode(" " + _NEEDLE.format(kind="numbers", key=key, value=value)))
    question = list(encode(_NEEDLE_QUESTION.format(single="number", key=key)))
    new = _tokens_of(encode, value) + 8
    filler = _filler(encode, length - len(task) - len(needle) - len(question) - new, length)
    at = rng.randrange(len(filler) + 1)
    return Question(_joined([task, *filler[:at], needle, *filler[at:], question]), (value,), new)


def _many_words(encode: Encode, length: int, rng: random.Random) -> Question:
    return _many(encode, length, rng, "numbers", "number", _word_pairs(rng), lambda: str(rng.randrange(10**6, 10**7)))


def _many_uuids(encode: Encode, length: int, rng: random.Random) -> Question:
    def made() -> str:
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    return _many(encode, length, rng, "uuids", "uuid", iter(made, ""), made)


def _many(
    encode: Encode,
    length: int,
    rng: random.Random,
    kind: str,
    single: str,
    keys: Iterator[str],
    value: Callable[[], str],
) -> Question:
    """As many lines as fit, one of which is asked for."""
    task = list(encode(_NEEDLE_TASK.format(kind=kind)))
    key, wanted = next(keys), value()
    question = list(encode(_NEEDLE_QUESTION.format(single=single, key=key)))
    new = _tokens_of(encode, wanted) + 8
    lines = [list(encode(" " + _NEEDLE.format(kind=kind, key=key, value=wanted)))]
    room = length - len(task) - len(question) - new - len(lines[0])
    if room < 0:
        raise _too_short(length, -room)
    for other in keys:
        line = list(encode(" " + _NEEDLE.format(kind=kind, key=other, value=value())))
        room -= len(line)
        if room < 0:
            break
        lines.append(line)
    lines.insert(rng.randrange(len(lines)), lines.pop(0))
    return Question(_joined([task, *lines, question]), (wanted,), new)


def _variables(encode: Encode, length: int, rng: random.Random, hops: int = 4) -> Question:
    names = ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(2 * (hops + 1))]
    values = [str(rng.randrange(10000, 100000)) for _ in range(2)]
    chains = [names[: hops + 1], names[hops + 1 :]]
    task = list(encode("Memorize and track the chain of variable assignments hidden in the following text.\n"))
    asked = f"Find all variables that are assigned the value {values[0]} in the text above."
    question = list(
        encode(f"\nQuestion: {asked} Answer: the {hops + 1} variables that are assigned the value {values[0]} are")
    )
    new = _tokens_of(encode, " ".join(chains[0])) + 10
    lines = []
    for chain, value in zip(chains, values, strict=True):
        said = [
            f" VAR {chain[0]} = {value}.",
            *(f" VAR {b} = VAR {a}." for a, b in zip(chain, chain[1:], strict=False)),
        ]
        lines.append([list(encode(line)) for line in said])
    used = sum(len(ids) for of_chain in lines for ids in of_chain)
    filler = _filler(encode, length - len(task) - len(question) - new - used, length)
    before: list[list[list[int]]] = [[] for _ in range(len(filler) + 1)]  # the lines that stand before each sentence
    for of_chain in lines:  # which stands in its order
        for at, ids in zip(sorted(rng.choices(range(len(before)), k=len(of_chain))), of_chain, strict=True):
            before[at].append(ids)
    text = [piece for at, sentence in enumerate([*filler, []]) for piece in (*before[at], sentence)]
    return Question(_joined([task, *text, question]), tuple(chains[0]), new)


def _common_words(encode: Encode, length: int, rng: random.Random, common: int = 10) -> Question:
    words = _word_pairs(rng)
    wanted = [next(words) for _ in range(common)]
    task = "Below is a numbered list of words. In these words, some appear more often than others. Memorize them.\n"
    question = f"\nQuestion: what are the {common} most common words in the above list? Answer: the words are"
    new = _tokens_of(encode, " ".join(wanted)) + 4 * common
    others: list[str] = []

    def prompt(uncommon: int) -> list[int]:
        while len(others) < uncommon:
            others.append(next(words))
        listed = wanted * 30 + others[:uncommon] * 3
        random.Random(uncommon).shuffle(listed)
        lines = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
        return list(encode(task + lines + question))

    return Question(tuple(_largest(prompt, length - new, length)), tuple(wanted), new)


def _frequent_words(encode: Encode, length: int, rng: random.Random, wanted: int = 3, alpha: float = 2.0) -> Question:
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(200)]
    weights = [rank**-alpha for rank in range(1, len(vocabulary) + 1)]
    most = length  # no word takes less than a token
    drawn = rng.choices(vocabulary, weights, k=most)
    task = "Read the following coded text and track the frequency of each coded word.\n"
    question = (
        f"\nQuestion: what are the {wanted} most frequently appeared words in the above coded text? Answer: the "
        f"{wanted} words are"
    )
    new = _tokens_of(encode, " ".join(vocabulary[:wanted])) + 12

    def prompt(count: int) -> list[int]:
        # The most frequent ones are so by a margin, however few are drawn.
        text = drawn[:count]
        for rank in range(wanted):
            text[rank::7] = [vocabulary[rank]] * len(text[rank::7])
        return list(encode(task + " ".join(text) + question))

    return Question(tuple(_largest(prompt, length - new, length)), tuple(vocabulary[:wanted]), new)


_MAKERS: dict[str, Callable[[Encode, int, random.Random], Question]] = {
    "niah_single_1": _single,
    "niah_multikey_2": _many_words,
    "niah_multikey_3": _many_uuids,
    "vt": _variables,
    "cwe": _common_words,
    "fwe": _frequent_words,
}
RULER_TASKS = tuple(_MAKERS)


def _largest(prompt: Callable[[int], list[int]], room: int, length: int) -> list[int]:
    """The prompt of the most items that is no longer than `room`."""
    low, high = 0, 1
    if (shortest := len(prompt(low))) > room:
        raise _too_short(length, shortest - room)
    while len(prompt(high)) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(prompt(middle)) <= room else (low, middle)
    return prompt(low)


def _filler(encode: Encode, room: int, length: int) -> list[list[int]]:
    """Sentences that say nothing, as many as fit."""
    if room < 0:
        raise _too_short(length, -room)
    sentences = [list(encode(" " + sentence)) for sentence in _FILLER]
    found: list[list[int]] = []
    while room >= len(sentence := sentences[len(found) % len(sentences)]):
        found.append(sentence)
        room -= len(sentence)
    return found


def _word_pairs(rng: random.Random) -> Iterator[str]:
    """All adjectives with all nouns, each pair once, in a random order."""
    count = len(_ADJECTIVES) * len(_NOUNS)
    for number in rng.sample(range(count), count):
        yield f"{_ADJECTIVES[number % len(_ADJECTIVES)]}-{_NOUNS[number // len(_ADJECTIVES)]}"


def _tokens_of(encode: Encode, answer: str) -> int:
    return len(encode(" " + answer))


def _joined(pieces: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(token for piece in pieces for token in piece)


def _rng(seed: object) -> random.Random:
    return random.Random(repr(seed))


def _too_short(length: int, missing: int) -> InvalidInput:
    return InvalidInput("length", f"at least {length + missing:,} tokens, for the question", length)
