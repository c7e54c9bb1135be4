//! One file per group of commands; each asks the daemon and shows the answer.

mod agent_reports;
mod agents;
mod attach;
mod checkpoint;
mod context;
mod declared_agents;
mod doctor;
mod down;
mod events;
mod logs;
mod operation;
mod pause;
mod plugin;
mod project;
mod protocol;
mod question;
mod readiness;
mod restore;
mod run;
mod send;
mod status;
mod task;
mod transfer;
mod up;

pub use run::{canonical, environment};

use std::io::Read as _;
use std::time::Duration;

use fermata_protocol::agent::AgentList;
use fermata_protocol::agent::AgentView;
use fermata_protocol::{Code, ProjectName, Target};

use crate::cli::Command;
use crate::cli::groups::AgentCommand;
use crate::deadline;
use crate::errors::{Exit, Failure};
use crate::session::Session;
use crate::units::millis;

/// How a command ended: the exit code.
pub type Ended = Result<u8, Failure>;

/// How much longer than the daemon's own wait this program waits.
const MARGIN: Duration = Duration::from_secs(5);

/// Runs a command.
pub fn run(session: &mut Session, command: Command) -> Ended {
    // `attach` refuses it; a thread that ends the program would leave the terminal as it is.
    let lasts = matches!(command, Command::Attach(_));
    if let Some(time) = session.globals.timeout.filter(|_| !lasts) {
        // These tell the daemon how long to wait, and know more about a wait that was in vain.
        let own_wait = match &command {
            Command::Wait { .. } => true,
            Command::Run(run) => run.wait && !run.logs,
            Command::Agent(agent) => {
                matches!(**agent, AgentCommand::Ask { wait: true, .. } | AgentCommand::WaitAnswer { .. })
            }
            _ => false,
        };
        let time = if own_wait { time + MARGIN } else { time };
        deadline::arm(time, session.globals.json)?;
    }
    match command {
        Command::Run(args) => run::run(session, args.into_inner()),
        Command::Up(args) => up::up(session, &args),
        Command::Down(args) => down::down(session, &args),
        Command::Ps { project } => status::ps(session, project),
        Command::Status { project } => status::status(session, project),
        Command::Pause(args) => pause::pause(session, args.into_inner()),
        Command::Resume { target, checkpoint, over_budget } => pause::resume(session, target, checkpoint, over_budget),
        Command::Stop { target, grace } => agents::stop(session, target, grace),
        Command::Restart { target } => agents::restart(session, &target),
        Command::Kill { target, signal } => agents::kill(session, target, signal),
        Command::Rm { target, with_checkpoints } => agents::remove(session, target, with_checkpoints),
        Command::Logs(args) => logs::logs(session, args.into_inner()),
        Command::Attach(args) => attach::attach(session, &args),
        Command::Send(args) => send::send(session, &args),
        Command::Wait { target, propagate } => agents::wait(session, &target, propagate),
        Command::Project(command) => project::run(session, command.into_inner()),
        Command::Op(command) => operation::run(session, command.into_inner()),
        Command::Checkpoint(command) => checkpoint::run(session, command.into_inner()),
        Command::Context(command) => context::run(session, command.into_inner()),
        Command::Task(command) => task::run(session, command.into_inner()),
        Command::Inbox { project, all } => question::inbox(session, project, all),
        Command::Answer { question, text } => question::answer(session, question, &text),
        Command::Events(args) => events::events(session, args.into_inner()),
        Command::Plugin(command) => plugin::run(session, command.into_inner()),
        Command::Agent(command) => agent_reports::run(session, command.into_inner()),
        Command::Daemon(command) => protocol::daemon(session, command.into_inner()),
        Command::Doctor => doctor::doctor(session),
        Command::Completions { shell } => protocol::completions(session, shell),
        Command::Call { method, params } => protocol::call(session, &method, params),
        Command::Version => protocol::version(session),
    }
}

/// Returns `--timeout` in the protocol's unit.
fn timeout_ms(session: &Session) -> Option<u64> {
    session.globals.timeout.map(millis)
}

/// Returns all agents, of one project or of all.
fn all_agents(session: &mut Session, project: Option<&ProjectName>) -> Result<Vec<AgentView>, Failure> {
    let mut params = AgentList { project: project.cloned(), after: None };
    let mut agents = Vec::new();
    loop {
        let page = session.call(&params)?;
        agents.extend(page.agents);
        match page.next {
            Some(next) => params.after = Some(next),
            None => return Ok(agents),
        }
    }
}

/// Returns the agents that a target means; a project without agents is an error.
fn agents_of(session: &mut Session, target: &Target) -> Result<Vec<AgentView>, Failure> {
    let mut agents = all_agents(session, Some(&target.project))?;
    if let Some(name) = &target.agent {
        agents.retain(|agent| agent.name == *name);
    }
    if agents.is_empty() {
        return Err(Failure::new(
            Exit::NotFound,
            Code::AgentNotFound.as_str(),
            match &target.agent {
                Some(_) => format!("there is no agent {target}"),
                None => format!("the project {target} has no agents"),
            },
        )
        .hint(format!("start one: fermatactl run --project {} -- COMMAND", target.project)));
    }
    Ok(agents)
}

/// Returns the one agent that a target means.
fn one_agent(session: &mut Session, target: &Target) -> Result<Target, Failure> {
    if target.agent.is_some() {
        return Ok(target.clone());
    }
    let agents = agents_of(session, target)?;
    match &agents[..] {
        [agent] => Ok(target_of(agent)),
        several => {
            let names: Vec<String> = several.iter().map(|a| target_of(a).to_string()).collect();
            Err(Failure::usage(format!(
                "the project {target} has {} agents, and this command takes one",
                several.len()
            ))
            .hint(format!("name one of {}", names.join(", "))))
        }
    }
}

/// Returns the target of an agent.
fn target_of(agent: &AgentView) -> Target {
    Target::agent(agent.project.clone(), agent.name.clone())
}

/// Returns a text argument, from stdin when it is left out or `-`.
fn text_or_stdin(text: Option<String>) -> Result<String, Failure> {
    match text {
        Some(text) if text != "-" => Ok(text),
        _ => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).map_err(|e| Failure::io("read stdin", &e))?;
            Ok(text)
        }
    }
}
