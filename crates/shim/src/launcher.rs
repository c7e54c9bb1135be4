//! The start of a shim: from the command line to the running agent.
//!
//! The process that the daemon starts is only the launcher. It forks the shim, prints the one line in which the shim
//! reports success or failure, and exits, so that the shim's parent cannot die later.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use fermata_protocol::pause::FreezerKind;
use fermata_protocol::supervision::OutputPolicy;
use nix::fcntl::OFlag;
use nix::unistd::{ForkResult, dup2_stderr, dup2_stdin, dup2_stdout, pipe2};

use super::freeze::FreezeController;
use super::launch_report::{LaunchCode, LaunchFailure, LaunchReport, explain};
use super::log::LogWriter;
use super::log_sink::{LogSink, LogWriterLink};
use super::log_writer_process;
use super::pipes::{open_null_file, output_pipe};
use super::record::RunRecord;
use super::socket::{listen, make_private_dir};
use super::spec::{LaunchSpec, files};
use super::supervise::{AgentSupervisor, Parts};
use super::terminal::Terminal;
use fermata_os::cgroup::{Freezer, FreezerSetting, Group};
use fermata_os::fsync::{Reserve, write_atomic};
use fermata_os::prelude::Prelude;
use fermata_os::process::{self, ProcessId};
use fermata_os::pty::{self, Pty};
use fermata_os::spawn;
use fermata_os::spawn_error::SpawnStage;
use fermata_os::{clock, signals};

/// The program `fermata-shim RUN_DIR`; returns the exit code.
pub fn main(run_dir: &Path) -> i32 {
    spawn::close_inherited();
    let report = match LaunchSpec::read(run_dir) {
        Err(error) => failed(LaunchFailure::new(LaunchCode::BadSpec, &error)),
        Ok(spec) => match fork_shim(spec) {
            Ok(Some(line)) => line,
            // This process is the shim or the log writer process, and the agent has ended.
            Ok(None) => return 0,
            Err(error) => failed(LaunchFailure { code: LaunchCode::SpawnFailed, message: error.to_string() }),
        },
    };
    // A daemon that dies meanwhile finds the run record instead of this line.
    if let Ok(line) = serde_json::to_string(&report) {
        writeln!(io::stdout(), "{line}").ok();
    }
    match report {
        LaunchReport::Running { .. } => 0,
        LaunchReport::Failed { .. } => 1,
    }
}

fn failed(failure: LaunchFailure) -> LaunchReport {
    LaunchReport::Failed { ok: false, code: failure.code, message: failure.message }
}

/// Which process this is after forking the log writer process.
enum Forked {
    /// The launcher, with the shim's end of the log writer process's socket.
    Launcher(Option<OwnedFd>),
    /// The log writer process, which has finished.
    LogWriter,
}

/// Forks the log writer process, if the output policy needs one.
fn fork_log_writer(spec: &LaunchSpec) -> io::Result<Forked> {
    if spec.output == OutputPolicy::Block {
        return Ok(Forked::Launcher(None));
    }
    let logs = spec.file(files::LOGS);
    make_private_dir(&logs)?;
    let (ours, theirs) = log_writer_process::pair()?;
    match spawn::fork_single_threaded()? {
        ForkResult::Parent { .. } => Ok(Forked::Launcher(Some(ours))),
        ForkResult::Child => {
            // With this end open, the log writer process would never see the end of the shim.
            drop(ours);
            match detach(spec) {
                Ok(()) => log_writer_process::run(&theirs, &logs, spec.log),
                Err(failure) => eprintln!("fermata-shim: {}", failure.message),
            }
            Ok(Forked::LogWriter)
        }
    }
}

/// Forks the shim and waits for its report. In the shim and in the log writer process, returns `None` after the agent's
/// end.
fn fork_shim(spec: LaunchSpec) -> io::Result<Option<LaunchReport>> {
    let Forked::Launcher(log_writer) = fork_log_writer(&spec)? else { return Ok(None) };
    let (report_in, report_out) = pipe2(OFlag::O_CLOEXEC)?;
    match spawn::fork_single_threaded()? {
        ForkResult::Child => {
            drop(report_in);
            shim(spec, report_out, log_writer);
            Ok(None)
        }
        ForkResult::Parent { .. } => {
            drop((report_out, log_writer));
            let mut line = Vec::new();
            File::from(report_in).read_to_end(&mut line)?;
            Ok(Some(serde_json::from_slice(&line).unwrap_or_else(|_| {
                failed(LaunchFailure {
                    code: LaunchCode::ShimDied,
                    message: format!("the shim ended before it reported; see {}", files::SHIM_LOG),
                })
            })))
        }
    }
}

