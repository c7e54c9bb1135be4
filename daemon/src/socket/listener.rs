//! Binds the control socket, or takes it over from systemd, and accepts connections.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fermata_protocol::{Code, Refusal};
use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};

use super::daemon::Daemon;
use super::serve;
use fermata_os::peer::{self, PeerCredentials};

/// How many connections one user may have; an agent that listens keeps one open.
const CONNECTIONS_PER_USER: usize = 4096;

/// Why there is no control socket.
#[derive(Debug, Error)]
pub enum BindError {
    /// The socket's directory cannot be made.
    #[error("create the directory {}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be bound.
    #[error("listen on {}", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The socket that systemd handed over cannot be used.
    #[error("use the socket from systemd")]
    Inherited(#[source] io::Error),
}

/// The control socket.
pub struct Listener {
    socket: UnixListener,
    /// The file to remove at the end; none when it belongs to systemd.
    path: Option<PathBuf>,
}

impl Listener {
    /// Takes the socket that systemd has handed over, else binds one.
    ///
    /// The caller holds the state lock, so whatever stands at the path belongs to a daemon that is gone.
    ///
    /// # Errors
    /// When neither can be done.
    pub fn open(path: &Path, group: Option<u32>) -> Result<Self, BindError> {
        let inherited = listenfd::ListenFd::from_env().take_unix_listener(0).map_err(BindError::Inherited)?;
        if let Some(inherited) = inherited {
            inherited.set_nonblocking(true).map_err(BindError::Inherited)?;
            let socket = UnixListener::from_std(inherited).map_err(BindError::Inherited)?;
            return Ok(Self { socket, path: None });
        }
        let bind = |source| BindError::Bind { path: path.to_owned(), source };
        if let Some(parent) = path.parent() {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(if group.is_some() { 0o755 } else { 0o700 })
                .create(parent)
                .map_err(|source| BindError::Directory { path: parent.to_owned(), source })?;
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(bind(error)),
            _ => {}
        }
        let socket = UnixListener::bind(path).map_err(bind)?;
        // Roles are decided per peer; who may connect at all, by the mode.
        let mode = if nix::unistd::geteuid().is_root() { 0o666 } else { 0o600 };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(bind)?;
        if let Some(gid) = group {
            std::os::unix::fs::chown(path, None, Some(gid)).map_err(bind)?;
        }
        Ok(Self { socket, path: Some(path.to_owned()) })
    }

    /// Accepts connections until the daemon stops.
    pub async fn run(&self, daemon: &Arc<Daemon>) {
        let services = daemon.projects.services();
        let counts: Arc<Mutex<BTreeMap<u32, usize>>> = Arc::default();
        loop {
            let accepted = tokio::select! {
                accepted = self.socket.accept() => accepted,
                () = services.stopping.cancelled() => return,
            };
            match accepted {
                Ok((stream, _)) => self.serve(stream, daemon, &counts),
                Err(error) => {
                    // Out of descriptors, most likely: the connections that are open go on.
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn serve(&self, stream: UnixStream, daemon: &Arc<Daemon>, counts: &Arc<Mutex<BTreeMap<u32, usize>>>) {
        let credentials = match peer::credentials(&stream) {
            Ok(credentials) => credentials,
            Err(error) => {
                tracing::warn!(%error, "a peer without credentials");
                return;
            }
        };
        let slot = Slot::take(counts, &credentials);
        let daemon = Arc::clone(daemon);
        daemon.projects.services().tracker.clone().spawn(async move {
            match slot {
                Some(_slot) => serve::serve(stream, credentials, &daemon).await,
                None => {
                    let refusal = Refusal::new(Code::TooManyRequests, "too many connections of this user".to_owned());
                    serve::refuse(stream, refusal).await;
                }
            }
        });
    }

    /// Removes the socket's file, so that clients see at once that nobody listens.
    pub fn remove(&self) {
        if let Some(path) = &self.path
            && let Err(error) = std::fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "the control socket stays");
        }
    }
}

/// One connection's share of its user's limit.
struct Slot {
    counts: Arc<Mutex<BTreeMap<u32, usize>>>,
    uid: u32,
}

impl Slot {
    fn take(counts: &Arc<Mutex<BTreeMap<u32, usize>>>, credentials: &PeerCredentials) -> Option<Self> {
        let mut open = counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(credentials.uid).or_default();
        if *count >= CONNECTIONS_PER_USER {
            return None;
        }
        *count += 1;
        Some(Self { counts: Arc::clone(counts), uid: credentials.uid })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut open = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.uid);
            }
        }
    }
}
