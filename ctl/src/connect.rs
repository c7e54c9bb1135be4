//! Finds the daemon's socket and connects to it.
//!
//! Which sockets are tried, in this order:
//!
//! ```text
//! --socket / FERMATA_SOCKET             only that one
//! --runtime-dir / FERMATA_RUNTIME_DIR   only DIR/fermata.sock
//! root                                  /run/fermata/fermata.sock
//! others                                the user's own, then /run/fermata/fermata.sock
//! ```
//!
//! The user's own is `$XDG_RUNTIME_DIR/fermata/fermata.sock`, and without that directory
//! `${XDG_STATE_HOME:-~/.local/state}/fermata/run/fermata.sock`. A daemon that this command starts
//! ([`crate::autostart`]) listens on the first of them.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fermata_protocol::client::{Client, ClientError};

use crate::cli::Globals;
use crate::errors::{Exit, Failure};

/// The socket of the system's daemon.
const SYSTEM_SOCKET: &str = "/run/fermata/fermata.sock";

/// The state directory of the system's daemon.
const SYSTEM_STATE_DIR: &str = "/var/lib/fermata";

/// The longest path of a socket, in bytes: `sun_path` has 108 with its terminator.
const MAX_SOCKET_PATH: usize = 107;

/// How long a daemon may take to say hello.
const GREETING_TIME: Duration = Duration::from_secs(10);

/// What of the surroundings decides where the daemon is; a value, so that tests can make one.
pub struct Surroundings<'a> {
    /// Whether the caller is root.
    pub root: bool,
    /// Reads an environment variable.
    pub variable: &'a dyn Fn(&str) -> Option<OsString>,
}

/// Reads a variable of this process.
pub fn process_variable(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}

