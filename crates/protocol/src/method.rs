//! The table of methods: one row says everything that distinguishes a method from the others.
//!
//! | column | meaning |
//! |---|---|
//! | parameters | the type of the parameters, which names the method's variant of [`Call`] |
//! | name | the name on the wire |
//! | result | the type of the result |
//! | role | the least role of a caller ([`MethodInfo::role`]) |
//! | `Read`, `Change` | whether it changes anything, and so takes an `idempotency_key` |
//! | files | whether it uses files or runs programs with the daemon's rights ([`FileAccess`]) |
//! | subject | what an agent's call may be about ([`CallSubject`]) |
//! | summary | one sentence for the OpenRPC document |
//!
//! Parsing, the typed client, the checks of roles and subjects, and the OpenRPC document are derived from it. A row
//! that leaves a column out, or whose role and subject contradict each other, does not compile.

use serde::de::DeserializeOwned;
use serde::{Serialize, de::Error as _};
use serde_json::{Map, Value};

use crate::agent::*;
use crate::checkpoint::*;
use crate::context::*;
use crate::daemon::*;
use crate::error::{Code, Refusal};
use crate::ids::{ProjectName, Target};
use crate::operation::*;
use crate::pause::*;
use crate::plugin::*;
use crate::project::*;
use crate::question::*;
use crate::retention::*;
use crate::rpc::shorten;
use crate::subscription::*;
use crate::task::*;
use crate::terminal::*;
use crate::transfer::*;

/// A method, seen from its parameters: what [`crate::client::Client::call`] needs to know.
pub trait Method: Serialize + DeserializeOwned {
    /// The name on the wire.
    const NAME: &'static str;
    /// The result.
    type Result: Serialize + DeserializeOwned;
}

/// The row of one method.
pub struct MethodInfo {
    /// The name on the wire.
    pub name: &'static str,
    /// One sentence.
    pub summary: &'static str,
    /// The least role that may call it. `Agent` methods are open to agents, and to people from `Operator` on.
    pub role: Role,
    /// Whether it changes anything, and so takes an `idempotency_key`.
    pub mutating: bool,
    pub files: FileAccess,
    pub subject: CallSubject,
    /// The schema of the parameters.
    pub params: fn(&mut schemars::SchemaGenerator) -> schemars::Schema,
    /// The schema of the result.
    pub result: fn(&mut schemars::SchemaGenerator) -> schemars::Schema,
}

/// Whether a method runs a program, chooses, shows or writes files with the daemon's own rights, or reveals something
/// of an environment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileAccess {
    Never,
    Always,
    /// Depending on the parameters: [`Call::reaches_files`].
    When,
}

/// What a method is about: it decides whether an agent may call it, and for which agent or project.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallSubject {
    /// The connection itself: any peer may call it.
    Connection,
    /// What the parameters name, whatever that is: no agent may call it.
    Named,
    /// One agent; the caller itself when an agent leaves it out.
    Agent,
    /// A project or one of its agents; the caller itself when an agent leaves it out.
    AgentOrProject,
    /// A project; the caller's own when an agent leaves it out.
    OwnProject,
    /// A project, which the parameters always name.
    Project,
}

impl CallSubject {
    /// Says whether a method of this role may have this subject.
    const fn suits(self, role: Role) -> bool {
        match self {
            Self::Connection => true,
            Self::Named => !matches!(role, Role::Agent),
            Self::Agent | Self::AgentOrProject | Self::OwnProject | Self::Project => matches!(role, Role::Agent),
        }
    }
}

