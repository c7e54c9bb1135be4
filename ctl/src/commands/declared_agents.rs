//! What `up` and `down` share: reading the file, selecting agents, stopping them, and reporting actions.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use fermata_protocol::agent::{AgentStatus, AgentStop, AgentView};
use fermata_protocol::project::{ProjectDetail, ProjectShow};
use fermata_protocol::{AgentName, Code, ProjectName, Target};
use serde::Serialize;

use crate::cli::DeclaredArgs;
use crate::declaration::{self, Declaration, DeclaredAgent, order, source_file};
use crate::errors::{CommandError, Exit};
use crate::output::{Format, Paint, note};
use crate::paths::canonical;
use crate::session::DaemonSession;
use crate::terminal_text::clean;

/// How many agents are stopped concurrently.
const MAX_CONCURRENT_STOPS: usize = 8;

/// What was done, or would be done in a dry run, to an agent or the project.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// The project was created.
    Created,
    /// The configuration or description of the project was changed.
    Configured,
    Started,
    /// The agent was restarted because its declaration has changed.
    Recreated,
    /// The agent runs as declared.
    UpToDate,
    /// The agent has completed successfully.
    Completed,
    /// The agent runs with an outdated declaration and was left running.
    Changed,
    /// The agent is not declared and was left running.
    Orphan,
    Stopped,
    NotRunning,
    Removed,
    Failed,
}

impl Action {
    /// Says whether the action changes the project or an agent.
    pub fn changes(self) -> bool {
        match self {
            Self::Created | Self::Configured | Self::Started | Self::Recreated | Self::Stopped | Self::Removed => true,
            Self::UpToDate | Self::Completed | Self::Changed | Self::Orphan | Self::NotRunning | Self::Failed => false,
        }
    }

    fn words(self, dry_run: bool) -> (&'static str, Paint) {
        match (self, dry_run) {
            (Self::Created, false) => ("created", Paint::Good),
            (Self::Created, true) => ("would be created", Paint::Good),
            (Self::Configured, false) => ("configured", Paint::Good),
            (Self::Configured, true) => ("would be configured", Paint::Good),
            (Self::Started, false) => ("started", Paint::Good),
            (Self::Started, true) => ("would be started", Paint::Good),
            (Self::Recreated, false) => ("recreated", Paint::Good),
            (Self::Recreated, true) => ("would be recreated", Paint::Good),
            (Self::UpToDate, _) => ("up to date", Paint::Dim),
            (Self::Completed, _) => ("completed", Paint::Dim),
            (Self::Changed, _) => ("changed, left running", Paint::Attention),
            (Self::Orphan, _) => ("not declared, left running", Paint::Attention),
            (Self::Stopped, false) => ("stopped", Paint::Good),
            (Self::Stopped, true) => ("would be stopped", Paint::Good),
            (Self::NotRunning, _) => ("not running", Paint::Dim),
            (Self::Removed, _) => ("removed", Paint::Good),
            (Self::Failed, _) => ("failed", Paint::Bad),
        }
    }
}

/// One row of the output of `up` and `down`.
#[derive(Debug, Clone, Serialize)]
pub struct ActionRow {
    pub target: Target,
    pub action: Action,
    /// Set when the action was not carried out because of `--dry-run`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<AgentStatus>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
}

impl ActionRow {
    pub fn new(target: Target, action: Action) -> Self {
        Self { target, action, dry_run: false, detail: None, status: None, pid: None }
    }

    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// Adds the status and process id of the agent.
    #[must_use]
    pub fn agent(mut self, agent: &AgentView) -> Self {
        self.status = Some(agent.status);
        self.pid = agent.pid;
        self
    }

    pub fn failed(target: Target, error: &CommandError) -> Self {
        Self::new(target, Action::Failed).detail(message_of(error))
    }
}

/// Returns the message of an error without its hint.
fn message_of(error: &CommandError) -> String {
    match error {
        CommandError::Reported(report) => report.message.clone(),
        CommandError::OutputClosed => "stdout is closed".into(),
    }
}

/// Turns a refusal, which concerns this agent only, into a row; other errors end the command.
pub fn refusal_row(target: Target, error: CommandError) -> Result<ActionRow, CommandError> {
    match &error {
        CommandError::Reported(report) if report.exit != Exit::Unreachable && report.exit != Exit::TimedOut => {
            Ok(ActionRow::failed(target, &error))
        }
        CommandError::Reported(_) | CommandError::OutputClosed => Err(error),
    }
}

/// The rows of one command, written as they are added.
#[derive(Debug)]
pub struct ActionReport {
    width: usize,
    dry_run: bool,
    all: Vec<ActionRow>,
}

impl ActionReport {
    /// The width of the first column is that of the longest target.
    pub fn new(project: &ProjectName, names: &[AgentName], dry_run: bool) -> Self {
        let longest = names.iter().map(|name| name.as_str().len() + 1).max().unwrap_or(0);
        Self { width: project.as_str().len() + longest, dry_run, all: Vec::new() }
    }

