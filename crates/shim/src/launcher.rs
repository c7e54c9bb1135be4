//! The start of a shim: from the command line to the running agent.
//!
//! The process that the daemon starts is only the launcher. It forks the shim, passes on the one
//! line in which the shim reports success or failure, and ends: so nobody who can die is the
//! shim's parent.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fermata_protocol::pause::FreezerKind;
use fermata_protocol::supervision::OutputPolicy;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{ForkResult, dup2_stderr, dup2_stdin, dup2_stdout, pipe2};
use serde::{Deserialize, Serialize};

use super::freeze::{FreezeController, failed_to};
use super::log::LogWriter;
use super::log_sink::{LogSink, LogWriterLink};
use super::log_writer_process;
use super::raw::Raw;
use super::record::RunRecord;
use super::spec::{HookSpec, LaunchSpec, RUN_ID_VARIABLE, files};
use super::supervise::{Parts, Supervisor};
use super::terminal::Terminal;
use fermata_os::cgroup::FreezerSetting;
use fermata_os::cgroup::{Freezer, Group};
use fermata_os::fsync::{Reserve, write_atomic};
use fermata_os::prelude::Prelude;
use fermata_os::process::{self, ProcessId};
use fermata_os::pty::{self, Pty};
use fermata_os::spawn::{self, Program, SpawnError, Stage};
use fermata_os::{clock, signals};

/// Why nothing runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LaunchCode {
    /// The launch spec cannot be read or used.
    BadSpec,
    /// No such program, neither by path nor in the agent's PATH.
    ProgramNotFound,
    /// The program is there but may not or cannot be executed.
    ProgramNotExecutable,
    /// The script is there, but the interpreter that its first line names is not.
    InterpreterMissing,
    /// The working directory does not exist.
    CwdMissing,
    /// The working directory may not be entered.
    CwdDenied,
    /// A resource limit cannot be set.
    LimitRefused,
    /// The socket's path is too long for the kernel.
    SocketPathTooLong,
    /// The socket cannot be made.
    SocketFailed,
    /// The run's folder cannot be written.
    RunDirFailed,
    /// The process cannot be created.
    SpawnFailed,
    /// The shim ended before it reported.
    ShimDied,
    /// A code of a newer shim.
    #[serde(other)]
    Other,
}

/// The line that the launcher prints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum LaunchReport {
    /// It runs.
    Running {
        /// Always true.
        ok: bool,
        /// The shim.
        shim: ProcessId,
        /// The main process.
        agent: ProcessId,
        /// How the tree will be frozen.
        mechanism: FreezerKind,
        /// Why it is not done by a control group.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        why: Option<String>,
    },
    /// Nothing runs.
    Failed {
        /// Always false.
        ok: bool,
        /// The stable code.
        code: LaunchCode,
        /// The sentence.
        message: String,
    },
}

/// A failure before the agent ran.
#[derive(Debug)]
pub(super) struct Failure {
    code: LaunchCode,
    /// A sentence for people.
    pub(super) message: String,
}

impl Failure {
    fn new(code: LaunchCode, error: &(dyn std::error::Error + 'static)) -> Self {
        Self { code, message: failed_to(error) }
    }

    fn io(code: LaunchCode, what: &str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let text = format!("failed to {what} {}", path.display());
        move |error| Self { code, message: format!("{text}: {error}") }
    }
}

/// The whole of `fermata-shim RUN_DIR`; returns the exit code.
pub fn main(run_dir: &Path) -> i32 {
    spawn::close_inherited();
    let report = match LaunchSpec::read(run_dir) {
        Err(error) => failed(Failure::new(LaunchCode::BadSpec, &error)),
        Ok(spec) => match fork_shim(spec) {
            Ok(Some(line)) => line,
            // This is the shim or the log writer process, and the agent has ended.
            Ok(None) => return 0,
            Err(error) => failed(Failure { code: LaunchCode::SpawnFailed, message: error.to_string() }),
        },
    };
    // A daemon that has died in the meantime finds the run's record instead of this line.
    if let Ok(line) = serde_json::to_string(&report) {
        writeln!(io::stdout(), "{line}").ok();
    }
    match report {
        LaunchReport::Running { .. } => 0,
        LaunchReport::Failed { .. } => 1,
    }
}

fn failed(failure: Failure) -> LaunchReport {
    LaunchReport::Failed { ok: false, code: failure.code, message: failure.message }
}

/// Which process this is after a log writer process may have been forked.
enum Forked {
    /// The launcher, with the shim's end of the log writer process's socket.
    Launcher(Option<OwnedFd>),
    /// The log writer process, which has nothing more to do.
    LogWriter,
}

/// Forks the log writer process, where there is to be one.
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
            // Else it would never see the end of the shim.
            drop(ours);
            match detach(spec) {
                Ok(()) => log_writer_process::run(&theirs, &logs, spec.log),
                Err(failure) => eprintln!("fermata-shim: {}", failure.message),
            }
            Ok(Forked::LogWriter)
        }
    }
}

