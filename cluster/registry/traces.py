"""Sampled requests as span trees with feedback, for the MLflow trace mirror. Pure; nothing here decides anything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rl_actors.contracts import PlanRevision, Turn
from serving.contracts import UNSCORED, RequestRecord
from serving.store import LiveTrace, RequestLedger

SpanKind = Literal["AGENT", "CHAIN", "TOOL", "LLM"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSpan:
    """One step inside a request. Times are Unix seconds and milliseconds; `error` is empty when it went well."""

    kind: SpanKind
    name: str
    started_at: float
    duration_ms: float
    inputs: Any = None
    outputs: Any = None
    error: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    children: tuple[TraceSpan, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTrace:
    """A ledger row with what happened inside it. Actor and reason of an override come from the ledger's audit."""

    record: RequestRecord
    request: str
    response: str
    spans: tuple[TraceSpan, ...] = ()
    override_actor: str = "unknown"
    override_reason: str = ""
    plans: tuple[PlanRevision, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorReport:
    """What became of the traces offered: a mirror may lose some, but never silently."""

    written: int = 0
    already_there: int = 0
    lost: int = 0
    first_error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackRow:
    """One judgement on a request, and who or what made it."""

    name: str
    value: bool | float | str
    source_kind: Literal["HUMAN", "CODE"]
    source: str
    rationale: str = ""


def root_span(trace: SampledTrace) -> TraceSpan:
    """Return the agent span of a request with all its steps; the ledger row is its attributes."""
    record = trace.record
    failed = record.status != "ok"
    return TraceSpan(
        kind="AGENT",
        name="agent",
        started_at=record.started_at,
        duration_ms=record.duration_ms,
        inputs={"messages": [{"role": "user", "content": trace.request}]},
        outputs=trace.response,
        error=record.status if failed else "",
        attributes=trace_tags(record) | {"seatrial.replan_causes": _replan_causes(trace.plans)},
        children=trace.spans,
    )


def trace_tags(record: RequestRecord) -> dict[str, str]:
    """Return the version stamps and the outcome of a request, by which traces are searched."""
    names = ("run_id", "model_version", "reward_model_version", "policy_version", "bundle_id", "release_channel")
    names += ("split_epoch", "status", "success", "intent", "sandbox_level", "cost", "tool_calls_count")
    names += ("tool_error_count", "tokens_in", "tokens_out", "human_override")
    return {f"seatrial.{name}": str(getattr(record, name)) for name in names}


def _replan_causes(plans: Iterable[PlanRevision]) -> str:
    """Return why the agent planned again, such as `tool_error after 2 calls`; empty when it kept to its first."""
    return ", ".join(f"{plan.cause} after {plan.after_calls} calls" for plan in plans if plan.revision)


def feedback_rows(trace: SampledTrace) -> tuple[FeedbackRow, ...]:
    """Return the judgements on a request: an override by a human, scores and checks by code."""
    record, rows = trace.record, []
    if record.human_override:
        actor, reason = trace.override_actor, trace.override_reason
        rows.append(FeedbackRow(name="human_override", value=True, source_kind="HUMAN", source=actor, rationale=reason))
    if record.critic_score != UNSCORED:
        model = record.reward_model_version
        rows.append(FeedbackRow(name="critic", value=record.critic_score, source_kind="CODE", source=model))
    if record.success != "unknown":
        rows.append(FeedbackRow(name="success", value=record.success == "yes", source_kind="CODE", source="verifier"))
    for check, held in record.policy_checks.items():
        rows.append(FeedbackRow(name=check, value=held, source_kind="CODE", source="policy_checks"))
    return tuple(rows)


def sampled_traces(traces: Iterable[LiveTrace], ledger: RequestLedger, count: int) -> list[SampledTrace]:
    """Join kept traces with their ledger rows; at most `count`, newest first, up to half of them overridden ones."""
    # One pass over the ledger: it is a file of this run, and traces are kept for a tenth of its requests.
    rows = {record.run_id: record for record in ledger.rows()}
    known = [trace for trace in reversed(list(traces)) if trace.run_id in rows]
    overridden = [trace for trace in known if rows[trace.run_id].human_override]
    others = [trace for trace in known if not rows[trace.run_id].human_override]
    # Overridden ones are rare and the most worth reading; places that they do not need go to the others.
    chosen = overridden[: count // 2] + others[: count - min(len(overridden), count // 2)]
    return [_join(trace, rows[trace.run_id], ledger) for trace in chosen]


def _join(trace: LiveTrace, record: RequestRecord, ledger: RequestLedger) -> SampledTrace:
    # The ledger's row says only that somebody overrode the reply; who and why stands in its audit.
    said = [entry for entry in ledger.audit(record.run_id) if entry["what"] == "override"]
    return SampledTrace(
        record=record,
        request=trace.request,
        response=trace.response,
        spans=turn_spans(trace.turns, started_at=record.started_at, duration_ms=record.duration_ms),
        override_actor=said[0]["actor"] if said else "unknown",
        override_reason=said[0]["reason"] if said else "",
        plans=ledger.plans(record.run_id),
    )


def turn_spans(turns: Sequence[Turn], *, started_at: float, duration_ms: float) -> tuple[TraceSpan, ...]:
    """Return planner, llm and tool spans of a request's turns; times of model calls are marked as estimated."""
    # Turns carry no clock: tool times were measured, and the rest is shared among the model calls by sampled tokens.
    tools_ms = sum(turn.tool_result.duration_ms for turn in turns if turn.tool_result)
    tokens_out = sum(len(turn.completion.token_ids) for turn in turns)
    per_token_ms = max(duration_ms - tools_ms, 0.0) / max(tokens_out, 1)
    spans: list[TraceSpan] = []
    clock = started_at
    for turn in turns:
        llm = _llm_span(turn, clock, per_token_ms * len(turn.completion.token_ids))
        clock += llm.duration_ms / 1000
        spans.append(_planner_span(turn, llm) if turn.kind == "plan" else llm)
        if turn.tool_result and turn.kind != "plan":
            spans.append(_tool_span(turn, clock))
            clock += turn.tool_result.duration_ms / 1000
    return tuple(spans)


def _llm_span(turn: Turn, started_at: float, duration_ms: float) -> TraceSpan:
    call = turn.tool_call
    attributes = {
        "tokens_in": len(turn.prompt_token_ids),
        "tokens_cached": turn.completion.cached_tokens,
        "tokens_out": len(turn.completion.token_ids),
        "weights_version": turn.completion.weights_version,
        "timing": "estimated",
    }
    return TraceSpan(
        kind="LLM",
        name=f"llm {turn.kind}",
        started_at=started_at,
        duration_ms=duration_ms,
        inputs={"num_tokens": len(turn.prompt_token_ids)},
        outputs={"tool": call.name, "raw": call.raw} if call else {"kind": turn.kind},
        attributes=attributes,
    )


def _planner_span(turn: Turn, llm: TraceSpan) -> TraceSpan:
    plan = turn.tool_call.arguments if turn.tool_call else None
    return TraceSpan(
        kind="CHAIN",
        name="planner",
        started_at=llm.started_at,
        duration_ms=llm.duration_ms,
        outputs=dict(plan) if plan else None,
        error=turn.tool_result.error if turn.tool_result else "",
        children=(llm,),
    )


def _tool_span(turn: Turn, started_at: float) -> TraceSpan:
    call, result = turn.tool_call, turn.tool_result
    return TraceSpan(
        kind="TOOL",
        name=call.name if call else "tool",
        started_at=started_at,
        duration_ms=result.duration_ms if result else 0.0,
        inputs=dict(call.arguments) if call and call.arguments else {"raw": call.raw if call else ""},
        outputs=_parse(result.content) if result else None,
        error=result.error if result else "",
    )


def _parse(content: str) -> Any:
    """Return a JSON result as structure, anything else as text."""
    try:
        return json.loads(content)
    except ValueError:
        return content
