//! `stop`, `restart`, `kill`, `rm`, `wait`: what is done to agents that exist.

use std::time::{Duration, Instant};

use fermata_protocol::agent::{AgentKill, AgentRemove, AgentRestart, AgentStatus, AgentStop, AgentView, AgentWait};
use fermata_protocol::project::ProjectRemove;
use fermata_protocol::{Code, Target};

use super::{Ended, agents_of, one_agent, status, target_of, timeout_ms};
use crate::errors::{Exit, Failure};
use crate::session::Session;
use crate::units::millis;

/// Runs `stop`.
pub fn stop(session: &mut Session, target: Target, grace: Option<Duration>) -> Ended {
    let params = AgentStop { target, grace_ms: grace.map(millis) };
    let agents = session.call_long("stop", &params)?.agents;
    shown(session, &agents)
}

/// Runs `kill`.
pub fn kill(session: &mut Session, target: Target, signal: Option<String>) -> Ended {
    let agents = session.call(&AgentKill { target, signal })?.agents;
    shown(session, &agents)
}

/// Runs `restart`.
pub fn restart(session: &mut Session, target: &Target) -> Ended {
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
    shown(session, &agents)
}

/// Runs `rm`.
pub fn remove(session: &mut Session, target: Target, with_checkpoints: bool) -> Ended {
    if target.agent.is_none() {
        return remove_project(session, target, with_checkpoints);
    }
    if with_checkpoints {
        return Err(Failure::usage(
            "--with-checkpoints goes with a project: checkpoints belong to projects, not to agents",
        ));
    }
    let done = session.call(&AgentRemove { target: target.clone() })?;
    session.out.said(&done, format_args!("{target} removed"))?;
    Ok(0)
}

fn remove_project(session: &mut Session, target: Target, with_checkpoints: bool) -> Ended {
    let done = session.call(&ProjectRemove { project: target.project.clone(), with_checkpoints })?;
    session.out.said(&done, format_args!("{target} removed"))?;
    Ok(0)
}

fn shown(session: &mut Session, agents: &[AgentView]) -> Ended {
    let rows = session.out.rows(agents, "no agents", target_of, status::agent_table);
    rows?;
    Ok(0)
}

/// Runs `wait`: prints each agent's exit code.
pub fn wait(session: &mut Session, target: &Target, propagate: bool) -> Ended {
    let targets = match target.agent {
        Some(_) => vec![target.clone()],
        None => agents_of(session, target)?.iter().map(target_of).collect(),
    };
    let began = Instant::now();
    let several = targets.len() > 1;
    let mut code = 0;
    for target in targets {
        let left = timeout_ms(session).map(|ms| {
            let spent = millis(began.elapsed());
            ms.saturating_sub(spent)
        });
        let ended = wait_for(session, &target, left)?;
        let own_code = exit_code(&ended);
        if code == 0 {
            code = own_code;
        }
        let text = match ended.exit {
            Some(exit) => exit.shell_code().to_string(),
            None => ended.status.to_string(),
        };
        session.out.one(&ended, Some(text.clone()), |out, _| {
            if several { out.line(format_args!("{target} {text}")) } else { out.line(&text) }
        })?;
        session.out.flush()?;
    }
    Ok(if propagate { code } else { 0 })
}

/// Waits until one agent has ended.
pub fn wait_for(session: &mut Session, target: &Target, timeout_ms: Option<u64>) -> Result<AgentView, Failure> {
    let target = one_agent(session, target)?;
    let params = AgentWait { target: target.clone(), timeout_ms };
    let failure = match session.call_lasting(&params) {
        Ok(agent) if agent.status.is_terminal() => return Ok(agent),
        Ok(_) => Failure::timed_out(format!("{target} has not ended in time")),
        Err(failure) if failure.is(Code::TimedOut) => failure,
        Err(failure) => return Err(failure),
    };
    // An agent that waits for a person is worth another exit code: someone can end the wait.
    let agents = super::all_agents(session, Some(&target.project)).unwrap_or_default();
    let asks = agents.iter().any(|agent| target_of(agent) == target && agent.status == AgentStatus::WaitingForInput);
    if !asks {
        return Err(failure);
    }
    Err(Failure::new(
        Exit::WaitingForInput,
        AgentStatus::WaitingForInput.as_str(),
        format!("{target} waits for the answer to a question"),
    )
    .hint(format!("fermatactl inbox {}", target.project)))
}

/// Returns the code to exit with for an agent that has ended: 1 when there is none to pass on.
pub fn exit_code(agent: &AgentView) -> u8 {
    match agent.exit {
        Some(exit) => u8::try_from(exit.shell_code()).unwrap_or(1),
        None if agent.status == AgentStatus::Exited => 0,
        None => 1,
    }
}
