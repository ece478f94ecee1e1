-- The request ledger: one row per request (the article's observability schema), written ahead and completed exactly once.
-- Nothing is ever deleted; what becomes known later (overrides, labels, critic scores) is appended beside the row.

CREATE TABLE IF NOT EXISTS runs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id TEXT NOT NULL UNIQUE CHECK (run_id <> ''),
    request_id TEXT NOT NULL UNIQUE CHECK (request_id <> ''),
    owner TEXT NOT NULL,
    session_key TEXT NOT NULL CHECK (session_key <> ''),
    task_id TEXT NOT NULL,
    model_version TEXT NOT NULL CHECK (model_version <> ''),
    reward_model_version TEXT NOT NULL CHECK (reward_model_version <> ''),
    policy_version TEXT NOT NULL CHECK (policy_version <> ''),
    bundle_id TEXT NOT NULL CHECK (bundle_id <> ''),
    release_channel TEXT NOT NULL CHECK (release_channel IN ('offline_eval', 'canary', 'general')),
    split_epoch INTEGER NOT NULL CHECK (split_epoch >= 0),
    started_at REAL NOT NULL,
    intent TEXT NOT NULL,
    sandbox_level TEXT NOT NULL,
    status TEXT NOT NULL
        CHECK (status IN ('running', 'ok', 'truncated', 'tool_budget', 'timeout', 'engine_error', 'aborted')),
    success TEXT NOT NULL CHECK (success IN ('yes', 'no', 'unknown')),
    tool_calls_count INTEGER NOT NULL,
    tool_error_count INTEGER NOT NULL CHECK (0 <= tool_error_count AND tool_error_count <= tool_calls_count),
    tokens_in INTEGER NOT NULL CHECK (tokens_in >= 0),
    tokens_out INTEGER NOT NULL CHECK (tokens_out >= 0),
    duration_ms REAL NOT NULL CHECK (duration_ms >= 0),
    cost REAL NOT NULL CHECK (cost >= 0),
    policy_checks TEXT NOT NULL CHECK (json_valid(policy_checks)),
    failed_checks_count INTEGER NOT NULL CHECK (failed_checks_count >= 0),
    completed_at REAL NOT NULL
) STRICT;

CREATE INDEX IF NOT EXISTS runs_by_window ON runs (policy_version, release_channel, split_epoch);
CREATE INDEX IF NOT EXISTS runs_by_epoch ON runs (split_epoch, release_channel, session_key);
CREATE INDEX IF NOT EXISTS runs_running ON runs (owner) WHERE status = 'running';

