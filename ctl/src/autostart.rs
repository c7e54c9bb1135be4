//! Starts a daemon when none runs, and waits until it listens.
//!
//! Two commands may do this at the same time: the daemon that loses the lock of the state directory
//! exits with [`LOST_THE_LOCK`], and its command simply goes on waiting for the other one's socket.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use fermata_protocol::client::{Client, ClientError};

use crate::cli::Globals;
use crate::connect;
use crate::errors::{Exit, Failure};

/// How long a daemon may take from its start to its first greeting.
const START_TIME: Duration = Duration::from_secs(10);

/// Between two looks at the socket.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The exit code of a daemon whose state directory belongs to another daemon.
const LOST_THE_LOCK: i32 = 75;

/// How much of the daemon's log an error shows.
const TAIL_LINES: usize = 8;

/// Variables that say who an agent is; a daemon that inherits them would hand them on.
pub const IDENTITY: [&str; 6] =
    ["FERMATA_TOKEN", "FERMATA_PROJECT", "FERMATA_AGENT", "FERMATA_RESUME", "FERMATA_CONTEXT", "FERMATA_CHECKPOINT"];

/// Starts a daemon and connects to it.
///
/// # Errors
/// When there is no `fermatad`, it ends with an error, or nobody listens in time.
pub fn start(globals: &Globals, socket: &Path, state_dir: &Path) -> Result<Client, Failure> {
    let program = program()?;
    let log_path = state_dir.join("fermatad.log");
    let (mut log, log_start) =
        open_log(state_dir, &log_path).map_err(|e| Failure::io(format!("open {}", log_path.display()), &e))?;
    let mut child = spawn(&program, globals, socket, state_dir, &log)
        .map_err(|e| Failure::io(format!("start {}", program.display()), &e))?;
    let deadline = Instant::now() + START_TIME;
    let mut other_owner = false;
    loop {
        match connect::greet(socket, None) {
            Ok(connected) => return Ok(connected),
            Err(error @ ClientError::Refused(_)) => return Err(error.into()),
            // A daemon that is going down, or has not begun to listen.
            Err(_) => {}
        }
        match ended(&mut child) {
            // Exit code 0: a daemon that has put itself into the background.
            Some(status) if status.success() => {}
            Some(status) if status.code() == Some(LOST_THE_LOCK) => other_owner = true,
            Some(status) => {
                return Err(broken_start(&program, status, &tail(&mut log, log_start))
                    .hint(format!("its whole log is {}", log_path.display())));
            }
            None => {}
        }
        if Instant::now() >= deadline {
            return Err(too_late(socket, state_dir, &log_path, other_owner));
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Finds `fermatad` next to this program, else on PATH.
pub fn program() -> Result<PathBuf, Failure> {
    let own = std::env::current_exe().ok();
    let beside = own.and_then(|path| Some(path.parent()?.join("fermatad")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|dir| dir.join("fermatad"));
    beside.into_iter().chain(on_path).find(|candidate| candidate.is_file()).ok_or_else(|| {
        Failure::new(
            Exit::Unreachable,
            "unreachable",
            "no daemon runs, and there is no fermatad to start beside fermatactl or on PATH",
        )
        .hint("install fermatad, or name a daemon's socket with --socket")
    })
}

fn open_log(state_dir: &Path, path: &Path) -> io::Result<(File, u64)> {
    DirBuilder::new().recursive(true).mode(0o700).create(state_dir)?;
    let log = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
    let length = log.metadata()?.len();
    Ok((log, length))
}

fn spawn(program: &Path, globals: &Globals, socket: &Path, state_dir: &Path, log: &File) -> io::Result<Child> {
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
    // The daemon must listen where this command looks, whatever its own defaults are. It starts in
    // `/`: what the caller gave relative to its own directory is made absolute.
    let runtime_dir = match (&globals.runtime_dir, &globals.socket) {
        (Some(dir), _) => Some(dir.clone()),
        (None, Some(_)) => None,
        (None, None) => socket.parent().map(Path::to_owned),
    };
    let surroundings = [
        ("FERMATA_SOCKET", globals.socket.clone()),
        ("FERMATA_RUNTIME_DIR", runtime_dir),
        ("FERMATA_CONFIG", variable("FERMATA_CONFIG")),
        ("FERMATA_PLUGIN_DIR", variable("FERMATA_PLUGIN_DIR")),
    ];
    for (name, path) in surroundings {
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

/// Says how the daemon ended; one that cannot be waited for counts as running until the deadline.
fn ended(child: &mut Child) -> Option<ExitStatus> {
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

fn broken_start(program: &Path, status: ExitStatus, tail: &str) -> Failure {
    let mut message = format!("{} did not start ({status})", program.display());
    if !tail.is_empty() {
        message.push_str(":\n");
        message.push_str(tail);
    }
    Failure::new(Exit::Unreachable, "unreachable", message)
}

fn too_late(socket: &Path, state_dir: &Path, log: &Path, other_owner: bool) -> Failure {
    let seconds = START_TIME.as_secs();
    let (message, hint) = if other_owner {
        (
            format!(
                "another daemon owns the state directory {}, but none listens on {}",
                state_dir.display(),
                socket.display()
            ),
            "name that daemon's socket with --socket, or another state directory with --state-dir".to_owned(),
        )
    } else {
        (
            format!("the daemon was started but has not listened on {} for {seconds} s", socket.display()),
            format!("its log is {}", log.display()),
        )
    };
    Failure::new(Exit::Unreachable, "unreachable", message).hint(hint)
}
