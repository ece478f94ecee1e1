"""Order and customer numbers. Residue classes of the order number keep the prompts of two splits apart."""

from __future__ import annotations

import random
from collections.abc import Mapping

from rl_actors.contracts import BadInputError, Split

MODULUS = 11
# Every prompt names its order, so disjoint residues mean disjoint prompts, whatever seeds two builds use.
RESIDUES: Mapping[Split, tuple[int, ...]] = {
    "train": (0, 1, 2, 3),
    "calibration": (4,),
    "held_out": (5,),
    "frozen": (6,),
    "adversarial": (7,),
    "live": (8, 9, 10),
}


_ORDERS, _CUSTOMERS = range(10_000, 100_000), range(1_000, 10_000)
NUM_CUSTOMERS = len(_CUSTOMERS)


class IdPool:
    """A seeded permutation of a split's numbers; live numbers are never given twice, because live worlds are merged."""

    def __init__(self, split: Split, seed: int) -> None:
        """Shuffle the split's order numbers and all customer numbers."""
        self._split: Split = split
        self._rng = random.Random(f"ids/{split}/{seed}")
        self._orders: list[str] = []
        self._customers: list[str] = []
        self._fill_orders()
        self._fill_customers()

    def order(self) -> str:
        """Return the next order number, such as O65-241."""
        if not self._orders:
            self._refuse_live("order")
            self._fill_orders()
        return self._orders.pop()

    def customer(self) -> str:
        """Return the next customer number, such as C36_52."""
        if not self._customers:
            self._refuse_live("customer")
            self._fill_customers()
        return self._customers.pop()

    def _fill_orders(self) -> None:
        numbers = (number for number in _ORDERS if number % MODULUS in RESIDUES[self._split])
        self._orders = [f"O{number // 1_000}-{number % 1_000:03}" for number in numbers]
        self._rng.shuffle(self._orders)

    def _fill_customers(self) -> None:
        self._customers = [f"C{number // 100}_{number % 100:02}" for number in _CUSTOMERS]
        self._rng.shuffle(self._customers)

    def _refuse_live(self, what: str) -> None:
        if self._split == "live":
            raise BadInputError("count", what, "more live tasks than free numbers; lower data.num_live")
