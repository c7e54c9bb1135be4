-- The first schema. Once released, a migration is never edited: write the next one.
--
-- Times are milliseconds since the Unix epoch. JSON columns hold what only the program reads;
-- what people and queries look at has a column of its own.

CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE projects (
    name            TEXT PRIMARY KEY,
    description     TEXT NOT NULL,
    source_type     TEXT,
    source_location TEXT,
    source_branch   TEXT,
    workspace       TEXT NOT NULL,
    status          TEXT NOT NULL,
    phase           TEXT NOT NULL,
    config          TEXT NOT NULL,
    state           TEXT NOT NULL,
    checkpointing   TEXT,
    counters        TEXT NOT NULL,
    total_paused_ms INTEGER NOT NULL,
    created_at      INTEGER NOT NULL,
    updated_at      INTEGER NOT NULL
) STRICT;

CREATE TABLE agents (
    project    TEXT NOT NULL,
    name       TEXT NOT NULL,
    status     TEXT NOT NULL,
    data       TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    PRIMARY KEY (project, name)
) STRICT, WITHOUT ROWID;

-- Apart from the agents, because it holds secrets: never backed up, never exported.
CREATE TABLE agent_environments (
    project TEXT NOT NULL,
    agent   TEXT NOT NULL,
    env     TEXT NOT NULL,
    PRIMARY KEY (project, agent)
) STRICT, WITHOUT ROWID;

-- An agent's own JSON blob.
CREATE TABLE agent_states (
    project  TEXT NOT NULL,
    agent    TEXT NOT NULL,
    state    TEXT NOT NULL,
    saved_at INTEGER NOT NULL,
    PRIMARY KEY (project, agent)
) STRICT, WITHOUT ROWID;

CREATE TABLE tasks (
    project    TEXT NOT NULL,
    id         INTEGER NOT NULL,
    agent      TEXT,
    title      TEXT NOT NULL,
    status     TEXT NOT NULL,
    percent    REAL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    PRIMARY KEY (project, id)
) STRICT, WITHOUT ROWID;

CREATE TABLE questions (
    project     TEXT NOT NULL,
    id          INTEGER NOT NULL,
    agent       TEXT NOT NULL,
    text        TEXT NOT NULL,
    choices     TEXT NOT NULL,
    asked_at    INTEGER NOT NULL,
    answer      TEXT,
    answered_at INTEGER,
    PRIMARY KEY (project, id)
) STRICT, WITHOUT ROWID;

-- Narrow rows for what scoring reads; the bodies are apart.
CREATE TABLE context_items (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    project      TEXT NOT NULL,
    agent        TEXT NOT NULL,
    type         TEXT NOT NULL,
    tokens       INTEGER NOT NULL,
    score        REAL NOT NULL,
    tier         TEXT NOT NULL,
    pinned       INTEGER NOT NULL,
    archived     INTEGER NOT NULL,
    access_count INTEGER NOT NULL,
    created_at   INTEGER NOT NULL
) STRICT;

CREATE INDEX context_items_by_agent ON context_items (project, agent, archived);

CREATE TABLE context_bodies (
    id   INTEGER PRIMARY KEY REFERENCES context_items (id) ON DELETE CASCADE,
    text TEXT NOT NULL
) STRICT;

CREATE VIRTUAL TABLE context_search USING fts5 (text, content = '', contentless_delete = 1);

CREATE TABLE checkpoints (
    project          TEXT NOT NULL,
    id               INTEGER NOT NULL,
    name             TEXT NOT NULL,
    description      TEXT NOT NULL,
    trigger          TEXT NOT NULL,
    format           INTEGER NOT NULL,
    created_at       INTEGER NOT NULL,
    operation_id     TEXT NOT NULL,
    pause_reason     TEXT,
    git_commit       TEXT NOT NULL,
    database_backup  TEXT NOT NULL,
    context_snapshot TEXT NOT NULL,
    manifest_sha256  TEXT NOT NULL,
    size_bytes       INTEGER NOT NULL,
    pinned           INTEGER NOT NULL,
    metadata         TEXT NOT NULL,
    PRIMARY KEY (project, id)
) STRICT, WITHOUT ROWID;

CREATE TABLE operations (
    id         TEXT PRIMARY KEY,
    project    TEXT NOT NULL,
    kind       TEXT NOT NULL,
    state      TEXT NOT NULL,
    step       TEXT,
    steps_ms   TEXT NOT NULL,
    started_at INTEGER NOT NULL,
    ended_at   INTEGER,
    result     TEXT,
    error      TEXT
) STRICT, WITHOUT ROWID;

CREATE INDEX operations_by_project ON operations (project, started_at);

CREATE TABLE events (
    seq     INTEGER PRIMARY KEY AUTOINCREMENT,
    at      INTEGER NOT NULL,
    project TEXT NOT NULL,
    kind    TEXT NOT NULL,
    event   TEXT NOT NULL
) STRICT;

CREATE TABLE usage (
    seq            INTEGER PRIMARY KEY AUTOINCREMENT,
    at             INTEGER NOT NULL,
    project        TEXT NOT NULL,
    agent          TEXT NOT NULL,
    input_tokens   INTEGER NOT NULL,
    output_tokens  INTEGER NOT NULL,
    cost_micro_usd INTEGER NOT NULL
) STRICT;

CREATE TABLE idempotency_keys (
    principal TEXT NOT NULL,
    key       TEXT NOT NULL,
    request   TEXT NOT NULL,
    operation TEXT,
    reply     TEXT,
    at        INTEGER NOT NULL,
    PRIMARY KEY (principal, key)
) STRICT, WITHOUT ROWID;
