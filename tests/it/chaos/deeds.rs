//! The random actions on agents, and their results.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, sync_channel};

use fermata_protocol::agent::{AgentKill, AgentList, AgentRestart, AgentStop};
use fermata_protocol::client::{Client, ClientError};
use fermata_protocol::event::Event;
use fermata_protocol::method::Method;
use fermata_protocol::pause::{PauseMode, ProjectPause, ProjectResume};
use fermata_protocol::subscription::{EventFilter, EventsList};
use fermata_protocol::{Code, Target};
use fermata_tests::waiting::poll_for;
use fermata_tests::{Sandbox, process};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::books::Books;
use super::{HANDS, Member, PATIENCE, PROJECTS, project};
use crate::scene;

/// One random action. Numbers stand for a member or a project.
#[derive(Debug, Clone, Copy)]
pub enum Deed {
    /// SIGKILL to the daemon, followed by a new daemon.
    CrashDaemon,
    /// SIGKILL to a member's shim.
    KillShim(usize),
    /// SIGKILL to a process of a member's tree.
    KillOne(usize, u64),
    /// SIGCONT to a process of a member's tree.
    Continue(usize, u64),
    /// Pause of a project.
    Pause(usize, PauseMode),
    /// Resume of a project.
    Resume(usize),
    /// Stop of a member, with that many milliseconds of grace.
    Stop(usize, u64),
    /// Kill of a member.
    Kill(usize),
    /// Restart of a member.
    Restart(usize),
}

impl Deed {
    fn random(chance: &mut Chance) -> Self {
        let (project, member, some) = (chance.below(PROJECTS), chance.below(super::AGENTS), chance.next());
        match chance.below(100) {
            0..4 => Self::CrashDaemon,
            4..12 => Self::KillShim(member),
            12..18 => Self::KillOne(member, some),
            18..30 => Self::Continue(member, some),
            30..48 => Self::Pause(project, PauseMode::Freeze),
            48..50 => Self::Pause(project, PauseMode::Park),
            50..66 => Self::Resume(project),
            66..73 => Self::Stop(member, some % 500),
            73..78 => Self::Kill(member),
            _ => Self::Restart(member),
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::CrashDaemon => "crash",
            Self::KillShim(_) => "kill shim",
            Self::KillOne(..) => "kill one",
            Self::Continue(..) => "continue",
            Self::Pause(_, PauseMode::Park) => "park",
            Self::Pause(..) => "pause",
            Self::Resume(_) => "resume",
            Self::Stop(..) => "stop",
            Self::Kill(_) => "kill",
            Self::Restart(_) => "restart",
        }
    }
}

/// A random number generator with a seed (SplitMix64).
#[derive(Debug)]
pub struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// The threads that perform the actions in parallel.
pub struct Hands<'a> {
    socket: PathBuf,
    members: &'a [Member],
    books: &'a Books,
    outcomes: Mutex<BTreeMap<(&'static str, String), usize>>,
    faults: Mutex<Vec<String>>,
}

impl<'a> Hands<'a> {
    /// Creates the threads' shared state.
    pub fn new(sandbox: &Sandbox, members: &'a [Member], books: &'a Books) -> Self {
        let socket = sandbox.socket().to_owned();
        Self { socket, members, books, outcomes: Mutex::default(), faults: Mutex::default() }
    }

    /// Performs that many actions. This thread owns the daemon: a crash interrupts the actions of the other threads.
    pub fn work(&self, sandbox: &mut Sandbox, mut chance: Chance, deeds: usize) {
        let (give, take) = sync_channel(HANDS);
        let take = Mutex::new(take);
        std::thread::scope(|scope| {
            for _ in 0..HANDS {
                scope.spawn(|| self.do_what_comes(&take));
            }
            let mut by_signals = false;
            for _ in 0..deeds {
                let deed = Deed::random(&mut chance);
                if let Deed::CrashDaemon = deed {
                    by_signals = !by_signals;
                    sandbox.set_config(if by_signals { scene::BY_SIGNALS } else { scene::BY_GROUP });
                    sandbox.crash_and_restart();
                    self.came_to(deed, "done".into());
                } else {
                    give.send(deed).expect("the hands take what comes");
                }
            }
            drop(give);
        });
    }

    fn do_what_comes(&self, take: &Mutex<Receiver<Deed>>) {
        loop {
            let next = take.lock().expect("no hand fails while it takes").recv();
            let Ok(deed) = next else { return };
            let came = match self.carry_out(deed) {
                Ok(()) => "done".to_owned(),
                Err(ClientError::Refused(refusal)) => {
                    if is_fault(refusal.code) {
                        let fault = format!("{deed:?}: {refusal:?}; before that: {}", self.history_of(deed));
                        self.faults.lock().expect("no thread panics while it records").push(fault);
                    }
                    refusal.code.as_str().to_owned()
                }
                // The daemon was killed during the call.
                Err(ClientError::Broken(_) | ClientError::Closed | ClientError::Unreachable { .. }) => "crash".into(),
                Err(other) => {
                    self.faults.lock().expect("no thread panics while it records").push(format!("{deed:?}: {other}"));
                    "garbled".into()
                }
            };
            self.came_to(deed, came);
        }
    }

