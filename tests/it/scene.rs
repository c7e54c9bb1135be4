//! The project of the tests of pausing and restoring: `web`, whose agent appends a mark to a file every few
//! milliseconds, so that a test can tell whether it runs.

use std::collections::HashSet;
use std::fs;
use std::io::Read as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use fermata_protocol::agent::{AgentRun, AgentView};
use fermata_protocol::checkpoint::{CheckpointCreate, CheckpointList, CheckpointVerify, CheckpointView};
use fermata_protocol::client::{Client, ClientError};
use fermata_protocol::context::{ContextList, ContextPut, ItemType, NewItem};
use fermata_protocol::method::Method;
use fermata_protocol::operation::{OperationList, OperationView};
use fermata_protocol::pause::{PauseMode, PauseResult, ProjectPause, ProjectResume, ResumeResult};
use fermata_protocol::project::{ProjectConfig, ProjectDetail, ProjectSet, ProjectShow, ProjectStatus};
use fermata_protocol::{AgentName, Code, ProjectName, Refusal, Target};
use fermata_tests::metronome::wait_for_beats;
use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::{Sandbox, Workspace, process};

/// The number of marks that a running agent would write while the test asserts that the agent writes none.
const BEATS: u64 = 10;

/// Writes a mark every 20 ms.
pub const TICK: &str = "while :; do printf . >> \"$MARKS\"; sleep 0.02; done";

/// Also writes marks from two more sessions: one of a child, one of an orphan.
pub const TICK_EVERYWHERE: &str = "export MARKS\n\
    setsid sh -c 'while :; do printf . >> \"$MARKS.child\"; sleep 0.02; done' &\n\
    (setsid sh -c 'while :; do printf . >> \"$MARKS.orphan\"; sleep 0.02; done' &)\n\
    while :; do printf . >> \"$MARKS\"; sleep 0.02; done";

/// The two ways to freeze, as sections of `fermata.toml`.
pub const BY_GROUP: &str = "";
pub const BY_SIGNALS: &str = "[agents]\nfreezer = \"signals\"\n";

/// The lease in tests that wait for its end: long enough for a daemon that gets a fifth of a processor to renew it in
/// time.
pub const LEASE: Duration = Duration::from_secs(5);

/// Returns a `[pause]` section with this lease.
pub fn short_lease() -> String {
    format!("[pause]\nlease_ms = {}\n", LEASE.as_millis())
}

pub fn web() -> ProjectName {
    project("web")
}

pub fn project(name: &str) -> ProjectName {
    ProjectName::new(name).expect("the tests' names are valid")
}

pub fn agent(name: &str) -> AgentName {
    AgentName::new(name).expect("the tests' names are valid")
}

pub fn worker() -> Target {
    Target::agent(web(), agent("worker"))
}

/// An agent that writes marks.
#[derive(Debug, Clone)]
pub struct Ticker {
    marks: PathBuf,
}

impl Ticker {
    /// Starts `web/worker` in a workspace of a few files and waits for its first marks.
    pub fn start(sandbox: &Sandbox) -> Self {
        Self::running(sandbox, "web", "worker", TICK)
    }

    /// Starts an agent with a shell script and waits for its first marks.
    #[track_caller]
    pub fn running(sandbox: &Sandbox, name: &str, worker: &str, script: &str) -> Self {
        let workspace = furnished(sandbox, name);
        let marks = sandbox.path().join(format!("marks-{name}-{worker}"));
        let env =
            [("PATH", std::env::var("PATH").unwrap_or_default()), ("MARKS", marks.to_string_lossy().into_owned())];
        let run = AgentRun {
            project: project(name),
            workspace: Some(workspace.text().into()),
            name: Some(agent(worker)),
            argv: ["/bin/sh", "-c", script].map(String::from).to_vec(),
            env: env.map(|(name, value)| (name.to_owned(), value)).into(),
            cwd: None,
            umask: None,
            limits: Default::default(),
            resume_argv: None,
            profile: None,
            stop_grace_ms: Some(0),
            supervision: Default::default(),
        };
        sandbox.rpc().call(&run).expect("start the agent");
        let ticker = Self { marks };
        ticker.runs(SOON);
        ticker
    }

    /// Returns the marks of another process of the same agent, for instance of a child.
    pub fn beside(&self, ending: &str) -> Self {
        Self { marks: self.marks.with_extension(ending) }
    }

