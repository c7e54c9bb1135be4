//! Reconnects to the shim of a run, and ends the run when its shim cannot be reached.
//!
//! ```text
//!  exit.json exists ────────────────────────────────────────────────────► Ended
//!  the shim is dead ──────────────────────────► end its tree ───────────► Lost
//!  it answers ──────────────────────────────────────────────────────────► Linked
//!  it is stopped ── SIGCONT, once ────────┐
//!  its socket is gone ── SIGHUP, once ────┴── it answers ───────────────► Linked
//!                                         └── no answer in time
//!                                             ─► SIGKILL, end its tree ─► Lost
//!  it speaks another version ── left alone ─────────────────────────────► Foreign
//!  this daemon lacks descriptors, memory or permissions ────────────────► Unknown
//! ```
//!
//! Every signal goes through a pidfd whose identity was checked. An agent whose shim does not answer is ended, since no
//! daemon could pause, stop or observe it; its restart policy starts it again. A shim of another version works, only not
//! with this daemon, and is left alone.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use super::link::{LinkError, ShimLink};
use super::lost::{LostTreeError, end_lost_run};
use fermata_os::death::Death;
use fermata_os::process::{self, ProcessId, RunState};
use fermata_protocol::error_chain;
use fermata_shim::record::{ExitRecord, RecordError, RunRecord, read_cut_short, read_exit, read_run};
use fermata_shim::wire::ShimEvent;

/// How long killed processes may take to exit.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// The delay between two tries to connect, which doubles from the first to the last.
const FIRST_DELAY: Duration = Duration::from_millis(5);
const LAST_DELAY: Duration = Duration::from_millis(200);

/// A link and the events that it receives.
pub type Linked = (ShimLink, mpsc::Receiver<ShimEvent>);

/// The state of a run after a reconnection.
pub enum ReconnectOutcome {
    /// It runs, and its shim answers.
    Linked(Box<Linked>),
    Ended(ExitRecord),
    /// Its shim is dead and has left no record of the exit.
    Lost {
        /// The circumstances, for the user.
        detail: String,
        /// Why processes of its tree may remain; none remain where this is `None`.
        remaining: Option<LostTreeError>,
    },
    /// It runs under a shim of another version. The reason, for the user.
    Foreign(String),
    /// Its state cannot be determined for a reason in this daemon (no descriptors left, a record cannot be read).
    /// Nothing was ended, and the caller has to try again. The reason, for the user.
    Unknown(String),
}

/// Why a shim was not reached.
enum ConnectFailure {
    Dead,
    /// It is alive and does not answer. `no_socket`: it may have to create its socket again.
    Silent {
        why: String,
        no_socket: bool,
    },
    Foreign(String),
    Unknown(String),
}

/// Determines the state of a run, and ends one whose shim does not answer within `patience`. `boot_id` is that of the
/// current boot; the task of the link runs in `tasks`.
pub async fn reconnect(run_dir: &Path, boot_id: &str, patience: Duration, tasks: &TaskTracker) -> ReconnectOutcome {
    let run = match read_run(run_dir) {
        Ok(Some(run)) => run,
        Ok(None) => return lost("it was never started".to_owned()),
        Err(error) if error.may_pass() => return ReconnectOutcome::Unknown(error_chain(&error)),
        Err(error) => return lost(format!("its record cannot be read: {}", error_chain(&error))),
    };
    match ended(run_dir) {
        Ok(Some(ended)) => return ended,
        Ok(None) => {}
        Err(why) => return ReconnectOutcome::Unknown(why),
    }
    if run.boot_id != boot_id {
        match cut_short(run_dir) {
            Ok(Some(ended)) => return ended,
            Ok(None) => {}
            Err(why) => return ReconnectOutcome::Unknown(why),
        }
        return lost("the machine was restarted".to_owned());
    }
    let unreached = match connect_within(&run, patience, tasks).await {
        Ok(linked) => return ReconnectOutcome::Linked(Box::new(linked)),
        Err(ConnectFailure::Foreign(why)) => return ReconnectOutcome::Foreign(why),
        Err(ConnectFailure::Unknown(why)) => return ReconnectOutcome::Unknown(why),
        Err(ConnectFailure::Dead) => None,
        Err(ConnectFailure::Silent { why, .. }) => Some(why),
    };
    end(run_dir, &run, boot_id, unreached).await
}

/// Connects to the shim of a run: continues a shim that is stopped, and lets a shim whose socket is gone create it again.
///
/// # Errors
/// The reason, when it cannot be reached within `patience`. Nothing is ended.
pub async fn connect(run: &RunRecord, patience: Duration, tasks: &TaskTracker) -> Result<Linked, String> {
    connect_within(run, patience, tasks).await.map_err(|failure| match failure {
        ConnectFailure::Dead => "its shim is dead".to_owned(),
        ConnectFailure::Silent { why, .. } | ConnectFailure::Foreign(why) | ConnectFailure::Unknown(why) => why,
    })
}

