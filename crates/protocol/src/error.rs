//! Errors on the wire: stable codes, a sentence for people, and a hint that says what to type next.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal, $number:literal;)*) => {
        /// The stable codes of refusals and errors. A code is never renamed or given a new meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
        pub enum Code {
            $($(#[$doc])* #[serde(rename = $text)] $variant,)*
        }

        impl Code {
            /// Every code, in the order of the documentation.
            pub const ALL: &'static [Code] = &[$(Code::$variant),*];

            /// Returns the stable snake_case text of the code.
            pub fn as_str(self) -> &'static str {
                match self { $(Code::$variant => $text,)* }
            }

            /// Returns the JSON-RPC number that goes with the code.
            pub fn number(self) -> i64 {
                match self { $(Code::$variant => $number,)* }
            }
        }
    };
}

codes! {
    /// The line is not valid JSON or not valid UTF-8.
    ParseError = "parse_error", -32700;
    /// The JSON is not a JSON-RPC 2.0 request object.
    InvalidRequest = "invalid_request", -32600;
    /// The line is longer than the limit; the connection closes after this error.
    LineTooLong = "line_too_long", -32600;
    /// There is no such method.
    MethodNotFound = "method_not_found", -32601;
    /// A parameter is unknown, missing or of the wrong type.
    InvalidParams = "invalid_params", -32602;
    /// Fermata itself broke; nothing was changed unless the message says so.
    InternalError = "internal_error", -32603;
    /// Client and daemon share no protocol version.
    UnsupportedVersion = "unsupported_version", -32000;
    /// The peer's role does not allow the call.
    PermissionDenied = "permission_denied", -32001;
    /// The per-launch token is not known.
    BadToken = "bad_token", -32001;
    /// The daemon is shutting down and takes no new work.
    ShuttingDown = "shutting_down", -32002;
    /// Too many concurrent requests on this connection, or too many connections of this user.
    TooManyRequests = "too_many_requests", -32003;
    /// The request was cancelled by its sender.
    RequestCancelled = "request_cancelled", -32800;
    /// The idempotency key was used before with another request.
    IdempotencyConflict = "idempotency_conflict", -32004;
    /// No such project.
    ProjectNotFound = "project_not_found", -32010;
    /// A project of that name exists.
    ProjectExists = "project_exists", -32011;
    /// No such agent.
    AgentNotFound = "agent_not_found", -32010;
    /// There is no output of such a run of the agent.
    LogNotFound = "log_not_found", -32010;
    /// An agent of that name is running.
    AgentRunning = "agent_running", -32011;
    /// The agent is not running.
    AgentNotRunning = "agent_not_running", -32011;
    /// Agents of the project run, and the command needs them paused or ended.
    AgentsRunning = "agents_running", -32011;
    /// The agent has no terminal.
    NoTerminal = "no_terminal", -32012;
    /// Another attachment writes to the agent's terminal.
    TerminalBusy = "terminal_busy", -32011;
    /// The agent's terminal has as many viewers as it can have.
    TooManyViewers = "too_many_viewers", -32003;
    /// The connection has no such attachment, or it only watches.
    NotAttached = "not_attached", -32011;
    /// The agent could not be started.
    LaunchFailed = "launch_failed", -32012;
    /// No such checkpoint.
    CheckpointNotFound = "checkpoint_not_found", -32010;
    /// Neither the checkpoint nor the workspace has the path.
    PathNotFound = "path_not_found", -32010;
    /// The checkpoint exists but is damaged.
    CheckpointDamaged = "checkpoint_damaged", -32013;
    /// A file is no exported checkpoint, is damaged, or newer than this program.
    BundleRefused = "bundle_refused", -32013;
    /// The checkpoint may not be removed.
    CheckpointProtected = "checkpoint_protected", -32011;
    /// No such task.
    TaskNotFound = "task_not_found", -32010;
    /// No such context item.
    ContextItemNotFound = "context_item_not_found", -32010;
    /// No such question.
    QuestionNotFound = "question_not_found", -32010;
    /// The question was answered already.
    QuestionAnswered = "question_answered", -32011;
    /// No such operation.
    OperationNotFound = "operation_not_found", -32010;
    /// The operation can no longer be cancelled.
    OperationNotCancellable = "operation_not_cancellable", -32011;
    /// The operation was cancelled and undone.
    OperationCancelled = "operation_cancelled", -32014;
    /// Another operation of the project is in progress.
    OperationInProgress = "operation_in_progress", -32011;
    /// A pause of the project is in progress.
    PauseInProgress = "pause_in_progress", -32011;
    /// A resume of the project is in progress.
    ResumeInProgress = "resume_in_progress", -32011;
    /// A restore of the project is in progress.
    RestoreInProgress = "restore_in_progress", -32011;
    /// The project is paused already.
    AlreadyPaused = "already_paused", -32011;
    /// The project is not paused.
    NotPaused = "not_paused", -32011;
    /// The project is paused, and the command needs it running.
    ProjectPaused = "project_paused", -32011;
    /// Nothing runs that could be paused.
    NothingToPause = "nothing_to_pause", -32011;
    /// The mode is not available.
    ModeUnavailable = "mode_unavailable", -32012;
    /// A step of a pause failed; the project is as it was before.
    PauseFailed = "pause_failed", -32014;
    /// A resume failed.
    ResumeFailed = "resume_failed", -32014;
    /// A checkpoint could not be made; nothing was changed.
    CheckpointFailed = "checkpoint_failed", -32014;
    /// A restore failed.
    RestoreFailed = "restore_failed", -32014;
    /// The workspace is missing, unreadable, or one that Fermata refuses (`/`, `$HOME`).
    WorkspaceRefused = "workspace_refused", -32012;
    /// The state directory's file system has too little free space.
    DiskFull = "disk_full", -32015;
    /// The checkpoints of the project take as much of the disk as they may.
    QuotaExceeded = "quota_exceeded", -32015;
    /// A budget is reached; the project goes on when it is raised or waived.
    BudgetExceeded = "budget_exceeded", -32011;
    /// Resources of an agent cannot be limited here; the data names the controllers that are missing.
    LimitsUnavailable = "limits_unavailable", -32012;
    /// A value is too large.
    TooLarge = "too_large", -32016;
    /// The events before this cursor are gone; the data names the oldest cursor.
    CursorExpired = "cursor_expired", -32017;
    /// No such plugin.
    PluginNotFound = "plugin_not_found", -32010;
    /// The plugin failed, hung or was refused.
    PluginFailed = "plugin_failed", -32014;
    /// The wait ended before what was waited for.
    TimedOut = "timed_out", -32018;
    /// The status does not allow the transition.
    InvalidTransition = "invalid_transition", -32011;
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// "We said no": an answer that changed nothing, with a stable code, a sentence and a hint.
///
/// The opposite, a fault ("we broke"), is a type of the daemon and reaches the wire as
/// [`Code::InternalError`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// The stable code.
    pub code: Code,
    /// One sentence for people: what, which, why.
    pub message: String,
    /// What to type or do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Further fields for programs, for instance the id of the checkpoint that exists already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<Value>,
}

