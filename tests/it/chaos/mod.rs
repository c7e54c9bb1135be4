//! Chaos: a hundred agents with difficult process trees, three hundred random actions of four threads at once, and
//! then a check of all records.
//!
//! The actions follow from a seed, which is printed; `FERMATA_TEST_SEED=N` repeats it. The interleaving depends on the
//! machine as well. A seed that has found a fault is added to `seeds.txt`. With every crash of the daemon the
//! configuration changes between the two ways to freeze, so that soon both are mixed within every project.

mod books;
mod deeds;

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fermata_protocol::agent::{AgentKill, AgentRestart, AgentRun, AgentStop};
use fermata_protocol::pause::{PauseMode, ProjectPause, ProjectResume};
use fermata_protocol::project::{ProjectShow, ProjectStatus};
use fermata_protocol::{AgentName, Code, ProjectName, Target};
use fermata_test_seeds::Seed;
use fermata_tests::metronome::wait_for_beats;
use fermata_tests::waiting::{poll_for, wait_until};
use fermata_tests::{Sandbox, process};

use crate::scene;
use books::Books;
use deeds::{Chance, Hands};

const PROJECTS: usize = 5;
const AGENTS: usize = 100;
const DEEDS: usize = 300;
const HANDS: usize = 4;

/// The process trees of agents; see `agent.pl`.
const KINDS: [&str; 10] =
    ["plain", "session", "orphan", "deaf", "storm", "group", "stopped", "mortal", "handler", "chain"];

/// The deadline for everything while a hundred trees run on a machine that other processes use too.
const PATIENCE: Duration = Duration::from_secs(90);

/// How often a running process writes while no process of a paused project may.
const BEATS: u64 = 15;

/// One of the hundred agents.
#[derive(Debug, Clone)]
struct Member {
    target: Target,
    kind: &'static str,
}

impl Member {
    fn all() -> Vec<Self> {
        let member = |number: usize| {
            let kind = KINDS[number / PROJECTS % KINDS.len()];
            let target = Target::agent(project(number % PROJECTS), scene::agent(&format!("{kind}-{number}")));
            Self { target, kind }
        };
        (0..AGENTS).map(member).collect()
    }

    fn name(&self) -> &AgentName {
        self.target.agent.as_ref().expect("a member is one agent")
    }
}

fn project(number: usize) -> ProjectName {
    scene::project(&format!("p{number}"))
}

fn unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970");
    i64::try_from(since.as_millis()).expect("milliseconds fit into 63 bits")
}

fn seeds() -> Vec<u64> {
    match fermata_test_seeds::seed() {
        Seed::Chosen(seed) => vec![seed],
        Seed::Fixed => {
            let lines = include_str!("seeds.txt").lines().filter(|line| !line.starts_with('#'));
            lines.map(|line| line.parse().expect("a seed a line")).collect()
        }
    }
}

#[test]
fn chaos_neither_loses_an_agent_nor_leaves_a_process_behind() {
    let seeds = seeds();
    assert!(!seeds.is_empty());
    seeds.into_iter().for_each(chaos);
}

fn chaos(seed: u64) {
    println!("FERMATA_TEST_SEED={seed}");
    let mut sandbox = Sandbox::builder().config(scene::BY_GROUP).start();
    let members = Member::all();
    let books = Books::open(&sandbox);
    let hands = Hands::new(&sandbox, &members, &books);

    std::thread::scope(|scope| {
        for some in members.chunks(AGENTS / HANDS) {
            let (sandbox, books) = (&sandbox, &books);
            scope.spawn(move || some.iter().for_each(|member| start(sandbox, books, member)));
        }
    });
    hands.work(&mut sandbox, Chance::new(seed), DEEDS);
    println!("{}", hands.account());
    assert_eq!(hands.faults(), Vec::<String>::new());

    settle(&sandbox, &books);
    pause_all(&mut sandbox, &books);
    resume_all(&sandbox, &members, &books);
    end_all(&sandbox, &members, &books);

    let events = books::events(&sandbox);
    nothing_is_left(&sandbox, &members, &books);
    assert!(sandbox.stop_daemon().success(), "the daemon ends in order");
    books::database_is_whole(&sandbox);
    books.balance(&sandbox, &members, &events);
    // A new daemon finds nothing to repair.
    sandbox.start_daemon();
    nothing_is_left(&sandbox, &members, &books);
    assert_eq!(books::events(&sandbox).len(), events.len(), "a start without agents publishes events");
}

