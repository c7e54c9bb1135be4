//! Watches the covered directories with inotify, so that a snapshot knows which paths may have changed.
//!
//! ```text
//! kernel queue ─► reader thread, or the caller of take() ─► newest bucket of the workspace
//! take():   merges all buckets into one and begins a new one
//! settle(): drops the buckets of a published scan
//! ```
//!
//! One inotify instance serves all workspaces, since a user may have only 128. The kernel queues an event before
//! the call that caused it returns: a drained queue holds every event that frozen processes have caused. A
//! cookie file in the state directory proves it: if the queue is drained without the event of the cookie, it is
//! not trusted.
//!
//! A bucket is *lost* if the queue has overflowed, a directory could not be watched, or the file system does
//! not report the changes of other hosts. The next scan is then a full one. Directories are watched by
//! descriptor, so that no symbolic link can redirect a watch.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};

use crate::scan::pool;
use crate::tree::names::RelPath;

/// Every event that can change a checkpoint. A write through a memory mapping raises none.
const MASK: AddWatchFlags = AddWatchFlags::IN_MODIFY
    .union(AddWatchFlags::IN_ATTRIB)
    .union(AddWatchFlags::IN_CLOSE_WRITE)
    .union(AddWatchFlags::IN_MOVED_FROM)
    .union(AddWatchFlags::IN_MOVED_TO)
    .union(AddWatchFlags::IN_CREATE)
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_DELETE_SELF)
    .union(AddWatchFlags::IN_MOVE_SELF)
    .union(AddWatchFlags::IN_ONLYDIR);

/// Above this number of names in one bucket, a full scan is quicker.
const MANY_NAMES: usize = 100_000;

/// The paths that may have changed, as a tree of directories.
#[derive(Clone, Debug, Default)]
pub(crate) struct Dirty {
    /// Names that may have changed, appeared or vanished.
    pub names: BTreeSet<Box<[u8]>>,
    /// Names whose fingerprint does not prove that the content is unchanged, since a process has written to
    /// them or may have.
    pub written: BTreeSet<Box<[u8]>>,
    /// Whether all names in the directory may have changed.
    pub all: bool,
    /// Whether the directory was replaced by another one, which is not watched yet.
    pub anew: bool,
    /// The subdirectories with changes.
    pub below: BTreeMap<Box<[u8]>, Dirty>,
}

impl Dirty {
    /// Returns the node of a directory, which is created if necessary.
    pub fn at(&mut self, dir: &RelPath) -> &mut Dirty {
        let names = dir.bytes().split(|b| *b == b'/').filter(|name| !name.is_empty());
        names.fold(self, |at, name| at.below.entry(name.into()).or_default())
    }

    pub fn mark(&mut self, path: &RelPath) {
        match path.split() {
            Some((parent, name)) => {
                self.at(&parent).names.insert(name.into());
            }
            None => self.all = true,
        }
    }

    /// Marks a path whose fingerprint does not prove that its content is unchanged.
    pub fn mark_written(&mut self, path: &RelPath) {
        self.mark(path);
        if let Some((parent, name)) = path.split() {
            self.at(&parent).written.insert(name.into());
        }
    }

    /// Lists the paths that were marked as written.
    pub fn written(&self) -> Vec<RelPath> {
        let mut written = Vec::new();
        let mut open = vec![(RelPath::root(), self)];
        while let Some((path, dirty)) = open.pop() {
            written.extend(dirty.written.iter().map(|name| path.join(name)));
            open.extend(dirty.below.iter().map(|(name, below)| (path.join(name), below)));
        }
        written
    }

    /// Says whether a node is deeper than `depth`, without recursion.
    pub fn is_deeper_than(&self, depth: usize) -> bool {
        let mut open = vec![(self, 0)];
        while let Some((dirty, at)) = open.pop() {
            if at > depth {
                return true;
            }
            open.extend(dirty.below.values().map(|below| (below, at + 1)));
        }
        false
    }

