"""The search for LongRoPE's divisors: which frequencies a model can bear to be slowed down, by its loss on a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from longattn.errors import InvalidInput
from longattn.rope import Rope
from longattn.scaling import NTK, Linear, LongRoPE, Scaling, YaRN

__all__ = ["search_longrope"]

_MUTATED = 0.3  # the share of divisors that a mutation changes
_SPREAD = 0.25  # of the logarithm of a changed divisor
_BEYOND = 1.25  # no divisor is above so many times the factor (Ding et al., table 4)


def search_longrope(
    loss: Callable[[LongRoPE], float],
    rope: Rope,
    factor: float,
    original_max_position: int,
    *,
    population: int = 16,
    parents: int = 5,
    generations: int = 8,
    attention_factor: float = 1.0,
    seed: int = 0,
    show: Callable[[int, int, float], None] | None = None,
) -> LongRoPE:
    """An evolution of divisors that never fall from one pair to the next, from those of PI, NTK and YaRN on.

    Ding et al., LongRoPE, arXiv 2402.13753, section 3.3 and algorithm 1. Their threshold of first tokens that keep
    their positions is left out, as rope_parameters cannot say it.

    Args:
        loss: of a scaling, at the length aimed at; the lowest wins. Called population + generations * population times
            at most; what was seen is not asked again.
        rope: the model's own rotation, unscaled.
        factor: s, above 1. original_max_position: L0.
        population: candidates of a generation; parents: the best, from which the next one comes, half by mutation and
            half by crossover.
        attention_factor: of the result; 1 leaves texts of up to L0 tokens exactly as they are.
        show: told of each candidate: how many are done, of how many, and the lowest loss.

    Returns:
        The best, whose short_factor is 1: up to L0 tokens nothing changes.

    Raises:
        InvalidInput: numbers out of range, or a rope with a scaling.
    """
    if rope.scaling is not None:
        raise InvalidInput("rope", "one without a scaling", rope.scaling)
    for name, value, least in (("population", population, 4), ("parents", parents, 2), ("generations", generations, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidInput(name, f"an int >= {least}", repr(value))
    if parents > population:
        raise InvalidInput("parents", f"at most the population {population}", parents)
    if factor <= 1:
        raise InvalidInput("factor", "a number above 1", factor)
    rng = np.random.default_rng(seed)
    pairs = rope.dim // 2
    known: dict[tuple[float, ...], float] = {}
    most = population * (generations + 1)
    done = 0

    def made(divisors: tuple[float, ...]) -> LongRoPE:
        return LongRoPE(factor, original_max_position, (1.0,) * pairs, divisors, attention_factor)

    def judge(candidates: list[tuple[float, ...]]) -> None:
        nonlocal done
        for divisors in candidates:
            if divisors not in known:
                known[divisors] = loss(made(divisors))
            done += 1
            if show is not None:
                show(done, most, min(known.values()))

    first = _known_divisors(rope, factor, original_max_position)
    while len(first) < population:
        first.append(_mutated(first[int(rng.integers(min(3, len(first))))], factor, rng))
    judge(first[:population])
    for _ in range(generations):
        best = sorted(known, key=lambda divisors: known[divisors])[:parents]
        judge(list(_children(best, population, factor, rng)))
    return made(min(known, key=lambda divisors: known[divisors]))


def _known_divisors(rope: Rope, factor: float, original_max_position: int) -> list[tuple[float, ...]]:
    """How much slower the pairs turn under the methods that have a formula."""
    methods: list[Scaling] = [Linear(factor), YaRN(factor, original_max_position)]
    if rope.dim > 2:
        methods.append(NTK(factor))
    plain, _ = rope.frequencies(1)
    found = []
    for method in methods:
        inv_freq, _ = method.frequencies(rope.dim, rope.base, 1)
        found.append(_valid((plain / inv_freq).double().numpy(), factor))
    return found


def _children(
    best: list[tuple[float, ...]], count: int, factor: float, rng: np.random.Generator
) -> Iterator[tuple[float, ...]]:
    for number in range(count):
        one, other = (best[int(rng.integers(len(best)))] for _ in range(2))
        if number % 2:
            yield _mutated(one, factor, rng)
        else:
            yield _valid(np.where(rng.random(len(one)) < 0.5, one, other), factor)


def _mutated(divisors: tuple[float, ...], factor: float, rng: np.random.Generator) -> tuple[float, ...]:
    changed = rng.random(len(divisors)) < _MUTATED
    return _valid(np.asarray(divisors) * np.exp(changed * rng.normal(0.0, _SPREAD, len(divisors))), factor)


def _valid(divisors: np.ndarray, factor: float) -> tuple[float, ...]:
    """From 1 up, never falling, in steps of a hundredth (section 3.3)."""
    clipped = np.maximum.accumulate(np.clip(divisors, 1.0, _BEYOND * factor))
    return tuple(round(float(value), 2) for value in clipped)
