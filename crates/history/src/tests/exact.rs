//! Exactness beyond contents: hard links, holes and extended attributes. A plan reads only what differs, agrees
//! with the preview, and full verification checks the result.

use std::os::unix::fs::FileExt;

use super::*;
use crate::tree::confined_dir::Time;
use crate::tree::listing::{CheckpointRoot, Listing};

/// Replaces a file by one with the same content, mode and time, as an editor does.
fn break_link(path: &Path) {
    let meta = fs::metadata(path).unwrap();
    let aside = path.with_extension("aside");
    fs::copy(path, &aside).unwrap();
    set_mtime(&aside, (meta.mtime() * 1_000_000_000 + meta.mtime_nsec()) as u64);
    fs::rename(aside, path).unwrap();
}

/// Restores a checkpoint, compares the result, and restores the previous state.
fn there_and_back(sandbox: &Sandbox, numbers: (u64, u64)) {
    let (wanted, fine) = (files_on_disk(&sandbox.path()), finer(&sandbox.path()));
    let (one, two) = numbers;
    let original = (files_at(sandbox, one), finer_at(sandbox, one));
    sandbox.restore_cleanly(one, two);
    assert_eq!((files_on_disk(&sandbox.path()), finer(&sandbox.path())), original);
    sandbox.restore_cleanly(two, two + 1);
    assert_eq!((files_on_disk(&sandbox.path()), finer(&sandbox.path())), (wanted, fine));
}

fn files_at(sandbox: &Sandbox, number: u64) -> FilesOnDisk {
    serde_json::from_slice(&fs::read(sandbox.outside(&format!("picture-{number}"))).unwrap()).unwrap()
}

fn finer_at(sandbox: &Sandbox, number: u64) -> Finer {
    serde_json::from_slice(&fs::read(sandbox.outside(&format!("finer-{number}"))).unwrap()).unwrap()
}

/// Takes a checkpoint and returns what a restore must bring back.
fn remember(sandbox: &Sandbox, number: u64) {
    sandbox.checkpoint(number);
    let keep = |what: &str, text: Vec<u8>| fs::write(sandbox.outside(&format!("{what}-{number}")), text).unwrap();
    keep("picture", serde_json::to_vec(&files_on_disk(&sandbox.path())).unwrap());
    keep("finer", serde_json::to_vec(&finer(&sandbox.path())).unwrap());
}

#[test]
fn hard_links_are_made_again_whatever_became_of_them() {
    type Edit = fn(&Sandbox);
    let changes: [Edit; 9] = [
        |s| fs::remove_file(s.at("a")).unwrap(),
        |s| break_link(&s.at("far/b")),
        |s| s.write("a", "written through all names"),
        |s| {
            fs::remove_file(s.at("single")).unwrap();
            fs::hard_link(s.at("a"), s.at("single")).unwrap();
        },
        |s| fs::hard_link(s.at("a"), s.at("far/another")).unwrap(),
        |s| set_mode(&s.at("a"), 0o600),
        |s| {
            break_link(&s.at("a"));
            break_link(&s.at("far/b"));
            set_mode(&s.at("far/b"), 0o755);
        },
        |s| {
            fs::remove_file(s.at("far/b")).unwrap();
            fs::create_dir(s.at("far/b")).unwrap();
            s.write("far/b/c", "a directory now");
        },
        |s| {
            fs::remove_dir_all(s.at("far")).unwrap();
            s.write("single", "another content");
            fs::hard_link(s.at("single"), s.at("twin")).unwrap();
        },
    ];
    for (n, change) in changes.into_iter().enumerate() {
        let sandbox = Sandbox::new();
        sandbox.write("a", "shared");
        sandbox.write("single", "shared");
        sandbox.write("quiet/other", "x");
        fs::create_dir(sandbox.at("far")).unwrap();
        fs::hard_link(sandbox.at("a"), sandbox.at("far/b")).unwrap();
        fs::hard_link(sandbox.at("a"), sandbox.at("quiet/c")).unwrap();
        set_mtime(&sandbox.at("single"), 1_000_000_000_123_456_789);
        set_mtime(&sandbox.at("a"), 1_000_000_000_123_456_789);
        remember(&sandbox, 1);
        change(&sandbox);
        println!("change {n}");
        there_and_back(&sandbox, (1, 2));
    }
}