fn start(sandbox: &Sandbox, books: &Books, member: &Member) {
    let workspace = scene::furnished(sandbox, member.target.project.as_str());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/it/chaos/agent.pl");
    let ledger = books.ledger().to_str().expect("the sandbox has a UTF-8 path");
    let run = AgentRun {
        project: member.target.project.clone(),
        workspace: Some(workspace.text().into()),
        name: Some(member.name().clone()),
        argv: ["perl", script, member.kind, ledger].map(String::from).to_vec(),
        env: [("PATH".to_owned(), std::env::var("PATH").unwrap_or_default())].into(),
        cwd: None,
        umask: None,
        limits: Default::default(),
        resume_argv: None,
        profile: None,
        stop_grace_ms: Some(400),
        supervision: Default::default(),
    };
    // Two threads may create the project at the same time: the later one finds it created.
    let refused = scene::refusal(sandbox.rpc().call(&run)).err();
    if let Some(refusal) = refused {
        assert_eq!(refusal.code, Code::ProjectExists, "{}: {refusal:?}", member.target);
        scene::done(sandbox, &AgentRun { workspace: None, ..run });
    }
}

/// Waits until no project has an operation under way.
fn settle(sandbox: &Sandbox, books: &Books) {
    for number in 0..PROJECTS {
        let shown = || scene::done(sandbox, &ProjectShow { project: project(number) });
        wait_until(PATIENCE, &format!("the operations of p{number} to end"), || shown().operation.is_none());
        let status = shown().project.status;
        let whole = [ProjectStatus::Active, ProjectStatus::Paused, ProjectStatus::Stopped, ProjectStatus::Completed];
        assert!(
            whole.contains(&status)
                || status == ProjectStatus::Failed && books.members_alive(&project(number)).is_empty(),
            "p{number} is {status:?} without any operation"
        );
    }
}

/// Pauses every project, and asserts that no agent runs, neither under this daemon nor under the next.
fn pause_all(sandbox: &mut Sandbox, books: &Books) {
    for number in 0..PROJECTS {
        if books.was_continued(&project(number)) {
            // A process that a stray SIGCONT has woken in a tree that is frozen by signals is not checked here: the
            // project is paused again.
            let resume = ProjectResume { project: project(number), checkpoint: None, over_budget: false };
            let resumed = scene::refusal(sandbox.rpc().call(&resume));
            assert!(resumed.is_ok() || resumed.is_err_and(|refusal| refusal.code == Code::NotPaused));
        }
        let pause = ProjectPause { project: project(number), reason: None, mode: PauseMode::Freeze, grace_ms: None };
        let paused = poll_for(PATIENCE, || match scene::refusal(sandbox.rpc().call(&pause)) {
            Ok(_) => Some(()),
            Err(refusal) => match refusal.code {
                Code::AlreadyPaused | Code::NothingToPause => Some(()),
                Code::OperationInProgress => None,
                _ => panic!("p{number}: {refusal:?}"),
            },
        });
        assert!(paused.is_some(), "p{number} cannot be paused");
    }
    for _ in 0..2 {
        for number in 0..PROJECTS {
            let alive = books.members_alive(&project(number));
            let moving = || alive.iter().filter(|&&pid| process::is_alive(pid) && !scene::is_frozen(pid));
            // Processes that are being killed need a moment.
            let still = poll_for(PATIENCE, || moving().next().is_none().then_some(()));
            let who = |pid: &i32| format!("{pid} {} {:?}", process::command_line(*pid), process::state(*pid));
            assert!(still.is_some(), "in p{number} there move {:?}", moving().map(who).collect::<Vec<_>>());
        }
        let before = books.lines();
        wait_for_beats(BEATS);
        assert!(books.lines() == before, "a process writes in a paused project");
        sandbox.crash_and_restart();
    }
}

