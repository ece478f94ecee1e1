"""Relay: a game of three turns over a tiny vocabulary whose best play, and best play on a KL leash, are known exactly.

The prompt names a drawer. A turn is two tokens, a verb and a symbol. LOOK in the named drawer: the tool's answer holds
a hint, the drawer to look in next. LOOK there: the answer holds the code. SAY the code: success, the only reward.
A look in another drawer, anything malformed, and one look in ten by chance is answered with BLANK. Hint and code
lie between junk tokens of random number and kind, so the policy must read what it did not write, across two turns.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from rl_actors.contracts import Task

NUM_SYMBOLS = 4
NUM_TURNS = 3
TOKENS_PER_TURN = 2
LOOK_WORKS = 0.9
MAX_JUNK = 2

PAD, END, START, LOOK, SAY, TOOL, BLANK = range(7)
SYMBOLS = range(8, 8 + NUM_SYMBOLS)
JUNK = range(16, 28)
VOCAB_SIZE = 28
MAX_LENGTH = 2 + NUM_TURNS * TOKENS_PER_TURN + (NUM_TURNS - 1) * (2 + 2 * MAX_JUNK)

Move = tuple[int, ...]
"""The tokens of one of the policy's turns, as sampled: they may be anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What is hidden where. Only `drawer` is in the prompt."""

    drawer: int
    hint: int
    code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Luck:
    """Chance of one attempt: whether each of the two looks works, and the junk before and after each answer."""

    works: tuple[bool, bool]
    junk: tuple[tuple[Move, Move], tuple[Move, Move]]


def worlds() -> list[World]:
    """Return every world; each is equally likely."""
    return [World(drawer=a, hint=b, code=c) for a, b, c in product(SYMBOLS, repeat=3)]


def tasks(seed: int) -> list[Task]:
    """Return one task per world, in an order that depends on the seed."""
    found = [
        Task(
            task_id=f"relay/train/{number}",
            workflow="relay",
            split="train",
            intent="relay",
            prompt=f"drawer {world.drawer}",
            world={"drawer": world.drawer, "hint": world.hint, "code": world.code},
            goal={"code": world.code},
            seed=number,
        )
        for number, world in enumerate(worlds())
    ]
    random.Random(seed).shuffle(found)
    return found


def world_of(state: Mapping[str, Any]) -> World:
    """Return the world that a task's `world` describes."""
    return World(**state)


def draw_luck(rng: random.Random) -> Luck:
    """Draw the chance of one attempt."""
    first, second = (rng.random() < LOOK_WORKS for _ in range(2))
    junk = [tuple(rng.choice(JUNK) for _ in range(rng.randint(0, MAX_JUNK))) for _ in range(4)]
    return Luck(works=(first, second), junk=((junk[0], junk[1]), (junk[2], junk[3])))


def prompt(world: World) -> Move:
    """Return the prompt's tokens."""
    return (START, world.drawer)


def tool_answer(world: World, luck: Luck, turn: int, move: Move) -> Move:
    """Return the tool's tokens after the first or second move: never sampled by the policy, never trained on."""
    wanted, found = ((world.drawer, world.hint), (world.hint, world.code))[turn]
    before, after = luck.junk[turn]
    is_found = move == (LOOK, wanted) and luck.works[turn]
    return (TOOL, *before, found if is_found else BLANK, *after)


def is_solved(world: World, last: Move) -> bool:
    """Whether the last move says the code: the verified outcome."""
    return last == (SAY, world.code)


def expected_reward(*, first: float, second: float, third: float) -> float:
    """Return the success probability of a player who, where the right symbol was shown, takes it this often.

    Args:
        first: at the drawer, which the prompt always shows.
        second: at the hint, when the first look worked; otherwise one guess in `NUM_SYMBOLS` is right.
        third: at the code, when the second look worked; otherwise likewise.
    """
    saw_hint = first * LOOK_WORKS
    saw_code = (saw_hint * second + (1 - saw_hint) / NUM_SYMBOLS) * LOOK_WORKS
    return saw_code * third + (1 - saw_code) / NUM_SYMBOLS


