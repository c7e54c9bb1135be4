//! Agents: supervised process trees, and what they report of themselves.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::budget::Usage;
use crate::ids::{AgentName, ProjectName, RunId, Target, UnixMillis};
use crate::load::Load;
use crate::pause::FreezerKind;
use crate::supervision::Supervision;

/// The status of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AgentStatus {
    /// Its shim is being started.
    Starting,
    /// It runs.
    Running,
    /// It runs and waits for the answer to a question.
    WaitingForInput,
    /// It is paused: frozen in memory, or ended until a resume starts it again.
    Paused,
    /// It failed and will be started again.
    Backoff,
    /// It is being stopped.
    Stopping,
    /// It ended by itself with exit code 0, or was stopped.
    Exited,
    /// It ended with another code or a signal, or could not be started.
    Failed,
    /// Its time was over.
    TimedOut,
    /// The machine or its shim went down under it.
    Interrupted,
}

impl AgentStatus {
    /// Returns the text of the wire and of the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::WaitingForInput => "waiting_for_input",
            Self::Paused => "paused",
            Self::Backoff => "backoff",
            Self::Stopping => "stopping",
            Self::Exited => "exited",
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
            Self::Interrupted => "interrupted",
        }
    }

    /// Says whether the agent has ended and nothing will start it again by itself.
    pub fn is_terminal(self) -> bool {
        match self {
            Self::Exited | Self::Failed | Self::TimedOut | Self::Interrupted => true,
            Self::Starting | Self::Running | Self::WaitingForInput | Self::Paused | Self::Backoff | Self::Stopping => {
                false
            }
        }
    }
}

impl std::fmt::Display for AgentStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// One resource limit of the caller: soft and hard, `None` for no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ResourceLimit {
    /// The soft limit.
    pub soft: Option<u64>,
    /// The hard limit.
    pub hard: Option<u64>,
}

/// How an agent is started: everything of `agent.run` that is kept, without its environment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AgentSpec {
    /// The program and its arguments.
    pub argv: Vec<String>,
    pub cwd: String,
    /// The file mode creation mask.
    pub umask: u32,
    /// Resource limits by the lower-case name of their constant.
    pub limits: BTreeMap<String, ResourceLimit>,
    /// The program and arguments that bring it back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume_argv: Option<Vec<String>>,
    /// The profile that knows the tool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
    /// How long a stop waits between SIGTERM and SIGKILL, milliseconds.
    pub stop_grace_ms: u64,
    /// How it is supervised.
    #[serde(default, skip_serializing_if = "Supervision::is_plain")]
    pub supervision: Box<Supervision>,
}

/// The processes of one run, by which a new daemon recognises them: a pid alone identifies nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RunProcesses {
    /// The agent's main process.
    pub pid: i32,
    /// When it started, clock ticks since boot (field 22 of `/proc/PID/stat`).
    pub start_ticks: u64,
    pub shim_pid: i32,
    /// When the shim started, clock ticks since boot.
    pub shim_start_ticks: u64,
    /// The kernel's boot id at that time.
    pub boot_id: String,
    /// What freezes the tree.
    pub mechanism: FreezerKind,
}

/// Parameters of `agent.run`. Environment, directory, umask and limits are the caller's own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentRun {
    /// The project; created when there is none of that name and a workspace is given.
    pub project: ProjectName,
    /// The absolute path of the workspace, needed for a new project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<String>,
    /// The agent's name; without it the program's name, made unique.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<AgentName>,
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// The whole environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// The working directory; the workspace when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// The file mode creation mask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub umask: Option<u32>,
    /// Resource limits by the lower-case name of their constant, for instance `nofile`.
    #[serde(default)]
    pub limits: BTreeMap<String, ResourceLimit>,
    /// The program and arguments that bring the agent back after its process is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume_argv: Option<Vec<String>>,
    /// The profile that knows the tool; recognised by the program's name when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
    /// How long a stop waits between SIGTERM and SIGKILL, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_grace_ms: Option<u64>,
    /// How it is supervised.
    #[serde(default, skip_serializing_if = "Supervision::is_plain")]
    pub supervision: Box<Supervision>,
}

