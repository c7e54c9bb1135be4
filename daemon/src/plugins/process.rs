//! The daemon's side of one plugin host process: spawns it, sends and receives frames, ends it.
//!
//! Dropping a [`HostProcess`] kills it and every process of its session. The supervisor interprets the frames.

use super::config::PluginConfig;
use super::frame::{self, FrameError, FrameReader, FromHost, ToHost};
use super::output::PluginOutput;
use fermata_os::death::Death;
use fermata_os::{process, socket_child};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

/// How long a host that has closed descriptor 3 may take to exit by itself, and how long its last output may take to be
/// read.
const EXIT_TIMEOUT: Duration = Duration::from_millis(500);

/// How long a killed host may take to exit.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// The parameters of a host.
#[derive(Debug, Clone)]
pub struct HostLaunch {
    pub host_binary: PathBuf,
    pub plugin: PathBuf,
    pub settings_file: Option<PathBuf>,
    /// Whether the host only describes the plugin and exits.
    pub describe_only: bool,
    /// The resident memory that it may use, in bytes (0: no limit).
    pub memory_limit: u64,
    /// For the tasks that read its output.
    pub tasks: TaskTracker,
}

impl HostLaunch {
    /// Returns the parameters of a host that makes calls.
    pub fn new(config: &PluginConfig, tasks: &TaskTracker, plugin: &Path, settings_file: Option<&Path>) -> Self {
        Self {
            host_binary: config.host_binary.clone(),
            plugin: plugin.to_owned(),
            settings_file: settings_file.map(Path::to_owned),
            describe_only: false,
            memory_limit: config.memory_limit,
            tasks: tasks.clone(),
        }
    }
}

/// Why a host cannot be used any longer.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("{program} could not be started")]
    Spawn {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    /// It sent bytes that are no frame, or the connection failed.
    #[error("descriptor 3 did not carry frames")]
    Frame(#[from] FrameError),
    /// It sent a frame that is not allowed in its state.
    #[error("an unexpected frame came on descriptor 3: {frame}")]
    Unexpected {
        /// A description of the frame.
        frame: String,
    },
    /// It exited, or closed descriptor 3.
    #[error("the connection was closed")]
    Closed,
    /// It announced its end with a reason.
    #[error("{message}")]
    Dying { message: String },
    /// It sent no hello in time.
    #[error("no answer within {0:?}")]
    StartTimeout(Duration),
    /// It did not answer a call in time, nor its cancellation.
    #[error("no answer within {0:?}, nor to a cancel")]
    CallTimeout(Duration),
}

/// How a host has ended.
#[derive(Debug, Clone, Copy)]
pub enum HostExit {
    /// It exited before the daemon killed it.
    ByItself(ExitStatus),
    /// The daemon killed it.
    Killed,
    /// It was killed and did not exit in time.
    Unknown,
}

impl std::fmt::Display for HostExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            HostExit::ByItself(status) => match (status.code(), status.signal()) {
                (Some(code), _) => write!(f, "the host exited with code {code}"),
                (None, Some(number)) => match Signal::try_from(number) {
                    Ok(signal) => write!(f, "the host was killed by {signal}"),
                    Err(_) => write!(f, "the host was killed by signal {number}"),
                },
                (None, None) => write!(f, "the host ended: {status}"),
            },
            HostExit::Killed => f.write_str("the host was killed"),
            HostExit::Unknown => f.write_str("the host was killed and did not exit in time"),
        }
    }
}

/// A running host.
#[derive(Debug)]
pub struct HostProcess {
    child: Option<Child>,
    pid: u32,
    exit: Death,
    reader: FrameReader<OwnedReadHalf>,
    /// `None` once the daemon has closed its direction.
    writer: Option<OwnedWriteHalf>,
    /// The tasks that read its stdout and stderr.
    output_readers: Vec<JoinHandle<()>>,
}

impl HostProcess {
    /// Starts a host in a session of its own.
    pub fn spawn(launch: &HostLaunch, output: &PluginOutput) -> Result<Self, HostError> {
        start(launch, output).map_err(|source| HostError::Spawn { program: launch.host_binary.clone(), source })
    }

    /// Returns its process id, which is also the id of its session.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for the next frame, or for the exit of the host. Cancel-safe.
    pub async fn next(&mut self) -> Result<FromHost, HostError> {
        // Frames first: those that a host sent before its exit are read.
        let frame = tokio::select! {
            biased;
            frame = self.reader.next() => frame?,
            () = self.exit.wait() => None,
        };
        match frame {
            Some(FromHost::Dying { error }) => Err(HostError::Dying { message: error.message }),
            Some(frame) => Ok(frame),
            None => Err(HostError::Closed),
        }
    }

