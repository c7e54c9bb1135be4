//! `up`: starts the agents that a `fermata.toml` declares. Agents that run as declared are left alone.

use std::collections::BTreeMap;

use fermata_protocol::agent::{AgentDetail, AgentShow};
use fermata_protocol::agent::{AgentRun, AgentStatus, AgentView, AgentWait};
use fermata_protocol::project::{ProjectCreate, ProjectDetail, ProjectSet, ProjectStatus};
use fermata_protocol::supervision::Declared;
use fermata_protocol::supervision::Supervision;
use fermata_protocol::{AgentName, Code, ProjectName, Target};

use super::declared_agents::{self, Action, ActionReport, ActionRow, refusal_row, selected, stop_all};
use super::readiness;
use super::run::{own_limits, own_umask};
use super::status::agent_state;
use crate::agent_environment::inherited;
use crate::cli::UpArgs;
use crate::declaration::{Declaration, DeclaredAgent, order};
use crate::errors::{CommandError, CommandResult, Exit};
use crate::output::note;
use crate::paths::to_utf8;
use crate::session::DaemonSession;

pub fn up(session: &mut DaemonSession, args: &UpArgs) -> CommandResult {
    let declaration = declared_agents::load(session, &args.declared)?;
    let agents = selected(&declaration, &args.declared.agents, true)?;
    let existing = declared_agents::project(session, &declaration)?;
    refuse_while_paused(existing.as_ref())?;
    let names: Vec<AgentName> = order::layers(&agents).into_iter().flatten().collect();
    let all_names: Vec<AgentName> =
        names.iter().cloned().chain(existing.iter().flat_map(|k| &k.agents).map(|a| a.name.clone())).collect();
    let mut report = ActionReport::new(&declaration.project, &all_names, args.dry_run);
    apply_project(session, &declaration, existing.as_ref(), &mut report, args.dry_run)?;
    let caller_env = inherited(std::env::vars_os());
    for name in &names {
        let Some(agent) = agents.get(name) else { continue };
        let mut agent_up = AgentUp { session, declaration: &declaration, name, agent, caller_env: &caller_env };
        let current = match &existing {
            Some(_) => agent_up.show()?,
            None => None,
        };
        let row = agent_up.bring_up(current.as_ref(), args)?;
        report.add(session, row)?;
    }
    if args.declared.agents.is_empty() {
        handle_orphans(session, &declaration, existing.as_ref(), args, &mut report)?;
    }
    let ready = !args.wait || readiness::wait(session, &declaration.project, &names)?;
    if session.out.is_human() {
        note(&summary(&declaration, &report, args, ready));
    }
    Ok(u8::from(report.has_failures() || !ready))
}

/// A project that is paused, or in transition, must not get new agents.
fn refuse_while_paused(project: Option<&ProjectDetail>) -> Result<(), CommandError> {
    let Some(ProjectDetail { project, .. }) = project else { return Ok(()) };
    let name = &project.name;
    let (code, state) = match project.status {
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
    let error =
        CommandError::new(Exit::Failed, code.as_str(), format!("project '{name}' {state}; nothing was changed"));
    Err(error.hint(if project.status == ProjectStatus::Paused {
        format!("fermatactl resume {name} && fermatactl up")
    } else {
        format!("wait until it is done: fermatactl status {name}")
    }))
}

/// Creates the project, or applies the settings of the file to it.
fn apply_project(
    session: &mut DaemonSession,
    declaration: &Declaration,
    existing: Option<&ProjectDetail>,
    report: &mut ActionReport,
    dry_run: bool,
) -> Result<(), CommandError> {
    let name = declaration.project.clone();
    let target = Target::project(name.clone());
    let Some(existing) = existing else {
        if !dry_run {
            session.call(&ProjectCreate {
                name,
                workspace: to_utf8(&declaration.workspace)?,
                description: declaration.description.clone().unwrap_or_default(),
                source: None,
                config: declaration.config.clone(),
            })?;
        }
        let row = ActionRow::new(target, Action::Created).detail(declaration.workspace.to_string_lossy());
        return report.add(session, row);
    };
    // Settings that the file does not mention are kept.
    let description =
        declaration.description.clone().filter(|description| *description != existing.project.description);
    let config = declaration.config.clone().filter(|config| *config != existing.config);
    let changed: Vec<&str> = [description.as_ref().map(|_| "description"), config.as_ref().map(|_| "config")]
        .into_iter()
        .flatten()
        .collect();
    if changed.is_empty() {
        return Ok(());
    }
    let row = ActionRow::new(target, Action::Configured).detail(changed.join(", "));
    if !dry_run {
        session.call(&ProjectSet { project: name, description, phase: None, config })?;
    }
    report.add(session, row)
}

/// Brings up one agent.
struct AgentUp<'a> {
    session: &'a mut DaemonSession,
    declaration: &'a Declaration,
    name: &'a AgentName,
    agent: &'a DeclaredAgent,
    caller_env: &'a BTreeMap<String, String>,
}

