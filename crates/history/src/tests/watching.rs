//! A watched store must see the same as a store that scans the whole workspace for the first time.

use std::ffi::CString;
use std::fs::{File, OpenOptions, Permissions};
use std::io::Write;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

/// Compares the next snapshot of the watched store with one of a new store.
fn agrees(sandbox: &Sandbox, number: u64) {
    let state = tempfile::tempdir().unwrap();
    let fresh = History::open(state.path()).unwrap();
    let watched = sandbox.checkpoint(number);
    let seen = fresh.snapshot(&sandbox.request(number), 5, &quiet, &NEVER).unwrap();
    if (watched.files, watched.meta) != (seen.files, seen.meta) {
        fresh.publish(&seen).unwrap();
        let (ours, theirs) = (sandbox.history.listing_of(number).unwrap(), fresh.listing_of(number).unwrap());
        let mut text = format!("round {number}\n");
        for path in ours.items.keys().chain(theirs.items.keys()) {
            let (a, b) = (ours.items.get(path), theirs.items.get(path));
            if a != b {
                text.push_str(&format!("{path}: watched {a:?}, there is {b:?}\n"));
            }
        }
        panic!("{text}skipped {:?} and {:?}", ours.skipped, theirs.skipped);
    }
    assert_eq!(watched.skipped, seen.skipped);
    assert_eq!(sandbox.history.verify(number, &quiet, &NEVER).unwrap().bad, []);
}

/// Says whether the last snapshot was a partial scan.
fn was_partial(snapshot: &Snapshot) -> bool {
    !snapshot.full
}

const NAMES: [&str; 10] = ["a", "b", "c", "d.o", "e.log", ".gitignore", "f g", "keep.log", "n\nl", "z"];

fn path_from(words: &mut impl Iterator<Item = u32>) -> String {
    let depth = words.next().unwrap_or(0) % 4;
    let mut name = || NAMES[words.next().unwrap_or(0) as usize % NAMES.len()];
    let dirs = ["a", "b", "c", "z"];
    let mut parts: Vec<String> = (0..depth).map(|_| format!("d{}", dirs[name().len() % 4])).collect();
    parts.push(name().to_owned());
    parts.join("/")
}

/// Changes the workspace; impossible changes are ignored.
fn change(sandbox: &Sandbox, words: &mut impl Iterator<Item = u32>) {
    let path = sandbox.at(path_from(words));
    let other = sandbox.at(path_from(words));
    let kind = words.next().unwrap_or(0) % 20;
    // Opening a FIFO would wait for its other end.
    for path in [&path, &other] {
        if fs::symlink_metadata(path).is_ok_and(|meta| std::os::unix::fs::FileTypeExt::is_fifo(&meta.file_type())) {
            fs::remove_file(path).unwrap();
        }
    }
    let parent = |path: &Path| drop(fs::create_dir_all(path.parent().unwrap()));
    let result = match kind {
        0..=4 => {
            parent(&path);
            let patterns = ["*.o\n", "*.log\n!keep.log\n", "dd/\n", "/a\n", "", "d*/c\n"];
            let text = if path.ends_with(".gitignore") { patterns[kind as usize] } else { "content" };
            fs::write(&path, format!("{text}{}", if text == "content" { kind } else { 0 }))
        }
        5 => OpenOptions::new().append(true).open(&path).and_then(|mut file| file.write_all(b"more")),
        6 => fs::remove_file(&path),
        7 => fs::remove_dir_all(&path),
        8 | 9 => {
            parent(&other);
            fs::rename(&path, &other)
        }
        10 => {
            // A directory is moved out of the workspace and back under another name.
            let (dir, aside) = (path.parent().unwrap(), sandbox.outside("aside"));
            if dir == sandbox.path() {
                Ok(())
            } else {
                fs::rename(dir, &aside).and_then(|()| fs::rename(&aside, &other))
            }
        }
        11 => {
            parent(&other);
            fs::hard_link(&path, &other)
        }
        12 => {
            parent(&path);
            std::os::unix::fs::symlink("../somewhere", &path)
        }
        13 => fs::set_permissions(&path, Permissions::from_mode([0o600, 0o755, 0o4711][path.as_os_str().len() % 3])),
        14 => File::open(&path).and_then(|file| file.set_modified(std::time::UNIX_EPOCH)),
        15 => {
            parent(&path);
            fs::create_dir(&path)
        }
        16 => {
            let name = CString::new(path.as_os_str().as_bytes()).unwrap();
            nix::unistd::mkfifo(&*name, nix::sys::stat::Mode::S_IRUSR).map_err(Into::into)
        }
        17 => File::open(&path).and_then(|file| {
            rustix::fs::fsetxattr(&file, "user.note", b"value", rustix::fs::XattrFlags::empty()).map_err(Into::into)
        }),
        18 => {
            sandbox.git(&["add", "-f", "--ignore-errors", "."]);
            Ok(())
        }
        _ => {
            // Removed and created again before the next scan.
            fs::remove_dir_all(&path).and_then(|()| fs::create_dir(&path)).and_then(|()| fs::write(path.join("x"), "x"))
        }
    };
    drop(result);
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 200, ..fermata_test_seeds::cases(24) })]

    #[test]
    fn a_partial_scan_finds_the_same_as_a_full_one(rounds in prop::collection::vec(prop::collection::vec(any::<u32>(), 8..120), 2..7)) {
        let sandbox = Sandbox::new();
        sandbox.git(&["init", "-q"]);
        for (number, words) in rounds.into_iter().enumerate() {
            let mut words = words.into_iter().peekable();
            while words.peek().is_some() {
                change(&sandbox, &mut words);
            }
            agrees(&sandbox, number as u64 + 1);
        }
    }
}