    fn count(&self) -> usize {
        self.names.len() + self.below.values().map(Dirty::count).sum::<usize>()
    }

    /// Adds the marks of another tree.
    pub fn merge(&mut self, other: Dirty) {
        self.names.extend(other.names);
        self.written.extend(other.written);
        self.all |= other.all;
        self.anew |= other.anew;
        for (name, below) in other.below {
            self.below.entry(name).or_default().merge(below);
        }
    }
}

#[derive(Debug, Default)]
struct Bucket {
    epoch: u64,
    dirty: Dirty,
    names: usize,
    /// Why the marks are incomplete.
    lost: Option<Lost>,
}

/// The reason why changes were missed.
#[derive(Clone, Copy, Debug)]
struct Lost {
    /// A clause for messages.
    why: &'static str,
    /// Whether the reason persists after the next scan.
    lasting: bool,
}

#[derive(Debug, Default)]
struct Watches {
    /// The watches, each with the epoch in which it was added.
    by_path: BTreeMap<RelPath, (WatchDescriptor, u64)>,
    buckets: VecDeque<Bucket>,
    /// Whether the limit of watches was logged.
    limit_logged: bool,
}

impl Watches {
    fn current(&mut self) -> Option<&mut Bucket> {
        self.buckets.back_mut()
    }

    fn lose(&mut self, why: &'static str) {
        self.lose_as(Lost { why, lasting: false });
    }

    fn lose_as(&mut self, lost: Lost) {
        if let Some(bucket) = self.current() {
            bucket.lost.get_or_insert(lost);
            bucket.dirty = Dirty::default();
        }
    }
}

#[derive(Default)]
struct Table {
    /// The directories of a watch: one may belong to several workspaces, or have several paths.
    by_watch: HashMap<WatchDescriptor, Vec<(u64, RelPath)>>,
    workspaces: HashMap<u64, Watches>,
    /// Cookies whose event has arrived and that were not waited for yet.
    cookies: HashSet<u64>,
    next_workspace: u64,
}

/// The inotify instance and the thread that reads it, which ends when the last owner drops this.
pub struct FileWatcher {
    queue: Arc<Queue>,
}

impl Drop for FileWatcher {
    fn drop(&mut self) {
        self.queue.stopped.store(true, Ordering::Relaxed);
        if let Err(error) = self.queue.stop.write(1) {
            tracing::warn!(%error, "failed to stop the watcher thread");
        }
    }
}

/// The kernel's event queue, and the table by which its events are distributed.
struct Queue {
    inotify: Inotify,
    table: Mutex<Table>,
    cookies: PathBuf,
    cookie_watch: WatchDescriptor,
    next_cookie: AtomicU64,
    stop: EventFd,
    stopped: AtomicBool,
}

impl FileWatcher {
    /// Starts watching. `cookies` is an own directory for cookie files; its contents are removed.
    ///
    /// # Errors
    /// Fails when the user has no inotify instance left, or when the directory cannot be created.
    pub fn start(cookies: &Path) -> io::Result<Arc<FileWatcher>> {
        if cookies.exists() {
            fs::remove_dir_all(cookies)?;
        }
        fs::create_dir_all(cookies)?;
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let cookie_watch = inotify.add_watch(cookies, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_ONLYDIR)?;
        let queue = Arc::new(Queue {
            inotify,
            table: Mutex::default(),
            cookies: cookies.to_owned(),
            cookie_watch,
            next_cookie: AtomicU64::new(1),
            stop: EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?,
            stopped: AtomicBool::new(false),
        });
        let reader = Arc::clone(&queue);
        std::thread::Builder::new().name("watcher".to_owned()).spawn(move || reader.run())?;
        Ok(Arc::new(FileWatcher { queue }))
    }