/// The [`CallSubject`] of one call: the parameter that names it.
#[derive(Debug)]
pub enum SubjectParam<'a> {
    Connection,
    Named,
    Agent(&'a mut Option<Target>),
    AgentOrProject(&'a mut Option<Target>),
    OwnProject(&'a mut Option<ProjectName>),
    Project(&'a ProjectName),
}

macro_rules! mutating {
    (Read) => {
        false
    };
    (Change) => {
        true
    };
}

macro_rules! reaches_files {
    ($params:ident, Never) => {{
        let _ = $params;
        false
    }};
    ($params:ident, Always) => {{
        let _ = $params;
        true
    }};
    ($params:ident, When, $when:expr) => {
        holds($params, $when)
    };
}

/// Gives the closure of a row the type of the row's parameters.
fn holds<P>(params: &P, when: impl FnOnce(&P) -> bool) -> bool {
    when(params)
}

macro_rules! subject_param {
    ($params:ident, Connection) => {{
        let _ = $params;
        SubjectParam::Connection
    }};
    ($params:ident, Named) => {{
        let _ = $params;
        SubjectParam::Named
    }};
    ($params:ident, Agent) => {
        SubjectParam::Agent(&mut $params.target)
    };
    ($params:ident, AgentOrProject) => {
        SubjectParam::AgentOrProject(&mut $params.target)
    };
    ($params:ident, OwnProject) => {
        SubjectParam::OwnProject(&mut $params.project)
    };
    ($params:ident, Project) => {
        SubjectParam::Project(&$params.project)
    };
}

macro_rules! methods {
    ($($params:ident => $name:literal, $result:ty, $role:ident, $access:ident,
       $files:ident $(($when:expr))?, $subject:ident, $summary:literal;)*) => {
        /// A call with its parameters, checked for shape but not yet for permission.
        #[derive(Debug, Clone, PartialEq)]
        pub enum Call {
            $(#[doc = $summary] $params($params),)*
        }

        $(impl Method for $params {
            const NAME: &'static str = $name;
            type Result = $result;
        })*

        impl Call {
            /// Reads method and parameters.
            ///
            /// # Errors
            /// `method_not_found`, or `invalid_params` with the parameter's name.
            pub fn parse(method: &str, params: Map<String, Value>) -> Result<Self, Refusal> {
                match method {
                    $($name => read::<$params>($name, params).map(Call::$params),)*
                    _ => Err(Refusal::new(
                        Code::MethodNotFound,
                        format!("there is no method '{}'", shorten(method)),
                    )
                    .hint("rpc.discover lists all methods")),
                }
            }

            /// Returns the row of the table.
            pub fn info(&self) -> &'static MethodInfo {
                match self { $(Call::$params(_) => &infos::$params,)* }
            }

            /// Says whether this call uses files or runs programs with the daemon's own rights, as [`FileAccess`] says.
            pub fn reaches_files(&self) -> bool {
                match self { $(Call::$params(params) => reaches_files!(params, $files $(, $when)?),)* }
            }

            /// Returns the parameter that names what the call is about.
            pub fn subject(&mut self) -> SubjectParam<'_> {
                match self { $(Call::$params(params) => subject_param!(params, $subject),)* }
            }
        }

        #[allow(non_upper_case_globals)]
        mod infos {
            use super::*;
            $(pub(super) static $params: MethodInfo = MethodInfo {
                name: $name,
                summary: $summary,
                role: Role::$role,
                mutating: mutating!($access),
                files: FileAccess::$files,
                subject: CallSubject::$subject,
                params: |g| g.subschema_for::<super::$params>(),
                result: |g| g.subschema_for::<$result>(),
            };)*
        }

        $(const _: () = assert!(CallSubject::$subject.suits(Role::$role), $name);)*

        /// Every method, in the order of the documentation.
        pub static METHODS: &[&MethodInfo] = &[$(&infos::$params),*];
    };
}

methods! {
    Hello => "hello", HelloResult, Reader, Read, Never, Connection, "Agrees on a protocol version and tells the peer its role.";
    Discover => "rpc.discover", Value, Reader, Read, Never, Connection, "Returns the OpenRPC description of the protocol.";
    DaemonStatus => "daemon.status", DaemonStatusResult, Reader, Read, Never, Named, "Shows the status of the daemon.";
    DaemonReload => "daemon.reload", DaemonReloadResult, Admin, Change, Never, Named, "Reads the configuration again.";
    ProjectCreate => "project.create", ProjectView, Operator, Change, Always, Named, "Creates a project.";
    ProjectSet => "project.set", ProjectView, Operator, Change, Always, Named, "Changes a project's description, phase or settings.";
    ProjectList => "project.list", ProjectListResult, Reader, Read, Never, Named, "Lists the projects.";
    ProjectShow => "project.show", ProjectDetail, Agent, Read, Never, Project, "Shows a project with its agents.";
    ProjectRemove => "project.remove", Done, Operator, Change, Never, Named, "Removes a project whose agents have ended.";
    ProjectPause => "project.pause", PauseResult, Agent, Change, Never, Project, "Pauses a project: quiesce, freeze, flash save, checkpoint, one commit.";
    ProjectResume => "project.resume", ResumeResult, Operator, Change, When(|params| params.checkpoint.is_some()), Named, "Resumes a project: thaws its agents, or starts them again.";
    AgentRun => "agent.run", AgentView, Operator, Change, Always, Named, "Starts an agent.";
    AgentList => "agent.list", AgentListResult, Reader, Read, Never, Named, "Lists the agents.";
    AgentShow => "agent.show", AgentDetail, Operator, Read, When(|params| !params.env.is_empty()), Named, "Shows how an agent is started, and which of the given variables differ from its environment.";
    AgentStop => "agent.stop", AgentListResult, Operator, Change, Never, Named, "Stops agents: SIGTERM to the whole tree, and SIGKILL after the grace.";
    AgentKill => "agent.kill", AgentListResult, Operator, Change, Never, Named, "Kills the whole trees of agents, or sends a signal to their main processes.";
    AgentRestart => "agent.restart", AgentView, Operator, Change, Never, Named, "Stops an agent and starts it again.";
    AgentRemove => "agent.remove", Done, Operator, Change, Never, Named, "Removes an agent that has ended.";
    AgentWait => "agent.wait", AgentView, Reader, Read, Never, Named, "Waits until an agent has ended.";
    AgentLogs => "agent.logs", AgentLogsResult, Operator, Read, Never, Named, "Reads an agent's output.";
    AgentAttach => "agent.attach", AgentAttachResult, Operator, Read, When(|params| !params.read_only), Named, "Shows an agent's terminal on this connection, and lets one connection type into it.";
    AgentInput => "agent.input", TypedResult, Operator, Read, Never, Named, "Types into the terminal of an attachment.";
    AgentResize => "agent.resize", Done, Operator, Read, Never, Named, "Changes the size of the terminal of an attachment.";
    AgentDetach => "agent.detach", Done, Operator, Read, Never, Named, "Ends an attachment; the agent runs on.";
    AgentSend => "agent.send", TypedResult, Operator, Change, Always, Named, "Types into an agent's terminal without attaching to it.";
    AgentListen => "agent.listen", Done, Agent, Read, Never, Connection, "Makes this connection the agent's channel for pause requests.";
    AgentAck => "agent.ack", Done, Agent, Change, Never, Agent, "Acknowledges a pause request.";
    AgentProgress => "agent.progress", Done, Agent, Change, Never, Agent, "Reports progress.";
    AgentReady => "agent.ready", Done, Agent, Change, Never, Agent, "Reports that the agent is ready for the agents that depend on it.";
    AgentResume => "agent.resume", AgentView, Operator, Change, Never, Named, "Starts an agent that timed out, was interrupted, failed or was stopped again: by its resume command, with the context of the last checkpoint.";
    AgentUsage => "agent.usage", Done, Agent, Change, Never, Agent, "Reports tokens and cost.";
    StatePut => "state.put", Done, Agent, Change, Never, Agent, "Saves the agent's own JSON state.";
    StateGet => "state.get", StateGetResult, Agent, Read, Never, Agent, "Returns the agent's own JSON state.";
    TaskPut => "task.put", TaskView, Agent, Change, Never, AgentOrProject, "Creates or changes a task.";
    TaskList => "task.list", TaskListResult, Agent, Read, Never, OwnProject, "Lists the tasks of a project.";
    QuestionAsk => "question.ask", QuestionView, Agent, Change, Never, Agent, "Asks a person a question.";
    QuestionWait => "question.wait", QuestionView, Agent, Read, Never, OwnProject, "Waits for an answer.";
    QuestionList => "question.list", QuestionListResult, Reader, Read, Never, Named, "Lists questions.";
    QuestionAnswer => "question.answer", QuestionView, Operator, Change, Never, Named, "Answers a question.";
    ContextPut => "context.put", ContextPutResult, Agent, Change, Never, Agent, "Adds context items.";
    ContextList => "context.list", ContextListResult, Agent, Read, Never, AgentOrProject, "Lists context items.";
    ContextShow => "context.show", ContextItem, Agent, Change, Never, OwnProject, "Shows the whole text of a context item and counts the access.";
    ContextPin => "context.pin", Done, Agent, Change, Never, OwnProject, "Pins or unpins a context item.";
    ContextSearch => "context.search", ContextListResult, Agent, Read, Never, AgentOrProject, "Searches the context, archived items included.";
    ContextRecall => "context.recall", Done, Agent, Change, Never, OwnProject, "Restores archived context items.";
    ContextFlashSave => "context.flash_save", FlashSaveResult, Agent, Change, Never, AgentOrProject, "Scores all context items anew and archives the cold ones.";
    CheckpointCreate => "checkpoint.create", CheckpointCreateResult, Agent, Change, Never, OwnProject, "Makes a checkpoint.";
    CheckpointList => "checkpoint.list", CheckpointListResult, Reader, Read, Never, Named, "Lists checkpoints.";
    CheckpointShow => "checkpoint.show", CheckpointDetail, Reader, Read, Never, Named, "Shows a checkpoint with its parts and the paths that it skipped.";
    CheckpointDiff => "checkpoint.diff", CheckpointDiffResult, Operator, Read, Always, Named, "Compares a checkpoint with another or with the workspace.";
    CheckpointRestore => "checkpoint.restore", CheckpointRestoreResult, Operator, Change, Always, Named, "Restores a checkpoint after taking a safety checkpoint.";
    CheckpointVerify => "checkpoint.verify", CheckpointVerifyResult, Operator, Read, Never, Named, "Rehashes every part of checkpoints.";
    CheckpointRemove => "checkpoint.remove", CheckpointRemoveResult, Operator, Change, Never, Named, "Removes checkpoints.";
    CheckpointPrune => "checkpoint.prune", CheckpointRemoveResult, Operator, Change, Never, Named, "Removes the checkpoints that the retention policy, or the given bounds, no longer keep.";
    CheckpointPin => "checkpoint.pin", CheckpointView, Operator, Change, Never, Named, "Pins or unpins a checkpoint.";
    CheckpointExport => "checkpoint.export", CheckpointExportResult, Operator, Read, Never, Named, "Exports a checkpoint as one file, to be read with checkpoint.download.";
    CheckpointDownload => "checkpoint.download", CheckpointDownloadResult, Operator, Read, Never, Named, "Reads a piece of the file that checkpoint.export has made for this connection.";
    CheckpointUpload => "checkpoint.upload", CheckpointUploadResult, Operator, Read, Never, Named, "Sends a piece of a file for checkpoint.import on this connection.";
    CheckpointImport => "checkpoint.import", CheckpointCreateResult, Operator, Change, Never, Named, "Imports the file that was sent with checkpoint.upload as a checkpoint.";
    CheckpointConsolidate => "checkpoint.consolidate", CheckpointConsolidateResult, Operator, Change, Never, Named, "Merges the packs of a project's history into one.";
    OperationList => "operation.list", OperationListResult, Reader, Read, Never, Named, "Lists operations.";
    OperationShow => "operation.show", OperationView, Reader, Read, Never, Named, "Shows an operation.";
    OperationCancel => "operation.cancel", OperationView, Operator, Change, Never, Named, "Cancels an operation and undoes its steps.";
    EventsSubscribe => "events.subscribe", EventsSubscribeResult, Reader, Read, Never, Named, "Sends all events after a cursor, without a gap.";
    EventsUnsubscribe => "events.unsubscribe", Done, Reader, Read, Never, Named, "Ends a subscription.";
    EventsList => "events.list", EventsListResult, Reader, Read, Never, Named, "Lists the events after a cursor.";
    PluginList => "plugin.list", PluginListResult, Reader, Read, Never, Named, "Lists plugins.";
    PluginReload => "plugin.reload", PluginListResult, Admin, Change, Never, Named, "Loads new and changed plugins and unloads removed ones.";
    PluginEnable => "plugin.enable", PluginListResult, Admin, Change, Never, Named, "Switches a plugin on or off.";
    PluginCheck => "plugin.check", PluginCheckResult, Admin, Read, Never, Named, "Loads a shared object in a host process of its own and describes it.";
}

fn read<P: DeserializeOwned>(method: &str, params: Map<String, Value>) -> Result<P, Refusal> {
    let problem = |e: serde_json::Error| {
        Refusal::new(Code::InvalidParams, format!("parameters of {method}: {}", shorten_sentence(&e.to_string())))
            .hint("rpc.discover describes every parameter")
    };
    serde_path(params).map_err(problem)
}

/// Deserialises and names the member that was wrong, which serde alone does not say for wrong types.
fn serde_path<P: DeserializeOwned>(params: Map<String, Value>) -> Result<P, serde_json::Error> {
    let whole = Value::Object(params.clone());
    let error = match P::deserialize(whole) {
        Ok(params) => return Ok(params),
        Err(error) => error,
    };
    // Serde names unknown and missing members itself. For a wrong type, the member is the one
    // whose removal changes the complaint.
    for name in params.keys() {
        let mut without = params.clone();
        without.remove(name);
        let changed = match P::deserialize(Value::Object(without)) {
            Ok(_) => true,
            Err(other) => other.to_string() != error.to_string(),
        };
        let text = error.to_string();
        if changed && !text.contains(&format!("`{name}`")) {
            return Err(serde_json::Error::custom(format!("'{}': {text}", shorten(name))));
        }
    }
    Err(error)
}

fn shorten_sentence(text: &str) -> String {
    let mut short: String = text.chars().take(300).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(method: &str, params: Value) -> Result<Call, Refusal> {
        let Value::Object(params) = params else { panic!("params are an object") };
        Call::parse(method, params)
    }

    #[test]
    fn unknown_methods_and_parameters_are_refused_by_name() {
        let error = parse("project.fly", json!({})).expect_err("unknown");
        assert_eq!(error.code, Code::MethodNotFound);
        let error = parse("project.show", json!({"project": "web", "prject": 1})).expect_err("unknown");
        assert_eq!(error.code, Code::InvalidParams);
        assert!(error.message.contains("prject"), "{}", error.message);
        let error = parse("project.show", json!({})).expect_err("missing");
        assert!(error.message.contains("project"), "{}", error.message);
    }

    #[test]
    fn wrong_types_are_refused_by_name() {
        let error = parse("project.pause", json!({"project": "web", "grace_ms": "soon"})).expect_err("type");
        assert!(error.message.contains("grace_ms"), "{}", error.message);
        let error = parse("project.pause", json!({"project": "a/b"})).expect_err("name");
        assert!(error.message.contains("project"), "{}", error.message);
    }

    #[test]
    fn method_names_are_unique() {
        let mut names: Vec<_> = METHODS.iter().map(|m| m.name).collect();
        names.sort_unstable();
        let before = names.len();
        names.dedup();
        assert_eq!(names.len(), before);
    }
}
