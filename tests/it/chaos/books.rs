//! The books: what agents have recorded of themselves and what was done to them, compared with the records of the
//! daemon and the shims.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use fermata_protocol::agent::ExitStatus;
use fermata_protocol::event::Event;
use fermata_protocol::subscription::RecordedEvent;
use fermata_protocol::subscription::{EventFilter, EventsList};
use fermata_protocol::{ProjectName, RunId, Target};
use fermata_tests::{Sandbox, process};
use serde_json::Value;

use super::{Member, unix_ms};
use crate::scene;

/// How long after an order to end an end may be due to it.
const ORDER_HOLDS_MS: i64 = 120_000;

/// The progress of one writer by its own record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub run: String,
    /// The name of the process in the tree.
    pub writer: String,
    pub pid: i32,
    /// The line that it was about to write.
    begun: u64,
    /// The last line that it has written: `begun`, or one less.
    written: u64,
}

/// The records of the test.
#[derive(Debug)]
pub struct Books {
    ledger: PathBuf,
    state: PathBuf,
    socket: String,
    orders: Mutex<Vec<(Target, i64)>>,
    killed_shims: Mutex<BTreeSet<String>>,
    continued: Mutex<BTreeSet<ProjectName>>,
}

impl Books {
    /// Creates empty books.
    pub fn open(sandbox: &Sandbox) -> Self {
        let ledger = sandbox.path().join("ledger");
        fs::create_dir(&ledger).expect("create the ledger");
        let socket = format!("FERMATA_SOCKET={}", sandbox.socket().display());
        let state = sandbox.state_dir();
        Self {
            ledger,
            state,
            socket,
            orders: Mutex::default(),
            killed_shims: Mutex::default(),
            continued: Mutex::default(),
        }
    }

    /// Returns the directory in which agents write their records.
    pub fn ledger(&self) -> &Path {
        &self.ledger
    }

    /// Records that the test is about to end an agent.
    pub fn ordered_end(&self, target: &Target) {
        self.orders.lock().expect("no thread panics while it records").push((target.clone(), unix_ms()));
    }

    /// Records that the shim of a run is about to be killed.
    pub fn killed_shim(&self, run: &RunId) {
        self.killed_shims.lock().expect("no thread panics while it records").insert(run.to_string());
    }

    /// Records that the test is about to continue a process of a project.
    pub fn continues_in(&self, project: &ProjectName) {
        self.continued.lock().expect("no thread panics while it records").insert(project.clone());
    }

    /// Says whether the test has continued a process of the project.
    pub fn was_continued(&self, project: &ProjectName) -> bool {
        self.continued.lock().expect("no thread panics while it records").contains(project)
    }