    /// Adds a workspace, whose first scan is a full one.
    pub(crate) fn watch_workspace(self: &Arc<Self>, name: String) -> WatchedWorkspace {
        let mut table = self.queue.table();
        table.next_workspace += 1;
        let workspace = table.next_workspace;
        let nothing_known =
            Bucket { lost: Some(Lost { why: "nothing was watched before", lasting: false }), ..Bucket::default() };
        table.workspaces.insert(workspace, Watches { buckets: [nothing_known].into(), ..Watches::default() });
        WatchedWorkspace { watcher: Arc::clone(self), workspace, name }
    }
}

impl Queue {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads all queued events.
    fn drain(&self, table: &mut Table) {
        loop {
            match self.inotify.read_events() {
                Ok(events) if events.is_empty() => return,
                Ok(events) => events.into_iter().for_each(|event| self.distribute(table, event)),
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    tracing::error!(%errno, "failed to read the inotify queue; the next checkpoints make a full scan");
                    table.workspaces.values_mut().for_each(|watches| watches.lose("the queue cannot be read"));
                    return;
                }
            }
        }
    }

    fn distribute(&self, table: &mut Table, event: InotifyEvent) {
        if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            tracing::info!("the inotify queue has overflowed; the next checkpoints make a full scan");
            table.workspaces.values_mut().for_each(|watches| watches.lose("the kernel's queue overflowed"));
            return;
        }
        if event.wd == self.cookie_watch {
            use std::os::unix::ffi::OsStrExt;
            let number: Option<u64> =
                event.name.and_then(|name| std::str::from_utf8(name.as_bytes()).ok()?.parse().ok());
            table.cookies.extend(number);
            return;
        }
        let gone = event.mask.contains(AddWatchFlags::IN_IGNORED);
        let places = if gone { table.by_watch.remove(&event.wd) } else { table.by_watch.get(&event.wd).cloned() };
        for (workspace, path) in places.unwrap_or_default() {
            let Some(watches) = table.workspaces.get_mut(&workspace) else { continue };
            if gone && watches.by_path.get(&path).is_some_and(|(watch, _)| *watch == event.wd) {
                watches.by_path.remove(&path);
            }
            let unmounted = event.mask.contains(AddWatchFlags::IN_UNMOUNT);
            let moved = event.mask.intersects(AddWatchFlags::IN_MOVE_SELF | AddWatchFlags::IN_DELETE_SELF);
            if unmounted || (path.is_root() && (moved || gone)) {
                watches.lose("the workspace itself was moved, removed or unmounted");
                continue;
            }
            let Some(bucket) = watches.current() else { continue };
            if bucket.lost.is_some() {
                continue;
            }
            let dir = bucket.dirty.at(&path);
            // Another directory may have taken the path, even with the same inode number.
            dir.anew |= gone;
            if let Some(name) = &event.name {
                use std::os::unix::ffi::OsStrExt;
                bucket.names += usize::from(dir.names.insert(name.as_bytes().into()));
                if event.mask.intersects(AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CLOSE_WRITE) {
                    dir.written.insert(name.as_bytes().into());
                }
                if bucket.names > MANY_NAMES {
                    watches.lose("very much has changed");
                }
            }
        }
    }

    /// Removes a path from a watch, and the watch with its last path.
    fn forget(&self, table: &mut Table, workspace: u64, watch: WatchDescriptor, path: &RelPath) {
        let Some(places) = table.by_watch.get_mut(&watch) else { return };
        places.retain(|(owner, other)| *owner != workspace || other != path);
        if places.is_empty() {
            table.by_watch.remove(&watch);
            // The kernel removes the watch of a removed directory itself.
            if let Err(errno) = self.inotify.rm_watch(watch) {
                tracing::trace!(%path, %errno, "the watch had already ended");
            }
        }
    }

    /// Reads events until [`FileWatcher`] is dropped.
    fn run(&self) {
        loop {
            let mut fds = [
                PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
            ];
            let waited = poll(&mut fds, PollTimeout::NONE);
            if self.stopped.load(Ordering::Relaxed) {
                return;
            }
            let mut table = self.table();
            match waited {
                Ok(_) | Err(Errno::EINTR) => self.drain(&mut table),
                Err(errno) => {
                    tracing::error!(%errno, "the watcher failed to wait for events; checkpoints make full scans");
                    table.workspaces.values_mut().for_each(|watches| watches.lose("the queue cannot be waited for"));
                    return;
                }
            }
        }
    }
}

