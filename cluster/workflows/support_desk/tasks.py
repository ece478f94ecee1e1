"""Tasks of every split: a shuffled deck of intents, a phrasing, a world. Equal arguments give equal tasks."""

from __future__ import annotations

import functools
import random
from typing import Any

from cluster.workflows.support_desk.adversarial import ADVERSARIAL, AdversarialKind
from cluster.workflows.support_desk.articles import ARTICLES
from cluster.workflows.support_desk.ids import NUM_CUSTOMERS, IdPool
from cluster.workflows.support_desk.intents import INTENTS, Intent
from cluster.workflows.support_desk.phrasings import CLOSINGS, OPENINGS, bank_of
from cluster.workflows.support_desk.ticket import Ticket
from cluster.workflows.support_desk.worlds import Situation, build_world, new_address
from rl_actors.contracts import Split, Task

NAME = "support_desk"
UNSEEN_SPLITS: frozenset[Split] = frozenset({"held_out", "frozen", "live"})
UNSEEN_FRACTION = 0.4


def most_live_tasks() -> int:
    """Return how many live tasks every seed can build before customers run out; there are more than enough orders.

    A ticket about somebody else's order takes two customers. Of the last round, those may come first.
    """
    size = sum(intent.weight for intent in INTENTS.values())
    foreign = sum(intent.weight for intent in INTENTS.values() if intent.situation.foreign)
    rounds, left = divmod(NUM_CUSTOMERS, size + foreign)
    return rounds * size + max(left - foreign, left // 2)


def build_tasks(split: Split, count: int, seed: int) -> list[Task]:
    """Return `count` tasks; the first n of a longer build equal a build of n.

    Raises:
        BadInputError: more live tasks than there are order or customer numbers.
    """
    pool = IdPool(split, seed)
    build = _build_adversarial if split == "adversarial" else _build_ordinary
    return [build(split, seed, index, pool) for index in range(count)]


def _build_ordinary(split: Split, seed: int, index: int, pool: IdPool) -> Task:
    """Return the task of the deck's card at `index`."""
    rng = random.Random(f"{split}/{seed}/{index}")
    intent = _card(split, seed, index)
    ticket = Ticket(
        customer_id=pool.customer(),
        order_id=pool.order(),
        asks=rng.choice(intent.ask_choices),
        legal=intent.legal,
        address=new_address(rng),
        topic=rng.choice(tuple(ARTICLES)),
    )
    bank = bank_of(ticket)
    is_unseen = split in UNSEEN_SPLITS and rng.random() < UNSEEN_FRACTION
    text = rng.choice(bank.unseen if is_unseen else bank.seen)
    prompt = write_prompt(ticket, text, rng)
    return _task(split, seed, index, intent.name, prompt, ticket, intent.situation, pool, rng)


def _build_adversarial(split: Split, seed: int, index: int, pool: IdPool) -> Task:
    """Return the adversarial task at `index`; kinds take turns, so that each is equally frequent."""
    rng = random.Random(f"{split}/{seed}/{index}")
    kinds: tuple[AdversarialKind, ...] = tuple(ADVERSARIAL.values())
    kind = kinds[index % len(kinds)]
    ticket = Ticket(
        customer_id=pool.customer(), order_id=pool.order(), asks=kind.asks, legal=kind.legal, marker=kind.marker
    )
    prompt = write_prompt(ticket, rng.choice(kind.phrasings), rng)
    return _task(split, seed, index, kind.name, prompt, ticket, kind.situation, pool, rng)


def _task(
    split: Split,
    seed: int,
    index: int,
    intent: str,
    prompt: str,
    ticket: Ticket,
    situation: Situation,
    pool: IdPool,
    rng: random.Random,
) -> Task:
    """Add world and goal to a ticket."""
    world = build_world(ticket.customer_id, ticket.order_id, situation, pool, rng)
    return Task(
        task_id=f"{NAME}/{split}/{seed}-{index}",
        workflow=NAME,
        split=split,
        intent=intent,
        prompt=prompt,
        world=world,
        goal={"ticket": ticket.as_goal(), "selector": _selector(world)},
        seed=rng.getrandbits(31),
    )


def write_prompt(ticket: Ticket, phrasing: str, rng: random.Random) -> str:
    """Return the ticket text: header, perhaps an opening, the request, perhaps a closing."""
    text = phrasing.format(order=ticket.order_id, address=ticket.address, topic=ticket.topic)
    parts = (f"From {ticket.customer_id}:", rng.choice(OPENINGS), text, rng.choice(CLOSINGS))
    return " ".join(part for part in parts if part)


def _selector(world: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    """Return the orders and customers whose rows decide the outcome: all of the task's."""
    return {
        "orders": [row["order_id"] for row in world["orders"]],
        "customers": [row["customer_id"] for row in world["customers"]],
    }


def _card(split: Split, seed: int, index: int) -> Intent:
    """Return the intent at `index`: each run of 100 tasks holds every intent exactly `weight` times."""
    round_number, position = divmod(index, sum(intent.weight for intent in INTENTS.values()))
    return _deck(f"deck/{split}/{seed}/{round_number}")[position]


@functools.lru_cache(maxsize=8)
def _deck(seed: str) -> tuple[Intent, ...]:
    """Return one shuffled round."""
    deck = [intent for intent in INTENTS.values() for _ in range(intent.weight)]
    random.Random(seed).shuffle(deck)
    return tuple(deck)