fn shim(spec: LaunchSpec, report_out: OwnedFd, log_writer: Option<OwnedFd>) {
    let (report, parts) = match launch(spec, log_writer) {
        Ok((record, parts)) => {
            let RunRecord { shim, agent, mechanism, why, .. } = record;
            (LaunchReport::Running { ok: true, shim, agent, mechanism, why }, Some(parts))
        }
        Err(failure) => (failed(failure), None),
    };
    if let Ok(line) = serde_json::to_vec(&report) {
        // If the launcher was killed, the daemon finds the same in the run record.
        File::from(report_out).write_all(&line).ok();
    }
    if let Some(parts) = parts {
        AgentSupervisor::new(*parts).run();
    }
}

/// Makes this process a shim and starts the agent.
fn launch(spec: LaunchSpec, log_writer: Option<OwnedFd>) -> Result<(RunRecord, Box<Parts>), LaunchFailure> {
    detach(&spec)?;
    let children = signals::shim_signal_fd().map_err(LaunchFailure::io(
        LaunchCode::SpawnFailed,
        "watch the children of",
        Path::new("/proc/self"),
    ))?;
    let logs = spec.file(files::LOGS);
    make_private_dir(&logs).map_err(LaunchFailure::io(LaunchCode::RunDirFailed, "create", &logs))?;
    let log = match log_writer {
        Some(socket) => LogSink::Process(LogWriterLink::new(socket, &logs, spec.log)),
        None => {
            let log = LogWriter::open(&logs, spec.log);
            LogSink::Direct(log.map_err(LaunchFailure::io(LaunchCode::RunDirFailed, "open the logs in", &logs))?)
        }
    };
    let reserve = Reserve::create(&spec.file(files::EXIT), 0o600)
        .map_err(|error| LaunchFailure::new(LaunchCode::RunDirFailed, &error))?;
    // A post-stop command and a log writer process delay the exit record.
    let takes_time = spec.post_stop.is_some() || spec.output != OutputPolicy::Block;
    let ended = takes_time.then(|| Reserve::create(&spec.file(files::ENDED), 0o600));
    let ended = ended.transpose().map_err(|error| LaunchFailure::new(LaunchCode::RunDirFailed, &error))?;
    let listener = listen(&spec.socket)?;
    let started = start_agent(&spec);
    let undo_socket = |failure| {
        std::fs::remove_file(&spec.socket).ok();
        failure
    };
    let StartedAgent { agent, freezer, stdout, stderr, terminal, prelude } = started.map_err(undo_socket)?;
    fermata_failpoint::hit("shim.agent_started");
    let shim = own_identity().map_err(undo_socket)?;
    let (mechanism, why, cgroup) = match &freezer {
        Freezer::Cgroup(group) => (FreezerKind::Cgroup, None, Some(group.path().to_path_buf())),
        Freezer::Signals { why } => (FreezerKind::Signals, Some(why.clone()), None),
    };
    let freeze = FreezeController::new(shim.pid, agent, freezer);
    let record = RunRecord {
        run_id: spec.run_id.clone(),
        shim,
        agent,
        boot_id: process::boot_id().unwrap_or_default(),
        started_at_ms: clock::unix_ms(),
        mechanism,
        why,
        cgroup,
        socket: spec.socket.clone(),
        stdout_pipe: inode(&stdout),
        stderr_pipe: stderr.as_ref().and_then(inode),
    };
    if let Err(failure) = write_record(&spec, &record) {
        // An agent without a record, which no daemon could find, must not run.
        process::signal(agent, libc::SIGKILL).ok();
        if let Some(group) = freeze.group() {
            group.kill().ok();
            group.wait_empty(Duration::from_secs(1)).ok();
            group.remove(Duration::from_secs(1)).ok();
        }
        fermata_os::tree::kill_tree(shim.pid, Duration::from_secs(1)).ok();
        return Err(undo_socket(failure));
    }
    let parts =
        Parts { spec, shim, agent, freeze, log, reserve, ended, children, listener, stdout, stderr, terminal, prelude };
    Ok((record, Box::new(parts)))
}

