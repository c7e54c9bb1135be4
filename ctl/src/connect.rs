//! Finds the daemon's socket and connects to it.
//!
//! Sockets are tried in this order:
//!
//! ```text
//! --socket / FERMATA_SOCKET             only that one
//! --runtime-dir / FERMATA_RUNTIME_DIR   only DIR/fermata.sock
//! root                                  /run/fermata/fermata.sock
//! other users                           that of the user, then /run/fermata/fermata.sock
//! ```
//!
//! That of the user is `$XDG_RUNTIME_DIR/fermata/fermata.sock`, and without that directory
//! `${XDG_STATE_HOME:-~/.local/state}/fermata/run/fermata.sock`. A daemon that this command starts
//! ([`crate::autostart`]) listens on the first of them.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fermata_protocol::client::{Client, ClientError};

use crate::cli::global_options::GlobalOptions;
use crate::errors::{CommandError, Exit};
use crate::paths::absolute;

const SYSTEM_SOCKET: &str = "/run/fermata/fermata.sock";

const SYSTEM_STATE_DIR: &str = "/var/lib/fermata";

/// The longest path of a socket, in bytes: `sun_path` has 108 with its terminator.
const MAX_SOCKET_PATH: usize = 107;

/// How long a daemon may take to greet.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// What determines the socket and state directory, apart from options; a value, so that tests can construct it.
pub struct CallerEnvironment<'a> {
    /// Whether the effective user is root.
    pub root: bool,
    /// Reads an environment variable.
    pub variable: &'a dyn Fn(&str) -> Option<OsString>,
}

pub fn process_variable(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}

impl CallerEnvironment<'_> {
    fn directory(&self, name: &str) -> Option<PathBuf> {
        // The XDG specification demands that relative paths are ignored.
        (self.variable)(name).map(PathBuf::from).filter(|dir| dir.is_absolute())
    }

    fn state_home(&self) -> Option<PathBuf> {
        self.directory("XDG_STATE_HOME").or_else(|| Some(self.directory("HOME")?.join(".local/state")))
    }

    fn user_runtime_dir(&self) -> Option<PathBuf> {
        match self.directory("XDG_RUNTIME_DIR") {
            Some(dir) => Some(dir.join("fermata")),
            None => Some(self.state_home()?.join("fermata/run")),
        }
    }
}

/// Returns the sockets to try, in order.
///
/// # Errors
/// When a path is too long for a socket.
pub fn sockets(globals: &GlobalOptions, caller: &CallerEnvironment) -> Result<Vec<PathBuf>, CommandError> {
    let sockets = if let Some(socket) = &globals.socket {
        vec![socket.clone()]
    } else if let Some(dir) = &globals.runtime_dir {
        vec![dir.join("fermata.sock")]
    } else if caller.root {
        vec![SYSTEM_SOCKET.into()]
    } else {
        let own = caller.user_runtime_dir().map(|d| d.join("fermata.sock"));
        own.into_iter().chain([SYSTEM_SOCKET.into()]).collect()
    };
    let sockets = sockets.into_iter().map(absolute).collect::<Result<_, _>>()?;
    check_lengths(sockets)
}

fn check_lengths(sockets: Vec<PathBuf>) -> Result<Vec<PathBuf>, CommandError> {
    for socket in &sockets {
        if socket.as_os_str().len() > MAX_SOCKET_PATH {
            return Err(CommandError::usage(format!(
                "the socket path {} is longer than {MAX_SOCKET_PATH} bytes, the limit of the kernel",
                socket.display()
            ))
            .hint("choose a shorter directory with --runtime-dir or FERMATA_RUNTIME_DIR"));
        }
    }
    Ok(sockets)
}

/// Returns the state directory of a daemon that this command starts.
///
/// # Errors
/// When the home directory is not known.
pub fn state_dir(globals: &GlobalOptions, caller: &CallerEnvironment) -> Result<PathBuf, CommandError> {
    if let Some(dir) = globals.state_dir.clone() {
        return absolute(dir);
    }
    if caller.root {
        return Ok(SYSTEM_STATE_DIR.into());
    }
    match caller.state_home() {
        Some(home) => Ok(home.join("fermata")),
        None => Err(CommandError::usage("HOME is not set, so there is no default state directory")
            .hint("give --state-dir, or set FERMATA_STATE_DIR or HOME")),
    }
}

