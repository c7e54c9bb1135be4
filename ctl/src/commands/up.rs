//! `up`: brings a project to what its `fermata.toml` declares. What runs as declared is left alone.

use std::collections::BTreeMap;

use fermata_protocol::agent::{AgentDetail, AgentShow};
use fermata_protocol::agent::{AgentRun, AgentStatus, AgentView, AgentWait};
use fermata_protocol::project::{ProjectCreate, ProjectDetail, ProjectSet, ProjectStatus};
use fermata_protocol::supervision::Declared;
use fermata_protocol::supervision::Supervision;
use fermata_protocol::{AgentName, Code, ProjectName, Target};

use super::Ended;
use super::declared_agents::{self as declared, Action, Row, Rows, chosen, refused, stop_all};
use super::run::{own_limits, own_umask, text};
use crate::cli::workspace::UpArgs;
use crate::declaration::{Declaration, DeclaredAgent, environment, order};
use crate::errors::{Exit, Failure};
use crate::output::note;
use crate::session::Session;

/// Runs `up`.
pub fn up(session: &mut Session, args: &UpArgs) -> Ended {
    let declaration = declared::load(session, &args.declared)?;
    let agents = chosen(&declaration, &args.declared.agents, true)?;
    let known = declared::project(session, &declaration)?;
    refuse_while_held(known.as_ref())?;
    let names: Vec<AgentName> = order::layers(&agents).into_iter().flatten().collect();
    let all_names: Vec<AgentName> =
        names.iter().cloned().chain(known.iter().flat_map(|k| &k.agents).map(|a| a.name.clone())).collect();
    let mut rows = Rows::begin(&declaration.project, &all_names, args.dry_run);
    settle_project(session, &declaration, known.as_ref(), &mut rows, args.dry_run)?;
    let callers = environment::callers(std::env::vars_os());
    for name in &names {
        let Some(agent) = agents.get(name) else { continue };
        let mut one = One { session, declaration: &declaration, name, agent, callers: &callers };
        let stands = match &known {
            Some(_) => one.look()?,
            None => None,
        };
        let row = one.bring_up(stands.as_ref(), args)?;
        rows.add(session, row)?;
    }
    if args.declared.agents.is_empty() {
        orphans(session, &declaration, known.as_ref(), args, &mut rows)?;
    }
    let ready = !args.wait || super::readiness::wait(session, &declaration.project, &names)?;
    if session.out.is_human() {
        note(&summary(&declaration, &rows, args, ready));
    }
    Ok(u8::from(rows.failed() || !ready))
}

/// Starting something in a project that is held would undo what the person who holds it wants.
fn refuse_while_held(project: Option<&ProjectDetail>) -> Result<(), Failure> {
    let Some(ProjectDetail { project, .. }) = project else { return Ok(()) };
    let name = &project.name;
    let (code, what) = match project.status {
        ProjectStatus::Paused => (Code::ProjectPaused, "is paused"),
        ProjectStatus::Pausing => (Code::PauseInProgress, "is being paused"),
        ProjectStatus::Resuming => (Code::ResumeInProgress, "is being resumed"),
        ProjectStatus::Restoring => (Code::RestoreInProgress, "is being restored"),
        ProjectStatus::Init
        | ProjectStatus::Planning
        | ProjectStatus::Active
        | ProjectStatus::Stopped
        | ProjectStatus::Completed
        | ProjectStatus::Failed => return Ok(()),
    };
    let failure = Failure::new(Exit::Failed, code.as_str(), format!("project '{name}' {what}; nothing was changed"));
    Err(match project.status {
        ProjectStatus::Paused => failure.hint(format!("fermatactl resume {name}, then again: fermatactl up")),
        _ => failure.hint(format!("wait until that is done: fermatactl status {name}")),
    })
}

/// Creates the project, or gives it the settings of the file.
fn settle_project(
    session: &mut Session,
    declaration: &Declaration,
    known: Option<&ProjectDetail>,
    rows: &mut Rows,
    dry_run: bool,
) -> Result<(), Failure> {
    let name = declaration.project.clone();
    let target = Target::project(name.clone());
    let Some(known) = known else {
        if !dry_run {
            session.call(&ProjectCreate {
                name,
                workspace: text(&declaration.workspace)?,
                description: declaration.description.clone().unwrap_or_default(),
                source: None,
                config: declaration.config.clone(),
            })?;
        }
        let row = Row::new(target, Action::Created).detail(declaration.workspace.to_string_lossy());
        return rows.add(session, row);
    };
    // What the file does not speak of stays as a person has set it.
    let description = declaration.description.clone().filter(|description| *description != known.project.description);
    let config = declaration.config.clone().filter(|config| *config != known.config);
    let what: Vec<&str> = [description.as_ref().map(|_| "description"), config.as_ref().map(|_| "config")]
        .into_iter()
        .flatten()
        .collect();
    if what.is_empty() {
        return Ok(());
    }
    let row = Row::new(target, Action::Configured).detail(what.join(", "));
    if !dry_run {
        session.call(&ProjectSet { project: name, description, phase: None, config })?;
    }
    rows.add(session, row)
}

