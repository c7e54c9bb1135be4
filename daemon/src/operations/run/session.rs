//! Finds the tools' own sessions, for their transcripts and for starting them again.

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
    agent: AgentName,
    profile: Profile,
    env: BTreeMap<String, String>,
    cwd: String,
    since_ms: i64,
    pid: Option<i32>,
    session: Option<String>,
}

/// What was found of agents' sessions, and what it takes to see whether that still holds.
pub struct Scouted(Vec<(ProfiledAgent, Option<Session>)>);

impl Scouted {
    /// Says whether no agent has a tool whose sessions are known of.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the sessions as they are now, by agent: those that agents have open, else those that were found. Walks
    /// through no directory, so that agents may stand still for it.
    pub fn now(self) -> Vec<(AgentName, Session)> {
        let one = |(known, found): (ProfiledAgent, Option<Session>)| {
            Some((known.agent.clone(), held_open(&known).or(found)?))
        };
        self.0.into_iter().filter_map(one).collect()
    }
}

/// Finds the sessions of these agents, by agent. Agents without profile or session are left out.
///
/// # Errors
/// When the store cannot be read.
pub async fn find(site: &StepContext, agents: &[AgentName]) -> Result<Vec<(AgentName, Session)>, Failure> {
    let Scouted(found) = scout(site, agents).await?;
    Ok(found.into_iter().filter_map(|(known, session)| Some((known.agent, session?))).collect())
}

/// Finds the sessions of these agents. It may take long, so it runs before they are frozen.
///
/// # Errors
/// When the store cannot be read.
pub async fn scout(site: &StepContext, agents: &[AgentName]) -> Result<Scouted, Failure> {
    let profiles = site.services.profiles();
    let mut known = Vec::new();
    for name in agents {
        let Some(agent) = site.project.agents.get(name) else { continue };
        let profile = agent.spec.profile.as_deref().and_then(|name| profiles.get(name));
        let Some(profile) = profile.filter(|profile| profile.session.is_some()) else { continue };
        known.push(ProfiledAgent {
            agent: name.clone(),
            profile: profile.clone(),
            env: environment(site, name).await?,
            cwd: agent.spec.cwd.clone(),
            since_ms: agent.created_at.0,
            pid: main_process(agent),
            session: agent.session.clone(),
        });
    }
    if known.is_empty() {
        return Ok(Scouted(Vec::new()));
    }
    blocking("find sessions", move || {
        let one = |known: ProfiledAgent| {
            let session = session_of(&known);
            (known, session)
        };
        Ok(Scouted(known.into_iter().map(one).collect()))
    })
    .await
}

/// Reads the environment that an agent was started with.
///
/// # Errors
/// When the store cannot be read.
pub async fn environment(site: &StepContext, agent: &AgentName) -> Result<BTreeMap<String, String>, Failure> {
    let (project, agent) = (site.project.name.clone(), agent.clone());
    site.services
        .store
        .read(move |connection| rows::load_environment(connection, &project, &agent))
        .await
        .map_err(|error| Failure::fault("read the agent's environment", &error))
}

fn main_process(agent: &Agent) -> Option<i32> {
    agent.run()?.processes.as_ref().map(|processes| processes.pid)
}

fn session_of(known: &ProfiledAgent) -> Option<Session> {
    known.profile.session.as_ref()?.find(known.run(&known.pids()))
}

fn held_open(known: &ProfiledAgent) -> Option<Session> {
    known.profile.session.as_ref()?.held_open(known.run(&known.pids()))
}

impl ProfiledAgent {
    fn pids(&self) -> Vec<i32> {
        let below =
            self.pid.map(|pid| process::descendants(pid, ProcScan::Quick).unwrap_or_default()).unwrap_or_default();
        self.pid.into_iter().chain(below.iter().map(|stat| stat.id.pid)).collect()
    }

    fn run<'a>(&'a self, pids: &'a [i32]) -> RunOf<'a> {
        RunOf { env: &self.env, cwd: &self.cwd, since_ms: self.since_ms, pids, known: self.session.as_deref() }
    }
}

/// How an agent can be started again.
pub struct Again {
    /// The program and arguments.
    pub argv: Vec<String>,
    /// Whether they go on where the agent was: its own resume command, or the profile's.
    pub goes_on: bool,
    /// The session that they go on with.
    pub session: Option<String>,
}

/// Chooses the command that starts an agent again: its own resume command, else the profile's,
/// else the original one.
///
/// # Errors
/// When the store cannot be read.
pub async fn start_again(site: &StepContext, agent: &Agent) -> Result<Again, Failure> {
    if let Some(argv) = &agent.spec.resume_argv {
        return Ok(Again { argv: argv.clone(), goes_on: true, session: agent.session.clone() });
    }
    let profiles = site.services.profiles();
    let resume = agent.spec.profile.as_deref().and_then(|name| profiles.get(name)).and_then(|p| p.resume.clone());
    if let Some(template) = resume {
        let found = find(site, std::slice::from_ref(&agent.name)).await?;
        let session = found.into_iter().next().map(|(_, session)| session.id).or_else(|| agent.session.clone());
        if let Some(session) = session
            && let Some(argv) = template.command(&agent.spec.argv, &session)
        {
            return Ok(Again { argv, goes_on: true, session: Some(session) });
        }
    }
    Ok(Again { argv: agent.spec.argv.clone(), goes_on: false, session: None })
}