#[test]
fn what_is_written_through_a_restored_name_reaches_no_other() {
    let sandbox = Sandbox::new();
    for name in ["a", "b"] {
        sandbox.write(name, "same");
        set_mtime(&sandbox.at(name), 1_000_000_000_000_000_000);
    }
    sandbox.checkpoint(1);
    fs::remove_file(sandbox.at("b")).unwrap();
    fs::hard_link(sandbox.at("a"), sandbox.at("b")).unwrap();
    sandbox.restore_cleanly(1, 2);
    sandbox.write("b", "changed");
    assert_eq!(fs::read(sandbox.at("a")).unwrap(), b"same");
}

#[test]
fn a_part_of_linked_names_is_restored_without_the_others() {
    let sandbox = Sandbox::new();
    sandbox.write("a", "old");
    fs::hard_link(sandbox.at("a"), sandbox.at("b")).unwrap();
    fs::hard_link(sandbox.at("a"), sandbox.at("c")).unwrap();
    sandbox.checkpoint(1);
    sandbox.write("a", "newer");
    set_mode(&sandbox.at("a"), 0o600);
    sandbox.checkpoint(2);
    let plan = sandbox.plan(1, 2, Some(&[rel("a"), rel("b")]));
    let report = sandbox.history.apply_restore(&plan, &quiet).unwrap();
    assert_eq!(report.mismatches, []);
    let read = |name: &str| fs::read_to_string(sandbox.at(name)).unwrap();
    assert_eq!((read("a"), read("b"), read("c")), ("old".into(), "old".into(), "newer".into()));
    let meta = |name: &str| fs::metadata(sandbox.at(name)).unwrap();
    assert_eq!((meta("a").ino(), meta("c").mode() & 0o777, meta("c").nlink()), (meta("b").ino(), 0o600, 1));

    // A single name is linked to those that are right already.
    fs::remove_file(sandbox.at("b")).unwrap();
    sandbox.checkpoint(3);
    let plan = sandbox.plan(1, 3, Some(&[rel("b")]));
    sandbox.history.apply_restore(&plan, &quiet).unwrap();
    assert_eq!(meta("a").ino(), meta("b").ino());
}

#[test]
fn a_name_that_is_not_covered_keeps_what_it_has() {
    let sandbox = Sandbox::new();
    sandbox.write(".gitignore", "*.o\n");
    sandbox.write("a", "same");
    sandbox.write("b", "old");
    fs::hard_link(sandbox.at("b"), sandbox.at("b.o")).unwrap();
    sandbox.checkpoint(1);
    fs::hard_link(sandbox.at("a"), sandbox.at("a.o")).unwrap();
    set_mode(&sandbox.at("a"), 0o600);
    sandbox.write("b", "changed through both");
    sandbox.checkpoint(2);
    let plan = sandbox.plan(1, 2, None);
    assert!(plan.warnings.iter().any(|text| text.starts_with("1 files had other names")), "{:?}", plan.warnings);
    assert_eq!(sandbox.history.apply_restore(&plan, &quiet).unwrap().mismatches, []);
    let mode = |name: &str| fs::metadata(sandbox.at(name)).unwrap().mode() & 0o777;
    assert_eq!((mode("a"), mode("a.o")), (0o644, 0o600));
    assert_eq!(fs::read(sandbox.at("b")).unwrap(), b"old");
    assert_eq!(fs::read(sandbox.at("b.o")).unwrap(), b"changed through both");
}

