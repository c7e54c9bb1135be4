//! What `up` and `down` share: the file that counts, the agents that are meant, and the rows that
//! say what was done.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use fermata_protocol::agent::{AgentStatus, AgentStop, AgentView};
use fermata_protocol::project::{ProjectDetail, ProjectShow};
use fermata_protocol::{AgentName, Code, ProjectName, Target};
use serde::Serialize;

use super::run::canonical;
use crate::cli::workspace::DeclaredArgs;
use crate::declaration::{self, Declaration, DeclaredAgent, order, source_file};
use crate::errors::{Exit, Failure};
use crate::output::{Format, Paint, clean, note};
use crate::session::Session;

/// So many agents of one layer are stopped at a time.
const AT_A_TIME: usize = 8;

/// What was done, or would be done, about one agent or about the project.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// The project was made.
    Created,
    /// The project's settings or description were changed.
    Configured,
    /// It was started.
    Started,
    /// It was stopped and started as it is declared now.
    Recreated,
    /// It runs as it is declared, and was left alone.
    UpToDate,
    /// It has done its work, and was left alone.
    Completed,
    /// It runs, but not as it is declared, and was left alone.
    Changed,
    /// It runs and is not declared, and was left alone.
    Orphan,
    /// It was stopped.
    Stopped,
    /// It was not running.
    NotRunning,
    /// It was removed.
    Removed,
    /// It was not done.
    Failed,
}

impl Action {
    /// Says whether something is another than before.
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

/// One row of `up` and `down`.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The agent, or the project itself.
    pub target: Target,
    /// What was done.
    pub action: Action,
    /// Whether it only would be done.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
    /// What more there is to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// The agent's status.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<AgentStatus>,
    /// Its process id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
}

impl Row {
    /// Makes a row of what was done.
    pub fn new(target: Target, action: Action) -> Self {
        Self { target, action, dry_run: false, detail: None, status: None, pid: None }
    }

    /// Adds what more there is to say.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// Adds how the agent stands.
    #[must_use]
    pub fn agent(mut self, agent: &AgentView) -> Self {
        self.status = Some(agent.status);
        self.pid = agent.pid;
        self
    }

    /// Makes the row of something that was not done.
    pub fn failed(target: Target, failure: &Failure) -> Self {
        Self::new(target, Action::Failed).detail(sentence(failure))
    }
}

/// Returns what a failure says, without its hint.
pub fn sentence(failure: &Failure) -> String {
    match failure {
        Failure::Said(report) => report.message.clone(),
        Failure::ReaderGone => "nobody reads".into(),
    }
}

/// A refusal is about this agent alone; whoever cannot talk to the daemon at all gives up.
pub fn refused(target: Target, failure: Failure) -> Result<Row, Failure> {
    match &failure {
        Failure::Said(report) if report.exit != Exit::Unreachable && report.exit != Exit::TimedOut => {
            Ok(Row::failed(target, &failure))
        }
        _ => Err(failure),
    }
}

/// The rows of one command, shown to people as they come and to programs in the same order.
#[derive(Debug)]
pub struct Rows {
    width: usize,
    dry_run: bool,
    all: Vec<Row>,
}

impl Rows {
    /// Begins; the names of the targets decide how wide the first column is.
    pub fn begin(project: &ProjectName, names: &[AgentName], dry_run: bool) -> Self {
        let longest = names.iter().map(|name| name.as_str().len() + 1).max().unwrap_or(0);
        Self { width: project.as_str().len() + longest, dry_run, all: Vec::new() }
    }

