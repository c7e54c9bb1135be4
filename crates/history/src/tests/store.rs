//! Snapshots, refs, packs and the remains of a crash.

use std::os::unix::fs::FileExt;

use super::*;

#[test]
fn a_checkpoint_exists_only_once_it_is_published() {
    let sandbox = Sandbox::new();
    sandbox.write("a", "1");
    let snapshot = sandbox.take(1);
    assert!(sandbox.history.list().unwrap().is_empty());
    assert!(matches!(sandbox.history.commit_of(1), Err(HistoryError::NoSuchCheckpoint { number: 1 })));
    sandbox.history.publish(&snapshot).unwrap();
    assert_eq!(sandbox.history.list().unwrap(), [1]);
    assert_eq!(sandbox.history.commit_of(1).unwrap(), snapshot.commit);
    assert!(matches!(sandbox.history.publish(&snapshot), Err(HistoryError::SnapshotGone { .. })));
}

#[test]
fn a_number_is_given_only_once() {
    let sandbox = Sandbox::new();
    let (one, other) = (sandbox.take(1), sandbox.take(1));
    sandbox.history.publish(&one).unwrap();
    assert!(matches!(sandbox.history.publish(&other), Err(HistoryError::NumberTaken { number: 1 })));
    assert_eq!(sandbox.history.commit_of(1).unwrap(), one.commit);
}

#[test]
fn a_discarded_snapshot_leaves_nothing_and_no_snapshot_relies_on_it() {
    let sandbox = Sandbox::new();
    sandbox.write("a", "the same content in both");
    let first = sandbox.take(1);
    let second = sandbox.take(2);
    sandbox.history.discard(first);
    sandbox.history.publish(&second).unwrap();
    let report = sandbox.history.verify(2, &quiet, &NEVER).unwrap();
    assert_eq!(report.bad, []);
    assert_eq!(fs::read_dir(sandbox.history.repository().join("pending")).unwrap().count(), 0);
}

#[test]
fn an_unchanged_tree_writes_no_blob_and_reads_no_file() {
    let sandbox = Sandbox::new();
    for n in 0..20 {
        sandbox.write(format!("dir{}/file{n}", n % 3), format!("content {n}"));
    }
    sandbox.let_files_age();
    let first = sandbox.checkpoint(1);
    let second = sandbox.checkpoint(2);
    assert_eq!((second.files, second.meta), (first.files, first.meta));
    assert_eq!(second.stats.unchanged, 20);
    // Manifest, root tree and commit.
    assert_eq!(second.stats.new_objects, 3);

    // The same after a restart, with the saved workspace state.
    sandbox.history.save_state().unwrap();
    let again = History::open(&sandbox.outside("state")).unwrap();
    let third = again.snapshot(&sandbox.request(3), 5, &quiet, &NEVER).unwrap();
    assert_eq!((third.stats.unchanged, third.stats.new_objects), (20, 3));

    // Without the saved state everything is read, but nothing is written.
    fs::write(sandbox.outside("state").join("workspace-state"), "nonsense").unwrap();
    let again = History::open(&sandbox.outside("state")).unwrap();
    let fourth = again.snapshot(&sandbox.request(4), 5, &quiet, &NEVER).unwrap();
    assert_eq!((fourth.stats.unchanged, fourth.stats.new_objects), (0, 3));
}