/// Forks the shim and waits for its report; in the shim and in the log writer process returns `None` after the
/// agent's end.
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
                failed(Failure {
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
        // If the launcher was killed, the run's record still tells a daemon everything.
        File::from(report_out).write_all(&line).ok();
    }
    if let Some(parts) = parts {
        Supervisor::new(*parts).run();
    }
}

/// Makes this process a shim and starts the agent.
fn launch(spec: LaunchSpec, log_writer: Option<OwnedFd>) -> Result<(RunRecord, Box<Parts>), Failure> {
    detach(&spec)?;
    let children = signals::shim_signal_fd().map_err(Failure::io(
        LaunchCode::SpawnFailed,
        "watch the children of",
        Path::new("/proc/self"),
    ))?;
    let logs = spec.file(files::LOGS);
    make_private_dir(&logs).map_err(Failure::io(LaunchCode::RunDirFailed, "create", &logs))?;
    let log = match log_writer {
        Some(socket) => LogSink::Process(LogWriterLink::new(socket, &logs, spec.log)),
        None => {
            let log = LogWriter::open(&logs, spec.log);
            LogSink::Direct(log.map_err(Failure::io(LaunchCode::RunDirFailed, "open the logs in", &logs))?)
        }
    };
    let reserve = Reserve::create(&spec.file(files::EXIT), 0o600)
        .map_err(|error| Failure::new(LaunchCode::RunDirFailed, &error))?;
    // What comes between the agent's end and its record takes time with either of these.
    let takes_time = spec.post_stop.is_some() || spec.output != OutputPolicy::Block;
    let ended = takes_time.then(|| Reserve::create(&spec.file(files::ENDED), 0o600));
    let ended = ended.transpose().map_err(|error| Failure::new(LaunchCode::RunDirFailed, &error))?;
    let listener = listen(&spec.socket)?;
    let started = start_agent(&spec);
    let undo_socket = |failure| {
        std::fs::remove_file(&spec.socket).ok();
        failure
    };
    let Started { agent, freezer, stdout, stderr, terminal, prelude } = started.map_err(undo_socket)?;
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
        // An agent that no daemon could ever find again must not run.
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

/// The inode of a pipe; a terminal is none.
fn inode(end: &OwnedFd) -> Option<u64> {
    let stat = nix::sys::stat::fstat(end).ok()?;
    (stat.st_mode & libc::S_IFMT == libc::S_IFIFO).then_some(stat.st_ino)
}

fn write_record(spec: &LaunchSpec, record: &RunRecord) -> Result<(), Failure> {
    let bytes = serde_json::to_vec(record).map_err(|error| Failure::new(LaunchCode::RunDirFailed, &error))?;
    write_atomic(&spec.file(files::RUN), &bytes, 0o600)
        .map_err(|error| Failure::new(LaunchCode::RunDirFailed, &error))?;
    // A daemon that was started meanwhile may have looked before the record was there.
    if spec.file(files::ABANDONED).exists() {
        let message = "the daemon that wanted it is gone, and the next one gave the launch up".to_owned();
        return Err(Failure { code: LaunchCode::ShimDied, message });
    }
    Ok(())
}

fn own_identity() -> Result<ProcessId, Failure> {
    let pid = nix::unistd::getpid().as_raw();
    identify(pid)
}

fn identify(pid: i32) -> Result<ProcessId, Failure> {
    match process::identify(pid) {
        Ok(Some(id)) => Ok(id),
        Ok(None) => Err(Failure { code: LaunchCode::SpawnFailed, message: format!("process {pid} is not in /proc") }),
        Err(error) => {
            Err(Failure { code: LaunchCode::SpawnFailed, message: format!("failed to read /proc/{pid}/stat: {error}") })
        }
    }
}

/// Cuts every tie to the daemon: session, terminal, signals, descriptors, working directory.
fn detach(spec: &LaunchSpec) -> Result<(), Failure> {
    let failure = |what: &str| {
        let what = what.to_owned();
        move |errno: nix::errno::Errno| Failure {
            code: LaunchCode::SpawnFailed,
            message: format!("failed to {what}: {errno}"),
        }
    };
    nix::unistd::setsid().map_err(failure("begin a session"))?;
    nix::sys::prctl::set_child_subreaper(true).map_err(failure("become a subreaper"))?;
    nix::unistd::chdir("/").map_err(failure("enter /"))?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    signals::ignore_deadly().map_err(|error| Failure {
        code: LaunchCode::SpawnFailed,
        message: format!("failed to ignore signals: {error}"),
    })?;
    let path = spec.file(files::SHIM_LOG);
    let own_log = OpenOptions::new().append(true).create(true).mode(0o600).open(&path).map_err(Failure::io(
        LaunchCode::RunDirFailed,
        "open",
        &path,
    ))?;
    let null = open_null()?;
    dup2_stdin(&null).map_err(failure("replace stdin"))?;
    dup2_stdout(&null).map_err(failure("replace stdout"))?;
    dup2_stderr(&own_log).map_err(failure("replace stderr"))
}

pub(super) fn open_null_file() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/null")
}