/// Returns the inode of a pipe; `None` for a terminal.
fn inode(end: &OwnedFd) -> Option<u64> {
    let stat = nix::sys::stat::fstat(end).ok()?;
    (stat.st_mode & libc::S_IFMT == libc::S_IFIFO).then_some(stat.st_ino)
}

fn write_record(spec: &LaunchSpec, record: &RunRecord) -> Result<(), LaunchFailure> {
    let bytes = serde_json::to_vec(record).map_err(|error| LaunchFailure::new(LaunchCode::RunDirFailed, &error))?;
    write_atomic(&spec.file(files::RUN), &bytes, 0o600)
        .map_err(|error| LaunchFailure::new(LaunchCode::RunDirFailed, &error))?;
    // A daemon started meanwhile may have searched for the record before it existed.
    if spec.file(files::ABANDONED).exists() {
        let message =
            "the daemon that requested the launch has died, and the next daemon has given the launch up".to_owned();
        return Err(LaunchFailure { code: LaunchCode::ShimDied, message });
    }
    Ok(())
}

fn own_identity() -> Result<ProcessId, LaunchFailure> {
    let pid = nix::unistd::getpid().as_raw();
    identify(pid)
}

fn identify(pid: i32) -> Result<ProcessId, LaunchFailure> {
    match process::identify(pid) {
        Ok(Some(id)) => Ok(id),
        Ok(None) => {
            Err(LaunchFailure { code: LaunchCode::SpawnFailed, message: format!("process {pid} is not in /proc") })
        }
        Err(error) => Err(LaunchFailure {
            code: LaunchCode::SpawnFailed,
            message: format!("failed to read /proc/{pid}/stat: {error}"),
        }),
    }
}

/// Separates this process from the daemon: session, terminal, signals, descriptors, working directory.
fn detach(spec: &LaunchSpec) -> Result<(), LaunchFailure> {
    let failure = |what: &str| {
        let what = what.to_owned();
        move |errno: nix::errno::Errno| LaunchFailure {
            code: LaunchCode::SpawnFailed,
            message: format!("failed to {what}: {errno}"),
        }
    };
    nix::unistd::setsid().map_err(failure("create a session"))?;
    nix::sys::prctl::set_child_subreaper(true).map_err(failure("become a subreaper"))?;
    nix::unistd::chdir("/").map_err(failure("enter /"))?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    signals::ignore_deadly().map_err(|error| LaunchFailure {
        code: LaunchCode::SpawnFailed,
        message: format!("failed to ignore signals: {error}"),
    })?;
    let path = spec.file(files::SHIM_LOG);
    let own_log = OpenOptions::new().append(true).create(true).mode(0o600).open(&path).map_err(LaunchFailure::io(
        LaunchCode::RunDirFailed,
        "open",
        &path,
    ))?;
    let null = open_null()?;
    dup2_stdin(&null).map_err(failure("replace stdin"))?;
    dup2_stdout(&null).map_err(failure("replace stdout"))?;
    dup2_stderr(&own_log).map_err(failure("replace stderr"))
}

fn open_null() -> Result<File, LaunchFailure> {
    open_null_file().map_err(LaunchFailure::io(LaunchCode::SpawnFailed, "open", Path::new("/dev/null")))
}

#[derive(Debug)]
struct StartedAgent {
    agent: ProcessId,
    freezer: Freezer,
    stdout: OwnedFd,
    stderr: Option<OwnedFd>,
    terminal: Option<Terminal>,
    prelude: Option<Prelude>,
}

/// Both ends of the agent's standard streams.
#[derive(Debug)]
struct Streams {
    stdout: OwnedFd,
    stderr: Option<OwnedFd>,
    terminal: Option<Terminal>,
    theirs: [OwnedFd; 3],
}

/// Creates two pipes and no input, or a terminal.
fn streams(spec: &LaunchSpec) -> Result<Streams, LaunchFailure> {
    let Some(size) = spec.terminal else {
        let (stdout, agent_stdout) = agent_pipe()?;
        let (stderr, agent_stderr) = agent_pipe()?;
        let theirs = [open_null()?.into(), agent_stdout, agent_stderr];
        return Ok(Streams { stdout, stderr: Some(stderr), terminal: None, theirs });
    };
    let failure = |error: io::Error| LaunchFailure {
        code: LaunchCode::SpawnFailed,
        message: format!("failed to open a terminal: {error}"),
    };
    let Pty { master, slave } = pty::open_controlling(size.rows, size.cols).map_err(failure)?;
    let copy = || slave.try_clone().map_err(failure);
    let theirs = [copy()?, copy()?, copy()?];
    let terminal = Terminal::new(master.try_clone().map_err(failure)?, slave, size);
    Ok(Streams { stdout: master, stderr: None, terminal: Some(terminal), theirs })
}

