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

/// The most connections of one user; an agent that listens for pause requests keeps one open.
const CONNECTIONS_PER_USER: usize = 4096;

/// Why the control socket cannot be opened.
#[derive(Debug, Error)]
pub enum BindError {
    #[error("create the directory {}", path.display())]
    Directory {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("listen on {}", path.display())]
    Bind {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("use the socket passed by systemd")]
    Inherited(#[source] io::Error),
}

/// The control socket.
pub struct Listener {
    socket: UnixListener,
    /// The socket's file, to be removed at shutdown; none when it belongs to systemd.
    path: Option<PathBuf>,
}

impl Listener {
    /// Takes the socket that systemd has passed, else binds one.
    ///
    /// The caller holds the lock of the state directory: an existing socket at the path is a leftover of an earlier
    /// daemon, and is removed.
    ///
    /// # Errors
    /// The socket passed by systemd cannot be used, or none can be bound.
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
            Ok(()) | Err(_) => {}
        }
        let socket = UnixListener::bind(path).map_err(bind)?;
        // The mode decides which users can connect; their roles are decided per connection.
        let mode = if nix::unistd::geteuid().is_root() { 0o666 } else { 0o600 };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(bind)?;
        if let Some(gid) = group {
            std::os::unix::fs::chown(path, None, Some(gid)).map_err(bind)?;
        }
        Ok(Self { socket, path: Some(path.to_owned()) })
    }

    /// Accepts connections until the daemon shuts down.
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
                    // Most likely out of file descriptors; a connection that closes frees one.
                    tracing::warn!(%error, "failed to accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn serve(&self, stream: UnixStream, daemon: &Arc<Daemon>, counts: &Arc<Mutex<BTreeMap<u32, usize>>>) {
        let credentials = match peer::credentials(&stream) {
            Ok(credentials) => credentials,
            Err(error) => {
                tracing::warn!(%error, "failed to read the credentials of a peer");
                return;
            }
        };
        let slot = Slot::take(counts, &credentials);
        let daemon = Arc::clone(daemon);
        daemon.projects.services().tracker.clone().spawn(async move {
            match slot {
                Some(_slot) => serve::serve(stream, credentials, &daemon).await,
                None => {
                    let message = format!("this user has {CONNECTIONS_PER_USER} connections already");
                    let refusal = Refusal::new(Code::TooManyRequests, message);
                    serve::refuse(stream, refusal).await;
                }
            }
        });
    }

    /// Removes the socket's file, so that clients fail to connect at once.
    pub fn remove(&self) {
        if let Some(path) = &self.path
            && let Err(error) = std::fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "failed to remove the control socket");
        }
    }
}

/// Counts one connection of a user until it is dropped.
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