    /// Reads a file that the agent wrote beside its marks.
    pub fn text(&self, ending: &str) -> Option<String> {
        fs::read_to_string(self.marks.with_extension(ending)).ok()
    }

    /// Returns the number of marks.
    pub fn count(&self) -> u64 {
        fs::metadata(&self.marks).map_or(0, |meta| meta.len())
    }

    /// Waits until the agent writes more marks.
    #[track_caller]
    pub fn runs(&self, deadline: Duration) {
        let before = self.count();
        wait_until(deadline, &format!("marks in {}", self.marks.display()), || self.count() > before + 1);
    }

    /// Waits until the agent writes no more marks.
    #[track_caller]
    pub fn comes_to_rest(&self) {
        wait_until(SOON, &format!("{} to get no more marks", self.marks.display()), || {
            let before = self.count();
            wait_for_beats(BEATS);
            self.count() == before
        });
    }

    /// Asserts that the agent writes no mark while a running process writes ten.
    #[track_caller]
    pub fn stands_still(&self) {
        let before = self.count();
        wait_for_beats(BEATS);
        assert_eq!(self.count(), before, "marks were added to {} while the agent must not run", self.marks.display());
    }
}

/// Returns the workspace `web`, filled with a few files.
pub fn furnished(sandbox: &Sandbox, name: &str) -> Workspace {
    let workspace = sandbox.workspace(name);
    if !workspace.has("README.md") {
        workspace
            .write("README.md", "# A project\n")
            .write("src/lib.rs", "//! Empty.\n")
            .write("src/deep/a.txt", "a\n");
    }
    workspace
}

/// Pauses `web`.
pub fn pause(sandbox: &Sandbox, mode: PauseMode) -> Result<PauseResult, Refusal> {
    pause_within(sandbox, mode, None)
}

/// Pauses `web` with this grace.
pub fn pause_within(sandbox: &Sandbox, mode: PauseMode, grace_ms: Option<u64>) -> Result<PauseResult, Refusal> {
    let pause = ProjectPause { project: web(), reason: Some("lunch".into()), mode, grace_ms };
    refusal(sandbox.rpc().call(&pause))
}

/// Pauses `web` with a daemon that may die of it; returns the result of the call.
pub fn pause_at_risk(sandbox: &Sandbox, mode: PauseMode) -> Result<PauseResult, ClientError> {
    sandbox.rpc().call(&ProjectPause { project: web(), reason: None, mode, grace_ms: None })
}

/// Resumes `web`.
pub fn resume(sandbox: &Sandbox) -> Result<ResumeResult, Refusal> {
    refusal(sandbox.rpc().call(&ProjectResume { project: web(), checkpoint: None, over_budget: false }))
}

/// Calls a method and returns its result.
#[track_caller]
pub fn done<M: Method>(sandbox: &Sandbox, params: &M) -> M::Result {
    match sandbox.rpc().call(params) {
        Ok(result) => result,
        Err(error) => panic!("{}: {error}", M::NAME),
    }
}

/// Calls a method and returns its refusal.
#[track_caller]
pub fn refused<M: Method>(sandbox: &Sandbox, params: &M) -> Refusal
where
    M::Result: std::fmt::Debug,
{
    refusal(sandbox.rpc().call(params)).expect_err("it must be refused")
}

/// Returns the refusal in an error; any other error fails the test.
#[track_caller]
pub fn refusal<T>(result: Result<T, ClientError>) -> Result<T, Refusal> {
    match result {
        Ok(value) => Ok(value),
        Err(ClientError::Refused(refusal)) => Err(refusal),
        Err(other) => panic!("the daemon broke: {other}"),
    }
}

/// Shows `web`.
#[track_caller]
pub fn show(sandbox: &Sandbox) -> ProjectDetail {
    done(sandbox, &ProjectShow { project: web() })
}

/// Returns incompressible bytes.
pub fn noise(bytes: usize) -> Vec<u8> {
    let mut noise = vec![0_u8; bytes];
    fs::File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut noise)).expect("read urandom");
    noise
}

/// Returns the status of `web`.
#[track_caller]
pub fn status(sandbox: &Sandbox) -> ProjectStatus {
    show(sandbox).project.status
}