#[test]
fn a_checkpoint_of_what_is_the_same_is_another_name_for_the_one_before() {
    let sandbox = Sandbox::new();
    git_in(&sandbox.path(), &["init", "-q"]);
    sandbox.write("dir/file", "content");
    sandbox.let_files_age();
    let after = |parent| SnapshotRequest { parent: Some(parent), ..sandbox.request(parent + 1) };
    let take = |request: &SnapshotRequest| {
        let taken = sandbox.history.snapshot(request, 1_700_000_000_000, &quiet, &NEVER).unwrap();
        sandbox.history.publish(&taken).unwrap();
        taken
    };
    let first = sandbox.checkpoint(1);
    let packs = sandbox.history.pack_stats().unwrap().packs;
    let second = take(&after(1));
    assert_eq!((second.commit, second.stats.new_objects, second.stats.new_bytes), (first.commit, 0, 0));
    assert_eq!(sandbox.history.pack_stats().unwrap().packs, packs, "it has no pack of its own");
    assert_eq!(fs::read_dir(sandbox.outside("state/history.git/pending")).unwrap().count(), 0);

    // The manifest includes what a restore warns about.
    git_in(&sandbox.path(), &["symbolic-ref", "HEAD", "refs/heads/other"]);
    let third = take(&after(2));
    assert_ne!(third.commit, first.commit);
    sandbox.write("dir/file", "changed");
    let fourth = take(&after(3));

    // A commit with damaged objects is not shared.
    sandbox.history.mark_damaged(&[fourth.commit]);
    let fifth = take(&after(4));
    assert_ne!(fifth.commit, fourth.commit);
    fs::write(sandbox.outside("state/history.git/refs/fermata/checkpoints/5"), "nonsense\n").unwrap();
    assert_ne!(take(&after(5)).commit, fifth.commit);

    // Each ref stands for itself.
    sandbox.history.remove(1).unwrap();
    for number in [2, 3, 4, 6] {
        sandbox.history.verify(number, &quiet, &NEVER).unwrap();
    }
    sandbox.restore(2, 9);
    assert_eq!(fs::read(sandbox.at("dir/file")).unwrap(), b"content");
}

#[test]
fn a_change_within_the_same_tick_is_seen() {
    let sandbox = Sandbox::new();
    for round in 1..20 {
        sandbox.write("a", format!("{round:04}"));
        sandbox.checkpoint(round);
        let text = sandbox.history.diff_text(
            &Point::Checkpoint(round),
            &Point::Workspace(sandbox.path(), sandbox.rules.clone()),
            &rel("a"),
            100,
        );
        assert_eq!(text.unwrap(), TextDiff::Patch(String::new()));
    }
}

#[test]
fn what_is_known_of_the_workspace_keeps_its_objects() {
    let sandbox = Sandbox::new();
    sandbox.write("a", "only in the first");
    sandbox.let_files_age();
    sandbox.checkpoint(1);
    sandbox.history.save_state().unwrap();
    sandbox.history.remove(1).unwrap();
    assert_eq!(sandbox.history.sweep().unwrap().packs, 0);
    let again = History::open(&sandbox.outside("state")).unwrap();
    assert_eq!(again.sweep().unwrap().packs, 0);
    let second = again.snapshot(&sandbox.request(2), 5, &quiet, &NEVER).unwrap();
    assert_eq!((second.stats.unchanged, second.stats.new_objects), (1, 3));
    again.publish(&second).unwrap();
    assert_eq!(again.verify(2, &quiet, &NEVER).unwrap().bad, []);
}

#[test]
fn a_saved_state_whose_commit_is_gone_is_not_trusted() {
    let sandbox = Sandbox::new();
    sandbox.write("a", "only in the first");
    sandbox.write("b/c", "this too");
    sandbox.let_files_age();
    sandbox.checkpoint(1);
    sandbox.history.save_state().unwrap();
    sandbox.history.remove(1).unwrap();
    fs::remove_file(sandbox.history.repository().join("refs/fermata/base")).unwrap();
    let again = History::open(&sandbox.outside("state")).unwrap();
    assert_eq!(again.list().unwrap(), [0u64; 0]);
    // The store was cleared by another program.
    for entry in fs::read_dir(again.repository().join("objects/pack")).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    let again = History::open(&sandbox.outside("state")).unwrap();
    let second = again.snapshot(&sandbox.request(2), 5, &quiet, &NEVER).unwrap();
    again.publish(&second).unwrap();
    assert_eq!(again.verify(2, &quiet, &NEVER).unwrap().bad, []);
}

#[test]
fn a_sweep_removes_pending_snapshots_and_keeps_every_needed_pack() {
    let sandbox = Sandbox::new();
    sandbox.write("a", "shared by all");
    sandbox.write("b", "1");
    sandbox.checkpoint(1);
    sandbox.write("b", "2");
    sandbox.checkpoint(2);
    sandbox.write("b", "3");
    std::mem::forget(sandbox.take(3));
    sandbox.history.remove(1).unwrap();

    // A new process, as after a crash: no snapshot is in progress any more.
    let history = History::open(&sandbox.outside("state")).unwrap();
    let report = history.sweep().unwrap();
    assert_eq!((report.directories, report.packs), (1, 0));
    assert_eq!(history.verify(2, &quiet, &NEVER).unwrap().bad, []);
    history.remove(2).unwrap();
    assert_eq!(history.sweep().unwrap().packs, 2);
    assert_eq!(fs::read_dir(history.repository().join("objects/pack")).unwrap().count(), 0);
}

