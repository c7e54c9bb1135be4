//! Starts a daemon if none is running, and waits until it listens.
//!
//! Two commands may do this at the same time: the daemon that does not get the lock of the state directory exits with
//! [`STATE_DIR_LOCKED`], and its command keeps waiting for the socket of the other daemon.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use fermata_protocol::client::{Client, ClientError};

use crate::agent_environment::IDENTITY;
use crate::cli::global_options::GlobalOptions;
use crate::connect;
use crate::errors::{CommandError, Exit};

/// How long a daemon may take from its start to its greeting.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// Between two attempts to connect.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The exit code of a daemon whose state directory is locked by another daemon.
const STATE_DIR_LOCKED: i32 = 75;

/// How many lines of the daemon's log an error message shows.
const TAIL_LINES: usize = 8;

/// Starts a daemon and connects to it.
///
/// # Errors
/// When `fermatad` is not installed, exits with an error, or does not listen in time.
pub fn start(globals: &GlobalOptions, socket: &Path, state_dir: &Path) -> Result<Client, CommandError> {
    let program = program()?;
    let log_path = state_dir.join("fermatad.log");
    let (mut log, log_start) =
        open_log(state_dir, &log_path).map_err(|e| CommandError::io(format!("open {}", log_path.display()), &e))?;
    let mut child = spawn(&program, globals, socket, state_dir, &log)
        .map_err(|e| CommandError::io(format!("start {}", program.display()), &e))?;
    let deadline = Instant::now() + START_TIMEOUT;
    let mut other_owner = false;
    loop {
        match connect::greet(socket, None) {
            Ok(connected) => return Ok(connected),
            Err(error @ ClientError::Refused(_)) => return Err(error.into()),
            // A daemon that shuts down, or does not listen yet.
            Err(_) => {}
        }
        match exit_status(&mut child) {
            // The daemon has put itself into the background.
            Some(status) if status.success() => {}
            Some(status) if status.code() == Some(STATE_DIR_LOCKED) => other_owner = true,
            Some(status) => {
                return Err(failed_start(&program, status, &tail(&mut log, log_start))
                    .hint(format!("the complete log is {}", log_path.display())));
            }
            None => {}
        }
        if Instant::now() >= deadline {
            return Err(not_listening(socket, state_dir, &log_path, other_owner));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Finds `fermatad` in the directory of this program, else on PATH.
pub fn program() -> Result<PathBuf, CommandError> {
    let own = std::env::current_exe().ok();
    let beside = own.and_then(|path| Some(path.parent()?.join("fermatad")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|dir| dir.join("fermatad"));
    beside.into_iter().chain(on_path).find(|candidate| candidate.is_file()).ok_or_else(|| {
        CommandError::new(
            Exit::Unreachable,
            "unreachable",
            "no daemon is running, and fermatad is neither in the directory of fermatactl nor on PATH",
        )
        .hint("install fermatad, or give the socket of a daemon with --socket")
    })
}

fn open_log(state_dir: &Path, path: &Path) -> io::Result<(File, u64)> {
    DirBuilder::new().recursive(true).mode(0o700).create(state_dir)?;
    let log = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
    let length = log.metadata()?.len();
    Ok((log, length))
}

fn spawn(program: &Path, globals: &GlobalOptions, socket: &Path, state_dir: &Path, log: &File) -> io::Result<Child> {
    let mut command = Command::new(program);
    command
        .arg("--background")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log.try_clone()?)
        .env("FERMATA_STATE_DIR", state_dir);
    for name in IDENTITY {
        command.env_remove(name);
    }
    // The daemon must listen where this command connects, whatever its defaults are. It starts in `/`, so relative
    // paths are made absolute.
    let runtime_dir = match (&globals.runtime_dir, &globals.socket) {
        (Some(dir), _) => Some(dir.clone()),
        (None, Some(_)) => None,
        (None, None) => socket.parent().map(Path::to_owned),
    };
    let variables = [
        ("FERMATA_SOCKET", globals.socket.clone()),
        ("FERMATA_RUNTIME_DIR", runtime_dir),
        ("FERMATA_CONFIG", variable("FERMATA_CONFIG")),
        ("FERMATA_PLUGIN_DIR", variable("FERMATA_PLUGIN_DIR")),
    ];
    for (name, path) in variables {
        match path.filter(|p| !p.as_os_str().is_empty()) {
            Some(path) => command.env(name, std::path::absolute(path)?),
            None => command.env_remove(name),
        };
    }
    command.spawn()
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from)
}

/// Returns `None` while the daemon runs, and when its status cannot be read.
fn exit_status(child: &mut Child) -> Option<ExitStatus> {
    child.try_wait().ok().flatten()
}

fn tail(log: &mut File, from: u64) -> String {
    let mut bytes = Vec::new();
    let read = log.seek(SeekFrom::Start(from)).and_then(|_| log.take(1 << 20).read_to_end(&mut bytes));
    if read.is_err() {
        return String::new();
    }
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

fn failed_start(program: &Path, status: ExitStatus, tail: &str) -> CommandError {
    let mut message = format!("{} did not start ({status})", program.display());
    if !tail.is_empty() {
        message.push_str(":\n");
        message.push_str(tail);
    }
    CommandError::new(Exit::Unreachable, "unreachable", message)
}

fn not_listening(socket: &Path, state_dir: &Path, log: &Path, other_owner: bool) -> CommandError {
    let seconds = START_TIMEOUT.as_secs();
    let (message, hint) = if other_owner {
        (
            format!(
                "another daemon uses the state directory {}, but none listens on {}",
                state_dir.display(),
                socket.display()
            ),
            "give the socket of that daemon with --socket, or another state directory with --state-dir".to_owned(),
        )
    } else {
        (
            format!("the daemon was started but did not listen on {} within {seconds} s", socket.display()),
            format!("its log is {}", log.display()),
        )
    };
    CommandError::new(Exit::Unreachable, "unreachable", message).hint(hint)
}
