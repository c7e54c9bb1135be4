//! `stop`, `restart`, `kill`, `rm` and `wait`.

use std::time::{Duration, Instant};

use fermata_protocol::agent::{AgentKill, AgentRemove, AgentRestart, AgentStatus, AgentStop, AgentView, AgentWait};
use fermata_protocol::project::ProjectRemove;
use fermata_protocol::{Code, Target};

use super::arguments::{agents_of, all_agents, one_agent, target_of};
use super::status;
use crate::errors::{CommandError, CommandResult, Exit};
use crate::session::DaemonSession;
use crate::units::millis;

pub fn stop(session: &mut DaemonSession, target: Target, grace: Option<Duration>) -> CommandResult {
    let params = AgentStop { target, grace_ms: grace.map(millis) };
    let agents = session.call_long("stop", &params)?.agents;
    print_agents(session, &agents)
}

pub fn kill(session: &mut DaemonSession, target: Target, signal: Option<String>) -> CommandResult {
    let agents = session.call(&AgentKill { target, signal })?.agents;
    print_agents(session, &agents)
}

pub fn restart(session: &mut DaemonSession, target: &Target) -> CommandResult {
    let targets = if target.agent.is_some() {
        vec![target.clone()]
    } else {
        let agents = agents_of(session, target)?;
        agents.iter().map(target_of).collect()
    };
    let mut agents = Vec::new();
    for target in targets {
        agents.push(session.call_long("restart", &AgentRestart { target })?);
    }
    print_agents(session, &agents)
}

pub fn remove(session: &mut DaemonSession, target: Target, with_checkpoints: bool) -> CommandResult {
    if target.agent.is_none() {
        return remove_project(session, target, with_checkpoints);
    }
    if with_checkpoints {
        return Err(CommandError::usage(
            "--with-checkpoints applies to a project only: checkpoints belong to projects, not to agents",
        ));
    }
    let done = session.call(&AgentRemove { target: target.clone() })?;
    session.out.sentence(&done, format_args!("{target} removed"))?;
    Ok(0)
}

fn remove_project(session: &mut DaemonSession, target: Target, with_checkpoints: bool) -> CommandResult {
    let done = session.call(&ProjectRemove { project: target.project.clone(), with_checkpoints })?;
    session.out.sentence(&done, format_args!("{target} removed"))?;
    Ok(0)
}

fn print_agents(session: &mut DaemonSession, agents: &[AgentView]) -> CommandResult {
    let rows = session.out.rows(agents, "no agents", target_of, status::agent_table);
    rows?;
    Ok(0)
}

/// Prints the exit code of each agent once it has ended.
pub fn wait(session: &mut DaemonSession, target: &Target, propagate: bool) -> CommandResult {
    let targets = match target.agent {
        Some(_) => vec![target.clone()],
        None => agents_of(session, target)?.iter().map(target_of).collect(),
    };
    let began = Instant::now();
    let several = targets.len() > 1;
    let mut code = 0;
    for target in targets {
        let left = session.timeout_ms().map(|ms| {
            let spent = millis(began.elapsed());
            ms.saturating_sub(spent)
        });
        let agent = wait_for(session, &target, left)?;
        let own_code = exit_code(&agent);
        if code == 0 {
            code = own_code;
        }
        let text = match agent.exit {
            Some(exit) => exit.shell_code().to_string(),
            None => agent.status.to_string(),
        };
        session.out.object(&agent, Some(text.clone()), |out, _| {
            if several { out.line(format_args!("{target} {text}")) } else { out.line(&text) }
        })?;
        session.out.flush()?;
    }
    Ok(if propagate { code } else { 0 })
}

/// Waits until one agent has ended.
pub fn wait_for(
    session: &mut DaemonSession,
    target: &Target,
    timeout_ms: Option<u64>,
) -> Result<AgentView, CommandError> {
    let target = one_agent(session, target)?;
    let params = AgentWait { target: target.clone(), timeout_ms };
    let error = match session.call_across_restarts(&params) {
        Ok(agent) if agent.status.is_terminal() => return Ok(agent),
        Ok(_) => CommandError::timed_out(format!("{target} did not end in time")),
        Err(error) if error.is(Code::TimedOut) => error,
        Err(error) => return Err(error),
    };
    // Another exit code when the agent waits for an answer: a person can end this wait.
    let agents = all_agents(session, Some(&target.project)).unwrap_or_default();
    let asks = agents.iter().any(|agent| target_of(agent) == target && agent.status == AgentStatus::WaitingForInput);
    if !asks {
        return Err(error);
    }
    Err(CommandError::new(
        Exit::WaitingForInput,
        AgentStatus::WaitingForInput.as_str(),
        format!("{target} is waiting for the answer to a question"),
    )
    .hint(format!("fermatactl inbox {}", target.project)))
}

/// Returns the exit code of an ended agent as that of this process; 1 when it is not known.
pub fn exit_code(agent: &AgentView) -> u8 {
    match agent.exit {
        Some(exit) => u8::try_from(exit.shell_code()).unwrap_or(1),
        None if agent.status == AgentStatus::Exited => 0,
        None => 1,
    }
}