#[test]
fn only_changed_paths_are_visited() {
    let sandbox = Sandbox::new();
    for n in 0..50 {
        sandbox.write(format!("dir{}/below/file{n}", n % 5), format!("content {n}"));
    }
    sandbox.let_files_age();
    assert!(!was_partial(&sandbox.checkpoint(1)));
    sandbox.write("dir3/below/file3", "changed");
    let second = sandbox.checkpoint(2);
    assert!(was_partial(&second));
    assert_eq!(second.stats.files - second.stats.unchanged, 1);
    // A blob and its metadata; two trees for each of three directories; the manifest, the root tree, the
    // commit.
    assert_eq!(second.stats.new_objects, 2 + 3 * 2 + 3);
    agrees(&sandbox, 3);
}

#[test]
fn a_snapshot_that_is_discarded_forgets_no_change() {
    let sandbox = Sandbox::new();
    sandbox.write("a/b", "1");
    sandbox.checkpoint(1);
    sandbox.write("a/b", "2");
    sandbox.write("c", "3");
    sandbox.history.discard(sandbox.take(2));
    drop(sandbox.take(2));
    agrees(&sandbox, 2);
}

#[test]
fn more_events_than_the_queue_holds_lose_nothing() {
    let sandbox = Sandbox::new();
    sandbox.write("a/b", "1");
    sandbox.checkpoint(1);
    let limit: usize = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap().trim().parse().unwrap();
    // While the table is locked, the reader thread cannot drain the queue.
    sandbox.history.watch.as_ref().unwrap().block_reader_during(|| {
        for n in 0..limit / 2 + 10 {
            sandbox.write(format!("a/{}", n % 7), "x");
            fs::remove_file(sandbox.at(format!("a/{}", n % 7))).unwrap();
        }
        sandbox.write("z/late", "not seen by the queue");
    });
    let second = sandbox.checkpoint(2);
    assert!(!was_partial(&second), "the queue has overflowed");
    agrees(&sandbox, 3);
    assert!(sandbox.covered(3).contains(&"z/late".to_owned()));
}

