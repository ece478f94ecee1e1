"""Everything that is not real: users, their tickets, and the degraded candidate."""

from cluster.simulation.degraded import DEGRADE_SCALE, degrade_policy
from cluster.simulation.ticket_book import TicketBook
from cluster.simulation.traffic import TrafficConfig, TrafficDriver, TrafficProgress, TrafficThread, run_traffic