/// Connects to one socket; the greeting is sent with the first call.
///
/// # Errors
/// When nothing listens on the socket.
pub fn connect(socket: &Path, token: Option<String>) -> Result<Client, ClientError> {
    let mut client = Client::connect_greeting(socket, concat!("fermatactl/", env!("CARGO_PKG_VERSION")), token)?;
    client.set_read_timeout(Some(GREETING_TIMEOUT)).map_err(ClientError::Broken)?;
    Ok(client)
}

/// Connects to one socket and exchanges greetings.
///
/// # Errors
/// When nothing listens on the socket, or the daemon does not greet in time.
pub fn greet(socket: &Path, token: Option<String>) -> Result<Client, ClientError> {
    let mut client = connect(socket, token)?;
    client.hello()?;
    Ok(client)
}

/// Says whether a connection failed because nothing listens on the socket.
pub fn is_no_listener(error: &ClientError) -> bool {
    matches!(
        error,
        ClientError::Unreachable { source, .. } if matches!(
            source.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
        )
    )
}

/// Converts a connection error, with a hint that suits a person or an agent.
pub fn explain(error: ClientError, agent: bool) -> CommandError {
    match error {
        ClientError::Unreachable { path, source } => {
            #[cfg_attr(not(test), expect(clippy::wildcard_enum_match_arm, reason = "one kind has a hint of its own"))]
            let hint = match source.kind() {
                io::ErrorKind::PermissionDenied => {
                    "permission denied: join the group fermata, or run your own daemon with FERMATA_RUNTIME_DIR"
                }
                _ if agent => {
                    "the daemon of this agent is down; the agent keeps running and can report once the daemon is back"
                }
                _ => "start one with 'fermatad', or omit --no-autostart; run fermatactl doctor for details",
            };
            CommandError::from(ClientError::Unreachable { path, source }).hint(hint)
        }
        ClientError::Broken(source) if matches!(source.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            CommandError::new(
                Exit::Unreachable,
                "unreachable",
                format!("the daemon accepts connections but has not answered for {} s", GREETING_TIMEOUT.as_secs()),
            )
            .hint("see its log, or 'systemctl status fermatad'")
        }
        ClientError::Broken(_) | ClientError::Closed | ClientError::Garbled(_) | ClientError::Refused(_) => {
            error.into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket_paths(globals: &GlobalOptions, root: bool, variables: &[(&str, &str)]) -> Vec<String> {
        let variable = |name: &str| {
            let pair = variables.iter().find(|(key, _)| *key == name);
            pair.map(|(_, value)| OsString::from(value))
        };
        let caller = CallerEnvironment { root, variable: &variable };
        let sockets = sockets(globals, &caller).expect("sockets");
        sockets.iter().map(|s| s.display().to_string()).collect()
    }

    #[test]
    fn a_given_socket_is_the_only_one() {
        let globals =
            GlobalOptions { socket: Some("/a/s".into()), runtime_dir: Some("/b".into()), ..GlobalOptions::default() };
        assert_eq!(socket_paths(&globals, true, &[]), ["/a/s"]);
    }

    #[test]
    fn a_given_runtime_dir_wins_for_root_too() {
        let globals = GlobalOptions { runtime_dir: Some("/b".into()), ..GlobalOptions::default() };
        assert_eq!(socket_paths(&globals, true, &[]), ["/b/fermata.sock"]);
        assert_eq!(socket_paths(&GlobalOptions::default(), true, &[]), [SYSTEM_SOCKET]);
    }

    #[test]
    fn users_prefer_their_own_daemon_to_the_systems() {
        let globals = GlobalOptions::default();
        assert_eq!(
            socket_paths(&globals, false, &[("XDG_RUNTIME_DIR", "/run/user/7")]),
            ["/run/user/7/fermata/fermata.sock", SYSTEM_SOCKET]
        );
        assert_eq!(
            socket_paths(&globals, false, &[("HOME", "/home/x")]),
            ["/home/x/.local/state/fermata/run/fermata.sock", SYSTEM_SOCKET]
        );
        assert_eq!(
            socket_paths(&globals, false, &[("XDG_RUNTIME_DIR", "relative"), ("XDG_STATE_HOME", "/s")]),
            ["/s/fermata/run/fermata.sock", SYSTEM_SOCKET]
        );
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_refused_with_a_hint() {
        let globals =
            GlobalOptions { runtime_dir: Some(format!("/{}", "x".repeat(120)).into()), ..GlobalOptions::default() };
        let caller = CallerEnvironment { root: true, variable: &|_| None };
        let error = sockets(&globals, &caller).expect_err("too long");
        assert_eq!(error.exit_number(), 2);
    }
}