fn open_null() -> Result<File, Failure> {
    open_null_file().map_err(Failure::io(LaunchCode::SpawnFailed, "open", Path::new("/dev/null")))
}

fn make_private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Listens in a directory that only this user can enter.
pub(super) fn listen(path: &Path) -> Result<UnixListener, Failure> {
    // sun_path has 108 bytes, the last one is a NUL (unix(7)).
    if path.as_os_str().as_bytes().len() > 107 {
        return Err(Failure {
            code: LaunchCode::SocketPathTooLong,
            message: format!("the socket path {} has more than 107 bytes", path.display()),
        });
    }
    let failure = |what| Failure::io(LaunchCode::SocketFailed, what, path);
    if let Some(parent) = path.parent() {
        make_private_dir(parent).map_err(failure("create the directory of"))?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failure("replace")(error));
        }
        _ => {}
    }
    // The umask makes it 0600 from its first moment; this also holds where umasks are ignored.
    let listener = UnixListener::bind(path).map_err(failure("listen on"))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failure("protect"))?;
    listener.set_nonblocking(true).map_err(failure("unblock"))?;
    Ok(listener)
}

#[derive(Debug)]
struct Started {
    agent: ProcessId,
    freezer: Freezer,
    stdout: OwnedFd,
    stderr: Option<OwnedFd>,
    terminal: Option<Terminal>,
    prelude: Option<Prelude>,
}

/// Both sides of what the agent reads from and writes to.
#[derive(Debug)]
struct Streams {
    stdout: OwnedFd,
    stderr: Option<OwnedFd>,
    terminal: Option<Terminal>,
    theirs: [OwnedFd; 3],
}

/// Pipes and no input, or a terminal.
fn streams(spec: &LaunchSpec) -> Result<Streams, Failure> {
    let Some(size) = spec.terminal else {
        let (stdout, agent_stdout) = agent_pipe()?;
        let (stderr, agent_stderr) = agent_pipe()?;
        let theirs = [open_null()?.into(), agent_stdout, agent_stderr];
        return Ok(Streams { stdout, stderr: Some(stderr), terminal: None, theirs });
    };
    let failure = |error: io::Error| Failure {
        code: LaunchCode::SpawnFailed,
        message: format!("failed to open a terminal: {error}"),
    };
    let Pty { master, slave } = pty::open_controlling(size.rows, size.cols).map_err(failure)?;
    let copy = || slave.try_clone().map_err(failure);
    let theirs = [copy()?, copy()?, copy()?];
    let terminal = Terminal::new(master.try_clone().map_err(failure)?, slave, size);
    Ok(Streams { stdout: master, stderr: None, terminal: Some(terminal), theirs })
}

/// Prepares a program with the agent's environment, directory and limits.
pub(super) fn program(spec: &LaunchSpec, argv: &[Raw], more: &[(Raw, Raw)]) -> io::Result<Program> {
    let mut env = spec.env.clone();
    env.retain(|(name, _)| name.as_bytes() != RUN_ID_VARIABLE.as_bytes());
    env.push((Raw::from(RUN_ID_VARIABLE), Raw::from(spec.run_id.as_str())));
    env.extend_from_slice(more);
    Program::new(argv, &env, spec.cwd.as_os_str(), spec.umask, &spec.rlimits)
}

fn start_agent(spec: &LaunchSpec) -> Result<Started, Failure> {
    let bad = |error: io::Error| Failure { code: LaunchCode::BadSpec, message: error.to_string() };
    let program = program(spec, &spec.argv, &[]).map_err(bad)?;
    let before = spec.pre_start.as_ref().map(|hook| self::program(spec, &hook.argv, &[])).transpose().map_err(bad)?;
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
            // For instance a delegated subtree that may not be entered from here: only the
            // migration itself shows it. The agent is worth more than its group.
            Err(error) if error.stage == Stage::Cgroup && !limited => {
                give_up_group(&mut freezer, &error);
                run(None)
            }
            other => other,
        },
    };
    match spawned {
        Ok((pid, prelude)) => {
            Ok(Started { agent: identify(pid.as_raw())?, freezer, stdout, stderr, terminal, prelude })
        }
        Err(error) => {
            if let Freezer::Cgroup(group) = &freezer {
                group.remove(Duration::from_secs(1)).ok();
            }
            Err(explain(spec, &error))
        }
    }
}