#[test]
fn a_name_that_appeared_since_the_plan_is_not_changed_through_another() {
    let sandbox = Sandbox::new();
    sandbox.write("a", "same");
    sandbox.checkpoint(1);
    set_mode(&sandbox.at("a"), 0o600);
    sandbox.checkpoint(2);
    let plan = sandbox.plan(1, 2, None);
    fs::hard_link(sandbox.at("a"), sandbox.outside("elsewhere")).unwrap();
    let report = sandbox.history.apply_restore(&plan, &quiet).unwrap();
    assert_eq!(report.mismatches.len(), 1);
    assert_eq!(fs::metadata(sandbox.outside("elsewhere")).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn extended_attributes_come_back_and_go_away() {
    let sandbox = Sandbox::new();
    for name in ["kept", "changed", "gone", "bare", "dir/inner", "set/x"] {
        sandbox.write(name, name);
    }
    for name in ["kept", "changed", "gone", "dir", "dir/inner"] {
        set_xattr(&sandbox.at(name), "user.one", Some(b"\0odd\xff"));
        set_xattr(&sandbox.at(name), "user.two=,\n", Some(b""));
    }
    remember(&sandbox, 1);
    set_xattr(&sandbox.at("changed"), "user.one", Some(b"other"));
    set_xattr(&sandbox.at("changed"), "user.new", Some(b"other"));
    fs::remove_file(sandbox.at("gone")).unwrap();
    set_xattr(&sandbox.at("bare"), "user.new", Some(b"1"));
    set_xattr(&sandbox.at("set"), "user.new", Some(b"1"));
    fs::remove_dir_all(sandbox.at("dir")).unwrap();
    let here = Point::Workspace(sandbox.path(), sandbox.rules.clone());
    let diff = sandbox.history.diff(&Point::Checkpoint(1), &here, &quiet, &NEVER).unwrap();
    let named: Vec<_> = diff.entries.iter().map(|entry| (entry.path.to_string(), entry.change)).collect();
    assert!(named.contains(&("bare".to_owned(), DiffChange::AttributesChanged)), "{named:?}");
    there_and_back(&sandbox, (1, 2));
}

#[test]
fn files_with_holes_come_back_with_holes() {
    let sandbox = Sandbox::new();
    let file = fs::File::create(sandbox.at("image")).unwrap();
    file.set_len(40 << 20).unwrap();
    file.write_all_at(b"in the middle", (20 << 20) + 17).unwrap();
    fs::File::create(sandbox.at("empty")).unwrap().set_len(1 << 20).unwrap();
    sandbox.write("dense", vec![0; 100_000]);
    file.sync_all().unwrap();
    remember(&sandbox, 1);
    assert!(finer(&sandbox.path())["image"].2, "this file system makes no holes");
    fs::remove_file(sandbox.at("image")).unwrap();
    // The same bytes without a hole.
    sandbox.write("empty", vec![0; 1 << 20]);
    fs::remove_file(sandbox.at("dense")).unwrap();
    sandbox.restore_cleanly(1, 2);
    assert_eq!(files_on_disk(&sandbox.path()), files_at(&sandbox, 1));
    assert!(fs::metadata(sandbox.at("image")).unwrap().blocks() * 512 < 1 << 20);
    assert!(fs::metadata(sandbox.at("empty")).unwrap().blocks() * 512 < 1 << 20);
}

#[test]
fn what_is_shown_before_is_what_is_done() {
    let sandbox = Sandbox::new();
    for n in 0..20 {
        sandbox.write(format!("d{}/f{n}", n % 4), format!("{n}"));
    }
    fs::hard_link(sandbox.at("d0/f0"), sandbox.at("d1/link")).unwrap();
    sandbox.write(".gitignore", "*.o\n");
    sandbox.write("held", "x");
    sandbox.checkpoint(1);
    sandbox.write("d1/f1", "changed");
    fs::remove_file(sandbox.at("d1/link")).unwrap();
    fs::remove_dir_all(sandbox.at("d2")).unwrap();
    sandbox.write("new/deep/x", "new");
    fs::remove_file(sandbox.at("held")).unwrap();
    sandbox.write("held/kept.o", "ignored");
    set_mode(&sandbox.at("d3/f3"), 0o600);
    sandbox.checkpoint(2);
    for paths in [None, Some(vec![rel("d1"), rel("new")])] {
        let shown = sandbox.planned(1, None, paths.as_deref());
        let done = sandbox.planned(1, Some(2), paths.as_deref());
        assert_eq!(shown.plan.operations, done.plan.operations);
        assert_eq!(shown.plan.conflicts, done.plan.conflicts);
        assert_eq!(shown.plan.warnings, done.plan.warnings);
        assert_eq!(shown.diff, done.diff);
    }
    let plan = sandbox.plan(1, 2, None);
    let report = sandbox.history.apply_restore(&plan, &quiet).unwrap();
    assert_eq!((report.written, report.removed), plan.counts());
}

#[test]
fn only_directories_that_differ_are_read() {
    let sandbox = Sandbox::new();
    for n in 0..400 {
        sandbox.write(format!("d{}/e{}/f{n}", n % 20, n % 100), format!("{n}"));
    }
    sandbox.checkpoint(1);
    sandbox.write("d7/e7/f7", "changed");
    sandbox.write("d9/new/x", "new");
    sandbox.checkpoint(2);
    let root = |number| {
        let commit = sandbox.history.commit_of(number).unwrap();
        CheckpointRoot::read(&sandbox.history.objects, &commit).unwrap()
    };
    let (old, new) = Listing::of_both(&sandbox.history.objects, &root(1), &root(2), None).unwrap();
    let paths = |listing: &Listing| listing.items.keys().map(RelPath::to_string).collect::<Vec<_>>();
    let files = ["d7/e7/f107", "d7/e7/f207", "d7/e7/f307", "d7/e7/f7"];
    let shared = [".", "d7", "d7/e7"];
    assert_eq!(paths(&old), [&shared[..], &files, &["d9"]].concat());
    assert_eq!(paths(&new), [&shared[..], &files, &["d9", "d9/new", "d9/new/x"]].concat());
    let chosen = [rel("d9/new")];
    let (old, new) = Listing::of_both(&sandbox.history.objects, &root(1), &root(2), Some(&chosen)).unwrap();
    assert_eq!(
        (paths(&old), paths(&new)),
        (vec![".".into(), "d9".into()], vec![".".into(), "d9".into(), "d9/new".into(), "d9/new/x".into()])
    );
}

#[test]
fn the_full_check_finds_what_the_plan_did_not_touch_and_passes_over_what_came_later() {
    let sandbox = Sandbox::new();
    for name in ["a", "b", "c/d", "e"] {
        sandbox.write(name, "1");
    }
    sandbox.checkpoint(1);
    sandbox.write("a", "22");
    sandbox.checkpoint(2);
    let plan = sandbox.plan(1, 2, None);
    // It is not in the safety checkpoint any more, and in no plan.
    sandbox.write("b", "behind the back of the safety checkpoint");
    fs::remove_file(sandbox.at("c/d")).unwrap();
    let report = sandbox.history.apply_restore(&plan, &quiet).unwrap();
    assert_eq!(report.mismatches, []);
    sandbox.let_files_age();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let ended = Time { sec: now.as_secs() as i64, nsec: now.subsec_nanos() };
    let check = || {
        let check = sandbox.history.check_restored(&plan, &report, &sandbox.rules, ended, &quiet, &NEVER).unwrap();
        check.mismatches.iter().map(|one| one.path.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(check(), ["b", "c", "c/d"]);
    sandbox.let_files_age();
    sandbox.write("e", "somebody went on");
    sandbox.write("new", "somebody went on");
    assert_eq!(check(), ["b", "c", "c/d"]);
}

#[test]
fn paths_that_nobody_knows_are_refused_and_uncovered_ones_are_told() {
    let sandbox = Sandbox::new();
    sandbox.write(".gitignore", "*.o\n");
    sandbox.write("dir/a", "1");
    sandbox.checkpoint(1);
    fs::remove_dir_all(sandbox.at("dir")).unwrap();
    sandbox.write("b.o", "ignored");
    sandbox.write("new", "1");
    let check = |path: &str| sandbox.history.check_paths(1, &sandbox.path(), &[rel(path)]);
    for known in ["dir", "dir/a", "new", "b.o"] {
        check(known).unwrap();
    }
    for unknown in ["dir/b", "dir/a/b", "di"] {
        assert!(matches!(check(unknown), Err(HistoryError::NoSuchPath { .. })), "{unknown}");
    }
    assert!(matches!(check("dir/.git/config"), Err(HistoryError::UnsafePath { .. })));
    sandbox.checkpoint(2);
    let plan = sandbox.plan(1, 2, Some(&[rel("b.o"), rel("dir/a")]));
    let conflicts: Vec<_> = plan.conflicts.iter().map(|one| (one.path.to_string(), one.reason)).collect();
    assert_eq!(conflicts, [("b.o".to_owned(), ConflictReason::NotCovered)]);
    sandbox.history.apply_restore(&plan, &quiet).unwrap();
    assert!(sandbox.at("dir/a").exists() && sandbox.at("new").exists());
}

#[test]
fn names_reserved_for_git_are_reported_and_never_written_to() {
    let sandbox = Sandbox::new();
    sandbox.write(".GIT/config", "somebody's");
    sandbox.write("sub/.Git", "a file");
    sandbox.write("file", "1");
    let first = sandbox.checkpoint(1);
    let told = |skipped: &[Skipped]| -> Vec<(String, SkipReason)> {
        skipped.iter().map(|one| (one.path.to_string(), one.reason)).collect()
    };
    let wanted = [".GIT", "sub/.Git"].map(|path| (path.to_owned(), SkipReason::Reserved));
    assert_eq!(told(&first.skipped), wanted);
    assert_eq!(told(&sandbox.history.skipped(1).unwrap()), wanted);
    assert_eq!(sandbox.history.verify(1, &quiet, &NEVER).unwrap().bad, []);
    sandbox.write("file", "2");
    fs::remove_file(sandbox.at("sub/.Git")).unwrap();
    assert_eq!(told(&sandbox.checkpoint(2).skipped), wanted[..1]);
    sandbox.restore_cleanly(1, 3);
    assert_eq!(fs::read(sandbox.at(".GIT/config")).unwrap(), b"somebody's");
    assert!(!sandbox.at("sub/.Git").exists());
}