/// Parameters of `agent.list`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentList {
    /// Only the agents of this project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<ProjectName>,
    /// Go on after this agent: `next` of the reply before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Target>,
}

/// Result of `agent.list`, `agent.stop` and `agent.kill`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AgentListResult {
    /// The agents, by project and name.
    pub agents: Vec<AgentView>,
    /// Where the next call of `agent.list` goes on, when not all of them fit into one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Target>,
}

/// Parameters of `agent.show`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentShow {
    /// The agent.
    pub target: Target,
    /// Variables to compare with those that it is started with, which are never shown.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
}

/// Result of `agent.show`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AgentDetail {
    /// What `agent.list` shows.
    pub agent: AgentView,
    /// How it is started, without its environment.
    pub spec: AgentSpec,
    /// Whether it ended by itself with exit code 0, rather than because a person stopped it.
    pub completed: bool,
    /// The names of those of the given variables that it is not started with, or with another value.
    pub env_differs: Vec<String>,
}

/// Parameters of `agent.stop`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentStop {
    /// One agent, or all of a project.
    pub target: Target,
    /// How long to wait between SIGTERM and SIGKILL, milliseconds; the agent's own when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_ms: Option<u64>,
}

/// Parameters of `agent.kill`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentKill {
    /// One agent, or all of a project.
    pub target: Target,
    /// A signal for the main process alone, for instance `USR1`; `CONT` goes to its process group.
    /// Without it the whole tree is killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
}

/// Parameters of `agent.restart`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentRestart {
    /// The agent.
    pub target: Target,
}

/// Parameters of `agent.remove`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentRemove {
    /// The agent, which must have ended.
    pub target: Target,
}

/// Parameters of `agent.wait`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentWait {
    /// The agent.
    pub target: Target,
    /// How long to wait at most, milliseconds; for ever when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// How a run of an agent ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It called exit with this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

impl ExitStatus {
    /// Returns the code that a shell would show: 128 plus the number for a signal.
    pub fn shell_code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }

    /// Says whether it is exit code 0.
    pub fn is_success(self) -> bool {
        self == Self::Code(0)
    }
}

impl std::fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// Why a run of an agent began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StartCause {
    /// `agent.run`.
    Run,
    /// `agent.restart`.
    Restart,
    /// A resume of the project, or of the agent.
    Resume,
    /// Its restart policy.
    Policy,
    /// It was interrupted.
    Recovery,
}

/// Why an agent is being stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StopCause {
    /// A person wants it.
    #[default]
    Asked,
    /// Its time is over.
    TimeUp,
    /// It has not reported for too long.
    Stale,
    /// It was not ready in time.
    NotReady,
}

impl StopCause {
    /// Says whether it is the usual cause, which stored events leave out.
    pub fn is_asked(&self) -> bool {
        *self == Self::Asked
    }
}

/// An agent as `ps` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AgentView {
    pub project: ProjectName,
    pub name: AgentName,
    pub status: AgentStatus,
    /// The program and its arguments.
    pub argv: Vec<String>,
    pub cwd: String,
    /// The profile that knows the tool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
    /// The current run, or the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<RunId>,
    /// How many runs it has had.
    pub runs: u64,
    /// The process id, while it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// When the current or last run began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<UnixMillis>,
    /// Since when a signal holds its main process, for instance after a Ctrl-Z in its terminal.
    /// `agent.kill` with the signal `CONT` lets it go on; a resume of the project does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspended_at: Option<UnixMillis>,
    /// When the last run ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<UnixMillis>,
    /// How the last run ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExitStatus>,
    /// Why it failed or was interrupted, where there is more to say than the exit status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// What freezes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mechanism: Option<FreezerKind>,
    /// Whether it runs and is ready.
    #[serde(default)]
    pub ready: bool,
    /// The agents that its start waits for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waits_for: Vec<AgentName>,
    /// When it is started again, in status `backoff`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_start_at: Option<UnixMillis>,
    /// How often in a row it was started again by its policy.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub starts_in_row: u32,
    /// How long the current or last run has run, paused time not counted, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ran_ms: Option<i64>,
    /// How much of its time is left, where it has a timeout, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_left_ms: Option<i64>,
    /// How long it will take to be done at the pace so far, where it reports percent, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remaining_ms: Option<i64>,
    /// Since when it has been known to be stale: it has not reported for too long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stale_at: Option<UnixMillis>,
    /// The last progress it reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// The tool's own session id, as the profile found it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// Input and output tokens and cost that it reported.
    pub usage: Usage,
    /// What its tree uses of the machine; a sample with its age, while it has processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load: Option<Load>,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// What an agent reports of its work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Progress {
    /// 0 to 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<f64>,
    /// What it is doing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Units of work done since it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub units_done: Option<u64>,
    /// When it said so.
    pub reported_at: UnixMillis,
}

