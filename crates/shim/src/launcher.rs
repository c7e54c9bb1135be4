//! The start of a shim: from the command line to the running agent.
//!
//! The process that the daemon starts is only the launcher. It forks the shim, prints the one line in which the shim
//! reports success or failure, and exits, so that the shim's parent cannot die later.

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
use super::raw::RawString;
use super::record::RunRecord;
use super::spec::{HookSpec, LaunchSpec, RUN_ID_VARIABLE, files};
use super::supervise::{AgentSupervisor, Parts};
use super::terminal::Terminal;
use fermata_os::cgroup::FreezerSetting;
use fermata_os::cgroup::{Freezer, Group};
use fermata_os::fsync::{Reserve, write_atomic};
use fermata_os::prelude::Prelude;
use fermata_os::process::{self, ProcessId};
use fermata_os::pty::{self, Pty};
use fermata_os::spawn::{self, Program};
use fermata_os::spawn_error::{SpawnError, SpawnStage};
use fermata_os::{clock, signals};

/// Why a launch has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LaunchCode {
    /// The launch spec cannot be read or used.
    BadSpec,
    /// No such program, neither by path nor in the agent's PATH.
    ProgramNotFound,
    /// The program exists but cannot be executed.
    ProgramNotExecutable,
    /// The script exists, but not the interpreter that its first line names.
    InterpreterMissing,
    /// The working directory does not exist.
    CwdMissing,
    /// The working directory cannot be entered.
    CwdDenied,
    /// A resource limit cannot be set.
    LimitRefused,
    SocketPathTooLong,
    /// The socket cannot be created.
    SocketFailed,
    /// The run's directory cannot be written.
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
    /// The agent runs.
    Running {
        /// Always true.
        ok: bool,
        shim: ProcessId,
        /// The main process.
        agent: ProcessId,
        /// How the tree will be frozen.
        mechanism: FreezerKind,
        /// Why the tree is frozen by signals and not by a control group.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        why: Option<String>,
    },
    /// No agent runs.
    Failed {
        /// Always false.
        ok: bool,
        code: LaunchCode,
        /// A sentence for people.
        message: String,
    },
}

/// A failure before the agent ran.
#[derive(Debug)]
pub(super) struct LaunchFailure {
    code: LaunchCode,
    /// A sentence for people.
    pub(super) message: String,
}

impl LaunchFailure {
    fn new(code: LaunchCode, error: &(dyn std::error::Error + 'static)) -> Self {
        Self { code, message: failed_to(error) }
    }

    fn io(code: LaunchCode, what: &str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let text = format!("failed to {what} {}", path.display());
        move |error| Self { code, message: format!("{text}: {error}") }
    }
}

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

pub(super) fn open_null_file() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/null")
}

fn open_null() -> Result<File, LaunchFailure> {
    open_null_file().map_err(LaunchFailure::io(LaunchCode::SpawnFailed, "open", Path::new("/dev/null")))
}

fn make_private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Listens on a socket in a directory that only this user can enter.
pub(super) fn listen(path: &Path) -> Result<UnixListener, LaunchFailure> {
    // sun_path has 108 bytes, the last one is a NUL (unix(7)).
    if path.as_os_str().as_bytes().len() > 107 {
        return Err(LaunchFailure {
            code: LaunchCode::SocketPathTooLong,
            message: format!("the socket path {} has more than 107 bytes", path.display()),
        });
    }
    let failure = |what| LaunchFailure::io(LaunchCode::SocketFailed, what, path);
    if let Some(parent) = path.parent() {
        make_private_dir(parent).map_err(failure("create the directory of"))?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failure("replace")(error));
        }
        _ => {}
    }
    // The umask makes the mode 0600 from the start. Setting it as well covers file systems that ignore the umask.
    let listener = UnixListener::bind(path).map_err(failure("listen on"))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failure("protect"))?;
    listener.set_nonblocking(true).map_err(failure("unblock"))?;
    Ok(listener)
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