#[test]
fn a_file_written_through_a_known_mapping_is_read_again() {
    let sandbox = Sandbox::new();
    sandbox.write("data", [0u8; 4096]);
    sandbox.write("other", "o");
    sandbox.let_files_age();
    sandbox.checkpoint(1);
    let file = OpenOptions::new().read(true).write(true).open(sandbox.at("data")).unwrap();
    let before = file.metadata().unwrap();
    nix::sys::uio::pwrite(&file, b"quietly", 0).unwrap();
    // The effect of a memory mapping: the content is new and the modification time is not; only the change time
    // cannot be set back.
    file.set_modified(before.modified().unwrap()).unwrap();
    sandbox.let_files_age();
    let mut request = sandbox.request(2);
    request.mapped.paths.insert(rel("data"), before.ino());
    let second = sandbox.history.snapshot(&request, 5, &quiet, &NEVER).unwrap();
    assert_eq!(second.stats.files - second.stats.unchanged, 1);
    sandbox.history.publish(&second).unwrap();
    // The next snapshot reads it again, whether it is mapped or not.
    let third = sandbox.checkpoint(3);
    assert_eq!(third.stats.files - third.stats.unchanged, 1);
    let fourth = sandbox.checkpoint(4);
    assert_eq!(fourth.stats.files - fourth.stats.unchanged, 0);
}

#[test]
fn nested_workspaces_find_the_same_changes() {
    let outer = Sandbox::new();
    outer.write("inner/a", "1");
    outer.write("b", "2");
    let watcher = FileWatcher::start(&outer.outside("cookies-of-both")).unwrap();
    let one = History::open_watched(&outer.outside("one"), Some(&watcher)).unwrap();
    let two = History::open_watched(&outer.outside("two"), Some(&watcher)).unwrap();
    let mut inner = outer.request(1);
    inner.workspace = outer.at("inner");
    let take = |history: &History, request: &SnapshotRequest, number| {
        let request = SnapshotRequest { number, ..request.clone() };
        let snapshot = history.snapshot(&request, 5, &quiet, &NEVER).unwrap();
        history.publish(&snapshot).unwrap();
        snapshot
    };
    let request = outer.request(1);
    let (first, _) = (take(&one, &request, 1), take(&two, &inner, 1));
    outer.write("inner/a", "changed");
    let (both, alone) = (take(&one, &request, 2), take(&two, &inner, 2));
    assert!(was_partial(&both) && was_partial(&alone));
    assert_ne!(both.files, first.files);
    drop(two);
    outer.write("inner/a", "changed again");
    assert_ne!(take(&one, &request, 3).files, both.files);
}

#[test]
fn after_a_warm_up_a_checkpoint_costs_only_later_changes() {
    let sandbox = Sandbox::new();
    for n in 0..30 {
        sandbox.write(format!("d{}/f{n}", n % 4), format!("content {n}"));
    }
    sandbox.let_files_age();
    let warm_up = |history: &History| history.warm_up(&sandbox.request(0), 5, &quiet, &NEVER).unwrap();
    assert_eq!(warm_up(&sandbox.history), WarmUp::Scanned { read: 30, files: 30 });
    assert_eq!(warm_up(&sandbox.history), WarmUp::UpToDate);
    assert_eq!(sandbox.history.list().unwrap(), [0u64; 0]);
    assert_eq!(sandbox.history.sweep().unwrap().packs, 0);
    let first = sandbox.checkpoint(1);
    assert_eq!((first.stats.unchanged, first.stats.new_objects), (30, 3));
    // A new daemon compares all fingerprints once and reads nothing.
    let watcher = FileWatcher::start(&sandbox.outside("cookies-again")).unwrap();
    let again = History::open_watched(&sandbox.outside("state"), Some(&watcher)).unwrap();
    assert_eq!(warm_up(&again), WarmUp::Scanned { read: 0, files: 30 });
    assert_eq!(again.verify(1, &quiet, &NEVER).unwrap().bad, []);
}