    /// Shows a row at once.
    pub fn add(&mut self, session: &mut Session, mut row: Row) -> Result<(), Failure> {
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

    /// Says whether something failed.
    pub fn failed(&self) -> bool {
        self.all.iter().any(|row| row.action == Action::Failed)
    }

    /// Says whether something is, or would be, another than before.
    pub fn changed(&self) -> bool {
        self.all.iter().any(|row| row.action.changes())
    }

    /// Counts the rows of one kind.
    pub fn count(&self, action: Action) -> usize {
        self.all.iter().filter(|row| row.action == action).count()
    }
}

/// Finds the file and reads it; says which one it is, where that is not plain.
pub fn load(session: &Session, args: &DeclaredArgs) -> Result<Declaration, Failure> {
    let here = std::env::current_dir().map_err(|e| Failure::io("find the current directory", &e))?;
    // A home that is a link is met under its real name on the way up.
    let home = std::env::var_os("HOME").and_then(|home| std::path::PathBuf::from(home).canonicalize().ok());
    let source = source_file::find(args.file.as_deref(), &here, home.as_deref())?;
    if session.out.is_human() && args.file.is_none() && source.workspace != canonical(&here)? {
        note(&format!("using {}", source.file.display()));
    }
    declaration::read(&source)
}

/// Returns the project, `None` when there is none of that name yet.
pub fn project(session: &mut Session, declaration: &Declaration) -> Result<Option<ProjectDetail>, Failure> {
    let name = declaration.project.clone();
    let detail = match session.call(&ProjectShow { project: name.clone() }) {
        Ok(detail) => detail,
        Err(failure) if failure.is(Code::ProjectNotFound) => return Ok(None),
        Err(failure) => return Err(failure),
    };
    if std::path::Path::new(&detail.project.workspace) != declaration.workspace {
        return Err(Failure::new(
            Exit::Failed,
            Code::ProjectExists.as_str(),
            format!(
                "project '{name}' has the workspace {}, not {}",
                detail.project.workspace,
                declaration.workspace.display()
            ),
        )
        .hint(format!(
            "give the project of {} another name: [project] with name = \"…\"",
            declaration.file.display()
        )));
    }
    Ok(Some(detail))
}

/// Returns the agents that are meant: the named ones, all when none is named.
pub fn chosen(
    declaration: &Declaration,
    names: &[AgentName],
    with_dependencies: bool,
) -> Result<BTreeMap<AgentName, DeclaredAgent>, Failure> {
    if let Some(stranger) = names.iter().find(|name| !declaration.agents.contains_key(*name)) {
        let known: Vec<&str> = declaration.agents.keys().map(AgentName::as_str).collect();
        return Err(Failure::new(
            Exit::NotFound,
            Code::AgentNotFound.as_str(),
            format!("{} declares no agent '{stranger}'", declaration.file.display()),
        )
        .hint(format!("it declares: {}", known.join(", "))));
    }
    let meant: BTreeSet<AgentName> = if names.is_empty() {
        declaration.agents.keys().cloned().collect()
    } else if with_dependencies {
        order::with_dependencies(&declaration.agents, names)
    } else {
        names.iter().cloned().collect()
    };
    Ok(declaration
        .agents
        .iter()
        .filter(|(name, _)| meant.contains(*name))
        .map(|(n, a)| (n.clone(), a.clone()))
        .collect())
}

/// How a stop ended: the agent, `None` when it was not running.
pub type StopResult = Result<Option<AgentView>, Failure>;

/// Stops agents side by side and waits for their ends; the results are in the order of the names.
pub fn stop_all(session: &mut Session, project: &ProjectName, names: &[AgentName]) -> Vec<(AgentName, StopResult)> {
    if let [name] = names {
        return vec![(name.clone(), stop(session, project, name))];
    }
    let left = Mutex::new(names.iter().enumerate());
    let done = Mutex::new(Vec::new());
    let globals = &session.globals;
    std::thread::scope(|scope| {
        for _ in 0..names.len().min(AT_A_TIME) {
            scope.spawn(|| {
                let mut own = Session::new(globals.clone());
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

fn stop(session: &mut Session, project: &ProjectName, name: &AgentName) -> StopResult {
    let target = Target::agent(project.clone(), name.clone());
    match session.call(&AgentStop { target, grace_ms: None }) {
        Ok(list) => Ok(list.agents.into_iter().next()),
        Err(failure) if failure.is(Code::AgentNotRunning) || failure.is(Code::AgentNotFound) => Ok(None),
        Err(failure) => Err(failure),
    }
}
