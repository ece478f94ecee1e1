"""The durable record of serving: ledger, decisions, traces, and the settings and stamps of what is served."""

from serving.store.decision_log import DecisionLog
from serving.store.ledger import RequestLedger
from serving.store.served import ApiLimits, GatewayConfig, ReleaseFiles, ServedPolicies, ServedPolicy, application_of
from serving.store.trace_log import LiveTrace, TraceLog, read_traces
