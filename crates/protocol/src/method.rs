//! The table of methods: name, parameters, result, the least role, and whether it changes anything.
//!
//! One row per method; parsing, the client's typing, role checks and the OpenRPC document all
//! read this table.

use serde::de::DeserializeOwned;
use serde::{Serialize, de::Error as _};
use serde_json::{Map, Value};

use crate::agent::*;
use crate::checkpoint::*;
use crate::context::*;
use crate::daemon::*;
use crate::error::{Code, Refusal};
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

/// What the table says of one method.
pub struct MethodInfo {
    /// The name on the wire.
    pub name: &'static str,
    /// One sentence.
    pub summary: &'static str,
    /// The least role that may call it; `Agent` methods concern the caller's own agent.
    pub role: Role,
    /// Whether it changes anything, and so takes an `idempotency_key`.
    pub mutating: bool,
    /// The schema of the parameters.
    pub params: fn(&mut schemars::SchemaGenerator) -> schemars::Schema,
    /// The schema of the result.
    pub result: fn(&mut schemars::SchemaGenerator) -> schemars::Schema,
}

macro_rules! methods {
    ($($params:ident => $name:literal, $result:ty, $role:ident, $mutating:literal, $summary:literal;)*) => {
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
        }

        #[allow(non_upper_case_globals)]
        mod infos {
            use super::*;
            $(pub(super) static $params: MethodInfo = MethodInfo {
                name: $name,
                summary: $summary,
                role: Role::$role,
                mutating: $mutating,
                params: |g| g.subschema_for::<super::$params>(),
                result: |g| g.subschema_for::<$result>(),
            };)*
        }

        /// Every method, in the order of the documentation.
        pub static METHODS: &[&MethodInfo] = &[$(&infos::$params),*];
    };
}

