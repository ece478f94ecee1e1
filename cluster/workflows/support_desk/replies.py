"""The expert's sentences: short, regular, at most one copied fact each."""

from __future__ import annotations

STATUS = "Your order is {status}."
TRACKING = "Your tracking code is {tracking}."
PAYMENT = "You paid {amount}."
REFUNDED = "We refunded {amount}."
DONE = {
    "cancel": "Your order is cancelled.",
    "address": "The address is updated.",
    "invoice": "The invoice is sent.",
    "damage": "We noted the damage.",
}
NOT_YOURS = "Sorry, we cannot help: this order is not on your account."
WINDOW_CLOSED = "Sorry, we cannot refund it: the return window is closed."
SHIPPED = {
    "cancel": "Sorry, we cannot cancel it: the order has shipped.",
    "address": "Sorry, we cannot change it: the order has shipped.",
}
ESCALATED = "We escalated this to a specialist."