    /// Sends a frame. If this is cancelled or fails, the host has to be ended.
    pub async fn send(&mut self, frame: &ToHost) -> Result<(), FrameError> {
        let bytes = frame::encode(frame)?;
        match &mut self.writer {
            Some(writer) => Ok(writer.write_all(&bytes).await?),
            None => Err(FrameError::Io(io::ErrorKind::NotConnected.into())),
        }
    }

    /// Closes the connection, waits up to `grace` for the host to exit by itself, then kills it.
    pub async fn close(mut self, grace: Duration) -> HostExit {
        self.writer = None;
        self.end(grace).await
    }

    /// Kills the host after an error, with its session.
    pub async fn finish(self, error: &HostError) -> HostExit {
        let patience = match error {
            // It is about to exit, and its status shows why.
            HostError::Closed | HostError::Dying { .. } => EXIT_TIMEOUT,
            HostError::Spawn { .. }
            | HostError::Frame(_)
            | HostError::Unexpected { .. }
            | HostError::StartTimeout(_)
            | HostError::CallTimeout(_) => Duration::ZERO,
        };
        self.end(patience).await
    }

    async fn end(mut self, patience: Duration) -> HostExit {
        let exited_by_itself = tokio::time::timeout(patience, self.exit.wait()).await.is_ok();
        let pid = self.pid;
        // On a blocking thread, since it lists all processes. The host is reaped only later, so that its pid cannot be
        // the id of another session yet.
        let killed = tokio::task::spawn_blocking(move || end_session(pid)).await;
        if killed.is_err() {
            end_session(pid);
        }
        let exited = tokio::time::timeout(KILL_TIMEOUT, self.exit.wait()).await.is_ok();
        for mut reader in self.output_readers.drain(..) {
            // A process that has left the session may hold the pipe open; its output is not read.
            if tokio::time::timeout(EXIT_TIMEOUT, &mut reader).await.is_err() {
                reader.abort();
            }
        }
        let Some(mut child) = self.child.take() else {
            return HostExit::Unknown;
        };
        if !exited {
            // It is blocked in the kernel, and stays a zombie after its exit until the daemon ends.
            return HostExit::Unknown;
        }
        match child.wait() {
            Ok(status) if exited_by_itself => HostExit::ByItself(status),
            Ok(_) => HostExit::Killed,
            Err(_) => HostExit::Unknown,
        }
    }
}

impl Drop for HostProcess {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            end_session(self.pid);
            // Reaps it if it has exited already. A host is dropped alive only while the daemon ends.
            child.try_wait().ok();
        }
        for reader in &self.output_readers {
            reader.abort();
        }
    }
}

/// Kills the processes of a session.
fn end_session(leader: u32) {
    if let Ok(group) = i32::try_from(leader) {
        // The host's own group first, at once; the list of processes takes longer.
        killpg(Pid::from_raw(group), Signal::SIGKILL).ok();
    }
    socket_child::kill_session(leader);
}

fn start(launch: &HostLaunch, output: &PluginOutput) -> io::Result<HostProcess> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let (reader, writer) = UnixStream::from_std(ours)?.into_split();
    let mut command = Command::new(&launch.host_binary);
    command
        .args([Path::new("--plugin"), &launch.plugin])
        .arg(format!("--memory-limit-bytes={}", launch.memory_limit))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if let Some(settings) = &launch.settings_file {
        command.args([Path::new("--settings-file"), settings]);
    }
    if launch.describe_only {
        command.arg("--describe-only");
    }
    let mut child = socket_child::spawn_with_fd3(&mut command, theirs.into())?;
    let pid = child.id();
    match watch(&mut child, output, &launch.tasks) {
        Ok((exit, output_readers)) => Ok(HostProcess {
            child: Some(child),
            pid,
            exit,
            reader: FrameReader::new(reader),
            writer: Some(writer),
            output_readers,
        }),
        Err(error) => {
            end_session(pid);
            child.wait()?;
            Err(error)
        }
    }
}

/// Returns the watch of the child's exit and the tasks that read its output.
fn watch(child: &mut Child, output: &PluginOutput, tasks: &TaskTracker) -> io::Result<(Death, Vec<JoinHandle<()>>)> {
    let id = process::identify(child.id().cast_signed())?;
    let exit = Death::of(id.ok_or_else(|| io::Error::other("the plugin host is not in /proc"))?)?;
    let stdout = child.stdout.take().map(tokio::process::ChildStdout::from_std);
    let stderr = child.stderr.take().map(tokio::process::ChildStderr::from_std);
    let (stdout, stderr) = (stdout.transpose()?, stderr.transpose()?);
    let mut readers = Vec::new();
    if let Some(stdout) = stdout {
        readers.push(tasks.spawn(output.clone().follow("stdout", stdout)));
    }
    if let Some(stderr) = stderr {
        readers.push(tasks.spawn(output.clone().follow("stderr", stderr)));
    }
    Ok((exit, readers))
}