    /// Reads which processes run; `None` while a launch is in progress.
    pub fn record(&self, target: &Target, run: &RunId) -> Option<Value> {
        let path = self.run_dir(target, run.as_str()).join("run.json");
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    fn run_dir(&self, target: &Target, run: &str) -> PathBuf {
        let agent = target.agent.as_ref().expect("a run is of one agent");
        let agents = self.state.join("projects").join(target.project.as_str()).join("agents");
        agents.join(agent.as_str()).join("runs").join(run)
    }

    /// Returns the living processes of a project's agents, found by the environment that they inherit.
    pub fn members_alive(&self, project: &ProjectName) -> Vec<i32> {
        self.marked(&[format!("FERMATA_PROJECT={project}")])
    }

    /// Returns the living processes of one agent.
    pub fn processes_of(&self, target: &Target) -> Vec<i32> {
        let agent = target.agent.as_ref().expect("a target of the chaos is one agent");
        self.marked(&[format!("FERMATA_PROJECT={}", target.project), format!("FERMATA_AGENT={agent}")])
    }

    fn marked(&self, marks: &[String]) -> Vec<i32> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").expect("list /proc").flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            // A zombie or a process that has ended since it was listed has no environment.
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let has = |mark: &str| environment.split(|&b| b == 0).any(|variable| variable == mark.as_bytes());
            if has(&self.socket) && marks.iter().all(|mark| has(mark)) && process::is_alive(pid) {
                found.push(pid);
            }
        }
        found.sort_unstable();
        found
    }

    /// Reads the progress of every writer.
    pub fn lines(&self) -> Vec<Line> {
        let mut lines = Vec::new();
        for entry in fs::read_dir(&self.ledger).expect("list the ledger").flatten() {
            let name = entry.file_name().into_string().expect("books have ASCII names");
            let (run, writer) = name.split_once('.').expect("a book is named RUN.WRITER");
            if writer == "exit" {
                continue;
            }
            let text = fs::read_to_string(entry.path()).expect("read a book");
            let mut numbers = text.split_whitespace().map(|word| word.parse::<u64>().expect("books hold numbers"));
            // A writer that was killed before its first record has written nothing.
            let (Some(pid), Some(begun), Some(written)) = (numbers.next(), numbers.next(), numbers.next()) else {
                continue;
            };
            let pid = i32::try_from(pid).expect("a process id fits into 31 bits");
            lines.push(Line { run: run.into(), writer: writer.into(), pid, begun, written });
        }
        lines.sort_by(|a, b| (&a.run, &a.writer).cmp(&(&b.run, &b.writer)));
        lines
    }

    /// Reads the exit code with which the main process of a run intended to end.
    fn last_page(&self, run: &str) -> Option<i32> {
        fs::read_to_string(self.ledger.join(format!("{run}.exit"))).ok()?.trim().parse().ok()
    }

    /// Asserts that every run has one end, with the right code, and that every line is in its log.
    pub fn balance(&self, sandbox: &Sandbox, members: &[Member], events: &[RecordedEvent]) {
        let stories = stories(events);
        let mut wrong = Vec::new();
        let mut account = Account::default();
        let lines = self.lines();
        for (run, story) in &stories {
            if story.ends.is_empty() && story.superseded && self.never_ran(run, story, &lines) {
                account.unborn += 1;
                continue;
            }
            let own: Vec<&Line> = lines.iter().filter(|line| line.run == *run).collect();
            if let Err(why) = self.check(run, story, &own, &mut account) {
                wrong.push(format!("{} {run}: {why}; {:?}", story.target, story.ends));
            }
        }
        for member in members {
            let runs = self.run_dir(&member.target, "");
            for entry in fs::read_dir(&runs).into_iter().flatten().flatten() {
                let name = entry.file_name().into_string().expect("runs have ASCII names");
                if !stories.contains_key(&name) {
                    wrong.push(format!("{} has files of a run {name} that no event speaks of", member.target));
                }
            }
        }
        wrong.extend(
            lines.iter().filter(|line| !stories.contains_key(&line.run)).map(|line| format!("{line:?}: no such run")),
        );
        println!("{} runs: {account:?}", stories.len());
        assert!(wrong.is_empty(), "{wrong:#?}\n{}", sandbox.log());
        assert!(
            stories.len() >= members.len() && account.codes > 0 && account.lines > 0,
            "nothing was tested: {account:?}"
        );
    }

    /// A run that was announced, but not launched before the daemon died, has no end; the next daemon announces
    /// another run for its agent.
    fn never_ran(&self, run: &str, story: &Story, lines: &[Line]) -> bool {
        let born = self.run_dir(&story.target, run).join("run.json").exists();
        !born && !story.started && lines.iter().all(|line| line.run != *run)
    }

    fn check(&self, run: &str, story: &Story, own: &[&Line], account: &mut Account) -> Result<(), String> {
        let dir = self.run_dir(&story.target, run);
        let recorded = exit_record(&dir);
        let shim_killed = self.killed_shims.lock().expect("no thread panicked").contains(run);
        let complete = match story.ends.as_slice() {
            [End::Exited(exit, at)] => {
                if recorded != Some(*exit) {
                    return Err(format!("exit.json says {recorded:?}"));
                }
                self.check_exit(run, story, *exit, *at, own, account)?;
                true
            }
            [End::Interrupted(detail)] => {
                account.interrupted += 1;
                let unborn = detail.contains("while it was being started");
                if !shim_killed && !unborn {
                    return Err("its shim was not killed".into());
                }
                recorded.is_some()
            }
            [End::Parked] | [End::Parked, End::Interrupted(_)] => {
                account.parked += 1;
                if recorded.is_none() && !shim_killed {
                    return Err("it was parked without a record of its exit".into());
                }
                recorded.is_some()
            }
            [End::LaunchFailed(reason)] => return Err(format!("it could not be started: {reason}")),
            other => return Err(format!("it has {} ends", other.len())),
        };
        self.check_log(&dir, own, complete, account)
    }

    fn check_exit(
        &self,
        run: &str,
        story: &Story,
        exit: ExitStatus,
        at: i64,
        own: &[&Line],
        account: &mut Account,
    ) -> Result<(), String> {
        let meant = self.last_page(run);
        match exit {
            ExitStatus::Code(code) => {
                account.codes += 1;
                if meant != Some(code) {
                    return Err(format!("it meant to leave with {meant:?}"));
                }
            }
            ExitStatus::Signal(signal) => {
                account.signals += 1;
                let orders = self.orders.lock().expect("no thread panicked");
                let ordered = |(target, given): &(Target, i64)| {
                    *target == story.target && *given <= at && at - given < ORDER_HOLDS_MS
                };
                let early = own.iter().all(|line| line.writer != "main");
                let possible = signal == 9 || signal == 15 && early;
                if !possible || !orders.iter().any(ordered) {
                    return Err(format!("it was not ordered to end; it intended to exit with {meant:?}"));
                }
            }
        }
        Ok(())
    }

    fn check_log(&self, dir: &Path, own: &[&Line], complete: bool, account: &mut Account) -> Result<(), String> {
        let mut written: BTreeMap<String, u64> = BTreeMap::new();
        for payload in log(dir)? {
            let (writer, number) = payload.split_once(' ').ok_or_else(|| format!("its log says {payload:?}"))?;
            let last = written.entry(writer.to_owned()).or_default();
            if number.parse() != Ok(*last + 1) {
                return Err(format!("in its log line {number} of {writer} comes after line {last}"));
            }
            *last += 1;
        }
        for line in own {
            let logged = written.remove(&line.writer).unwrap_or(0);
            account.lines += logged;
            if logged > line.begun || complete && logged < line.written {
                return Err(format!("its log has {logged} lines of {line:?}"));
            }
        }
        if written.is_empty() { Ok(()) } else { Err(format!("no process wrote {written:?}, which is in its log")) }
    }
}

