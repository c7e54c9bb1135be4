//! One agent under a real shim: its directory, its spec and a link. No process outlives the test.

use std::collections::HashSet;
use std::panic::Location;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use fermata_daemon::shims::launch::{LaunchError, Launched, launch};
use fermata_daemon::shims::link::ShimLink;
use fermata_daemon::shims::lost::end_lost_tree;
use fermata_os::cgroup::FreezerSetting;
use fermata_os::cgroup::Group;
use fermata_os::process;
use fermata_shim::log_line::LogFileLine;
use fermata_shim::log_reader::{LogReader, Start};
use fermata_shim::raw::RawString;
use fermata_shim::record::{ExitRecord, RunRecord, read_exit, read_run};
use fermata_shim::spec::{LaunchSpec, LogLimits, SPEC_VERSION};
use fermata_shim::wire::ShimEvent;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

/// Returns the path of the shim, which `cargo build --workspace` puts beside the programs of this package.
pub fn shim_program() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_fermata-plugin-host")).with_file_name("fermata-shim");
    assert!(path.exists(), "{} is missing: run the tests with --workspace", path.display());
    path
}

/// The deadline after which a test counts as hung. No test waits this long for something that does not happen.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// A lease or a grace that does not end within a test.
pub const LONG: Duration = Duration::from_secs(600);
/// How often a process outside the tree writes while no process of the tree may.
pub const BEATS: u64 = 20;

pub struct Bed {
    dir: tempfile::TempDir,
    pub spec: LaunchSpec,
}

impl Bed {
    /// Creates a bed for `sh -c script`.
    pub fn new(mechanism: FreezerSetting, script: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("shim-").tempdir().unwrap();
        let name = dir.path().file_name().unwrap().to_string_lossy().into_owned();
        let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
        let spec = LaunchSpec {
            version: SPEC_VERSION,
            project: "p".into(),
            agent: "a".into(),
            run_id: format!("run-{}-{name}", std::process::id()),
            argv: ["sh", "-c", script].into_iter().map(Into::into).collect(),
            env: vec![("PATH".into(), path.into())],
            cwd: dir.path().to_path_buf(),
            umask: 0o022,
            rlimits: Vec::new(),
            run_dir: dir.path().join("run"),
            socket: dir.path().join("s/shim.sock"),
            cgroup_parent: None,
            cgroup_name: format!("fermata-test-{}-{name}", std::process::id()),
            mechanism,
            terminal: None,
            tree_limits: Default::default(),
            log: LogLimits::default(),
            stop_grace_ms: 5_000,
            output: fermata_protocol::supervision::OutputPolicy::Block,
            pre_start: None,
            post_stop: None,
        };
        Self { dir, spec }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub async fn try_launch(&self) -> Result<Launched, LaunchError> {
        launch(&shim_program(), &self.spec).await
    }

    pub async fn launch(&self) -> (Launched, ShimLink, mpsc::Receiver<ShimEvent>) {
        let launched = self.try_launch().await.unwrap();
        let (link, events) = self.connect().await;
        assert_eq!(link.run_id(), self.spec.run_id);
        assert_eq!(link.shim(), launched.shim);
        (launched, link, events)
    }

    pub async fn connect(&self) -> (ShimLink, mpsc::Receiver<ShimEvent>) {
        ShimLink::connect(&self.spec.socket, &TaskTracker::new()).await.unwrap()
    }

    pub fn run(&self) -> RunRecord {
        read_run(&self.spec.run_dir).unwrap().expect("run.json")
    }

    pub fn exit(&self) -> Option<ExitRecord> {
        read_exit(&self.spec.run_dir).unwrap()
    }

    /// Waits for exit.json, for tests without a link.
    pub async fn exit_record(&self) -> ExitRecord {
        until("exit.json", || self.exit().is_some()).await;
        self.exit().unwrap()
    }

    pub fn size(&self, name: &str) -> u64 {
        std::fs::metadata(self.path(name)).map_or(0, |meta| meta.len())
    }

    pub fn logs(&self) -> Vec<LogFileLine> {
        let mut reader = LogReader::open(&self.spec.run_dir.join("logs"), Start::Begin).unwrap();
        let mut all = Vec::new();
        loop {
            let batch = reader.next_batch(1 << 20).unwrap();
            if batch.is_empty() {
                return all;
            }
            all.extend(batch);
        }
    }

    /// Returns all living processes of this run, in any session or group.
    pub fn living(&self) -> Vec<i32> {
        let variable = format!("FERMATA_RUN_ID={}", self.spec.run_id);
        process::all()
            .unwrap()
            .into_iter()
            .filter(|stat| stat.state() != process::RunState::Dead)
            .map(|stat| stat.id.pid)
            .filter(|pid| process::started_with(*pid, variable.as_bytes()))
            .collect()
    }

    /// Waits until the agent has appended to these files.
    pub async fn growing(&self, names: &[&str]) {
        let before: Vec<u64> = names.iter().map(|name| self.size(name)).collect();
        until("the files to grow", || names.iter().zip(&before).all(|(name, size)| self.size(name) > *size)).await;
    }

    /// Asserts that the whole tree is frozen: the kernel reports it for each process, and these files do not change
    /// while a process outside the tree writes.
    #[track_caller]
    pub fn still(&self, names: &[&str]) -> impl Future<Output = ()> {
        let caller = Location::caller();
        async move {
            assert_eq!(self.at_large(), [], "not frozen at {caller}");
            self.unchanged(names).await;
            assert_eq!(self.at_large(), [], "no longer frozen at {caller}");
        }
    }

    /// Waits until the kernel reports each process of the tree as frozen, and asserts that this does not change.
    pub async fn comes_to_rest(&self, names: &[&str]) {
        until("the tree to stand still", || self.at_large().is_empty()).await;
        self.still(names).await;
    }

    /// Asserts that these files do not change while a process outside the tree writes [`BEATS`] times, at the pace of
    /// the writers in the tree.
    pub async fn unchanged(&self, names: &[&str]) {
        let sizes = || -> Vec<_> { names.iter().map(|name| (name.to_string(), self.size(name))).collect() };
        let before = sizes();
        Metronome::start().beat(BEATS).await;
        assert_eq!(sizes(), before, "a process of a frozen tree wrote");
    }

    /// Returns the living processes of the run that are not frozen, each with its state letter. A process is frozen if
    /// it is stopped by a signal, waits in vfork for a stopped child, or is in a frozen control group.
    pub fn at_large(&self) -> Vec<(i32, char)> {
        let frozen = self.run().cgroup.map_or_else(HashSet::new, |path| {
            let group = Group::open(&path).unwrap();
            // In this order, so that a process that joins the group in between does not count as frozen.
            let members = group.procs().unwrap();
            if group.watch().unwrap().read().unwrap().frozen { members } else { HashSet::new() }
        });
        let all = process::all().unwrap();
        let stands = |stat: &process::ProcessStat| match stat.state() {
            process::RunState::Stopped | process::RunState::Dead => true,
            process::RunState::Live => frozen.contains(&stat.id.pid) || process::waits_for_stopped_child(stat, &all),
        };
        let members = self.living();
        let at_large = all.iter().filter(|stat| members.contains(&stat.id.pid) && !stands(stat));
        at_large.map(|stat| (stat.id.pid, char::from(stat.letter))).collect()
    }
}

/// A process outside every run that writes at the pace of the writers below.
struct Metronome {
    dir: tempfile::TempDir,
    writer: Child,
}

impl Metronome {
    fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("metronome-").tempdir().unwrap();
        let writer = Command::new("sh")
            .args(["-c", "while :; do echo x >> beats; sleep 0.01; done"])
            .current_dir(dir.path())
            .spawn()
            .unwrap();
        Self { dir, writer }
    }