impl AgentUp<'_> {
    fn target(&self) -> Target {
        Target::agent(self.declaration.project.clone(), self.name.clone())
    }

    /// Returns the current agent; `None` when it does not exist.
    fn show(&mut self) -> Result<Option<AgentDetail>, CommandError> {
        let params = AgentShow { target: self.target(), env: self.agent.env.set.clone() };
        match self.session.call(&params) {
            Ok(detail) => Ok(Some(detail)),
            Err(error) if error.is(Code::AgentNotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Starts, restarts or leaves the agent. A refusal of the daemon becomes a row, a lost connection an error.
    fn bring_up(&mut self, current: Option<&AgentDetail>, args: &UpArgs) -> Result<ActionRow, CommandError> {
        let Some(current) = current else { return self.start(Action::Started, args) };
        let changes = differences(self.agent, current);
        let view = &current.agent;
        if current.completed && changes.is_empty() {
            return Ok(ActionRow::new(self.target(), Action::Completed).agent(view));
        }
        if view.status.is_terminal() {
            return self.start(Action::Started, args);
        }
        if view.status == AgentStatus::Stopping {
            if !args.dry_run {
                self.session.call_across_restarts(&AgentWait { target: self.target(), timeout_ms: None })?;
            }
            return self.start(Action::Started, args);
        }
        if changes.is_empty() {
            return Ok(ActionRow::new(self.target(), Action::UpToDate).agent(view).detail(agent_state(view)));
        }
        let changes = changes.join(", ");
        if !args.recreate {
            return Ok(ActionRow::new(self.target(), Action::Changed).agent(view).detail(changes));
        }
        if !args.dry_run {
            for (_, result) in stop_all(self.session, &self.declaration.project, std::slice::from_ref(self.name)) {
                if let Err(error) = result {
                    return refusal_row(self.target(), error);
                }
            }
        }
        let row = self.start(Action::Recreated, args)?;
        Ok(if row.action == Action::Recreated { row.detail(changes) } else { row })
    }

    fn start(&mut self, action: Action, args: &UpArgs) -> Result<ActionRow, CommandError> {
        let target = self.target();
        if args.dry_run {
            let on: Vec<&str> = self.agent.supervision.depends_on.iter().map(|d| d.agent.as_str()).collect();
            let row = ActionRow::new(target, action);
            return Ok(if on.is_empty() { row } else { row.detail(format!("after {}", on.join(", "))) });
        }
        let (env, missing) = self.agent.env.resolve(self.caller_env);
        if !missing.is_empty() {
            note(&format!("warning: {target} is started without {}: not set in this environment", missing.join(", ")));
        }
        let declared = Declared { file: to_utf8(&self.declaration.file)?, sha256: self.agent.digest() };
        let params = AgentRun {
            project: self.declaration.project.clone(),
            workspace: Some(to_utf8(&self.declaration.workspace)?),
            name: Some(self.name.clone()),
            argv: self.agent.argv.clone(),
            env,
            cwd: Some(to_utf8(&self.agent.cwd)?),
            umask: Some(own_umask()),
            limits: own_limits(),
            resume_argv: self.agent.resume_argv.clone(),
            profile: self.agent.profile.clone(),
            stop_grace_ms: self.agent.stop_grace_ms,
            supervision: Box::new(Supervision { declared: Some(declared), ..self.agent.supervision.clone() }),
        };
        match self.session.call(&params) {
            Ok(view) => Ok(ActionRow::new(target, action).agent(&view).detail(agent_state(&view))),
            Err(error) => refusal_row(target, error),
        }
    }
}

/// Lists the keys in which a declaration differs from what the agent was started with.
fn differences(wanted: &DeclaredAgent, current: &AgentDetail) -> Vec<String> {
    let (spec, has) = (&current.spec, &*current.spec.supervision);
    let wanted_supervision = &wanted.supervision;
    let Some(declared) = &has.declared else {
        return vec!["it was not started from this file".into()];
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
            ("restart", wanted_supervision.restart != has.restart),
            ("recover", wanted_supervision.recover != has.recover),
            ("depends_on", wanted_supervision.depends_on != has.depends_on),
            ("ready", wanted_supervision.ready != has.ready),
            ("timeout", wanted_supervision.timeout_ms != has.timeout_ms),
            ("stale_after", wanted_supervision.stale_after_ms != has.stale_after_ms),
            ("on_stale", wanted_supervision.on_stale != has.on_stale),
            ("pre_start", wanted_supervision.pre_start != has.pre_start),
            ("post_stop", wanted_supervision.post_stop != has.post_stop),
            ("tty", wanted_supervision.terminal != has.terminal),
            ("memory_max", wanted_supervision.resources.memory_max_bytes != has.resources.memory_max_bytes),
            ("cpus", wanted_supervision.resources.cpu_max_percent != has.resources.cpu_max_percent),
            ("pids_max", wanted_supervision.resources.pids_max != has.resources.pids_max),
            ("output", wanted_supervision.output != has.output),
        ];
        names.extend(all.iter().filter(|(_, differs)| *differs).map(|(name, _)| (*name).to_owned()));
        if names.is_empty() && current.env_differs.is_empty() {
            // The digest also covers variables and keys whose values the daemon does not return.
            names.push("a key or variable was added or removed".into());
        }
    }
    names.extend(current.env_differs.iter().map(|name| format!("env.{name}")));
    names
}

/// Reports the running agents that are not declared, or stops them with `--remove-orphans`.
fn handle_orphans(
    session: &mut DaemonSession,
    declaration: &Declaration,
    existing: Option<&ProjectDetail>,
    args: &UpArgs,
    report: &mut ActionReport,
) -> Result<(), CommandError> {
    let running: Vec<&AgentView> = existing
        .iter()
        .flat_map(|existing| &existing.agents)
        .filter(|agent| !agent.status.is_terminal() && !declaration.agents.contains_key(&agent.name))
        .collect();
    let project: &ProjectName = &declaration.project;
    if args.remove_orphans && !args.dry_run {
        let names: Vec<AgentName> = running.iter().map(|agent| agent.name.clone()).collect();
        for (name, result) in stop_all(session, project, &names) {
            let target = Target::agent(project.clone(), name);
            let row = match result {
                Ok(_) => ActionRow::new(target, Action::Stopped).detail("not declared"),
                Err(error) => refusal_row(target, error)?,
            };
            report.add(session, row)?;
        }
        return Ok(());
    }
    for agent in running {
        let action = if args.remove_orphans { Action::Stopped } else { Action::Orphan };
        report.add(session, ActionRow::new(Target::agent(project.clone(), agent.name.clone()), action).agent(agent))?;
    }
    Ok(())
}

fn summary(declaration: &Declaration, report: &ActionReport, args: &UpArgs, ready: bool) -> String {
    let project = &declaration.project;
    let mut hints = Vec::new();
    if report.count(Action::Changed) > 0 {
        hints.push("restart changed agents with: fermatactl up --recreate");
    }
    if report.count(Action::Orphan) > 0 {
        hints.push("stop undeclared agents with: fermatactl up --remove-orphans");
    }
    let failed = report.count(Action::Failed);
    let first = if failed > 0 {
        format!("{project}: {failed} failed")
    } else if !ready {
        format!("{project}: not all agents are ready; see: fermatactl logs {project}/AGENT")
    } else if report.has_changes() {
        let done = if args.dry_run { "nothing was changed" } else { "done" };
        format!("{project}: {done}")
    } else if declaration.agents.is_empty() {
        format!("{project}: up to date; {} declares no agents", declaration.file.display())
    } else if report.count(Action::Changed) > 0 {
        format!("{project}: nothing was changed")
    } else {
        format!("{project}: up to date")
    };
    hints.insert(0, &first);
    hints.join("; ")
}