/// Resumes every project, and asserts that every agent runs again.
fn resume_all(sandbox: &Sandbox, members: &[Member], books: &Books) {
    for number in 0..PROJECTS {
        let resume = ProjectResume { project: project(number), checkpoint: None, over_budget: false };
        if let Err(refusal) = scene::refusal(sandbox.rpc().call(&resume)) {
            assert_eq!(refusal.code, Code::NotPaused, "p{number}: {refusal:?}");
        }
    }
    // Some agents must be left, or the rest of the test says nothing.
    let running = sandbox.agents().iter().filter(|agent| agent.pid.is_some()).count();
    assert!(running >= AGENTS / 10, "only {running} agents have outlived the chaos");
    let before = books.lines();
    let alive: BTreeSet<i32> = (0..PROJECTS).flat_map(|number| books.members_alive(&project(number))).collect();
    let stuck = || {
        let now = books.lines();
        let stands =
            |pid: &i32| before.iter().any(|line| line.pid == *pid && line.writer != "stopped" && now.contains(line));
        alive.iter().copied().filter(|pid| process::is_alive(*pid) && stands(pid)).collect::<Vec<_>>()
    };
    wait_until(PATIENCE, "every living process to write", || stuck().is_empty());
    for agent in sandbox.agents() {
        let runs = agent.status.as_str() == "running";
        assert!(runs == agent.pid.is_some() && (runs || agent.status.is_terminal()), "{agent:?}");
    }
    assert_eq!(sandbox.agents().len(), members.len());
}

/// Kills the agents that ignore SIGTERM, and stops the others with enough time to end.
fn end_all(sandbox: &Sandbox, members: &[Member], books: &Books) {
    let over = [Code::AgentNotRunning];
    for member in members.iter().filter(|member| member.kind == "deaf") {
        books.ordered_end(&member.target);
        let killed = scene::refusal(sandbox.rpc().call(&AgentKill { target: member.target.clone(), signal: None }));
        assert!(killed.as_ref().err().is_none_or(|refusal| over.contains(&refusal.code)), "{killed:?}");
    }
    for number in 0..PROJECTS {
        let target = Target { project: project(number), agent: None };
        let grace_ms = u64::try_from(PATIENCE.as_millis()).ok();
        let stopped = scene::refusal(sandbox.rpc().call(&AgentStop { target, grace_ms }));
        assert!(stopped.as_ref().err().is_none_or(|refusal| over.contains(&refusal.code)), "{stopped:?}");
    }
    // A restart may have been refused or lost during the chaos, but every agent can be started again.
    let one = &members[0].target;
    books.ordered_end(one);
    scene::done(sandbox, &AgentRestart { target: one.clone() });
    scene::done(sandbox, &AgentStop { target: one.clone(), grace_ms: u64::try_from(PATIENCE.as_millis()).ok() });
}

/// Checks for leftover processes, groups and sockets, and the status of every agent.
fn nothing_is_left(sandbox: &Sandbox, members: &[Member], books: &Books) {
    let agents = sandbox.agents();
    assert_eq!(agents.len(), members.len());
    for agent in agents {
        let (status, pid) = (agent.status, agent.pid);
        assert!(status.is_terminal() && pid.is_none(), "{}/{} is {status} with pid {pid:?}", agent.project, agent.name);
    }
    for number in 0..PROJECTS {
        assert_eq!(books.members_alive(&project(number)), Vec::<i32>::new(), "p{number} has left processes behind");
        let shown = scene::done(sandbox, &ProjectShow { project: project(number) });
        assert_eq!(shown.operation, None);
        assert!(
            [ProjectStatus::Stopped, ProjectStatus::Completed, ProjectStatus::Failed].contains(&shown.project.status)
                || shown.project.status == ProjectStatus::Active,
            "p{number} is {:?}",
            shown.project.status
        );
    }
    // Shims end a moment after they have reported the end of their agents.
    let rest = || {
        let daemon = sandbox.daemon_pid();
        let mut rest = sandbox.daemon_group().unwrap_or_default();
        rest.retain(|&pid| pid != daemon && process::is_alive(pid));
        rest
    };
    wait_until(PATIENCE, "the last shims to end", || rest().is_empty());
    if let Some(groups) = sandbox.agent_groups() {
        assert_eq!(groups, Vec::<std::path::PathBuf>::new(), "groups are left");
    }
    let sockets = std::fs::read_dir(sandbox.path().join("r/shims")).expect("list the shims' sockets");
    let sockets: Vec<_> = sockets.flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(sockets, Vec::<std::ffi::OsString>::new(), "sockets of shims are left");
}