    async fn beat(&self, times: u64) {
        let beats = || std::fs::metadata(self.dir.path().join("beats")).map_or(0, |meta| meta.len() / 2);
        until("the metronome to beat", || beats() >= times).await;
    }
}

impl Drop for Metronome {
    fn drop(&mut self) {
        self.writer.kill().unwrap();
        self.writer.wait().unwrap();
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let Ok(Some(run)) = read_run(&self.spec.run_dir) else {
            return;
        };
        if process::signal(run.shim, libc::SIGKILL).unwrap_or(false) {
            let until = Instant::now() + PATIENCE;
            while process::is_alive(run.shim).unwrap_or(false) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
            let ended = end_lost_tree(&run, &process::boot_id().unwrap(), PATIENCE);
            if !std::thread::panicking() {
                ended.unwrap();
            }
        }
    }
}

/// Waits until a condition holds.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < PATIENCE, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Returns the next event.
pub async fn next(events: &mut mpsc::Receiver<ShimEvent>) -> Option<ShimEvent> {
    tokio::time::timeout(PATIENCE, events.recv()).await.expect("an event in time")
}

/// Returns the exit, skipping other events.
pub async fn exited(events: &mut mpsc::Receiver<ShimEvent>) -> ExitRecord {
    loop {
        match next(events).await {
            Some(ShimEvent::Exited(record)) => return *record,
            Some(_) => {}
            None => panic!("the link ended without an exit"),
        }
    }
}

/// A main process, a job in a session of its own, and a double-forked one: each appends to a file.
pub const THREE_WRITERS: &str = r#"
    setsid sh -c 'while :; do echo x >> far; sleep 0.01; done' &
    (setsid sh -c 'while :; do echo x >> orphan; sleep 0.01; done' &)
    while :; do echo x >> near; sleep 0.01; done
"#;
pub const THREE_FILES: [&str; 3] = ["near", "far", "orphan"];

/// A single process that appends to `near`, with handlers that `setup` (Perl) installs. A shell would run its handler
/// only after its current child, which the same signal may have stopped.
pub fn one_writer(setup: &str) -> Vec<RawString> {
    let script = format!(
        "$| = 1; sub note {{ open(my $f, '>>', $_[0]); print $f $_[1]; close $f }}
        {setup}
        while (1) {{ note('near', 'x'); select(undef, undef, undef, 0.01) }}"
    );
    ["perl", "-e", &script].into_iter().map(Into::into).collect()
}

/// Makes one test per mechanism from each async function with a `FreezerSetting`.
macro_rules! for_both_mechanisms {
    ($($name:ident),+ $(,)?) => {
        mod with_a_control_group_if_possible {
            $(#[tokio::test] async fn $name() { super::$name(fermata_os::cgroup::FreezerSetting::Auto).await; })+
        }
        mod with_signals {
            $(#[tokio::test] async fn $name() { super::$name(fermata_os::cgroup::FreezerSetting::Signals).await; })+
        }
    };
}
