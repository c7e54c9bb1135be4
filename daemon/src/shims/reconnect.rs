//! Reaching a shim that does not answer as it should, and what to do when that is in vain.
//!
//! ```text
//!  exit.json ───────────────────────────────────────────────────────────► Ended
//!  the shim is dead ──────────────────────────► end its tree ───────────► Lost
//!  it answers ──────────────────────────────────────────────────────────► Linked
//!  stopped by somebody ── SIGCONT, once ──┐
//!  its socket is gone ── SIGHUP, once ────┴── it answers ───────────────► Linked
//!                                         └── not within the patience
//!                                             ─► SIGKILL, end its tree ─► Lost
//!  it speaks another version ── is left alone ──────────────────────────► Foreign
//!  this daemon lacks what looking takes (descriptors, memory, leave) ───► Unknown
//! ```
//!
//! Every signal goes through a pidfd whose identity was checked. An agent whose shim cannot be
//! spoken to is better ended than left to run where nobody can pause, stop or see it: it comes back
//! by its restart policy. But a shim of another version works, and only this daemon cannot use it.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::link::{LinkError, ShimLink};
use super::lost::{LostTreeError, end_lost_run};
use fermata_os::death::Death;
use fermata_os::process::{self, ProcessId, RunState};
use fermata_protocol::error_chain;
use fermata_shim::record::{ExitRecord, RecordError, RunRecord, read_cut_short, read_exit, read_run};
use fermata_shim::wire::ShimEvent;

/// How long killed processes may take to go.
const ENDING: Duration = Duration::from_secs(10);

/// How long to wait between two tries to connect, at first and at last.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LAST_PAUSE: Duration = Duration::from_millis(200);

/// A link and what comes through it.
pub type Linked = (ShimLink, mpsc::Receiver<ShimEvent>);

/// What has become of a run.
pub enum ReconnectOutcome {
    /// It goes on, and here is the link to its shim.
    Linked(Box<Linked>),
    /// It has ended, and this is how.
    Ended(ExitRecord),
    /// Its shim is gone without a record of the exit.
    Lost {
        /// What is known, as a sentence.
        detail: String,
        /// Why something may be left of its tree; nothing is when there is no such reason.
        left: Option<LostTreeError>,
    },
    /// It goes on under a shim that this daemon cannot speak to. Why, as a sentence.
    Foreign(String),
    /// This daemon has troubles of its own (it is out of descriptors, a record cannot be read) and
    /// cannot know: nothing was ended for that, and it is to be looked at again. Why, as a sentence.
    Unknown(String),
}

/// Why a living shim was not reached.
enum Unreached {
    Dead,
    Silent { why: String, no_socket: bool },
    Foreign(String),
    Unknown(String),
}

/// Finds out what has become of a run, and brings an end to one that nobody can reach within
/// `patience`. `boot_id` is that of the present boot.
pub async fn reconnect(run_dir: &Path, boot_id: &str, patience: Duration) -> ReconnectOutcome {
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
    let why = match call(&run, patience).await {
        Ok(linked) => return ReconnectOutcome::Linked(Box::new(linked)),
        Err(Unreached::Foreign(why)) => return ReconnectOutcome::Foreign(why),
        Err(Unreached::Unknown(why)) => return ReconnectOutcome::Unknown(why),
        Err(Unreached::Dead) => None,
        Err(Unreached::Silent { why, .. }) => Some(why),
    };
    give_up(run_dir, &run, boot_id, why).await
}

/// Connects to the shim of a run, waking one that is stopped and having one whose socket is gone
/// make it anew.
///
/// # Errors
/// A sentence, when it cannot be reached within `patience`. Nothing is ended.
pub async fn connect(run: &RunRecord, patience: Duration) -> Result<Linked, String> {
    call(run, patience).await.map_err(|unreached| match unreached {
        Unreached::Dead => "its shim is gone".to_owned(),
        Unreached::Silent { why, .. } | Unreached::Foreign(why) | Unreached::Unknown(why) => why,
    })
}