def optimum() -> float:
    """Return the success probability of best play: always take the symbol that was shown, guess after a BLANK."""
    return expected_reward(first=1.0, second=1.0, third=1.0)


def demonstrator_right(skill: float) -> float:
    """Return how often a demonstrator of this skill takes the symbol that was shown."""
    return skill + (1 - skill) / NUM_SYMBOLS


@dataclass(frozen=True, slots=True, kw_only=True)
class LeashedOptimum:
    """The policy that maximises E[reward] - coefficient * KL(policy || reference), KL per rollout in nats."""

    reward: float
    kl: float


def leashed_optimum(coefficient: float, skill: float) -> LeashedOptimum:
    """Return the best play on a KL leash to the demonstrator, by soft backward induction over three decisions.

    At each decision the best policy is ref * exp(Q / coefficient) / Z, worth coefficient * log Z. After a BLANK all
    symbols are worth the same, so it stays with the reference there, at no KL.
    """
    guess, right, q = 1 / NUM_SYMBOLS, demonstrator_right(skill), LOOK_WORKS
    say = _tilt(right, 1.0, 0.0, coefficient)
    found_code = q * say.value + (1 - q) * guess
    look = _tilt(right, found_code, guess, coefficient)
    blind = guess * found_code + (1 - guess) * guess
    first = _tilt(right, q * look.value + (1 - q) * blind, blind, coefficient)
    saw_hint = first.right * q
    saw_code = (saw_hint * look.right + (1 - saw_hint) * guess) * q
    return LeashedOptimum(
        reward=expected_reward(first=first.right, second=look.right, third=say.right),
        kl=first.kl + saw_hint * look.kl + saw_code * say.kl,
    )


@dataclass(frozen=True, slots=True)
class _Decision:
    right: float
    value: float
    kl: float


def _tilt(reference: float, good: float, bad: float, coefficient: float) -> _Decision:
    """Tilt one decision by the worth of the right symbol (`good`) against that of each other one (`bad`)."""
    gain = math.exp((bad - good) / coefficient)  # at most 1 here, so that a small coefficient does not overflow
    mass = reference + (1 - reference) * gain
    p = reference / mass
    wrong = 0.0 if p == 1.0 else (1 - p) * math.log((1 - p) / (1 - reference))
    return _Decision(right=p, value=good + coefficient * math.log(mass), kl=p * math.log(p / reference) + wrong)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """Tokens of one whole game, and which of them the player chose."""

    token_ids: tuple[int, ...]
    is_chosen: tuple[bool, ...]


def play(world: World, luck: Luck, choose: Callable[[int, Sequence[int]], Move]) -> Demonstration:
    """Play one game; `choose` sees the turn and every token so far."""
    ids, mask = list(prompt(world)), [False] * len(prompt(world))
    for turn in range(NUM_TURNS):
        move = choose(turn, ids)
        answer = tool_answer(world, luck, turn, move) if turn < NUM_TURNS - 1 else ()
        ids += [*move, *answer]
        mask += [True] * len(move) + [False] * len(answer)
    return Demonstration(tuple(ids), tuple(mask))


def last_shown(ids: Sequence[int]) -> int | None:
    """Return the symbol that the prompt or the newest tool answer shows, or None after a BLANK."""
    start = max((index for index, token in enumerate(ids) if token == TOOL), default=0)
    return next((token for token in ids[start:] if token in SYMBOLS), None)


def demonstrations(rng: random.Random, skill: float) -> Iterator[Demonstration]:
    """Yield games of a demonstrator who knows the verbs and takes the symbol that was shown with probability `skill`.

    Otherwise it takes any symbol at random; at skill 0 nothing of what is right can be learned from it.
    """

    def choose(turn: int, ids: Sequence[int]) -> Move:
        shown, is_sober = last_shown(ids), rng.random() < skill
        symbol = shown if shown is not None and is_sober else rng.choice(SYMBOLS)
        return (SAY if turn == NUM_TURNS - 1 else LOOK, symbol)

    every = worlds()
    while True:
        yield play(rng.choice(every), draw_luck(rng), choose)
