//! Finds the sessions of the agents' tools, for their transcripts and for starting the agents again.

use std::collections::BTreeMap;

use fermata_core::agent::Agent;
use fermata_protocol::AgentName;

use crate::errors::Failure;
use crate::operations::{StepContext, blocking};
use crate::profile::{Profile, RunOf, Session};
use crate::store::rows;
use fermata_os::process::{self, ProcScan};

/// An agent whose tool has a profile, with its environment.
struct ProfiledAgent {
    name: AgentName,
    profile: Profile,
    env: BTreeMap<String, String>,
    cwd: String,
    since_ms: i64,
    pid: Option<i32>,
    /// The id of the last session that is known.
    last_session: Option<String>,
}

/// The sessions of agents whose tools have a profile.
pub struct FoundSessions(Vec<(ProfiledAgent, Option<Session>)>);

impl FoundSessions {
    /// Returns whether no agent has a tool with a profile for sessions.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the current session of each agent that has one: the session that it has open, else the one that was
    /// found. Walks no directory, so that it may run while the agents are frozen.
    pub fn current(self) -> Vec<(AgentName, Session)> {
        let current = |(agent, found): (ProfiledAgent, Option<Session>)| {
            let session = agent.open_session().or(found)?;
            Some((agent.name, session))
        };
        self.0.into_iter().filter_map(current).collect()
    }
}

/// Finds the sessions of these agents. Agents without a profile for sessions are left out. It may take long, so that a
/// pause calls it before the freeze.
///
/// # Errors
/// When the store cannot be read.
pub async fn find(step: &StepContext, agents: &[AgentName]) -> Result<FoundSessions, Failure> {
    let profiles = step.services.profiles();
    let mut profiled = Vec::new();
    for name in agents {
        let Some(agent) = step.project.agents.get(name) else { continue };
        let profile = agent.spec.profile.as_deref().and_then(|name| profiles.get(name));
        let Some(profile) = profile.filter(|profile| profile.session.is_some()) else { continue };
        profiled.push(ProfiledAgent {
            name: name.clone(),
            profile: profile.clone(),
            env: environment(step, name).await?,
            cwd: agent.spec.cwd.clone(),
            since_ms: agent.created_at.0,
            pid: main_process(agent),
            last_session: agent.session.clone(),
        });
    }
    if profiled.is_empty() {
        return Ok(FoundSessions(Vec::new()));
    }
    blocking("find sessions", move || {
        let with_session = |agent: ProfiledAgent| {
            let session = agent.session();
            (agent, session)
        };
        Ok(FoundSessions(profiled.into_iter().map(with_session).collect()))
    })
    .await
}

/// Reads the environment that an agent was started with.
///
/// # Errors
/// When the store cannot be read.
pub async fn environment(step: &StepContext, agent: &AgentName) -> Result<BTreeMap<String, String>, Failure> {
    let (project, agent) = (step.project.name.clone(), agent.clone());
    step.services
        .store
        .read(move |connection| rows::load_environment(connection, &project, &agent))
        .await
        .map_err(|error| Failure::fault("read the agent's environment", &error))
}

fn main_process(agent: &Agent) -> Option<i32> {
    agent.run()?.processes.as_ref().map(|processes| processes.pid)
}

impl ProfiledAgent {
    /// Finds the session, in the directories of the tool if need be.
    fn session(&self) -> Option<Session> {
        self.profile.session.as_ref()?.find(self.run(&self.pids()))
    }

    /// Returns the session whose file a process of the agent has open.
    fn open_session(&self) -> Option<Session> {
        self.profile.session.as_ref()?.held_open(self.run(&self.pids()))
    }

    fn pids(&self) -> Vec<i32> {
        let below =
            self.pid.map(|pid| process::descendants(pid, ProcScan::Quick).unwrap_or_default()).unwrap_or_default();
        self.pid.into_iter().chain(below.iter().map(|stat| stat.id.pid)).collect()
    }

    fn run<'a>(&'a self, pids: &'a [i32]) -> RunOf<'a> {
        RunOf { env: &self.env, cwd: &self.cwd, since_ms: self.since_ms, pids, known: self.last_session.as_deref() }
    }
}

/// The command that starts an agent again.
pub struct RestartCommand {
    /// The program and arguments.
    pub argv: Vec<String>,
    /// Whether the command continues the agent's work: its own resume command, or that of the profile.
    pub goes_on: bool,
    /// The id of the session that it continues.
    pub session: Option<String>,
}

/// Chooses the command that starts an agent again: its own resume command, else the profile's,
/// else the original one.
///
/// # Errors
/// When the store cannot be read.
pub async fn restart_command(step: &StepContext, agent: &Agent) -> Result<RestartCommand, Failure> {
    if let Some(argv) = &agent.spec.resume_argv {
        return Ok(RestartCommand { argv: argv.clone(), goes_on: true, session: agent.session.clone() });
    }
    let profiles = step.services.profiles();
    let resume = agent.spec.profile.as_deref().and_then(|name| profiles.get(name)).and_then(|p| p.resume.clone());
    if let Some(template) = resume {
        let FoundSessions(found) = find(step, std::slice::from_ref(&agent.name)).await?;
        let session = found.into_iter().find_map(|(_, session)| session);
        let session = session.map(|session| session.id).or_else(|| agent.session.clone());
        if let Some(session) = session
            && let Some(argv) = template.command(&agent.spec.argv, &session)
        {
            return Ok(RestartCommand { argv, goes_on: true, session: Some(session) });
        }
    }
    Ok(RestartCommand { argv: agent.spec.argv.clone(), goes_on: false, session: None })
}