methods! {
    Hello => "hello", HelloResult, Reader, false, "Agrees on a protocol version and tells the peer its role.";
    Discover => "rpc.discover", Value, Reader, false, "Returns the OpenRPC description of the protocol.";
    DaemonStatus => "daemon.status", DaemonStatusResult, Reader, false, "Shows the daemon.";
    DaemonReload => "daemon.reload", DaemonReloadResult, Admin, true, "Reads the configuration again.";
    ProjectCreate => "project.create", ProjectView, Operator, true, "Creates a project.";
    ProjectSet => "project.set", ProjectView, Operator, true, "Changes a project's description, phase or settings.";
    ProjectList => "project.list", ProjectListResult, Reader, false, "Lists the projects.";
    ProjectShow => "project.show", ProjectDetail, Agent, false, "Shows a project with its agents.";
    ProjectRemove => "project.remove", Done, Operator, true, "Removes a project whose agents have ended.";
    ProjectPause => "project.pause", PauseResult, Agent, true, "Pauses a project: quiesce, freeze, flash save, checkpoint, one commit.";
    ProjectResume => "project.resume", ResumeResult, Operator, true, "Resumes a project: thaw, or start again.";
    AgentRun => "agent.run", AgentView, Operator, true, "Starts an agent.";
    AgentList => "agent.list", AgentListResult, Reader, false, "Lists the agents.";
    AgentShow => "agent.show", AgentDetail, Operator, false, "Shows how an agent is started, and compares its environment with a given one.";
    AgentStop => "agent.stop", AgentListResult, Operator, true, "Stops agents: SIGTERM, grace, SIGKILL to the whole tree.";
    AgentKill => "agent.kill", AgentListResult, Operator, true, "Kills agents' whole trees, or sends a signal to their main process.";
    AgentRestart => "agent.restart", AgentView, Operator, true, "Stops an agent and starts it again.";
    AgentRemove => "agent.remove", Done, Operator, true, "Removes an agent that has ended.";
    AgentWait => "agent.wait", AgentView, Reader, false, "Waits until an agent has ended.";
    AgentLogs => "agent.logs", AgentLogsResult, Operator, false, "Reads an agent's output.";
    AgentAttach => "agent.attach", AgentAttachResult, Operator, false, "Shows an agent's terminal on this connection, and lets one connection type into it.";
    AgentInput => "agent.input", TypedResult, Operator, false, "Types into the terminal of an attachment.";
    AgentResize => "agent.resize", Done, Operator, false, "Gives the terminal of an attachment another size.";
    AgentDetach => "agent.detach", Done, Operator, false, "Ends an attachment; the agent goes on.";
    AgentSend => "agent.send", TypedResult, Operator, true, "Types into an agent's terminal without attaching to it.";
    AgentListen => "agent.listen", Done, Agent, false, "Makes this connection the agent's channel for pause requests.";
    AgentAck => "agent.ack", Done, Agent, true, "Acknowledges a pause request.";
    AgentProgress => "agent.progress", Done, Agent, true, "Reports progress.";
    AgentReady => "agent.ready", Done, Agent, true, "Reports that the agent is ready for those that depend on it.";
    AgentResume => "agent.resume", AgentView, Operator, true, "Brings back an agent that timed out, was interrupted, failed or was stopped: by its resume command, with the last checkpoint's context.";
    AgentUsage => "agent.usage", Done, Agent, true, "Reports tokens and cost.";
    StatePut => "state.put", Done, Agent, true, "Saves the agent's own state blob.";
    StateGet => "state.get", StateGetResult, Agent, false, "Returns the agent's own state blob.";
    TaskPut => "task.put", TaskView, Agent, true, "Creates or changes a task.";
    TaskList => "task.list", TaskListResult, Agent, false, "Lists the tasks of a project.";
    QuestionAsk => "question.ask", QuestionView, Agent, true, "Asks a person.";
    QuestionWait => "question.wait", QuestionView, Agent, false, "Waits for an answer.";
    QuestionList => "question.list", QuestionListResult, Reader, false, "Lists questions.";
    QuestionAnswer => "question.answer", QuestionView, Operator, true, "Answers a question.";
    ContextPut => "context.put", ContextPutResult, Agent, true, "Adds context items.";
    ContextList => "context.list", ContextListResult, Agent, false, "Lists context items.";
    ContextShow => "context.show", ContextItem, Agent, true, "Shows a context item whole and counts the access.";
    ContextPin => "context.pin", Done, Agent, true, "Pins or unpins a context item.";
    ContextSearch => "context.search", ContextListResult, Agent, false, "Searches the context, archived items included.";
    ContextRecall => "context.recall", Done, Agent, true, "Brings archived context items back.";
    ContextFlashSave => "context.flash_save", FlashSaveResult, Agent, true, "Re-scores, re-tiers and archives the cold items.";
    CheckpointCreate => "checkpoint.create", CheckpointCreateResult, Agent, true, "Makes a checkpoint.";
    CheckpointList => "checkpoint.list", CheckpointListResult, Reader, false, "Lists checkpoints.";
    CheckpointShow => "checkpoint.show", CheckpointDetail, Reader, false, "Shows a checkpoint with its parts and what it left out.";
    CheckpointDiff => "checkpoint.diff", CheckpointDiffResult, Operator, false, "Compares a checkpoint with another or with the workspace.";
    CheckpointRestore => "checkpoint.restore", CheckpointRestoreResult, Operator, true, "Restores a checkpoint after taking a safety checkpoint.";
    CheckpointVerify => "checkpoint.verify", CheckpointVerifyResult, Operator, false, "Rehashes every part of checkpoints.";
    CheckpointRemove => "checkpoint.remove", CheckpointRemoveResult, Operator, true, "Removes checkpoints.";
    CheckpointPrune => "checkpoint.prune", CheckpointRemoveResult, Operator, true, "Removes the checkpoints that the retention, or given bounds, no longer keep.";
    CheckpointPin => "checkpoint.pin", CheckpointView, Operator, true, "Pins or unpins a checkpoint.";
    CheckpointExport => "checkpoint.export", CheckpointExportResult, Operator, false, "Makes one file of a checkpoint, to be read with checkpoint.download.";
    CheckpointDownload => "checkpoint.download", CheckpointDownloadResult, Operator, false, "Reads a piece of the file that checkpoint.export has made on this connection.";
    CheckpointUpload => "checkpoint.upload", CheckpointUploadResult, Operator, false, "Sends a piece of a file for checkpoint.import on this connection.";
    CheckpointImport => "checkpoint.import", CheckpointCreateResult, Operator, true, "Makes a checkpoint of the file that was sent with checkpoint.upload.";
    CheckpointConsolidate => "checkpoint.consolidate", CheckpointConsolidateResult, Operator, true, "Writes many packs of a project's history as one.";
    OperationList => "operation.list", OperationListResult, Reader, false, "Lists operations.";
    OperationShow => "operation.show", OperationView, Reader, false, "Shows an operation.";
    OperationCancel => "operation.cancel", OperationView, Operator, true, "Cancels an operation and undoes it.";
    EventsSubscribe => "events.subscribe", EventsSubscribeResult, Reader, false, "Sends events from a cursor on, without gap.";
    EventsUnsubscribe => "events.unsubscribe", Done, Reader, false, "Ends a subscription.";
    EventsList => "events.list", EventsListResult, Reader, false, "Lists events from a cursor on.";
    PluginList => "plugin.list", PluginListResult, Reader, false, "Lists plugins.";
    PluginReload => "plugin.reload", PluginListResult, Admin, true, "Picks up new, changed and removed plugins.";
    PluginEnable => "plugin.enable", PluginListResult, Admin, true, "Switches a plugin on or off.";
    PluginCheck => "plugin.check", PluginCheckResult, Admin, false, "Loads a shared object in a host of its own and describes it.";
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
