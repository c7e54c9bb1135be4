//! The costs of snapshots and restores as counts: files read, objects and packs written, paths changed.

use super::*;

const FILES: u64 = 1_000;
const DIRECTORIES: u64 = 50;

fn name(n: u64) -> String {
    format!("d{}/f{n}", n % DIRECTORIES)
}

/// Creates a workspace of many files and takes a checkpoint of it.
fn large() -> Sandbox {
    let sandbox = Sandbox::new();
    (0..FILES).for_each(|n| sandbox.write(name(n), format!("content {n}")));
    sandbox.let_files_age();
    let first = sandbox.checkpoint(1);
    assert_eq!((first.stats.files, read(&first)), (FILES, FILES));
    sandbox
}

fn read(snapshot: &Snapshot) -> u64 {
    snapshot.stats.files - snapshot.stats.unchanged
}

/// Takes and publishes the next checkpoint with its predecessor as parent, like the daemon.
fn next_checkpoint(sandbox: &Sandbox, number: u64) -> Snapshot {
    let request = SnapshotRequest { parent: Some(number - 1), ..sandbox.request(number) };
    let snapshot = sandbox.history.snapshot(&request, 5, &quiet, &NEVER).unwrap();
    sandbox.history.publish(&snapshot).unwrap();
    snapshot
}

/// Returns the files of a directory with their inodes and change times, which show every write.
fn untouched(dir: &Path) -> BTreeMap<PathBuf, (u64, i64, i64)> {
    let files = walk(dir).into_iter().map(|path| (fs::symlink_metadata(&path).unwrap(), path));
    files
        .filter(|(meta, _)| meta.is_file())
        .map(|(meta, path)| (path, (meta.ino(), meta.ctime(), meta.ctime_nsec())))
        .collect()
}

#[test]
fn a_checkpoint_reads_what_changed_and_writes_what_names_it() {
    let sandbox = large();
    // Ten files in five directories.
    (0..10).map(|n| n % 5 + n / 5 * DIRECTORIES).for_each(|n| sandbox.write(name(n), "changed"));
    sandbox.let_files_age();
    let stored = untouched(sandbox.history.repository());
    let second = next_checkpoint(&sandbox, 2);
    assert_eq!(read(&second), 10);
    // One content; the metadata of five directories; two trees for each of these and the root; manifest, root
    // tree, commit.
    assert_eq!(second.stats.new_objects, 1 + 5 + 2 * 6 + 3);
    assert_eq!(sandbox.history.pack_stats().unwrap().packs, 2);
    let new = untouched(sandbox.history.repository());
    assert!(stored.iter().all(|(path, state)| new.get(path) == Some(state)), "what was stored is written to");
    assert_eq!(new.len() - stored.len(), 3, "a pack, its index and a ref");
}

#[test]
fn a_checkpoint_with_nothing_changed_reads_nothing_and_writes_a_ref() {
    let sandbox = large();
    let stored = untouched(sandbox.history.repository());
    let second = next_checkpoint(&sandbox, 2);
    assert_eq!((read(&second), second.stats.new_objects, second.stats.new_bytes), (0, 0, 0));
    let mut new = untouched(sandbox.history.repository());
    new.retain(|path, state| stored.get(path) != Some(state));
    assert_eq!(new.into_keys().collect::<Vec<_>>(), [sandbox.history.repository().join("refs/fermata/checkpoints/2")]);
}

#[test]
fn a_restore_writes_and_removes_what_differs() {
    let sandbox = large();
    (0..10).for_each(|n| sandbox.write(name(n), "changed"));
    fs::remove_file(sandbox.at(name(10))).unwrap();
    sandbox.write("d11/new", "new");
    next_checkpoint(&sandbox, 2);
    let before = untouched(&sandbox.path());
    let report = sandbox.restore(1, 3);
    assert_eq!((report.written, report.removed, report.already_right), (11, 1, 0));
    assert_eq!(report.mismatches, []);
    let after = untouched(&sandbox.path());
    let changed: Vec<_> = after.iter().filter(|(path, state)| before.get(*path) != Some(state)).collect();
    assert_eq!(changed.len(), 11, "{changed:?}");
    assert_eq!(after.len(), 1_000);
}