/// The changes up to a point in time.
#[derive(Debug)]
pub(crate) struct TakenEvents {
    /// The epoch of the newest bucket among them.
    pub epoch: u64,
    /// The paths that may have changed, or the reason why they are not known.
    pub dirty: Result<Dirty, &'static str>,
}

/// The watched directories of one workspace.
pub(crate) struct WatchedWorkspace {
    watcher: Arc<FileWatcher>,
    workspace: u64,
    /// The store's path, for log messages.
    name: String,
}

impl WatchedWorkspace {
    /// Starts watching a directory. If that fails, the next scan is a full one.
    pub fn add(&self, dir: BorrowedFd<'_>, path: &RelPath) {
        // The path of the descriptor makes sure that the watched directory is the one that is listed.
        let place = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
        let mut table = self.watcher.queue.table();
        let added = self.watcher.queue.inotify.add_watch(&place, MASK);
        let Some(watches) = table.workspaces.get_mut(&self.workspace) else { return };
        match added {
            Ok(watch) => {
                let epoch = watches.current().map_or(0, |bucket| bucket.epoch);
                let before = watches.by_path.insert(path.clone(), (watch, epoch)).map(|(watch, _)| watch);
                if before.is_some_and(|before| before != watch)
                    && let Some(bucket) = watches.current()
                {
                    // Two scans found different directories at this path: the next scan visits it again.
                    bucket.dirty.at(path).anew = true;
                }
                let places = table.by_watch.entry(watch).or_default();
                if !places.iter().any(|(workspace, other)| *workspace == self.workspace && other == path) {
                    places.push((self.workspace, path.clone()));
                }
                if let Some(before) = before.filter(|before| *before != watch) {
                    self.watcher.queue.forget(&mut table, self.workspace, before, path);
                }
            }
            Err(Errno::ENOSPC) => {
                const WHY: &str = "there are more directories than may be watched (fs.inotify.max_user_watches)";
                if !std::mem::replace(&mut watches.limit_logged, true) {
                    tracing::warn!(store = %self.name, "{WHY}; checkpoints compare the fingerprints of all files");
                }
                watches.lose_as(Lost { why: WHY, lasting: true });
            }
            Err(errno) => {
                tracing::debug!(%path, %errno, "a directory cannot be watched");
                watches.lose_as(Lost { why: "a directory could not be watched", lasting: true });
            }
        }
    }

    /// Ends the current bucket after all earlier events have arrived, and returns the changes of all buckets.
    pub fn take(&self) -> TakenEvents {
        let cookie = self.watcher.queue.next_cookie.fetch_add(1, Ordering::Relaxed);
        let file = self.watcher.queue.cookies.join(cookie.to_string());
        // Locked first: the reader thread, which the cookie wakes, must not take the event.
        let mut table = self.watcher.queue.table();
        let created =
            fs::OpenOptions::new().write(true).create_new(true).open(&file).and_then(|_| fs::remove_file(&file));
        self.watcher.queue.drain(&mut table);
        let arrived = table.cookies.remove(&cookie);
        let Some(watches) = table.workspaces.get_mut(&self.workspace) else {
            return TakenEvents { epoch: 0, dirty: Err("the workspace is not watched") };
        };
        if let Err(error) = created {
            tracing::warn!(%error, "failed to create a cookie file in the state directory; the next checkpoint makes a full scan");
            watches.lose("no cookie could be made");
        } else if !arrived {
            watches.lose("the cookie did not come");
        }
        // The buckets that are not settled are merged, since their number would grow as long as no scan is
        // published.
        let epoch = watches.current().map_or(0, |bucket| bucket.epoch);
        let mut all = Bucket { epoch, ..Bucket::default() };
        for bucket in std::mem::take(&mut watches.buckets) {
            all.lost = all.lost.or(bucket.lost);
            all.dirty.merge(bucket.dirty);
        }
        all.names = all.dirty.count();
        if all.names > MANY_NAMES {
            all.lost.get_or_insert(Lost { why: "very much has changed", lasting: false });
        }
        if all.lost.is_some() {
            all.dirty = Dirty::default();
        }
        let dirty = match all.lost {
            Some(lost) => Err(lost.why),
            None => Ok(all.dirty.clone()),
        };
        watches.buckets.push_back(all);
        watches.buckets.push_back(Bucket { epoch: epoch + 1, ..Bucket::default() });
        TakenEvents { epoch, dirty }
    }