/// Waits until no operation is under way in `web`.
#[track_caller]
pub fn settled(sandbox: &Sandbox) -> ProjectDetail {
    let start = Instant::now();
    loop {
        let shown = show(sandbox);
        if shown.operation.is_none() {
            return shown;
        }
        assert!(start.elapsed() < SOON, "the operation does not end: {:?}", shown.operation);
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Returns the only agent of `web`.
#[track_caller]
pub fn the_agent(sandbox: &Sandbox) -> AgentView {
    let mut agents = show(sandbox).agents;
    assert_eq!(agents.len(), 1, "{agents:?}");
    agents.remove(0)
}

/// Creates a checkpoint of `web`.
#[track_caller]
pub fn checkpoint(sandbox: &Sandbox) -> CheckpointView {
    let create = CheckpointCreate { project: Some(web()), name: None, description: String::new() };
    done(sandbox, &create).checkpoint
}

/// Lists the checkpoints of `web`, oldest first.
#[track_caller]
pub fn checkpoints(sandbox: &Sandbox) -> Vec<u64> {
    let list = CheckpointList { project: web(), before: None, limit: None };
    let mut numbers: Vec<u64> = done(sandbox, &list).checkpoints.iter().map(|view| view.id).collect();
    numbers.reverse();
    numbers
}

/// Verifies every part of every checkpoint of `web`.
#[track_caller]
pub fn all_verify(sandbox: &Sandbox) {
    for one in done(sandbox, &CheckpointVerify { project: web(), checkpoint: None }).checkpoints {
        assert!(one.good, "checkpoint {}: {:?}", one.checkpoint_id, one.problems);
    }
}

/// Lists the operations of `web`, newest first.
#[track_caller]
pub fn operations(sandbox: &Sandbox) -> Vec<OperationView> {
    done(sandbox, &OperationList { project: Some(web()), limit: None }).operations
}

/// Waits until the operation under way reaches the step of this name; returns the operation.
#[track_caller]
pub fn step_is(sandbox: &Sandbox, step: &str) -> OperationView {
    let mut found = None;
    wait_until(SOON, &format!("the step {step}"), || {
        found = show(sandbox).operation.filter(|operation| operation.step.as_deref() == Some(step));
        found.is_some()
    });
    found.expect("it was waited for")
}

/// Gives `web/worker` ten context items and a token limit at which the next pause archives some of them.
pub fn fill_context(sandbox: &Sandbox) {
    let text = "many words that say little and are here only to be counted ".repeat(4);
    let items =
        (0..10).map(|n| NewItem { kind: ItemType::Other, text: format!("{n} {text}"), pinned: false }).collect();
    done(sandbox, &ContextPut { target: Some(worker()), items });
    let config = ProjectConfig { token_limit: 200, ..show(sandbox).config };
    done(sandbox, &ProjectSet { project: web(), description: None, phase: None, config: Some(config) });
    assert_eq!(archived(sandbox), 0);
}

/// Counts the archived context items of `web`.
#[track_caller]
pub fn archived(sandbox: &Sandbox) -> usize {
    let list = ContextList { target: Some(worker()), tier: None, archived: Some(true), before: None, limit: None };
    done(sandbox, &list).items.len()
}

/// Opens a connection that authenticates as the agent with this token.
#[track_caller]
pub fn as_agent(sandbox: &Sandbox, token: &str) -> Client {
    let (mut client, _) =
        Client::connect(sandbox.socket(), "fermata-tests", Some(token.into())).expect("connect as the agent");
    client.set_read_timeout(Some(SOON)).expect("limit how long a read waits");
    client
}

/// Says whether a process is frozen: stopped, waiting in vfork for a stopped child, or in a frozen group. For a moment
/// this may also be true of a running process that waits for the disk or in vfork.
pub fn is_frozen(pid: i32) -> bool {
    let frozen = || {
        let group = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let inside = group.lines().find_map(|line| line.strip_prefix("0::"))?.trim_start_matches('/').to_owned();
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let mount = mounts.lines().find_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            after.starts_with("cgroup2 ").then(|| before.split(' ').nth(4).map(str::to_owned))?
        })?;
        let events = fs::read_to_string(PathBuf::from(mount).join(inside).join("cgroup.events")).ok()?;
        Some(events.contains("frozen 1"))
    };
    matches!(process::state(pid), Some('T' | 'D')) || frozen() == Some(true)
}

/// The project's directory inside the state directory.
pub fn project_dir(sandbox: &Sandbox) -> PathBuf {
    sandbox.state_dir().join("projects/web")
}

