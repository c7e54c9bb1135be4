//! One plugin host process as the daemon holds it: frames in and out, its exit, its end.
//!
//! Whoever drops a [`HostProcess`] has killed it, with everything that it had started. What the
//! frames mean is the supervisor's business.

use super::config::PluginConfig;
use super::frame::{self, FrameError, FrameReader, FromHost, ToHost};
use super::output::Output;
use fermata_os::socket_child;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::JoinHandle;

/// How long a host whose descriptor 3 has closed may take to be seen exiting, and how long its
/// last output may take to be read.
const LINGER: Duration = Duration::from_millis(500);

/// What a host is started with.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The program.
    pub host_binary: PathBuf,
    /// The plugin.
    pub plugin: PathBuf,
    /// Its settings.
    pub settings_file: Option<PathBuf>,
    /// Whether it is only to be described.
    pub describe_only: bool,
    /// Resident memory it may use, in bytes (0: no limit).
    pub memory_limit: u64,
}

impl Launch {
    /// Launches a plugin for use, as the configuration says.
    pub fn new(config: &PluginConfig, plugin: &Path, settings_file: Option<&Path>) -> Self {
        Self {
            host_binary: config.host_binary.clone(),
            plugin: plugin.to_owned(),
            settings_file: settings_file.map(Path::to_owned),
            describe_only: false,
            memory_limit: config.memory_limit,
        }
    }
}

/// Why a host is of no use (any more).
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// It could not be started.
    #[error("{program} could not be started")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It sent something that is no frame, or the connection failed.
    #[error("descriptor 3 did not carry frames")]
    Frame(#[from] FrameError),
    /// It sent a frame that makes no sense here.
    #[error("an unexpected frame came on descriptor 3: {what}")]
    Unexpected {
        /// The frame, in short.
        what: String,
    },
    /// It ended, or closed descriptor 3.
    #[error("the connection was closed")]
    Closed,
    /// It gave a reason and ended.
    #[error("{message}")]
    Dying {
        /// The reason.
        message: String,
    },
    /// It did not come up in time.
    #[error("no answer within {0:?}")]
    Silent(Duration),
    /// It did not answer in time, not even to a cancel.
    #[error("no answer within {0:?}, nor to a cancel")]
    Deaf(Duration),
}

/// How a host came to its end.
#[derive(Debug, Clone, Copy)]
pub enum Ending {
    /// It ended before the daemon touched it.
    ByItself(ExitStatus),
    /// The daemon killed it.
    Killed,
    /// It was killed but could not be waited for.
    Unknown,
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Ending::ByItself(status) => match (status.code(), status.signal()) {
                (Some(code), _) => write!(f, "the host exited with code {code}"),
                (None, Some(number)) => match Signal::try_from(number) {
                    Ok(signal) => write!(f, "the host was killed by {signal}"),
                    Err(_) => write!(f, "the host was killed by signal {number}"),
                },
                (None, None) => write!(f, "the host ended: {status}"),
            },
            Ending::Killed => f.write_str("the host was killed"),
            Ending::Unknown => f.write_str("the host was killed and not seen to end"),
        }
    }
}

/// A running host.
#[derive(Debug)]
pub struct HostProcess {
    child: Option<Child>,
    pid: u32,
    exit: AsyncFd<OwnedFd>,
    reader: FrameReader<OwnedReadHalf>,
    writer: Option<OwnedWriteHalf>,
    followers: Vec<JoinHandle<()>>,
}

impl HostProcess {
    /// Starts a host; its output goes to `output`.
    pub fn spawn(launch: &Launch, output: &Output) -> Result<Self, HostError> {
        start(launch, output).map_err(|source| HostError::Spawn { program: launch.host_binary.clone(), source })
    }

    /// Its process id, which is also its session.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for the next frame, or for the end of the host. Cancel-safe.
    pub async fn next(&mut self) -> Result<FromHost, HostError> {
        // Frames first: what a host said before it died is worth reading.
        let frame = tokio::select! {
            biased;
            frame = self.reader.next() => frame?,
            _ = self.exit.readable() => None,
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

    /// Hangs up, waits up to `grace` for the host to leave by itself, then ends it.
    pub async fn close(mut self, grace: Duration) -> Ending {
        self.writer = None;
        self.end(grace).await
    }

    /// Ends the host and everything it has started, and says how it went.
    pub async fn finish(self, error: &HostError) -> Ending {
        let patience = match error {
            // It is about to become a zombie, which tells us why.
            HostError::Closed | HostError::Dying { .. } => LINGER,
            _ => Duration::ZERO,
        };
        self.end(patience).await
    }

    async fn end(mut self, patience: Duration) -> Ending {
        let left = tokio::time::timeout(patience, self.exit.readable()).await.is_ok();
        let pid = self.pid;
        // The list of processes is long on some machines. The host is not reaped before this is
        // done, so its number cannot have passed to another session.
        let swept = tokio::task::spawn_blocking(move || end_session(pid)).await;
        if swept.is_err() {
            end_session(pid);
        }
        let gone = tokio::time::timeout(Duration::from_secs(5), self.exit.readable()).await.is_ok();
        for mut follower in self.followers.drain(..) {
            // A process in a session of its own may still hold the pipe: not our loss.
            if tokio::time::timeout(LINGER, &mut follower).await.is_err() {
                follower.abort();
            }
        }
        let Some(mut child) = self.child.take() else {
            return Ending::Unknown;
        };
        if !gone {
            // Stuck in the kernel. It stays a zombie once it gets out, until the daemon ends.
            return Ending::Unknown;
        }
        match child.wait() {
            Ok(status) if left => Ending::ByItself(status),
            Ok(_) => Ending::Killed,
            Err(_) => Ending::Unknown,
        }
    }
}

impl Drop for HostProcess {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            end_session(self.pid);
            // Reaps it if it is dead already; otherwise the daemon is about to end anyway.
            child.try_wait().ok();
        }
        for follower in &self.followers {
            follower.abort();
        }
    }
}

fn end_session(leader: u32) {
    if let Ok(group) = i32::try_from(leader) {
        // At once, then thoroughly.
        killpg(Pid::from_raw(group), Signal::SIGKILL).ok();
    }
    socket_child::kill_session(leader);
}

fn start(launch: &Launch, output: &Output) -> io::Result<HostProcess> {
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
    match watch(&mut child, output) {
        Ok((exit, followers)) => Ok(HostProcess {
            child: Some(child),
            pid,
            exit,
            reader: FrameReader::new(reader),
            writer: Some(writer),
            followers,
        }),
        Err(error) => {
            end_session(pid);
            child.wait()?;
            Err(error)
        }
    }
}

type Watch = (AsyncFd<OwnedFd>, Vec<JoinHandle<()>>);

fn watch(child: &mut Child, output: &Output) -> io::Result<Watch> {
    let exit = fermata_os::death::watch_exit(child.id())?;
    let stdout = child.stdout.take().map(tokio::process::ChildStdout::from_std);
    let stderr = child.stderr.take().map(tokio::process::ChildStderr::from_std);
    let (stdout, stderr) = (stdout.transpose()?, stderr.transpose()?);
    let mut followers = Vec::new();
    if let Some(stdout) = stdout {
        followers.push(tokio::spawn(output.clone().follow("stdout", stdout)));
    }
    if let Some(stderr) = stderr {
        followers.push(tokio::spawn(output.clone().follow("stderr", stderr)));
    }
    Ok((exit, followers))
}