/// Parameters of `agent.logs`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentLogs {
    /// The agent.
    pub target: Target,
    /// Where to go on, from an earlier reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
    /// Begin with this number of last lines; everything when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tail: Option<u64>,
    /// Begin with lines written at or after this time; of the last lines, if both are given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<UnixMillis>,
    /// Only the output of this run; of the present one and those that follow it when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<RunId>,
    /// Only the output of the run this number of runs before the current one; 0 for the present one and those
    /// that follow it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub runs_back: u32,
    /// When there is nothing new, wait this long for something, milliseconds.
    #[serde(default)]
    pub wait_ms: u64,
    /// Show the output as it is; secrets are taken out of it otherwise.
    #[serde(default)]
    pub raw: bool,
}

/// One line of an agent's output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LogLine {
    /// When it was read from the agent, nanoseconds since the Unix epoch.
    pub at_ns: i64,
    /// `stdout`, `stderr`, or for lines that Fermata writes `gap` (output was lost) and `note` (what
    /// it does beside the agent).
    pub stream: String,
    /// The text; bytes that are no UTF-8 are replaced.
    pub text: String,
    /// Whether the line goes on in the next entry.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub partial: bool,
}

/// Result of `agent.logs`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AgentLogsResult {
    /// The lines, oldest first.
    pub lines: Vec<LogLine>,
    /// Where the next call goes on.
    pub cursor: String,
    /// Whether the agent has ended and everything was read.
    pub end: bool,
}

/// Parameters of `agent.listen`: this connection becomes the agent's channel and gets
/// `pause_requested` notifications.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentListen {}

/// Parameters of `agent.progress`. A report of nothing is a heartbeat: what was reported before stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentProgress {
    /// The agent; the caller itself when an agent calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    /// 0 to 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<f64>,
    /// What it is doing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Units of work done since it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub units_done: Option<u64>,
    /// The phase that the project's work is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<crate::task::Phase>,
}

/// Parameters of `agent.ready`: the agent has come up and can be depended on.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentReady {
    /// The agent; the caller itself when an agent calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
}

/// Parameters of `agent.resume`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentResume {
    /// The agent, which has ended, or waits for its next start.
    pub target: Target,
}

/// Parameters of `agent.usage`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentUsage {
    /// The agent; the caller itself when an agent calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    /// Tokens sent to the model since the last report.
    #[serde(default)]
    pub input_tokens: u64,
    /// Tokens that the model wrote since the last report.
    #[serde(default)]
    pub output_tokens: u64,
    /// Cost since the last report, in millionths of a US dollar.
    #[serde(default)]
    pub cost_micro_usd: u64,
}

/// Parameters of `agent.ack`: the agent is ready to be frozen by the pause that was requested.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentAck {
    /// The agent; the caller itself when an agent calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
}

/// Parameters of `state.put`: the agent's own JSON blob, part of every checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StatePut {
    /// The agent; the caller itself when an agent calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    /// The blob, at most 256 KiB as JSON text.
    pub state: Value,
}

/// Parameters of `state.get`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StateGet {
    /// The agent; the caller itself when an agent calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
}

/// Result of `state.get`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StateGetResult {
    /// The blob, null when none was put.
    pub state: Value,
    /// When it was put.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved_at: Option<UnixMillis>,
}