    fn carry_out(&self, deed: Deed) -> Result<(), ClientError> {
        match deed {
            Deed::CrashDaemon => Ok(()),
            Deed::KillShim(member) => self.kill_shim(&self.members[member].target),
            Deed::KillOne(member, some) => self.signal_one(&self.members[member].target, some, Signal::SIGKILL),
            Deed::Continue(member, some) => self.signal_one(&self.members[member].target, some, Signal::SIGCONT),
            Deed::Pause(number, mode) => {
                self.call(&ProjectPause { project: project(number), reason: None, mode, grace_ms: Some(50) })
            }
            Deed::Resume(number) => {
                self.call(&ProjectResume { project: project(number), checkpoint: None, over_budget: false })
            }
            Deed::Stop(member, grace_ms) => {
                let target = self.will_end(member);
                self.call(&AgentStop { target, grace_ms: Some(grace_ms) })
            }
            Deed::Kill(member) => {
                let target = self.will_end(member);
                self.call(&AgentKill { target, signal: None })
            }
            Deed::Restart(member) => {
                let target = self.will_end(member);
                self.call(&AgentRestart { target })
            }
        }
    }

    /// Returns the last events of the action's project, for the message of a failure.
    fn history_of(&self, deed: Deed) -> String {
        let (Deed::Stop(member, _) | Deed::Kill(member) | Deed::Restart(member)) = deed else { return String::new() };
        let target = &self.members[member].target;
        let filter = EventFilter { project: Some(target.project.clone()), kinds: Vec::new() };
        let mut list = EventsList { cursor: None, filter, limit: Some(500) };
        let mut history = Vec::new();
        while let Ok(page) = self.client().and_then(|mut client| client.call(&list)) {
            if page.events.is_empty() {
                break;
            }
            let about = |event: &Event| event.agent().is_none_or(|agent| Some(agent) == target.agent.as_ref());
            let lines = page.events.iter().filter(|recorded| about(&recorded.event));
            history.extend(lines.map(|recorded| format!("{} {}", recorded.at.0, recorded.event.kind())));
            list.cursor = Some(page.cursor);
        }
        let last = history.len().saturating_sub(30);
        history[last..].join("; ")
    }

    fn will_end(&self, member: usize) -> Target {
        let target = self.members[member].target.clone();
        self.books.ordered_end(&target);
        target
    }

    fn client(&self) -> Result<Client, ClientError> {
        let connect = || Client::connect(&self.socket, "fermata-tests", None).ok();
        let unreachable = || ClientError::Unreachable {
            path: self.socket.clone(),
            source: std::io::Error::from(std::io::ErrorKind::TimedOut),
        };
        let (mut client, _) = poll_for(PATIENCE, connect).ok_or_else(unreachable)?;
        client.set_read_timeout(Some(PATIENCE)).map_err(ClientError::Broken)?;
        Ok(client)
    }

    fn call<M: Method>(&self, params: &M) -> Result<(), ClientError> {
        self.client()?.call(params).map(|_| ())
    }

    fn kill_shim(&self, target: &Target) -> Result<(), ClientError> {
        let list = AgentList { project: Some(target.project.clone()), after: None };
        let agents = self.client()?.call(&list)?.agents;
        let found = agents.into_iter().find(|agent| Some(&agent.name) == target.agent.as_ref());
        let Some(run) = found.and_then(|agent| agent.run) else { return Ok(()) };
        let Some(record) = self.books.record(target, &run) else { return Ok(()) };
        let number = |name: &str| record["shim"][name].as_u64();
        let (Some(pid), Some(started)) = (number("pid"), number("start")) else { return Ok(()) };
        let pid = i32::try_from(pid).unwrap_or_default();
        if process::start_ticks(pid) == Some(started) {
            self.books.killed_shim(&run);
            send(pid, Signal::SIGKILL);
        }
        Ok(())
    }

    fn signal_one(&self, target: &Target, some: u64, signal: Signal) -> Result<(), ClientError> {
        let tree = self.books.processes_of(target);
        let Some(&pid) = tree.get((some % tree.len().max(1) as u64) as usize) else { return Ok(()) };
        if signal == Signal::SIGKILL {
            self.books.ordered_end(target);
        } else {
            self.books.continues_in(&target.project);
        }
        send(pid, signal);
        Ok(())
    }

    fn came_to(&self, deed: Deed, what: String) {
        let mut outcomes = self.outcomes.lock().expect("no thread panics while it records");
        *outcomes.entry((deed.word(), what)).or_default() += 1;
    }

    /// Returns how often each action had which result.
    pub fn account(&self) -> String {
        let outcomes = self.outcomes.lock().expect("all hands are done");
        let line = |((deed, what), times): (&(&str, String), &usize)| format!("{deed}: {what} {times}");
        outcomes.iter().map(line).collect::<Vec<_>>().join(", ")
    }

    /// Returns the answers that no action may get.
    pub fn faults(&self) -> Vec<String> {
        self.faults.lock().expect("all hands are done").clone()
    }
}

/// Most refusals only mean that an action came at the wrong moment. These mean that something is broken.
fn is_fault(code: Code) -> bool {
    matches!(
        code,
        Code::InternalError
            | Code::ParseError
            | Code::InvalidRequest
            | Code::InvalidParams
            | Code::AgentNotFound
            | Code::ProjectNotFound
            | Code::LaunchFailed
            | Code::ResumeFailed
            | Code::DiskFull
            | Code::CheckpointDamaged
            | Code::InvalidTransition
            | Code::TimedOut
    )
}

/// Sends a signal. The process may have ended since it was found.
fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).ok();
}
