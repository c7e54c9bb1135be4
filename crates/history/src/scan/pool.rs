//! The threads on which workspaces are walked, read and sealed, where that is more than a few steps.
//!
//! A small part of a workspace is looked at by whoever asks: to wake another thread and to be woken by it takes as long as
//! the look itself. Only where there is much side by side, or where it goes deep, do these threads take over.
//!
//! Two pools, so that agents that stand still never wait for somebody's first look. A tree may be as deep as a path is
//! long, some 2,000 levels, and the work follows it down: each thread has a stack for that, of which only what is used
//! takes memory.

use std::sync::LazyLock;

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Enough for two branches of the deepest tree, one on top of the other, in a build without optimisation.
const STACK: usize = 256 << 20;

/// Who waits for the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// Agents that stand still.
    Urgent,
    /// Nobody.
    Background,
}

static URGENT: LazyLock<Option<ThreadPool>> = LazyLock::new(|| pool("look"));
static BACKGROUND: LazyLock<Option<ThreadPool>> = LazyLock::new(|| pool("first-look"));

fn pool(name: &'static str) -> Option<ThreadPool> {
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8));
    let builder = ThreadPoolBuilder::new().num_threads(threads).stack_size(STACK);
    let built = builder.thread_name(move |n| format!("{name}-{n}")).build();
    built.inspect_err(|error| tracing::error!(%error, name, "no threads of its own; one at a time works too")).ok()
}

/// From this depth on, the work needs one of the pool's stacks.
pub(crate) const DEEP: usize = 32;

/// Does work on the threads of a pool; at once for whoever is one of them.
pub(crate) fn on<T: Send>(hurry: Urgency, work: impl FnOnce() -> T + Send) -> T {
    let pool = match hurry {
        Urgency::Urgent => &*URGENT,
        Urgency::Background => &*BACKGROUND,
    };
    match pool {
        Some(pool) => pool.install(work),
        None => work(),
    }
}

/// Does work that may go deep on a thread of its own: for whoever holds a lock that the pools' threads may wait for.
pub(crate) fn apart<T: Send>(work: impl Fn() -> T + Sync) -> T {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, &work);
        match thread {
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            // No thread is to be had: most trees are not deep.
            Err(_) => work(),
        }
    })
}
