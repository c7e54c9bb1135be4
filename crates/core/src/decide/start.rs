//! Starts of agents: the check of their settings, and starting at once or after their dependencies.

use fermata_protocol::agent::{AgentSpec, StartCause};
use fermata_protocol::event::Event;
use fermata_protocol::{AgentName, Code, Refusal, UnixMillis};

use super::checks::{agent, refuse_unless_startable};
use crate::command::{Decision, NewRun, PreparedStart};
use crate::deadlines::{DueAction, due_actions};
use crate::dependency::{cycle, waits_for};
use crate::effect::Effect;
use crate::project::Project;

/// Refuses settings that can never work.
pub(super) fn check(project: &Project, name: &AgentName, spec: &AgentSpec) -> Result<(), Refusal> {
    let invalid = |message: String| Refusal::new(Code::InvalidParams, message);
    let depends_on = &spec.supervision.depends_on;
    if let Some(missing) = depends_on.iter().find(|d| d.agent != *name && !project.agents.contains_key(&d.agent)) {
        return Err(invalid(format!(
            "'depends_on': project '{}' has no agent '{}' that '{name}' could wait for",
            project.name, missing.agent
        ))
        .hint(format!("start '{}' first", missing.agent)));
    }
    if let Some(cycle) = cycle(project, name, depends_on) {
        let names: Vec<&str> = cycle.iter().map(AgentName::as_str).collect();
        return Err(invalid(format!("'depends_on' forms a cycle: {}", names.join(" -> "))));
    }
    let restart = &spec.supervision.restart;
    if restart.max_delay_ms < restart.delay_ms {
        return Err(invalid(format!(
            "'restart': the longest delay ({} ms) is shorter than the first ({} ms)",
            restart.max_delay_ms, restart.delay_ms
        )));
    }
    if spec.supervision.timeout_ms == Some(0) {
        return Err(invalid("'timeout_ms' is 0; leave it out for no limit".into()));
    }
    Ok(())
}

/// Starts an agent, or lets it wait for the agents that it depends on.
pub(super) fn start_or_wait(
    project: &Project,
    agent: AgentName,
    spec: &AgentSpec,
    new: NewRun,
    cause: StartCause,
) -> Decision {
    let for_agents = waits_for(project, &spec.supervision.depends_on);
    if !for_agents.is_empty() {
        return Decision::events(vec![Event::AgentWaiting { agent, for_agents }]);
    }
    let NewRun { id: run, token_sha256 } = new;
    let launch = Effect::Launch { agent: agent.clone(), run: run.clone(), continuation: None };
    let argv = spec.argv.clone();
    Decision::events(vec![Event::AgentStarting { agent, run, argv, cause, token_sha256 }]).then(launch)
}

/// Starts an agent whose start is due, or one that a person brings back.
pub(super) fn start(
    project: &Project,
    name: AgentName,
    start: PreparedStart,
    requested: bool,
    now: UnixMillis,
) -> Result<Decision, Refusal> {
    let (found, cause) = if requested {
        refuse_unless_startable(project)?;
        let found = agent(project, &name)?;
        if found.is_alive() {
            return Err(Refusal::new(
                Code::AgentRunning,
                format!("agent '{name}' of project '{}' has not ended: it is {}", project.name, found.status(false)),
            ));
        }
        (found, StartCause::Resume)
    } else {
        let is_due = due_actions(project, now).contains(&DueAction::Start(name.clone()));
        let due = project.agents.get(&name).filter(|_| is_due);
        let Some(start) = due.and_then(|found| Some((&**found, found.state.pending_start()?.cause))) else {
            return Ok(Decision::default());
        };
        start
    };
    let PreparedStart { new, argv, session, continuation } = start;
    let mut events = Vec::new();
    if let Some(session) = session.filter(|session| found.session.as_ref() != Some(session)) {
        events.push(Event::AgentSessionFound { agent: name.clone(), session });
    }
    events.push(Event::AgentStarting {
        agent: name.clone(),
        run: new.id.clone(),
        argv,
        cause,
        token_sha256: new.token_sha256,
    });
    Ok(Decision::events(events).then(Effect::Launch { agent: name, run: new.id, continuation }))
}