/// Limits the group before anybody is in it.
fn set_tree_limits(spec: &LaunchSpec, freezer: &Freezer) -> Result<(), Failure> {
    match freezer {
        _ if spec.tree_limits.is_empty() => Ok(()),
        Freezer::Signals { .. } => Err(unlimited(freezer)),
        Freezer::Cgroup(group) => spec.tree_limits.set(group).map_err(|error| {
            // An empty group that stays behind does no harm.
            group.remove(Duration::from_millis(100)).ok();
            Failure::new(LaunchCode::LimitRefused, &error)
        }),
    }
}

/// An agent that was to be limited does not run without its limits.
fn unlimited(freezer: &Freezer) -> Failure {
    let why = match freezer {
        Freezer::Signals { why } => why.as_str(),
        Freezer::Cgroup(_) => "its control group cannot be used",
    };
    Failure { code: LaunchCode::LimitRefused, message: format!("its resources cannot be limited: {why}") }
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
        // An empty group that stays behind does no harm.
        group.remove(Duration::from_millis(100)).ok();
    }
}

/// A pipe whose reading end does not block; the agent's end is as everybody expects it.
pub(super) fn output_pipe() -> nix::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = pipe2(OFlag::O_CLOEXEC)?;
    fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((ours, theirs))
}

fn agent_pipe() -> Result<(OwnedFd, OwnedFd), Failure> {
    output_pipe()
        .map_err(|errno| Failure { code: LaunchCode::SpawnFailed, message: format!("failed to make a pipe: {errno}") })
}

/// Cuts a name to what fits into a sentence: the record of the exit has room for so much.
fn cut(name: &str) -> String {
    const MOST: usize = 200;
    if name.chars().count() <= MOST { name.to_owned() } else { name.chars().take(MOST).chain(['…']).collect() }
}

/// The sentence of [`explain`].
pub(super) fn why_not_started(spec: &LaunchSpec, error: &SpawnError) -> String {
    explain(spec, error).message
}

/// Turns an errno into what the person who typed the command needs to know.
fn explain(spec: &LaunchSpec, error: &SpawnError) -> Failure {
    let kind = error.source.raw_os_error();
    let program = spec.argv.first().map(|name| Path::new(name.as_ref()).display().to_string());
    let whole = program.unwrap_or_default();
    let (program, cwd) = (cut(&whole), cut(&spec.cwd.display().to_string()));
    let (code, message) = match (error.stage, kind) {
        (Stage::Exec, Some(libc::ENOENT | libc::ENOTDIR)) => {
            let path = spec.cwd.join(PathBuf::from(&whole));
            if whole.contains('/') && path.exists() {
                (
                    LaunchCode::InterpreterMissing,
                    format!("the interpreter (or loader) that {program} names was not found"),
                )
            } else if whole.contains('/') {
                (LaunchCode::ProgramNotFound, format!("there is no program {program}"))
            } else {
                (LaunchCode::ProgramNotFound, format!("there is no program {program} in the agent's PATH"))
            }
        }
        (Stage::Exec, _) => {
            (LaunchCode::ProgramNotExecutable, format!("{program} cannot be executed: {}", error.source))
        }
        (Stage::WorkingDirectory, Some(libc::ENOENT | libc::ENOTDIR)) => {
            (LaunchCode::CwdMissing, format!("the working directory {cwd} does not exist"))
        }
        (Stage::WorkingDirectory, _) => {
            (LaunchCode::CwdDenied, format!("the working directory {cwd} cannot be entered: {}", error.source))
        }
        (Stage::Limits, _) => (LaunchCode::LimitRefused, failed_to(error)),
        (Stage::ExecBefore, _) => {
            let line = spec.pre_start.as_ref().map(HookSpec::line).unwrap_or_default();
            let message = format!("the pre-start command '{line}' cannot be executed: {}", error.source);
            (LaunchCode::ProgramNotExecutable, message)
        }
        (Stage::Fork | Stage::Cgroup | Stage::ProcessGroup | Stage::Stdio | Stage::Terminal, _) => {
            (LaunchCode::SpawnFailed, failed_to(error))
        }
    };
    Failure { code, message }
}