/// The number of facts that were checked, to detect a test of nothing.
#[derive(Debug, Default)]
struct Account {
    codes: usize,
    signals: usize,
    interrupted: usize,
    parked: usize,
    unborn: usize,
    lines: u64,
}

/// The events of one run.
#[derive(Debug)]
struct Story {
    target: Target,
    started: bool,
    superseded: bool,
    ends: Vec<End>,
}

#[derive(Debug)]
enum End {
    Exited(ExitStatus, i64),
    Interrupted(String),
    Parked,
    LaunchFailed(String),
}

fn stories(events: &[RecordedEvent]) -> BTreeMap<String, Story> {
    let mut stories = BTreeMap::new();
    for recorded in events {
        let (run, end) = match &recorded.event {
            Event::AgentStarting { agent, run, .. } => {
                let target = Target::agent(recorded.project.clone(), agent.clone());
                for earlier in stories.values_mut().filter(|story: &&mut Story| story.target == target) {
                    earlier.superseded = true;
                }
                let story = Story { target, started: false, superseded: false, ends: Vec::new() };
                assert!(stories.insert(run.to_string(), story).is_none(), "run {run} begins twice");
                continue;
            }
            Event::AgentStarted { run, .. } => {
                stories.get_mut(run.as_str()).unwrap_or_else(|| panic!("run {run} was not announced")).started = true;
                continue;
            }
            Event::AgentExited { run, exit, ended_at, .. } => (run, End::Exited(*exit, ended_at.0)),
            Event::AgentInterrupted { run, detail, .. } => (run, End::Interrupted(detail.clone())),
            Event::AgentParked { run, .. } => (run, End::Parked),
            Event::AgentLaunchFailed { run, reason, .. } => (run, End::LaunchFailed(reason.clone())),
            _ => continue,
        };
        stories.get_mut(run.as_str()).unwrap_or_else(|| panic!("run {run} ends before it begins")).ends.push(end);
    }
    stories
}

/// Reads all events, oldest first.
pub fn events(sandbox: &Sandbox) -> Vec<RecordedEvent> {
    let mut all = Vec::new();
    let mut cursor = None;
    loop {
        let list = EventsList { cursor: cursor.take(), filter: EventFilter::default(), limit: Some(200) };
        let page = scene::done(sandbox, &list);
        if page.events.is_empty() {
            return all;
        }
        all.extend(page.events);
        cursor = Some(page.cursor);
    }
}

fn exit_record(run_dir: &Path) -> Option<ExitStatus> {
    let record: Value = serde_json::from_slice(&fs::read(run_dir.join("exit.json")).ok()?).ok()?;
    let number = |name: &str| record[name].as_i64().and_then(|number| i32::try_from(number).ok());
    number("signal").map(ExitStatus::Signal).or(number("code").map(ExitStatus::Code))
}

/// Reads the log of a run, in order: `TIME STREAM F TEXT`.
fn log(run_dir: &Path) -> Result<Vec<String>, String> {
    // A few lines only: no run reaches the size at which a log is rotated.
    let bytes = fs::read(run_dir.join("logs/current.log")).unwrap_or_default();
    let text = String::from_utf8(bytes).map_err(|e| format!("its log: {e}"))?;
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let payload = |line: &str| match line.splitn(4, ' ').collect::<Vec<_>>().as_slice() {
        [_, "stdout" | "stderr", "F", payload] => Ok((*payload).to_owned()),
        _ => Err(format!("its log has the line {line:?}")),
    };
    whole.lines().map(payload).collect()
}

/// Checks the database of a daemon that has ended.
pub fn database_is_whole(sandbox: &Sandbox) {
    let path = sandbox.state_dir().join("fermata.sqlite");
    let database = rusqlite::Connection::open(path).expect("open the database");
    let said: String = database.query_row("PRAGMA quick_check", [], |row| row.get(0)).expect("check the database");
    assert_eq!(said, "ok");
    let mut foreign = database.prepare("PRAGMA foreign_key_check").expect("check foreign keys");
    assert!(!foreign.exists([]).expect("check foreign keys"), "a row refers to one that is not there");
}