/// One agent that is being brought up.
struct One<'a> {
    session: &'a mut Session,
    declaration: &'a Declaration,
    name: &'a AgentName,
    agent: &'a DeclaredAgent,
    callers: &'a BTreeMap<String, String>,
}

impl One<'_> {
    fn target(&self) -> Target {
        Target::agent(self.declaration.project.clone(), self.name.clone())
    }

    /// Asks how the agent stands, `None` when there is none.
    fn look(&mut self) -> Result<Option<AgentDetail>, Failure> {
        let params = AgentShow { target: self.target(), env: self.agent.env.set.clone() };
        match self.session.call(&params) {
            Ok(detail) => Ok(Some(detail)),
            Err(failure) if failure.is(Code::AgentNotFound) => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// Does what is to be done; what the daemon refuses becomes a row, what breaks the conversation
    /// with it an error.
    fn bring_up(&mut self, stands: Option<&AgentDetail>, args: &UpArgs) -> Result<Row, Failure> {
        let Some(stands) = stands else { return self.start(Action::Started, args) };
        let changes = differences(self.agent, stands);
        let view = &stands.agent;
        if stands.completed && changes.is_empty() {
            return Ok(Row::new(self.target(), Action::Completed).agent(view));
        }
        if view.status.is_terminal() {
            return self.start(Action::Started, args);
        }
        if view.status == AgentStatus::Stopping {
            if !args.dry_run {
                self.session.call_lasting(&AgentWait { target: self.target(), timeout_ms: None })?;
            }
            return self.start(Action::Started, args);
        }
        if changes.is_empty() {
            return Ok(Row::new(self.target(), Action::UpToDate).agent(view).detail(standing(view)));
        }
        let what = changes.join(", ");
        if !args.recreate {
            return Ok(Row::new(self.target(), Action::Changed).agent(view).detail(what));
        }
        if !args.dry_run {
            for (_, result) in stop_all(self.session, &self.declaration.project, std::slice::from_ref(self.name)) {
                if let Err(failure) = result {
                    return refused(self.target(), failure);
                }
            }
        }
        let row = self.start(Action::Recreated, args)?;
        Ok(if row.action == Action::Recreated { row.detail(what) } else { row })
    }

    fn start(&mut self, action: Action, args: &UpArgs) -> Result<Row, Failure> {
        let target = self.target();
        if args.dry_run {
            let on: Vec<&str> = self.agent.supervision.depends_on.iter().map(|d| d.agent.as_str()).collect();
            let row = Row::new(target, action);
            return Ok(if on.is_empty() { row } else { row.detail(format!("after {}", on.join(", "))) });
        }
        let (env, missing) = self.agent.env.over(self.callers);
        if !missing.is_empty() {
            note(&format!("warning: {target} does not get {}: not set here", missing.join(", ")));
        }
        let declared = Declared { file: text(&self.declaration.file)?, sha256: self.agent.digest() };
        let params = AgentRun {
            project: self.declaration.project.clone(),
            workspace: Some(text(&self.declaration.workspace)?),
            name: Some(self.name.clone()),
            argv: self.agent.argv.clone(),
            env,
            cwd: Some(text(&self.agent.cwd)?),
            umask: Some(own_umask()),
            limits: own_limits(),
            resume_argv: self.agent.resume_argv.clone(),
            profile: self.agent.profile.clone(),
            stop_grace_ms: self.agent.stop_grace_ms,
            supervision: Box::new(Supervision { declared: Some(declared), ..self.agent.supervision.clone() }),
        };
        match self.session.call(&params) {
            Ok(view) => Ok(Row::new(target, action).agent(&view).detail(standing(&view))),
            Err(failure) => refused(target, failure),
        }
    }
}

/// Says how an agent stands, in a few words.
pub fn standing(agent: &AgentView) -> String {
    let status = match agent.exit {
        Some(exit) if agent.status.is_terminal() => format!("{} ({exit})", agent.status),
        _ => agent.status.to_string(),
    };
    match (&agent.detail, agent.pid) {
        (Some(detail), _) => format!("{status}, {detail}"),
        (None, Some(pid)) if !agent.status.is_terminal() => format!("{status}, pid {pid}"),
        (None, _) => status,
    }
}

/// Names what of a declaration is another than what the agent was started with.
fn differences(wanted: &DeclaredAgent, stands: &AgentDetail) -> Vec<String> {
    let (spec, has) = (&stands.spec, &*stands.spec.supervision);
    let wants = &wanted.supervision;
    let Some(declared) = &has.declared else {
        return vec!["it was started by hand, not from this file".into()];
    };
    let mut names: Vec<String> = Vec::new();
    if declared.sha256 != wanted.digest() {
        let cwd_differs = wanted.cwd.to_str() != Some(&spec.cwd);
        let grace_differs = wanted.stop_grace_ms.is_some_and(|grace| grace != spec.stop_grace_ms);
        let profile_differs = wanted.profile.is_some() && wanted.profile != spec.profile;
        let all = [
            ("command", wanted.argv != spec.argv),
            ("cwd", cwd_differs),
            ("resume_command", wanted.resume_argv != spec.resume_argv),
            ("profile", profile_differs),
            ("stop_grace", grace_differs),
            ("restart", wants.restart != has.restart),
            ("recover", wants.recover != has.recover),
            ("depends_on", wants.depends_on != has.depends_on),
            ("ready", wants.ready != has.ready),
            ("timeout", wants.timeout_ms != has.timeout_ms),
            ("stale_after", wants.stale_after_ms != has.stale_after_ms),
            ("on_stale", wants.on_stale != has.on_stale),
            ("pre_start", wants.pre_start != has.pre_start),
            ("post_stop", wants.post_stop != has.post_stop),
            ("tty", wants.terminal != has.terminal),
            ("memory_max", wants.resources.memory_max_bytes != has.resources.memory_max_bytes),
            ("cpus", wants.resources.cpu_max_percent != has.resources.cpu_max_percent),
            ("pids_max", wants.resources.pids_max != has.resources.pids_max),
            ("output", wants.output != has.output),
        ];
        names.extend(all.iter().filter(|(_, differs)| *differs).map(|(name, _)| (*name).to_owned()));
        if names.is_empty() && stands.env_differs.is_empty() {
            // A variable, or a key that is left out now, of which the daemon knows only what came of it.
            names.push("a key or variable was added or taken out".into());
        }
    }
    names.extend(stands.env_differs.iter().map(|name| format!("env.{name}")));
    names
}

/// Names the agents that run and are not declared, or stops them.
fn orphans(
    session: &mut Session,
    declaration: &Declaration,
    known: Option<&ProjectDetail>,
    args: &UpArgs,
    rows: &mut Rows,
) -> Result<(), Failure> {
    let running: Vec<&AgentView> = known
        .iter()
        .flat_map(|known| &known.agents)
        .filter(|agent| !agent.status.is_terminal() && !declaration.agents.contains_key(&agent.name))
        .collect();
    let project: &ProjectName = &declaration.project;
    if args.remove_orphans && !args.dry_run {
        let names: Vec<AgentName> = running.iter().map(|agent| agent.name.clone()).collect();
        for (name, result) in stop_all(session, project, &names) {
            let target = Target::agent(project.clone(), name);
            let row = match result {
                Ok(_) => Row::new(target, Action::Stopped).detail("not declared"),
                Err(failure) => refused(target, failure)?,
            };
            rows.add(session, row)?;
        }
        return Ok(());
    }
    for agent in running {
        let action = if args.remove_orphans { Action::Stopped } else { Action::Orphan };
        rows.add(session, Row::new(Target::agent(project.clone(), agent.name.clone()), action).agent(agent))?;
    }
    Ok(())
}

fn summary(declaration: &Declaration, rows: &Rows, args: &UpArgs, ready: bool) -> String {
    let project = &declaration.project;
    let mut hints = Vec::new();
    if rows.count(Action::Changed) > 0 {
        hints.push("what has changed is started anew by: fermatactl up --recreate");
    }
    if rows.count(Action::Orphan) > 0 {
        hints.push("what is not declared is stopped by: fermatactl up --remove-orphans");
    }
    let failed = rows.count(Action::Failed);
    let first = if failed > 0 {
        format!("{project}: {failed} failed")
    } else if !ready {
        format!("{project}: not all are ready; see fermatactl logs {project}/AGENT")
    } else if rows.changed() {
        let done = if args.dry_run { "nothing was changed" } else { "done" };
        format!("{project}: {done}")
    } else if declaration.agents.is_empty() {
        format!("{project}: up to date; {} declares no agents", declaration.file.display())
    } else if rows.count(Action::Changed) > 0 {
        format!("{project}: nothing was changed")
    } else {
        format!("{project}: up to date")
    };
    hints.insert(0, &first);
    hints.join("; ")
}