async fn call(run: &RunRecord, patience: Duration) -> Result<Linked, Unreached> {
    let death =
        Death::of(run.shim).map_err(|error| Unreached::Unknown(format!("failed to watch its shim: {error}")))?;
    let started = Instant::now();
    let (mut woken, mut asked) = (false, false);
    let mut pause = FIRST_PAUSE;
    loop {
        if !process::is_alive(run.shim).unwrap_or(true) {
            return Err(Unreached::Dead);
        }
        woken = woken || wake(run.shim);
        let left = patience.saturating_sub(started.elapsed());
        let tried = tokio::time::timeout(left.max(FIRST_PAUSE), once(run)).await;
        let unreached = match tried {
            Ok(Err(unreached @ (Unreached::Silent { .. } | Unreached::Unknown(_)))) => unreached,
            Ok(other) => return other,
            Err(_) => silent("it takes connections and says nothing".to_owned(), false),
        };
        if started.elapsed() >= patience {
            return Err(unreached);
        }
        if !asked && matches!(unreached, Unreached::Silent { no_socket: true, .. }) {
            asked = true;
            tracing::warn!(run = run.run_id, socket = %run.socket.display(), "a shim's socket is gone: it shall make it anew");
            // Older shims ignore it.
            process::signal(run.shim, libc::SIGHUP).ok();
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = death.wait() => {}
        }
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

async fn once(run: &RunRecord) -> Result<Linked, Unreached> {
    match ShimLink::connect(&run.socket).await {
        Ok(linked) if linked.0.run_id() == run.run_id => Ok(linked),
        Ok(linked) => Err(silent(format!("at its socket answers run {}", linked.0.run_id()), true)),
        Err(error @ LinkError::Version { .. }) => Err(Unreached::Foreign(error_chain(&error))),
        Err(LinkError::Connect { source, socket }) if is_own_trouble(&source) => {
            Err(Unreached::Unknown(format!("failed to connect to {}: {source}", socket.display())))
        }
        Err(error) => {
            // A file that refuses connections is one that nobody listens at: it has taken the place.
            let gone = matches!(&error, LinkError::Connect { source, .. }
                if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused));
            Err(silent(error_chain(&error), gone))
        }
    }
}

/// Whether an error of connect(2) is about this daemon and says nothing of the shim.
fn is_own_trouble(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS | libc::EACCES | libc::EPERM)
    )
}

fn silent(why: String, no_socket: bool) -> Unreached {
    Unreached::Silent { why, no_socket }
}

/// Continues a shim that somebody has stopped; says whether that was needed.
pub fn wake(shim: ProcessId) -> bool {
    let stopped = process::stat_of(shim).ok().flatten().is_some_and(|stat| stat.state() == RunState::Stopped);
    if stopped {
        tracing::warn!(pid = shim.pid, "somebody has stopped a shim: it is continued");
        process::signal(shim, libc::SIGCONT).ok();
    }
    stopped
}

fn ended(run_dir: &Path) -> Result<Option<ReconnectOutcome>, String> {
    exit_of_record(read_exit(run_dir))
}

/// The end of an agent whose shim was lost while a command ran after it.
fn cut_short(run_dir: &Path) -> Result<Option<ReconnectOutcome>, String> {
    exit_of_record(read_cut_short(run_dir))
}

/// A record that is damaged tells as little as none; one that cannot be read now may tell everything.
fn exit_of_record(record: Result<Option<ExitRecord>, RecordError>) -> Result<Option<ReconnectOutcome>, String> {
    match record {
        Ok(record) => Ok(record.map(ReconnectOutcome::Ended)),
        Err(error) if error.may_pass() => Err(error_chain(&error)),
        Err(error) => {
            tracing::warn!(error = error_chain(&error), "how a run ended is not known: its record is damaged");
            Ok(None)
        }
    }
}

/// Ends a run for good: its shim, if it still lives, and then whatever is left of its tree. `why` it
/// was not reached, if it lives.
pub async fn give_up(run_dir: &Path, run: &RunRecord, boot_id: &str, why: Option<String>) -> ReconnectOutcome {
    let how = match why {
        None => "its shim was killed".to_owned(),
        Some(why) => match end_shim(run).await {
            Ok(()) => format!("its shim could not be reached and was ended ({why})"),
            Err(error) => format!("its shim can be neither reached nor ended ({why}; {error})"),
        },
    };
    // A shim that is gone may just have recorded the exit.
    let before = ended(run_dir);
    if let Ok(Some(ended)) = before {
        return ended;
    }
    let (dir, run, boot_id) = (run_dir.to_path_buf(), run.clone(), boot_id.to_owned());
    let work = move || end_lost_run(&dir, &run, &boot_id, ENDING);
    let worked = tokio::task::spawn_blocking(work).await;
    match worked {
        // The next look finds its record, or that there is none.
        Ok(Ok(count)) => match before.and_then(|_| cut_short(run_dir)) {
            Ok(Some(ended)) => ended,
            Ok(None) => lost(format!("{how}; {count} processes of it were ended")),
            Err(why) => ReconnectOutcome::Unknown(why),
        },
        Ok(Err(error)) => {
            let detail = format!("{how}, and its processes could not be ended: {}", error_chain(&error));
            ReconnectOutcome::Lost { detail, left: Some(error) }
        }
        Err(_) => lost(how),
    }
}

fn lost(detail: String) -> ReconnectOutcome {
    ReconnectOutcome::Lost { detail, left: None }
}

async fn end_shim(run: &RunRecord) -> io::Result<()> {
    let death = Death::of(run.shim)?;
    tracing::warn!(run = run.run_id, pid = run.shim.pid, "a shim that cannot be reached is ended");
    process::signal(run.shim, libc::SIGKILL)?;
    tokio::time::timeout(ENDING, death.wait()).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))
}