CREATE TABLE IF NOT EXISTS overrides (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id TEXT NOT NULL REFERENCES runs (run_id),
    actor TEXT NOT NULL CHECK (actor <> ''),
    reason TEXT NOT NULL CHECK (reason <> ''),
    at REAL NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS overrides_by_run ON overrides (run_id);

CREATE TABLE IF NOT EXISTS labels (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id TEXT NOT NULL REFERENCES runs (run_id),
    success TEXT NOT NULL CHECK (success IN ('yes', 'no')),
    actor TEXT NOT NULL CHECK (actor <> ''),
    reason TEXT NOT NULL CHECK (reason <> ''),
    at REAL NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS labels_by_run ON labels (run_id);

CREATE TABLE IF NOT EXISTS critic_scores (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id TEXT NOT NULL REFERENCES runs (run_id),
    reward_model_version TEXT NOT NULL CHECK (reward_model_version <> ''),
    score REAL NOT NULL,
    at REAL NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS critic_scores_by_run ON critic_scores (run_id);

-- Which place a session got in a release (by its salt), in order of first visit; it keeps it: see serving/split/record.py.
CREATE TABLE IF NOT EXISTS session_slots (
    salt TEXT NOT NULL,
    session_key TEXT NOT NULL CHECK (session_key <> ''),
    slot INTEGER NOT NULL CHECK (slot >= 0),
    PRIMARY KEY (salt, session_key),
    UNIQUE (salt, slot)
) STRICT, WITHOUT ROWID;

-- Every plan of a request's policy: revision 0 answers the request, a later one is a replan and says what caused it.
CREATE TABLE IF NOT EXISTS plan_revisions (
    run_id TEXT NOT NULL REFERENCES runs (run_id),
    revision INTEGER NOT NULL CHECK (revision >= 0),
    at REAL NOT NULL,
    after_calls INTEGER NOT NULL CHECK (after_calls >= 0),
    cause TEXT NOT NULL CHECK (cause IN ('request', 'tool_error', 'observation')),
    tool_budget INTEGER NOT NULL CHECK (tool_budget >= 0),
    steps TEXT NOT NULL CHECK (json_type(steps) = 'array'),
    PRIMARY KEY (run_id, revision)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER IF NOT EXISTS runs_complete_once BEFORE UPDATE ON runs WHEN OLD.status <> 'running'
BEGIN SELECT RAISE(ABORT, 'a completed run never changes'); END;

CREATE TRIGGER IF NOT EXISTS runs_keep_identity BEFORE UPDATE OF run_id, request_id, owner, session_key, task_id,
    model_version, reward_model_version, policy_version, bundle_id, release_channel, split_epoch, started_at ON runs
BEGIN SELECT RAISE(ABORT, 'what a run was started as never changes'); END;

CREATE TRIGGER IF NOT EXISTS runs_undeletable BEFORE DELETE ON runs
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS session_slots_unchangeable BEFORE UPDATE ON session_slots
BEGIN SELECT RAISE(ABORT, 'a session keeps its slot'); END;
CREATE TRIGGER IF NOT EXISTS session_slots_undeletable BEFORE DELETE ON session_slots
BEGIN SELECT RAISE(ABORT, 'a session keeps its slot'); END;
CREATE TRIGGER IF NOT EXISTS overrides_undeletable BEFORE DELETE ON overrides
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS overrides_unchangeable BEFORE UPDATE ON overrides
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS labels_undeletable BEFORE DELETE ON labels
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS labels_unchangeable BEFORE UPDATE ON labels
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS critic_scores_undeletable BEFORE DELETE ON critic_scores
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS critic_scores_unchangeable BEFORE UPDATE ON critic_scores
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS plan_revisions_undeletable BEFORE DELETE ON plan_revisions
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS plan_revisions_unchangeable BEFORE UPDATE ON plan_revisions
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;

-- A request with what became known later: the latest label wins, one override is enough, the latest critic score counts.
CREATE VIEW IF NOT EXISTS run_records AS
SELECT
    runs.run_id, request_id, session_key, task_id, model_version, reward_model_version, policy_version, bundle_id,
    release_channel, split_epoch, started_at, intent, sandbox_level, status, tool_calls_count, tool_error_count,
    tokens_in, tokens_out, duration_ms, cost, policy_checks, seq, owner, failed_checks_count, completed_at,
    COALESCE((SELECT labels.success FROM labels WHERE labels.run_id = runs.run_id ORDER BY labels.seq DESC LIMIT 1),
        runs.success) AS success,
    EXISTS (SELECT 1 FROM overrides WHERE overrides.run_id = runs.run_id) AS human_override,
    COALESCE((SELECT score FROM critic_scores WHERE critic_scores.run_id = runs.run_id
        ORDER BY critic_scores.seq DESC LIMIT 1), -1.0) AS critic_score
FROM runs;

-- Bad events, each at the moment it became known.
CREATE VIEW IF NOT EXISTS run_events AS
SELECT completed_at AS at, 'violation' AS kind, run_id, session_key, policy_version, release_channel, split_epoch
FROM runs WHERE failed_checks_count > 0 AND status <> 'running'
UNION ALL
SELECT MIN(overrides.at), 'override', runs.run_id, session_key, policy_version, release_channel, split_epoch
FROM overrides JOIN runs ON runs.run_id = overrides.run_id GROUP BY runs.run_id
UNION ALL
SELECT MAX(completed_at, COALESCE((SELECT MAX(at) FROM labels WHERE labels.run_id = record.run_id), 0)),
    'failure', run_id, session_key, policy_version, release_channel, split_epoch
FROM run_records AS record
WHERE status <> 'running' AND (success = 'no' OR status IN ('engine_error', 'timeout', 'aborted'));