#[test]
fn a_sweep_removes_nothing_while_a_snapshot_is_in_progress() {
    let sandbox = Sandbox::new();
    sandbox.write("a", "shared");
    sandbox.checkpoint(1);
    let second = sandbox.take(2);
    sandbox.history.remove(1).unwrap();
    assert_eq!(sandbox.history.sweep().unwrap(), SweepReport::default());
    sandbox.history.publish(&second).unwrap();
    assert_eq!(sandbox.history.verify(2, &quiet, &NEVER).unwrap().bad, []);
}

#[test]
fn git_itself_finds_nothing_wrong_with_the_store() {
    let sandbox = Sandbox::new();
    for n in 0..300 {
        sandbox.write(format!("d{}/e{}/f{n}", n % 7, n % 3), format!("{n}").repeat(n));
    }
    sandbox.write("d1.x/a", "sorts before d1/");
    sandbox.write("large", vec![7; 3 * 1024 * 1024]);
    fs::create_dir(sandbox.at("empty")).unwrap();
    sandbox.checkpoint(1);
    sandbox.write("d1/new", "x");
    sandbox.checkpoint(2);
    let repository = sandbox.history.repository();
    git_in(repository, &["fsck", "--strict", "--full", "--no-dangling"]);
    let shown = git_in(repository, &["show", "refs/fermata/checkpoints/2:files/d1/new"]);
    assert_eq!(shown, b"x");
    let large = git_in(repository, &["cat-file", "-s", "refs/fermata/checkpoints/1:files/large"]);
    assert_eq!(large, b"3145728\n");
    let checked = git_in(repository, &["for-each-ref", "--format=%(refname)"]);
    assert_eq!(checked, b"refs/fermata/checkpoints/1\nrefs/fermata/checkpoints/2\n");
}

#[test]
fn packs_that_git_has_repacked_with_deltas_are_read() {
    let sandbox = Sandbox::new();
    let mut text: String = (0..2000).map(|n| format!("line {n}\n")).collect();
    for number in 1..=4 {
        text.push_str("one more\n");
        sandbox.write("text", &text);
        sandbox.checkpoint(number);
    }
    git_in(sandbox.history.repository(), &["repack", "-adfq", "--depth=10"]);
    let history = History::open(&sandbox.outside("state")).unwrap();
    for number in 1..=4 {
        assert_eq!(history.verify(number, &quiet, &NEVER).unwrap().bad, []);
    }
}

