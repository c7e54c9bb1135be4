//! The thread pools on which large workspaces are walked, read and turned into trees.
//!
//! Small work runs on the calling thread, since waking another thread and being woken by it takes as long as
//! the work. The pools are used for work that is parallel or follows a deep tree.
//!
//! There are two pools, so that a scan for which agents are frozen never waits for a background scan. A tree
//! may be as deep as a path is long, about 2,000 levels, and the work recurses: each thread has a stack large
//! enough for that, of which only the used part takes memory.

use std::sync::LazyLock;

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Room for two branches of the deepest tree, one on top of the other, in a build without optimisation.
const STACK: usize = 256 << 20;

/// The urgency of work, which selects the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// Frozen agents wait for the result.
    Urgent,
    /// No agent waits.
    Background,
}

static URGENT: LazyLock<Option<ThreadPool>> = LazyLock::new(|| pool("scan"));
static BACKGROUND: LazyLock<Option<ThreadPool>> = LazyLock::new(|| pool("background-scan"));

fn pool(name: &'static str) -> Option<ThreadPool> {
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8));
    let builder = ThreadPoolBuilder::new().num_threads(threads).stack_size(STACK);
    let built = builder.thread_name(move |n| format!("{name}-{n}")).build();
    built.inspect_err(|error| tracing::error!(%error, name, "failed to start a thread pool; its work runs on the calling threads")).ok()
}

/// From this depth on, work runs on a pool thread, whose stack is large enough.
pub(crate) const DEEP: usize = 32;

/// From this number of directories or files on, waking other threads is worth its cost.
pub(crate) const MANY: usize = 16;

/// Runs work on a thread of a pool; directly if the caller is one of its threads.
pub(crate) fn on<T: Send>(urgency: Urgency, work: impl FnOnce() -> T + Send) -> T {
    let pool = match urgency {
        Urgency::Urgent => &*URGENT,
        Urgency::Background => &*BACKGROUND,
    };
    match pool {
        Some(pool) => pool.install(work),
        None => work(),
    }
}

/// Runs work that may recurse deeply on a new thread: for callers that hold a lock for which the pool's threads
/// may wait.
pub(crate) fn on_new_thread<T: Send>(work: impl Fn() -> T + Sync) -> T {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, &work);
        match thread {
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            // No thread could be started. The caller's stack suffices for most trees.
            Err(_) => work(),
        }
    })
}