impl Refusal {
    /// Makes a refusal without hint.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None, details: None }
    }

    /// Adds what to type or do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds further fields for programs.
    #[must_use]
    pub fn details(mut self, details: Value) -> Self {
        self.details = Some(details);
        self
    }
}

/// The `error` member of a JSON-RPC 2.0 response.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorObject {
    /// The JSON-RPC number; programs should look at `data.code` instead.
    pub code: i64,
    /// One sentence for people.
    pub message: String,
    /// The stable code, the hint and further fields.
    pub data: ErrorData,
}

/// The `data` member of an error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorData {
    /// The stable code.
    pub code: Code,
    /// What to type or do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Further fields for programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<Value>,
}

impl From<Refusal> for ErrorObject {
    fn from(refusal: Refusal) -> Self {
        Self {
            code: refusal.code.number(),
            message: refusal.message,
            data: ErrorData { code: refusal.code, hint: refusal.hint, details: refusal.details },
        }
    }
}

impl From<ErrorObject> for Refusal {
    fn from(error: ErrorObject) -> Self {
        Self { code: error.data.code, message: error.message, hint: error.data.hint, details: error.data.details }
    }
}

/// Formats an error and its causes in one line, separated by `: `. A cause whose text the line ends with already is left
/// out, since errors of some libraries repeat theirs.
pub fn error_chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        let text = text.trim_end();
        if !line.ends_with(text) {
            line.push_str(": ");
            line.push_str(text);
        }
        cause = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_snake_case_and_match_their_serialised_form() {
        let mut seen = std::collections::HashSet::new();
        for code in Code::ALL {
            let text = code.as_str();
            assert!(seen.insert(text), "{text} stands twice");
            assert!(text.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{text}");
            assert_eq!(serde_json::to_value(code).ok(), Some(Value::from(text)));
        }
    }
}