#[test]
fn a_tree_as_deep_as_a_path_can_be_is_seen_and_what_is_deeper_is_told() {
    let sandbox = Sandbox::new();
    // Created step by step, the tree is deeper than any path can be.
    let mut dir =
        nix::fcntl::open(&sandbox.path(), nix::fcntl::OFlag::O_DIRECTORY, nix::sys::stat::Mode::empty()).unwrap();
    let mut beneath = dir.try_clone().unwrap();
    for level in 0..2_200 {
        nix::sys::stat::mkdirat(&dir, "d", nix::sys::stat::Mode::S_IRWXU).unwrap();
        let flags = nix::fcntl::OFlag::O_DIRECTORY;
        dir = nix::fcntl::openat(&dir, "d", flags, nix::sys::stat::Mode::empty()).unwrap();
        if level == 2_000 {
            beneath = dir.try_clone().unwrap();
        }
        if level % 500 == 0 {
            drop(nix::fcntl::openat(&dir, "f", nix::fcntl::OFlag::O_CREAT, nix::sys::stat::Mode::S_IRWXU).unwrap());
        }
    }
    let first = sandbox.checkpoint(1);
    assert_eq!(first.skipped.len(), 1, "{:?}", first.skipped.first().map(|skipped| &skipped.detail));
    assert_eq!(first.stats.files, 5);
    agrees(&sandbox, 2);
    // A path that was too deep and is gone is not reported forever.
    let at_the_end = "n".repeat(200);
    drop(
        nix::fcntl::openat(&beneath, &*at_the_end, nix::fcntl::OFlag::O_CREAT, nix::sys::stat::Mode::S_IRWXU).unwrap(),
    );
    assert_eq!(sandbox.checkpoint(10).skipped.len(), 2);
    nix::unistd::unlinkat(&beneath, &*at_the_end, nix::unistd::UnlinkatFlags::NoRemoveDir).unwrap();
    assert_eq!(sandbox.checkpoint(11).skipped.len(), 1);
    sandbox.write("d/d/new", "x");
    sandbox.let_files_age();
    agrees(&sandbox, 3);
    sandbox.history.save_state().unwrap();
    let again = History::open(&sandbox.outside("state")).unwrap();
    assert_eq!(again.snapshot(&sandbox.request(4), 5, &quiet, &NEVER).unwrap().stats.unchanged, 6);
    // The standard library cannot remove it either.
    let removed = Command::new("rm").arg("-rf").arg(sandbox.at("d")).status().unwrap();
    assert!(removed.success());
}

#[test]
fn a_path_that_vanishes_while_it_is_read_is_visited_again() {
    let sandbox = Sandbox::new();
    for n in 0..200 {
        sandbox.write(format!("g/d{}/f{n}", n % 9), format!("content {n}"));
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                fs::rename(sandbox.at("g"), sandbox.at("h")).unwrap();
                fs::rename(sandbox.at("h"), sandbox.at("g")).unwrap();
            }
        });
        for _ in 0..20 {
            sandbox.history.warm_up(&SnapshotRequest { number: 0, ..sandbox.request(1) }, 5, &quiet, &NEVER).unwrap();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    sandbox.let_files_age();
    agrees(&sandbox, 1);
}