#[test]
fn verify_names_the_path_of_a_damaged_object() {
    let sandbox = Sandbox::new();
    sandbox
        .write("dir/a", (0..40_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect::<Vec<_>>());
    sandbox.checkpoint(1);
    let pack = walk(&sandbox.history.repository().join("objects/pack"));
    let pack = pack.iter().find(|path| path.extension() == Some(OsStr::new("pack"))).unwrap();
    set_mode(pack, 0o600);
    let file = fs::OpenOptions::new().write(true).open(pack).unwrap();
    file.write_all_at(&[0xff; 64], 50_000).unwrap();
    let report = sandbox.history.verify(1, &quiet, &NEVER).unwrap();
    assert_eq!(report.bad.len(), 1);
    assert_eq!(report.bad[0].path, "files/dir/a");

    // A restore that needs it changes nothing.
    fs::remove_file(sandbox.at("dir/a")).unwrap();
    sandbox.checkpoint(2);
    let plan = sandbox.plan(1, 2, None);
    let before = files_on_disk(&sandbox.path());
    assert!(matches!(sandbox.history.apply_restore(&plan, &quiet), Err(HistoryError::Unrestorable { .. })));
    assert_eq!(files_on_disk(&sandbox.path()), before);
}

#[test]
fn a_cancelled_snapshot_leaves_nothing() {
    let sandbox = Sandbox::new();
    sandbox.write("a", "1");
    let result = sandbox.history.snapshot(&sandbox.request(1), 0, &quiet, &AtomicBool::new(true));
    assert!(matches!(result, Err(HistoryError::Cancelled)));
    assert_eq!(fs::read_dir(sandbox.history.repository().join("pending")).unwrap().count(), 0);
}

#[test]
fn differences_are_named_by_their_kind() {
    let sandbox = Sandbox::new();
    for name in ["kept", "changed", "gone", "mode", "swapped"] {
        sandbox.write(name, "line\n");
    }
    sandbox.checkpoint(1);
    sandbox.write("changed", "line\nmore\n");
    sandbox.write("dir/added", "");
    fs::create_dir(sandbox.at("empty")).unwrap();
    fs::remove_file(sandbox.at("gone")).unwrap();
    set_mode(&sandbox.at("mode"), 0o600);
    fs::remove_file(sandbox.at("swapped")).unwrap();
    std::os::unix::fs::symlink("kept", sandbox.at("swapped")).unwrap();
    let here = Point::Workspace(sandbox.path(), sandbox.rules.clone());
    let live = sandbox.history.diff(&Point::Checkpoint(1), &here, &quiet, &NEVER).unwrap();
    sandbox.checkpoint(2);
    let stored = sandbox.history.diff(&Point::Checkpoint(1), &Point::Checkpoint(2), &quiet, &NEVER).unwrap();
    assert_eq!(live, stored);
    let named: Vec<_> = stored.entries.iter().map(|entry| (entry.path.to_string(), entry.change)).collect();
    let expected = [
        ("changed", DiffChange::Modified),
        ("dir/added", DiffChange::Added),
        ("empty", DiffChange::Added),
        ("gone", DiffChange::Removed),
        ("mode", DiffChange::ModeChanged),
        ("swapped", DiffChange::TypeChanged),
    ];
    assert_eq!(named, expected.map(|(path, change)| (path.to_owned(), change)));

    let text = |cap| sandbox.history.diff_text(&Point::Checkpoint(1), &here, &rel("changed"), cap).unwrap();
    assert_eq!(text(3), TextDiff::TooLarge);
    let TextDiff::Patch(patch) = text(100) else { panic!("a text was expected") };
    assert!(patch.contains("+more"), "{patch}");
}

#[test]
fn a_snapshot_that_is_dropped_leaves_nothing() {
    let sandbox = Sandbox::new();
    sandbox.write("a", "1");
    drop(sandbox.take(1));
    let pending = sandbox.history.repository().join("pending");
    assert_eq!(fs::read_dir(pending).unwrap().count(), 0);
    let published = sandbox.checkpoint(1);
    assert_eq!(sandbox.history.trees_of(1).unwrap(), (published.files, published.meta));
}

#[test]
fn a_git_gc_in_the_store_loses_no_checkpoint() {
    let sandbox = Sandbox::new();
    for number in 1..=3 {
        sandbox.write("a", format!("{number}").repeat(500));
        sandbox.checkpoint(number);
    }
    let repository = sandbox.history.repository();
    git_in(repository, &["gc", "-q", "--prune=now"]);
    git_in(repository, &["pack-refs", "--all"]);
    // The packs that this store has opened are gone.
    assert_eq!(sandbox.history.verify(2, &quiet, &NEVER).unwrap().bad, []);
    assert_eq!(sandbox.history.list().unwrap(), [1, 2, 3]);
    sandbox.history.sweep().unwrap();
    sandbox.history.remove(2).unwrap();
    assert!(matches!(sandbox.history.remove(2), Err(HistoryError::NoSuchCheckpoint { number: 2 })));
    assert_eq!(sandbox.history.list().unwrap(), [1, 3]);
    let again = sandbox.take(3);
    assert!(matches!(sandbox.history.publish(&again), Err(HistoryError::NumberTaken { number: 3 })));
    sandbox.checkpoint(4);
    for number in [1, 3, 4] {
        assert_eq!(sandbox.history.verify(number, &quiet, &NEVER).unwrap().bad, []);
    }
    git_in(repository, &["fsck", "--strict", "--no-dangling"]);
}

/// Text that does not compress.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

fn damage_only_pack(history: &History) {
    let mut files = walk(&history.repository().join("objects/pack")).into_iter();
    let pack = files.rfind(|path| path.extension().is_some_and(|end| end == "pack")).unwrap();
    set_mode(&pack, 0o600);
    let file = fs::OpenOptions::new().write(true).open(pack).unwrap();
    file.write_all_at(b"!!!!", 5_000).unwrap();
}

#[test]
fn a_damaged_object_is_written_again_and_every_checkpoint_is_whole_again() {
    for restarts in [false, true] {
        let sandbox = Sandbox::new();
        sandbox.write("a", noise(10_000));
        sandbox.write("dir/b", "small");
        sandbox.let_files_age();
        sandbox.checkpoint(1);
        sandbox.history.save_state().unwrap();
        damage_only_pack(&sandbox.history);
        // A snapshot that began before the damage was found may rely on damaged objects.
        let misled = sandbox.take(2);
        let bad = sandbox.history.verify(1, &quiet, &NEVER).unwrap().bad;
        assert_eq!(bad.iter().map(|bad| bad.path.as_str()).collect::<Vec<_>>(), ["files/a"]);
        sandbox.history.publish(&misled).unwrap();

        let again = restarts.then(|| History::open(&sandbox.outside("state")).unwrap());
        let history = again.as_ref().unwrap_or(&sandbox.history);
        let healing = history.snapshot(&sandbox.request(3), 5, &quiet, &NEVER).unwrap();
        // The blob, and manifest, root tree and commit as always.
        assert_eq!(healing.stats.new_objects, 4);
        history.publish(&healing).unwrap();
        // The next snapshot has nothing to repair.
        let next = history.snapshot(&sandbox.request(4), 6, &quiet, &NEVER).unwrap();
        assert_eq!(next.stats.new_objects, 3);
        history.publish(&next).unwrap();
        let content = history.plan_restore(
            &RestoreOptions {
                number: 1,
                safety: Some(4),
                workspace: &sandbox.path(),
                rules: &sandbox.rules,
                paths: None,
            },
            &quiet,
            &NEVER,
        );
        content.unwrap();

        // The pack is still damaged, until it is rewritten without that copy.
        assert_eq!(history.worthwhile_extent(), Some(Extent::Waste));
        assert!(matches!(history.consolidate(Extent::Waste, &quiet, &NEVER).unwrap(), Attempt::Done(_)));
        for number in 1..=4 {
            assert_eq!(history.verify(number, &quiet, &NEVER).unwrap().bad, [], "checkpoint {number}");
        }
        assert_eq!(history.worthwhile_extent(), None);
        git_in(history.repository(), &["fsck", "--strict", "--no-dangling"]);
    }
}

#[test]
fn what_the_workspace_no_longer_has_stays_damaged_and_keeps_its_pack() {
    let sandbox = Sandbox::new();
    sandbox.write("a", noise(10_000));
    sandbox.checkpoint(1);
    damage_only_pack(&sandbox.history);
    sandbox.write("a", "another one");
    let bad = || -> Vec<_> {
        sandbox.history.verify(1, &quiet, &NEVER).unwrap().bad.into_iter().map(|bad| bad.path).collect()
    };
    assert_eq!(bad(), ["files/a"]);
    sandbox.checkpoint(2);
    assert_eq!(sandbox.history.verify(2, &quiet, &NEVER).unwrap().bad, []);
    assert_eq!(sandbox.history.worthwhile_extent(), None);
    assert_eq!(bad(), ["files/a"]);
    assert_eq!(sandbox.history.sweep().unwrap(), SweepReport::default());
}

#[test]
fn a_ref_that_a_power_failure_has_torn_can_be_removed_and_its_number_given_again() {
    let sandbox = Sandbox::new();
    sandbox.write("a", "1");
    sandbox.checkpoint(1);
    sandbox.history.save_state().unwrap();
    let again = History::open(&sandbox.outside("state")).unwrap();
    for torn in ["", "\0\0\0\0", "4b825dc6"] {
        fs::write(sandbox.outside("state/history.git/refs/fermata/checkpoints/2"), torn).unwrap();
        assert_eq!(again.list().unwrap(), [1, 2]);
        again.remove(2).unwrap();
        again.sweep().unwrap();
    }
    again.publish(&again.snapshot(&sandbox.request(2), 5, &quiet, &NEVER).unwrap()).unwrap();
    assert_eq!(again.verify(2, &quiet, &NEVER).unwrap().bad, []);
}