/// Prepares a program with the agent's environment, directory and limits. `more` is added to the environment.
pub(super) fn program(spec: &LaunchSpec, argv: &[RawString], more: &[(RawString, RawString)]) -> io::Result<Program> {
    let mut env = spec.env.clone();
    env.retain(|(name, _)| name.as_bytes() != RUN_ID_VARIABLE.as_bytes());
    env.push((RawString::from(RUN_ID_VARIABLE), RawString::from(spec.run_id.as_str())));
    env.extend_from_slice(more);
    Program::new(argv, &env, spec.cwd.as_os_str(), spec.umask, &spec.rlimits)
}

fn start_agent(spec: &LaunchSpec) -> Result<StartedAgent, LaunchFailure> {
    let bad = |error: io::Error| LaunchFailure { code: LaunchCode::BadSpec, message: error.to_string() };
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

/// Creates a pipe with a non-blocking reading end; the agent's end is blocking, as programs expect.
pub(super) fn output_pipe() -> nix::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = pipe2(OFlag::O_CLOEXEC)?;
    fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((ours, theirs))
}

fn agent_pipe() -> Result<(OwnedFd, OwnedFd), LaunchFailure> {
    output_pipe().map_err(|errno| LaunchFailure {
        code: LaunchCode::SpawnFailed,
        message: format!("failed to create a pipe: {errno}"),
    })
}

/// Shortens a name for a message: the exit record has limited space.
fn cut(name: &str) -> String {
    const MOST: usize = 200;
    if name.chars().count() <= MOST { name.to_owned() } else { name.chars().take(MOST).chain(['…']).collect() }
}

/// The message of [`explain`].
pub(super) fn why_not_started(spec: &LaunchSpec, error: &SpawnError) -> String {
    explain(spec, error).message
}

/// Turns an errno into a message for the user who typed the command.
fn explain(spec: &LaunchSpec, error: &SpawnError) -> LaunchFailure {
    let kind = error.source.raw_os_error();
    let program = spec.argv.first().map(|name| Path::new(name.as_ref()).display().to_string());
    let name = program.unwrap_or_default();
    let (program, cwd) = (cut(&name), cut(&spec.cwd.display().to_string()));
    let (code, message) = match (error.stage, kind) {
        (SpawnStage::Exec, Some(libc::ENOENT | libc::ENOTDIR)) => {
            let path = spec.cwd.join(PathBuf::from(&name));
            if name.contains('/') && path.exists() {
                (
                    LaunchCode::InterpreterMissing,
                    format!("the interpreter (or loader) that {program} names was not found"),
                )
            } else if name.contains('/') {
                (LaunchCode::ProgramNotFound, format!("there is no program {program}"))
            } else {
                (LaunchCode::ProgramNotFound, format!("there is no program {program} in the agent's PATH"))
            }
        }
        (SpawnStage::Exec, _) => {
            (LaunchCode::ProgramNotExecutable, format!("{program} cannot be executed: {}", error.source))
        }
        (SpawnStage::WorkingDirectory, Some(libc::ENOENT | libc::ENOTDIR)) => {
            (LaunchCode::CwdMissing, format!("the working directory {cwd} does not exist"))
        }
        (SpawnStage::WorkingDirectory, _) => {
            (LaunchCode::CwdDenied, format!("the working directory {cwd} cannot be entered: {}", error.source))
        }
        (SpawnStage::Limits, _) => (LaunchCode::LimitRefused, failed_to(error)),
        (SpawnStage::ExecBefore, _) => {
            let line = spec.pre_start.as_ref().map(HookSpec::line).unwrap_or_default();
            let message = format!("the pre-start command '{line}' cannot be executed: {}", error.source);
            (LaunchCode::ProgramNotExecutable, message)
        }
        (
            SpawnStage::Fork | SpawnStage::Cgroup | SpawnStage::ProcessGroup | SpawnStage::Stdio | SpawnStage::Terminal,
            _,
        ) => (LaunchCode::SpawnFailed, failed_to(error)),
    };
    LaunchFailure { code, message }
}