async fn connect_within(run: &RunRecord, patience: Duration, tasks: &TaskTracker) -> Result<Linked, ConnectFailure> {
    let death =
        Death::of(run.shim).map_err(|error| ConnectFailure::Unknown(format!("failed to watch its shim: {error}")))?;
    let started = Instant::now();
    let (mut continued, mut asked_for_socket) = (false, false);
    let mut delay = FIRST_DELAY;
    loop {
        if !process::is_alive(run.shim).unwrap_or(true) {
            return Err(ConnectFailure::Dead);
        }
        continued = continued || wake(run.shim);
        let left = patience.saturating_sub(started.elapsed());
        let tried = tokio::time::timeout(left.max(FIRST_DELAY), connect_once(run, tasks)).await;
        let failure = match tried {
            Ok(Err(failure @ (ConnectFailure::Silent { .. } | ConnectFailure::Unknown(_)))) => failure,
            Ok(other) => return other,
            Err(_) => silent("it accepts connections and does not answer".to_owned(), false),
        };
        if started.elapsed() >= patience {
            return Err(failure);
        }
        if !asked_for_socket && matches!(failure, ConnectFailure::Silent { no_socket: true, .. }) {
            asked_for_socket = true;
            tracing::warn!(
                run = run.run_id, socket = %run.socket.display(),
                "the socket of a shim is gone; the shim is asked to create it again"
            );
            // Older shims ignore it.
            process::signal(run.shim, libc::SIGHUP).ok();
        }
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = death.wait() => {}
        }
        delay = (delay * 2).min(LAST_DELAY);
    }
}

async fn connect_once(run: &RunRecord, tasks: &TaskTracker) -> Result<Linked, ConnectFailure> {
    match ShimLink::connect(&run.socket, tasks).await {
        Ok(linked) if linked.0.run_id() == run.run_id => Ok(linked),
        Ok(linked) => Err(silent(format!("run {} answers at its socket", linked.0.run_id()), true)),
        Err(error @ LinkError::Version { .. }) => Err(ConnectFailure::Foreign(error_chain(&error))),
        Err(LinkError::Connect { source, socket }) if is_local(&source) => {
            Err(ConnectFailure::Unknown(format!("failed to connect to {}: {source}", socket.display())))
        }
        Err(error) => {
            // A socket file that refuses connections has no listener: another file is in its place.
            let no_socket = matches!(&error, LinkError::Connect { source, .. }
                if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused));
            Err(silent(error_chain(&error), no_socket))
        }
    }
}

/// Returns whether an error of connect(2) has its cause in this daemon, so that it says nothing about the shim.
fn is_local(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS | libc::EACCES | libc::EPERM)
    )
}

fn silent(why: String, no_socket: bool) -> ConnectFailure {
    ConnectFailure::Silent { why, no_socket }
}

/// Continues a shim that is stopped; returns whether it was.
pub fn wake(shim: ProcessId) -> bool {
    let stopped = process::stat_of(shim).ok().flatten().is_some_and(|stat| stat.state() == RunState::Stopped);
    if stopped {
        tracing::warn!(pid = shim.pid, "a shim was stopped by another process; it is continued");
        process::signal(shim, libc::SIGCONT).ok();
    }
    stopped
}

fn ended(run_dir: &Path) -> Result<Option<ReconnectOutcome>, String> {
    exit_of_record(read_exit(run_dir))
}

/// Reads the exit of an agent whose shim was lost while its post-stop hook ran.
fn cut_short(run_dir: &Path) -> Result<Option<ReconnectOutcome>, String> {
    exit_of_record(read_cut_short(run_dir))
}

/// Treats a damaged record like a missing one. A record that cannot be read at the moment is an error, since the run may
/// have ended.
fn exit_of_record(record: Result<Option<ExitRecord>, RecordError>) -> Result<Option<ReconnectOutcome>, String> {
    match record {
        Ok(record) => Ok(record.map(ReconnectOutcome::Ended)),
        Err(error) if error.may_pass() => Err(error_chain(&error)),
        Err(error) => {
            tracing::warn!(error = error_chain(&error), "the exit record of a run is damaged; its exit is unknown");
            Ok(None)
        }
    }
}

/// Ends a run: its shim, if it is alive, and then the rest of its tree. `unreached` says why a living shim could not be
/// reached; `None` where it is dead.
pub async fn end(run_dir: &Path, run: &RunRecord, boot_id: &str, unreached: Option<String>) -> ReconnectOutcome {
    let detail = match unreached {
        None => "its shim was killed".to_owned(),
        Some(why) => match end_shim(run).await {
            Ok(()) => format!("its shim could not be reached and was ended ({why})"),
            Err(error) => format!("its shim can be neither reached nor ended ({why}; {error})"),
        },
    };
    // The shim may have recorded the exit just before it died.
    let exit = ended(run_dir);
    if let Ok(Some(ended)) = exit {
        return ended;
    }
    let (dir, run, boot_id) = (run_dir.to_path_buf(), run.clone(), boot_id.to_owned());
    let end_tree = move || end_lost_run(&dir, &run, &boot_id, END_TIMEOUT);
    match tokio::task::spawn_blocking(end_tree).await {
        Ok(Ok(count)) => match exit.and_then(|_| cut_short(run_dir)) {
            Ok(Some(ended)) => ended,
            Ok(None) => lost(format!("{detail}; {count} of its processes were ended")),
            Err(why) => ReconnectOutcome::Unknown(why),
        },
        Ok(Err(error)) => {
            let detail = format!("{detail}, and its processes could not be ended: {}", error_chain(&error));
            ReconnectOutcome::Lost { detail, remaining: Some(error) }
        }
        Err(_) => lost(detail),
    }
}

fn lost(detail: String) -> ReconnectOutcome {
    ReconnectOutcome::Lost { detail, remaining: None }
}

async fn end_shim(run: &RunRecord) -> io::Result<()> {
    let death = Death::of(run.shim)?;
    tracing::warn!(run = run.run_id, pid = run.shim.pid, "a shim that cannot be reached is killed");
    process::signal(run.shim, libc::SIGKILL)?;
    tokio::time::timeout(END_TIMEOUT, death.wait()).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))
}