#[test]
fn a_change_without_an_event_is_found_by_the_next_full_scan() {
    use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, open};
    use nix::sys::stat::Mode;

    let sandbox = Sandbox::new();
    sandbox.write("dir/other", "1");
    sandbox.checkpoint(1);
    // A nameless file is linked into the workspace and then written to through its first descriptor.
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR;
    let nameless = match open(&sandbox.at("dir"), flags, Mode::from_bits_truncate(0o644)) {
        // Some file systems do not support nameless files.
        Err(nix::errno::Errno::EOPNOTSUPP) => return,
        opened => opened.unwrap(),
    };
    let through = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&nameless));
    nix::unistd::linkat(AT_FDCWD, &*through, AT_FDCWD, &sandbox.at("dir/named"), AtFlags::AT_SYMLINK_FOLLOW).unwrap();
    sandbox.let_files_age();
    agrees(&sandbox, 2);
    sandbox.let_files_age();
    assert!(was_partial(&sandbox.checkpoint(3)));
    File::from(nameless).write_all(b"told to nobody").unwrap();
    sandbox.let_files_age();

    // If an agent has the file open, it is among the open files.
    let open = [RelPath::new(*b"dir/named").unwrap()].into();
    let request = SnapshotRequest { mapped: Mapped { open, ..Mapped::default() }, ..sandbox.request(9) };
    let seen = sandbox.history.snapshot(&request, 5, &quiet, &NEVER).unwrap();
    assert!(was_partial(&seen) && seen.stats.files - seen.stats.unchanged == 1);
    drop(seen);

    let warm_up = |full_scan_after| {
        let request = SnapshotRequest { number: 0, full_scan_after, ..sandbox.request(1) };
        sandbox.history.warm_up(&request, 5, &quiet, &NEVER).unwrap()
    };
    assert_eq!(warm_up(None), WarmUp::UpToDate);
    assert_eq!(warm_up(Some(Duration::from_secs(3600))), WarmUp::UpToDate, "it is not time yet");
    assert_eq!(warm_up(Some(Duration::ZERO)), WarmUp::Scanned { read: 1, files: 2 });
    agrees(&sandbox, 4);
    // A checkpoint itself never makes the additional full scan.
    let request = SnapshotRequest { full_scan_after: Some(Duration::ZERO), ..sandbox.request(5) };
    assert!(was_partial(&sandbox.history.snapshot(&request, 5, &quiet, &NEVER).unwrap()));
}

#[test]
fn rules_of_nested_repositories_and_those_above_the_workspace_count_as_they_are_now() {
    let sandbox = Sandbox::new();
    sandbox.git(&["init", "-q"]);
    sandbox.write("inner/a.o", "1");
    sandbox.write("inner/b.tmp", "2");
    git_in(&sandbox.at("inner"), &["init", "-q"]);
    agrees(&sandbox, 1);
    sandbox.let_files_age();
    agrees(&sandbox, 2);
    fs::write(sandbox.at("inner/.git/info/exclude"), "*.o\n").unwrap();
    agrees(&sandbox, 3);
    assert!(!sandbox.covered(3).contains(&"inner/a.o".to_owned()));
    sandbox.let_files_age();
    agrees(&sandbox, 4);
    sandbox.write("z", "only this");
    assert!(was_partial(&sandbox.checkpoint(5)), "rules that hold cost no look at everything");
    fs::write(sandbox.at(".git/info/exclude"), "z\n").unwrap();
    agrees(&sandbox, 6);
    fs::remove_dir_all(sandbox.at("inner/.git")).unwrap();
    agrees(&sandbox, 7);
    assert!(sandbox.covered(7).contains(&"inner/a.o".to_owned()));
}

#[test]
fn what_is_tracked_and_ignored_is_covered_as_soon_as_it_can_be() {
    let mut sandbox = Sandbox::new();
    sandbox.rules.max_file_bytes = 100;
    sandbox.git(&["init", "-q"]);
    sandbox.write(".gitignore", "*.bin\n");
    sandbox.write("big.bin", [7; 200]);
    sandbox.git(&["add", "-f", "big.bin"]);
    for number in 1..4 {
        agrees(&sandbox, number);
        assert_eq!(sandbox.history.skipped(number).unwrap().len(), 1);
        sandbox.let_files_age();
    }
    sandbox.write("big.bin", [7; 50]);
    agrees(&sandbox, 4);
    assert!(sandbox.covered(4).contains(&"big.bin".to_owned()));
}

#[test]
fn times_in_the_future_do_not_cause_files_to_be_read_again() {
    let sandbox = Sandbox::new();
    sandbox.write("a", "1");
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(86_400);
    File::open(sandbox.at("a")).unwrap().set_modified(later).unwrap();
    sandbox.let_files_age();
    sandbox.checkpoint(1);
    assert_eq!(sandbox.checkpoint(2).stats.unchanged, 1);
}