    /// Says whether a change lies so deep that a scan needs a large stack.
    pub fn is_deep(&self) -> bool {
        let mut table = self.watcher.queue.table();
        self.watcher.queue.drain(&mut table);
        let watches = table.workspaces.get(&self.workspace);
        watches.is_some_and(|watches| watches.buckets.iter().any(|bucket| bucket.dirty.is_deeper_than(pool::DEEP)))
    }

    /// Makes the next scan visit a path.
    pub fn note(&self, path: &RelPath) {
        if let Some(watches) = self.watcher.queue.table().workspaces.get_mut(&self.workspace)
            && let Some(bucket) = watches.current()
        {
            bucket.dirty.mark_written(path);
        }
    }

    /// Drops the buckets whose changes a published scan has taken in.
    pub fn settle(&self, epoch: u64) {
        if let Some(watches) = self.watcher.queue.table().workspaces.get_mut(&self.workspace) {
            watches.buckets.retain(|bucket| bucket.epoch > epoch);
        }
    }

    /// Records that changes are missed permanently.
    pub fn mark_incomplete(&self, why: &'static str) {
        if let Some(watches) = self.watcher.queue.table().workspaces.get_mut(&self.workspace) {
            watches.lose_as(Lost { why, lasting: true });
        }
    }

    /// Ends the watches of directories for which `keep` returns `false`, except those that scans after the one
    /// of `epoch` may have added.
    pub fn retain(&self, epoch: u64, keep: impl Fn(&RelPath) -> bool) {
        let mut table = self.watcher.queue.table();
        let Some(watches) = table.workspaces.get_mut(&self.workspace) else { return };
        // A scan adds its watches after its own bucket has ended.
        let gone = |path: &RelPath, added: u64| added <= epoch.saturating_add(1) && !keep(path);
        let all = watches.by_path.iter().filter(|(path, (_, added))| gone(path, *added));
        let lost: Vec<_> = all.map(|(path, (watch, _))| (path.clone(), *watch)).collect();
        lost.iter().for_each(|(path, _)| {
            watches.by_path.remove(path);
        });
        for (path, watch) in &lost {
            self.watcher.queue.forget(&mut table, self.workspace, *watch, path);
        }
    }

    /// Blocks the reader thread while `meanwhile` runs.
    #[cfg(test)]
    pub fn block_reader_during(&self, meanwhile: impl FnOnce()) {
        let _table = self.watcher.queue.table();
        meanwhile();
    }

    /// Says whether the changes since the last scan are known and at most `few`, or can never be known.
    pub fn is_complete(&self, few: usize) -> bool {
        let table = self.watcher.queue.table();
        table.workspaces.get(&self.workspace).is_some_and(|watches| {
            let complete = watches.buckets.iter().all(|bucket| bucket.lost.is_none_or(|lost| lost.lasting));
            complete && watches.buckets.iter().map(|bucket| bucket.names).sum::<usize>() <= few
        })
    }
}

impl Drop for WatchedWorkspace {
    fn drop(&mut self) {
        self.retain(u64::MAX, |_| false);
        self.watcher.queue.table().workspaces.remove(&self.workspace);
    }
}