/// Asserts that the project has only these checkpoints, each with its ref, and no temporary files.
#[track_caller]
pub fn only_these_are_left(sandbox: &Sandbox, numbers: &[u64]) {
    let dir = project_dir(sandbox);
    assert_eq!(checkpoints(sandbox), numbers, "rows");
    let names = |path: PathBuf| -> Vec<String> {
        let Ok(entries) = fs::read_dir(path) else { return Vec::new() };
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    let mut found = names(dir.join("checkpoints"));
    found.sort_by_key(|name| name.parse::<u64>().ok());
    let wanted: Vec<String> = numbers.iter().map(u64::to_string).collect();
    assert_eq!(found, wanted, "directories of checkpoints");
    if dir.join("history/history.git").exists() {
        let bare = format!("--git-dir={}", dir.join("history/history.git").display());
        let refs = Workspace::at(sandbox.path()).git(&[&bare, "for-each-ref", "--format=%(refname)"]);
        let mut refs: Vec<u64> = refs.lines().filter_map(|name| name.rsplit('/').next()?.parse().ok()).collect();
        refs.sort_unstable();
        assert_eq!(refs, numbers, "refs");
        let pending = dir.join("history/history.git/pending");
        // The daemon may be scanning the workspace.
        wait_until(SOON, "staged snapshots to be removed", || names(pending.clone()).is_empty());
        let packs = dir.join("history/history.git/objects/pack");
        let unneeded = || -> Vec<String> {
            // In this order, so that `needed` covers every pack in `all` if a scan publishes one in between.
            let all = names(packs.clone());
            let needed = Workspace::at(sandbox.path()).git(&[&bare, "rev-list", "--objects", "--all"]);
            let needed: HashSet<&str> = needed.lines().filter_map(|line| line.split(' ').next()).collect();
            let is_needed = |pack: &String| {
                let path = packs.join(pack);
                let contents = Command::new("git").args(["verify-pack", "-v"]).arg(&path).output().expect("run git");
                if !path.exists() {
                    // The pack was removed in the meantime.
                    return true;
                }
                assert!(contents.status.success(), "{contents:?}");
                let contents = String::from_utf8_lossy(&contents.stdout);
                let mut objects = contents.lines().map(|line| line.split_whitespace().take(2).collect::<Vec<_>>());
                // A scan that a later scan has replaced is removed at the next start or consolidation.
                let is_warm_up = |id: &str| {
                    let commit = Command::new("git").args([&bare, "cat-file", "-p", id]).output().expect("run git");
                    // Or the pack was removed in the meantime.
                    if path.exists() {
                        assert!(commit.status.success(), "{commit:?}");
                    }
                    !commit.status.success() || String::from_utf8_lossy(&commit.stdout).contains("warm-up scan of ")
                };
                objects.any(|one| match one[..] {
                    [id, kind] => needed.contains(id) || (kind == "commit" && is_warm_up(id)),
                    _ => false,
                })
            };
            all.into_iter().filter(|name| name.ends_with(".idx") && !is_needed(name)).collect()
        };
        wait_until(SOON, &format!("packs that no checkpoint of {numbers:?} needs to go"), || unneeded().is_empty());
    }
    let plans: Vec<String> = names(dir).into_iter().filter(|name| name.starts_with("restore-")).collect();
    assert_eq!(plans, Vec::<String>::new(), "plans of restores");
    let mut directories = vec![sandbox.state_dir(), sandbox.workspace("web").path().to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            if path.is_dir() {
                directories.push(path);
            } else {
                let temporary = [".tmp", ".partial", ".draft", ".lock", "fermata-restore"];
                assert!(!temporary.iter().any(|part| name.contains(part)), "{} is left over", path.display());
            }
        }
    }
}

/// Asserts that `web` runs as if there had been no pause.
#[track_caller]
pub fn is_untouched(sandbox: &Sandbox, ticker: &Ticker, numbers: &[u64]) {
    let shown = show(sandbox);
    assert_eq!(shown.project.status, ProjectStatus::Active);
    assert_eq!(shown.operation, None);
    let agent = the_agent(sandbox);
    assert_eq!(agent.status.as_str(), "running", "{agent:?}");
    wait_until(SOON, "the agent to be let go", || !is_frozen(agent.pid.expect("it runs")));
    ticker.runs(SOON);
    assert_eq!(archived(sandbox), 0, "a pause that failed archives nothing");
    only_these_are_left(sandbox, numbers);
}

/// Asserts that a refusal has the code of a failed pause.
#[track_caller]
pub fn is_failure(refusal: &Refusal) {
    assert_eq!(refusal.code, Code::PauseFailed, "{refusal:?}");
}