impl Surroundings<'_> {
    fn directory(&self, name: &str) -> Option<PathBuf> {
        // The XDG specification tells programs to ignore relative paths.
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

/// Returns the sockets to try, the best first.
///
/// # Errors
/// When there is neither a home nor a runtime directory, or a path is too long for a socket.
pub fn sockets(globals: &Globals, around: &Surroundings) -> Result<Vec<PathBuf>, Failure> {
    let sockets = if let Some(socket) = &globals.socket {
        vec![socket.clone()]
    } else if let Some(dir) = &globals.runtime_dir {
        vec![dir.join("fermata.sock")]
    } else if around.root {
        vec![SYSTEM_SOCKET.into()]
    } else {
        let own = around.user_runtime_dir().map(|d| d.join("fermata.sock"));
        own.into_iter().chain([SYSTEM_SOCKET.into()]).collect()
    };
    let sockets = sockets.into_iter().map(absolute).collect::<Result<_, _>>()?;
    check_lengths(sockets)
}

fn check_lengths(sockets: Vec<PathBuf>) -> Result<Vec<PathBuf>, Failure> {
    for socket in &sockets {
        if socket.as_os_str().len() > MAX_SOCKET_PATH {
            return Err(Failure::usage(format!(
                "the socket path {} is longer than {MAX_SOCKET_PATH} bytes, which the kernel does not take",
                socket.display()
            ))
            .hint("choose a shorter directory with --runtime-dir or FERMATA_RUNTIME_DIR"));
        }
    }
    Ok(sockets)
}

/// Returns the state directory that a daemon started from here uses.
///
/// # Errors
/// When nothing says where the home directory is.
pub fn state_dir(globals: &Globals, around: &Surroundings) -> Result<PathBuf, Failure> {
    if let Some(dir) = globals.state_dir.clone() {
        return absolute(dir);
    }
    if around.root {
        return Ok(SYSTEM_STATE_DIR.into());
    }
    match around.state_home() {
        Some(home) => Ok(home.join("fermata")),
        None => Err(Failure::usage("HOME is not set, so there is no place for the state")
            .hint("give --state-dir, or set FERMATA_STATE_DIR or HOME")),
    }
}

/// Makes a path absolute without looking at the file system.
pub fn absolute(path: PathBuf) -> Result<PathBuf, Failure> {
    std::path::absolute(&path).map_err(|e| Failure::io(format!("resolve {}", path.display()), &e))
}

/// Connects to one socket; the greeting goes with the first call.
///
/// # Errors
/// When nobody listens.
pub fn connect(socket: &Path, token: Option<String>) -> Result<Client, ClientError> {
    let mut client = Client::connect_greeting(socket, concat!("fermatactl/", env!("CARGO_PKG_VERSION")), token)?;
    client.set_read_timeout(Some(GREETING_TIME)).map_err(ClientError::Broken)?;
    Ok(client)
}

/// Connects to one socket and greets.
///
/// # Errors
/// When nobody listens, or whoever listens does not greet in time.
pub fn greet(socket: &Path, token: Option<String>) -> Result<Client, ClientError> {
    let mut client = connect(socket, token)?;
    client.hello()?;
    Ok(client)
}

/// Says whether a connection failed because nobody listens, and not for another reason.
pub fn nobody_listens(error: &ClientError) -> bool {
    matches!(
        error,
        ClientError::Unreachable { source, .. } if matches!(
            source.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
        )
    )
}

/// Explains why no socket could be connected to, to a person or to an agent.
pub fn explain(error: ClientError, agent: bool) -> Failure {
    match error {
        ClientError::Unreachable { path, source } => {
            let hint = match source.kind() {
                io::ErrorKind::PermissionDenied => {
                    "you may not connect: join the group fermata, or run your own daemon \
                     with FERMATA_RUNTIME_DIR"
                }
                _ if agent => {
                    "the daemon of this agent is down; the agent goes on, and can report again \
                     once it is back"
                }
                _ => {
                    "start one with 'fermatad', or leave out --no-autostart; \
                     fermatactl doctor says more"
                }
            };
            Failure::from(ClientError::Unreachable { path, source }).hint(hint)
        }
        ClientError::Broken(source) if matches!(source.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            Failure::new(
                Exit::Unreachable,
                "unreachable",
                format!("the daemon accepts connections but has not greeted for {} s", GREETING_TIME.as_secs()),
            )
            .hint("look at its log, or at 'systemctl status fermata'")
        }
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(globals: &Globals, root: bool, variables: &[(&str, &str)]) -> Vec<String> {
        let variable = |name: &str| {
            let pair = variables.iter().find(|(key, _)| *key == name);
            pair.map(|(_, value)| OsString::from(value))
        };
        let around = Surroundings { root, variable: &variable };
        let sockets = sockets(globals, &around).expect("sockets");
        sockets.iter().map(|s| s.display().to_string()).collect()
    }

    #[test]
    fn a_given_socket_is_the_only_one() {
        let globals = Globals { socket: Some("/a/s".into()), runtime_dir: Some("/b".into()), ..Globals::default() };
        assert_eq!(found(&globals, true, &[]), ["/a/s"]);
    }

    #[test]
    fn a_given_runtime_dir_wins_for_root_too() {
        let globals = Globals { runtime_dir: Some("/b".into()), ..Globals::default() };
        assert_eq!(found(&globals, true, &[]), ["/b/fermata.sock"]);
        assert_eq!(found(&Globals::default(), true, &[]), [SYSTEM_SOCKET]);
    }

    #[test]
    fn users_prefer_their_own_daemon_to_the_systems() {
        let globals = Globals::default();
        assert_eq!(
            found(&globals, false, &[("XDG_RUNTIME_DIR", "/run/user/7")]),
            ["/run/user/7/fermata/fermata.sock", SYSTEM_SOCKET]
        );
        assert_eq!(
            found(&globals, false, &[("HOME", "/home/x")]),
            ["/home/x/.local/state/fermata/run/fermata.sock", SYSTEM_SOCKET]
        );
        assert_eq!(
            found(&globals, false, &[("XDG_RUNTIME_DIR", "relative"), ("XDG_STATE_HOME", "/s")]),
            ["/s/fermata/run/fermata.sock", SYSTEM_SOCKET]
        );
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_refused_with_a_hint() {
        let globals = Globals { runtime_dir: Some(format!("/{}", "x".repeat(120)).into()), ..Globals::default() };
        let around = Surroundings { root: true, variable: &|_| None };
        let failure = sockets(&globals, &around).expect_err("too long");
        assert_eq!(failure.exit_number(), 2);
    }
}