fn start_agent(spec: &LaunchSpec) -> Result<StartedAgent, LaunchFailure> {
    let bad = |error: io::Error| LaunchFailure { code: LaunchCode::BadSpec, message: error.to_string() };
    let program = spec.program(&spec.argv, &[]).map_err(bad)?;
    let before = spec.pre_start.as_ref().map(|hook| spec.program(&hook.argv, &[])).transpose().map_err(bad)?;
    let Streams { stdout, stderr, terminal, theirs: [stdin, agent_stdout, agent_stderr] } = streams(spec)?;
    let program = if terminal.is_some() { program.in_foreground() } else { program };
    let mut freezer = match spec.mechanism {
        FreezerSetting::Signals => Freezer::Signals { why: "the launch spec asks for signals".to_owned() },
        FreezerSetting::Auto => Freezer::prepare(spec.cgroup_parent.as_deref(), &spec.cgroup_name),
    };
    set_tree_limits(spec, &freezer)?;
    let run = |procs: Option<&File>| {
        program.spawn(stdin.as_fd(), agent_stdout.as_fd(), agent_stderr.as_fd(), procs, before.as_ref())
    };
    let limited = !spec.tree_limits.is_empty();
    let spawned = match member_file(&mut freezer) {
        None if limited => return Err(unlimited(&freezer)),
        None => run(None),
        Some(procs) => match run(Some(&procs)) {
            // For instance, the group is in a delegated subtree that processes cannot be moved into from here, which only
            // the attempt shows. The agent runs without a group then.
            Err(error) if error.stage == SpawnStage::Cgroup && !limited => {
                give_up_group(&mut freezer, &error);
                run(None)
            }
            other => other,
        },
    };
    match spawned {
        Ok((pid, prelude)) => {
            Ok(StartedAgent { agent: identify(pid.as_raw())?, freezer, stdout, stderr, terminal, prelude })
        }
        Err(error) => {
            if let Freezer::Cgroup(group) = &freezer {
                group.remove(Duration::from_secs(1)).ok();
            }
            Err(explain(spec, &error))
        }
    }
}

/// Sets the limits of the group before it has a member.
fn set_tree_limits(spec: &LaunchSpec, freezer: &Freezer) -> Result<(), LaunchFailure> {
    match freezer {
        _ if spec.tree_limits.is_empty() => Ok(()),
        Freezer::Signals { .. } => Err(unlimited(freezer)),
        Freezer::Cgroup(group) => spec.tree_limits.set(group).map_err(|error| {
            // An empty group that cannot be removed is harmless.
            group.remove(Duration::from_millis(100)).ok();
            LaunchFailure::new(LaunchCode::LimitRefused, &error)
        }),
    }
}

/// An agent whose limits cannot be set must not run.
fn unlimited(freezer: &Freezer) -> LaunchFailure {
    let why = match freezer {
        Freezer::Signals { why } => why.as_str(),
        Freezer::Cgroup(_) => "its control group cannot be used",
    };
    LaunchFailure { code: LaunchCode::LimitRefused, message: format!("the agent's resources cannot be limited: {why}") }
}

fn member_file(freezer: &mut Freezer) -> Option<File> {
    let Freezer::Cgroup(group) = freezer else {
        return None;
    };
    match group.procs_file() {
        Ok(file) => Some(file),
        Err(error) => {
            give_up_group(freezer, &error);
            None
        }
    }
}

fn give_up_group(freezer: &mut Freezer, error: &dyn std::error::Error) {
    let group: Option<Group> = match std::mem::replace(freezer, Freezer::signals_because(error)) {
        Freezer::Cgroup(group) => Some(group),
        Freezer::Signals { .. } => None,
    };
    if let Some(group) = group {
        // An empty group that cannot be removed is harmless.
        group.remove(Duration::from_millis(100)).ok();
    }
}

fn agent_pipe() -> Result<(OwnedFd, OwnedFd), LaunchFailure> {
    output_pipe().map_err(|errno| LaunchFailure {
        code: LaunchCode::SpawnFailed,
        message: format!("failed to create a pipe: {errno}"),
    })
}