    /// Adds a row and writes it.
    pub fn add(&mut self, session: &mut DaemonSession, mut row: ActionRow) -> Result<(), CommandError> {
        row.dry_run = self.dry_run && row.action.changes();
        let width = self.width;
        match session.out.format() {
            Format::Json => session.out.json(&row)?,
            Format::Ids if row.action.changes() => session.out.line(&row.target)?,
            Format::Ids => {}
            Format::Human => {
                let (words, paint) = row.action.words(row.dry_run);
                let words = paint.apply(words, session.out.color());
                let detail = row.detail.as_ref().map(|detail| format!(": {}", clean(detail))).unwrap_or_default();
                session.out.line(format_args!("{:<width$}  {words}{detail}", row.target.to_string()))?;
            }
        }
        session.out.flush()?;
        self.all.push(row);
        Ok(())
    }

    pub fn has_failures(&self) -> bool {
        self.all.iter().any(|row| row.action == Action::Failed)
    }

    /// Says whether an action changes something, or would without `--dry-run`.
    pub fn has_changes(&self) -> bool {
        self.all.iter().any(|row| row.action.changes())
    }

    pub fn count(&self, action: Action) -> usize {
        self.all.iter().filter(|row| row.action == action).count()
    }
}

/// Finds and reads the file; notes its path when it is not in the current directory.
pub fn load(session: &DaemonSession, args: &DeclaredArgs) -> Result<Declaration, CommandError> {
    let here = std::env::current_dir().map_err(|e| CommandError::io("find the current directory", &e))?;
    // Canonical, like the directories that it is compared with.
    let home = std::env::var_os("HOME").and_then(|home| std::path::PathBuf::from(home).canonicalize().ok());
    let source = source_file::find(args.file.as_deref(), &here, home.as_deref())?;
    if session.out.is_human() && args.file.is_none() && source.workspace != canonical(&here)? {
        note(&format!("using {}", source.file.display()));
    }
    declaration::read(&source)
}

/// Returns the declared project; `None` when it does not exist yet.
///
/// # Errors
/// When the project exists with another workspace.
pub fn project(session: &mut DaemonSession, declaration: &Declaration) -> Result<Option<ProjectDetail>, CommandError> {
    let name = declaration.project.clone();
    let detail = match session.call(&ProjectShow { project: name.clone() }) {
        Ok(detail) => detail,
        Err(error) if error.is(Code::ProjectNotFound) => return Ok(None),
        Err(error) => return Err(error),
    };
    if std::path::Path::new(&detail.project.workspace) != declaration.workspace {
        return Err(CommandError::new(
            Exit::Failed,
            Code::ProjectExists.as_str(),
            format!(
                "project '{name}' has the workspace {}, not {}",
                detail.project.workspace,
                declaration.workspace.display()
            ),
        )
        .hint(format!("set another project name in {}: [project] with name = \"…\"", declaration.file.display())));
    }
    Ok(Some(detail))
}

/// Returns the named agents, or all when none is named.
pub fn selected(
    declaration: &Declaration,
    names: &[AgentName],
    with_dependencies: bool,
) -> Result<BTreeMap<AgentName, DeclaredAgent>, CommandError> {
    if let Some(unknown) = names.iter().find(|name| !declaration.agents.contains_key(*name)) {
        let declared: Vec<&str> = declaration.agents.keys().map(AgentName::as_str).collect();
        return Err(CommandError::new(
            Exit::NotFound,
            Code::AgentNotFound.as_str(),
            format!("{} declares no agent '{unknown}'", declaration.file.display()),
        )
        .hint(format!("it declares: {}", declared.join(", "))));
    }
    let selected: BTreeSet<AgentName> = if names.is_empty() {
        declaration.agents.keys().cloned().collect()
    } else if with_dependencies {
        order::with_dependencies(&declaration.agents, names)
    } else {
        names.iter().cloned().collect()
    };
    Ok(declaration
        .agents
        .iter()
        .filter(|(name, _)| selected.contains(*name))
        .map(|(n, a)| (n.clone(), a.clone()))
        .collect())
}

/// The stopped agent; `None` when it was not running.
pub type StopResult = Result<Option<AgentView>, CommandError>;

/// Stops agents concurrently and waits until they have ended; the results are in the order of the names.
pub fn stop_all(
    session: &mut DaemonSession,
    project: &ProjectName,
    names: &[AgentName],
) -> Vec<(AgentName, StopResult)> {
    if let [name] = names {
        return vec![(name.clone(), stop(session, project, name))];
    }
    let left = Mutex::new(names.iter().enumerate());
    let done = Mutex::new(Vec::new());
    let globals = &session.globals;
    std::thread::scope(|scope| {
        for _ in 0..names.len().min(MAX_CONCURRENT_STOPS) {
            scope.spawn(|| {
                let mut own = DaemonSession::new(globals.clone());
                loop {
                    let next = left.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
                    let Some((i, name)) = next else { break };
                    let result = stop(&mut own, project, name);
                    done.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((i, name.clone(), result));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    done.sort_by_key(|(i, _, _)| *i);
    done.into_iter().map(|(_, name, result)| (name, result)).collect()
}

fn stop(session: &mut DaemonSession, project: &ProjectName, name: &AgentName) -> StopResult {
    let target = Target::agent(project.clone(), name.clone());
    match session.call(&AgentStop { target, grace_ms: None }) {
        Ok(list) => Ok(list.agents.into_iter().next()),
        Err(error) if error.is(Code::AgentNotRunning) || error.is(Code::AgentNotFound) => Ok(None),
        Err(error) => Err(error),
    }
}
