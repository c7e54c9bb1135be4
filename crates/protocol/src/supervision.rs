//! How an agent is supervised: when it is started, started again, delayed, ended; what it may
//! use; and how it is connected. One value, the same in `agent.run`, in what is stored of an agent
//! and in a workspace's `fermata.toml`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::budget::Budget;
use crate::ids::AgentName;

/// How an agent is supervised. Everything has a default; an empty object is a plain process.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Supervision {
    /// Whether, how soon and how often it is started again after it has ended.
    #[serde(skip_serializing_if = "is_default")]
    pub restart: Restart,
    /// Whether it is brought back after the machine or its shim went down under it.
    #[serde(skip_serializing_if = "is_default")]
    pub recover: Recover,
    /// The agents of the same project that it waits for before it is started.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub depends_on: Vec<Dependency>,
    /// When it counts as ready; as soon as it runs when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready: Option<Readiness>,
    /// How long it may run, paused time not counted, milliseconds. Then a checkpoint is taken and
    /// it is ended as `timed_out`, from which `resume` brings it back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// After how long without a report an agent that has ever reported is stale, paused time not
    /// counted, milliseconds; 0 for never, one hour when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stale_after_ms: Option<u64>,
    /// What is done about a stale agent.
    #[serde(skip_serializing_if = "is_default")]
    pub on_stale: OnStale,
    /// A command that runs before each start, in the agent's place; the start fails with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pre_start: Option<Hook>,
    /// A command that runs after each end, when nothing of the agent's tree is left.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub post_stop: Option<Hook>,
    /// A terminal of its own; without it the agent writes to pipes and reads nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub terminal: Option<TerminalSize>,
    /// What its whole tree may use.
    #[serde(skip_serializing_if = "is_default")]
    pub resources: Resources,
    /// How much it may spend before its project is paused.
    #[serde(skip_serializing_if = "is_default")]
    pub budget: Budget,
    /// What becomes of output that comes faster than it can be kept.
    #[serde(skip_serializing_if = "is_default")]
    pub output: OutputPolicy,
    /// The file that declares it, when `up` started it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub declared: Option<Declared>,
}

impl Supervision {
    /// Says whether there is nothing but defaults.
    pub fn is_plain(&self) -> bool {
        is_default(self)
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Where an agent was declared, and as what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Declared {
    /// The absolute path of the file.
    pub file: String,
    /// SHA-256 of what the file says of the agent, in hexadecimal. The client that declares it
    /// chooses the form; values of variables are not in it, since a digest of a short secret is no
    /// secret.
    pub sha256: String,
}

/// When an agent is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RestartPolicy {
    /// Never.
    #[default]
    No,
    /// After it failed.
    OnFailure,
    /// However it ended, unless a person stopped it.
    Always,
}

/// Whether, how soon and how often an agent is started again.
///
/// The wait doubles from `delay_ms` up to `max_delay_ms` with each start in a row, and is cut by up
/// to a quarter at random, so that agents that failed together do not come back together. A run
/// that lasted longer than `within_ms` begins a new row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Restart {
    /// When.
    pub policy: RestartPolicy,
    /// The first wait, milliseconds.
    pub delay_ms: u64,
    /// The longest wait, milliseconds.
    pub max_delay_ms: u64,
    /// How many starts in a row within `within_ms` are tried before it counts as failed for good;
    /// 0 for no limit.
    pub limit: u32,
    /// The time in which starts count towards the limit, milliseconds.
    pub within_ms: u64,
}

impl Default for Restart {
    fn default() -> Self {
        Self { policy: RestartPolicy::No, delay_ms: 1_000, max_delay_ms: 300_000, limit: 10, within_ms: 3_600_000 }
    }
}

/// Whether an interrupted agent is brought back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Recover {
    /// Where it has a restart policy, or a resume command by which it goes on rather than begins anew.
    #[default]
    Auto,
    Always,
    Never,
}

/// An agent that has to come first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Dependency {
    /// Its name, in the same project.
    pub agent: AgentName,
    /// How far it has to have come.
    #[serde(default)]
    pub until: DependencyState,
}

/// How far an agent has to have come before those that depend on it are started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DependencyState {
    /// It runs.
    Started,
    #[default]
    Ready,
    /// It has ended with exit code 0.
    Completed,
}

/// When an agent counts as ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Readiness {
    /// How it is found out.
    pub when: ReadyWhen,
    /// How long it may take, milliseconds; longer is a failed start. One minute when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// How it is found out that an agent is ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReadyWhen {
    /// It says so, with `agent.ready`.
    Reported,
    /// A line of its output holds this text.
    Output(String),
    /// This command, tried every half second in its directory and environment, ends with exit code 0.
    Command(Vec<String>),
}

/// What is done about an agent that has not reported for too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnStale {
    /// An event says so.
    #[default]
    Tell,
    /// A checkpoint is taken and it is stopped and started again.
    Restart,
}

/// A command beside the agent: with its environment, directory and limits, its output in the
/// agent's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Hook {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// How long it may take, milliseconds; then its tree is killed and it counts as failed. One
    /// minute when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

impl Hook {
    /// How long a command may take that does not say, milliseconds.
    pub const DEFAULT_TIMEOUT_MS: u64 = 60_000;
}

/// The size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters per line.
    pub cols: u16,
}

/// What an agent's whole tree may use. Needs a control group whose controllers are delegated to
/// the daemon; a limit that cannot be set is refused.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Resources {
    /// Memory, bytes (`memory.max`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_max_bytes: Option<u64>,
    /// Processor time, percent of one core (`cpu.max`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_max_percent: Option<u64>,
    /// Processes and threads (`pids.max`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids_max: Option<u64>,
}

/// What becomes of output that comes faster than it can be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OutputPolicy {
    /// The agent waits, as it would for a slow file.
    #[default]
    Block,
    /// What cannot be kept is dropped, counted, and the gap is noted in the log.
    Drop,
}
