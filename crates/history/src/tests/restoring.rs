//! Restores: exactness, and the paths that they leave unchanged.

use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::symlink;

use super::*;

#[test]
fn bytes_modes_times_and_odd_names_come_back_exactly() {
    let sandbox = Sandbox::new();
    sandbox.git(&["init", "-q"]);
    sandbox.git(&["config", "core.autocrlf", "true"]);
    sandbox.write(".gitattributes", "* text=auto eol=lf\n*.bin filter=lfs\n");
    sandbox.write("crlf.txt", "one\r\ntwo\r\n");
    sandbox.write("x.bin", [0, 1, 2, 255]);
    sandbox.write("script", "#!/bin/sh\n");
    set_mode(&sandbox.at("script"), 0o4751);
    sandbox.write("private/key", "k");
    set_mode(&sandbox.at("private/key"), 0o600);
    set_mode(&sandbox.at("private"), 0o700);
    fs::create_dir_all(sandbox.at("empty/within")).unwrap();
    symlink("/nonexistent/absolute", sandbox.at("absolute")).unwrap();
    symlink("../..", sandbox.at("private/up")).unwrap();
    for name in [&b"not utf8 \xff\xfe"[..], b"new\nline", b"git~1", b"a%b", b"-", b"d/ space ", b"\\", b"e.\xc3\xa4"] {
        sandbox.write(std::ffi::OsString::from_vec(name.to_vec()), name);
    }
    sandbox.write("large", (0..600_000u32).flat_map(|n| n.wrapping_mul(n).to_le_bytes()).collect::<Vec<_>>());
    let old = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
    fs::File::open(sandbox.at("x.bin")).unwrap().set_modified(old).unwrap();
    sandbox.checkpoint(1);
    let before = files_without_git(&sandbox.path());

    for entry in fs::read_dir(sandbox.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name() == Some(OsStr::new(".git")) {
            continue;
        }
        let dir = fs::symlink_metadata(&path).unwrap().is_dir();
        if dir { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
    }
    sandbox.write("unwanted/deep/file", "x");
    sandbox.restore_cleanly(1, 2);
    assert_eq!(files_without_git(&sandbox.path()), before);

    // Undoing the restore is another restore.
    sandbox.restore_cleanly(2, 3);
    assert_eq!(sandbox.covered(2), ["unwanted/deep/file"]);
    assert_eq!(fs::read(sandbox.at("unwanted/deep/file")).unwrap(), b"x");
    assert!(!sandbox.at("script").exists());
}

#[test]
fn files_links_and_directories_change_places() {
    let sandbox = Sandbox::new();
    sandbox.write("file", "f");
    sandbox.write("dir/sub/x", "x");
    symlink("dir", sandbox.at("link")).unwrap();
    sandbox.checkpoint(1);
    let before = files_on_disk(&sandbox.path());

    fs::remove_file(sandbox.at("file")).unwrap();
    sandbox.write("file/now/dir", "d");
    fs::remove_dir_all(sandbox.at("dir")).unwrap();
    symlink("file", sandbox.at("dir")).unwrap();
    fs::remove_file(sandbox.at("link")).unwrap();
    sandbox.write("link", "now a file");
    sandbox.checkpoint(2);
    let between = files_on_disk(&sandbox.path());
    sandbox.restore_cleanly(1, 3);
    assert_eq!(files_on_disk(&sandbox.path()), before);
    sandbox.restore_cleanly(2, 4);
    assert_eq!(files_on_disk(&sandbox.path()), between);
}

#[test]
fn a_restore_of_some_paths_touches_only_those() {
    let sandbox = Sandbox::new();
    for name in ["a/x", "a/y", "b", "c/d/e"] {
        sandbox.write(name, "old");
    }
    sandbox.checkpoint(1);
    for name in ["a/x", "a/y", "b", "a/new", "n"] {
        sandbox.write(name, "newer");
    }
    fs::remove_dir_all(sandbox.at("c")).unwrap();
    sandbox.checkpoint(2);
    let plan = sandbox.plan(1, 2, Some(&[rel("a"), rel("c/d/e")]));
    let report = sandbox.history.apply_restore(&plan, &quiet).unwrap();
    assert_eq!(report.mismatches, []);
    let read = |name: &str| fs::read_to_string(sandbox.at(name)).unwrap();
    assert_eq!((read("a/x"), read("a/y"), read("c/d/e")), ("old".into(), "old".into(), "old".into()));
    assert_eq!((read("b"), read("n")), ("newer".into(), "newer".into()));
    assert!(!sandbox.at("a/new").exists());
}

#[test]
fn ignored_files_are_neither_touched_nor_deleted() {
    let sandbox = Sandbox::new();
    sandbox.write(".gitignore", "*.o\ncache/\n");
    sandbox.write("src/a", "1");
    sandbox.checkpoint(1);
    sandbox.write("src/a", "22");
    sandbox.write("src/a.o", "object");
    sandbox.write("new/b", "3");
    sandbox.write("new/b.o", "object");
    sandbox.write("cache/c", "4");
    let report = sandbox.restore(1, 2);
    assert_eq!((report.mismatches, report.kept), (vec![], vec![rel("new")]));
    let left: Vec<_> = files_on_disk(&sandbox.path()).into_keys().collect();
    let expected = ["", ".gitignore", "cache", "cache/c", "new", "new/b.o", "src", "src/a", "src/a.o"];
    assert_eq!(left, expected);
}

#[test]
fn an_ignored_file_where_a_directory_must_go_is_a_conflict() {
    let sandbox = Sandbox::new();
    sandbox.write("out/a", "1");
    sandbox.write("dir.o", "file");
    sandbox.write("z", "1");
    sandbox.checkpoint(1);
    fs::remove_dir_all(sandbox.at("out")).unwrap();
    sandbox.write("out", "an ignored file");
    fs::remove_file(sandbox.at("dir.o")).unwrap();
    sandbox.write("dir.o/held", "");
    sandbox.write("z", "22");
    sandbox.write(".gitignore", "/out\nheld\n");
    let report = sandbox.restore(1, 2);
    let conflicts: Vec<_> = report.conflicts.iter().map(|one| (one.path.to_string(), one.reason)).collect();
    let expected = [("dir.o", ConflictReason::HoldsUncovered), ("out", ConflictReason::NotCovered)];
    assert_eq!(conflicts, expected.map(|(path, reason)| (path.to_owned(), reason)));
    assert_eq!(report.mismatches, []);
    assert_eq!(fs::read(sandbox.at("out")).unwrap(), b"an ignored file");
    assert_eq!(fs::read(sandbox.at("z")).unwrap(), b"1");
}

#[test]
fn what_the_safety_checkpoint_does_not_hold_stays() {
    let sandbox = Sandbox::new();
    sandbox.write("a", "1");
    sandbox.checkpoint(1);
    sandbox.write("a", "22");
    sandbox.checkpoint(2);
    sandbox.write("a", "333");
    sandbox.write("b", "unsaved");
    let plan = sandbox.plan(1, 2, None);
    let report = sandbox.history.apply_restore(&plan, &quiet).unwrap();
    assert_eq!(report.mismatches.iter().map(|one| one.path.to_string()).collect::<Vec<_>>(), ["a"]);
    assert_eq!(fs::read(sandbox.at("a")).unwrap(), b"333");
    assert_eq!(fs::read(sandbox.at("b")).unwrap(), b"unsaved");
}

#[test]
fn what_changes_between_plan_and_restore_stays_and_is_reported() {
    let sandbox = Sandbox::new();
    sandbox.write("a", "1");
    sandbox.checkpoint(1);
    sandbox.write("a", "22");
    sandbox.write("b", "b");
    sandbox.checkpoint(2);
    let plan = sandbox.plan(1, 2, None);
    sandbox.write("a", "written meanwhile");
    sandbox.write("b", "written meanwhile");
    let report = sandbox.history.apply_restore(&plan, &quiet).unwrap();
    let paths: Vec<_> = report.mismatches.iter().map(|one| one.path.to_string()).collect();
    assert_eq!(paths, ["a", "b"]);
    assert_eq!(fs::read(sandbox.at("a")).unwrap(), b"written meanwhile");
    assert_eq!(fs::read(sandbox.at("b")).unwrap(), b"written meanwhile");
}

#[test]
fn a_file_keeps_its_owner() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let sandbox = Sandbox::new();
    sandbox.write("a", "1");
    sandbox.write("dir/b", "1");
    sandbox.checkpoint(1);
    std::os::unix::fs::chown(sandbox.path(), Some(1234), Some(1235)).unwrap();
    sandbox.write("a", "2");
    std::os::unix::fs::chown(sandbox.at("a"), Some(4321), None).unwrap();
    fs::remove_dir_all(sandbox.at("dir")).unwrap();
    sandbox.restore_cleanly(1, 2);
    let owner = |name: &str| fs::metadata(sandbox.at(name)).unwrap().uid();
    assert_eq!((owner("a"), owner("dir"), owner("dir/b")), (4321, 1234, 1234));
}

#[test]
fn what_a_given_up_restore_left_behind_is_not_covered_and_goes_with_the_next() {
    let sandbox = Sandbox::new();
    sandbox.write("dir/a", "1");
    sandbox.checkpoint(1);
    let before = files_on_disk(&sandbox.path());
    sandbox.write("dir/.fermata-restore-0123456789ab", "half");
    sandbox.write("new/.fermata-restore-0123456789ab", "half");
    sandbox.checkpoint(2);
    assert_eq!(sandbox.covered(2), ["dir/a"]);
    sandbox.restore_cleanly(1, 3);
    assert_eq!(files_on_disk(&sandbox.path()), before);

    // A user's file whose name only begins like a temporary one.
    sandbox.write(".fermata-restore-notes", "mine");
    sandbox.checkpoint(4);
    assert_eq!(sandbox.covered(4), [".fermata-restore-notes", "dir/a"]);
}

/// Runs a test without privileges, in a separate process if the tests have them.
fn unprivileged_scenario() {
    let sandbox = Sandbox::new();
    sandbox.write("ro/sub/file", "1");
    sandbox.write("ro/other", "1");
    sandbox.write("ro/gone/deep", "1");
    sandbox.write("ro/marked", "1");
    set_xattr(&sandbox.at("ro/marked"), "user.mark", Some(b"first"));
    set_mode(&sandbox.at("ro/marked"), 0o444);
    sandbox.write("secret", "1");
    sandbox.write("closed/inner", "1");
    let open = |mode: u32| ["ro/sub", "ro"].iter().for_each(|dir| set_mode(&sandbox.at(dir), mode));
    open(0o555);
    set_mode(&sandbox.at("secret"), 0);
    set_mode(&sandbox.at("closed"), 0);
    let snapshot = sandbox.checkpoint(1);
    let skipped: Vec<_> = snapshot.skipped.iter().map(|skip| (skip.path.to_string(), skip.reason)).collect();
    let expected = [("closed", SkipReason::Unreadable), ("secret", SkipReason::Unreadable)];
    assert_eq!(skipped, expected.map(|(path, reason)| (path.to_owned(), reason)));
    let before = (files_on_disk(&sandbox.at("ro")), finer(&sandbox.at("ro")));

    ["ro", "ro/sub"].iter().for_each(|dir| set_mode(&sandbox.at(dir), 0o755));
    set_mode(&sandbox.at("ro/marked"), 0o644);
    set_xattr(&sandbox.at("ro/marked"), "user.mark", Some(b"second"));
    set_mode(&sandbox.at("ro/marked"), 0o444);
    sandbox.write("ro/sub/file", "22");
    sandbox.write("ro/new/file", "22");
    fs::remove_file(sandbox.at("ro/other")).unwrap();
    fs::remove_dir_all(sandbox.at("ro/gone")).unwrap();
    set_mode(&sandbox.at("ro/new"), 0o555);
    open(0o555);
    let report = sandbox.restore(1, 2);
    assert_eq!((report.mismatches, report.conflicts), (vec![], vec![]));
    assert_eq!((files_on_disk(&sandbox.at("ro")), finer(&sandbox.at("ro"))), before);

    // Only some paths: the directory above them keeps its mode.
    ["ro", "ro/sub"].iter().for_each(|dir| set_mode(&sandbox.at(dir), 0o755));
    sandbox.write("ro/sub/file", "333");
    open(0o555);
    sandbox.checkpoint(3);
    let plan = sandbox.plan(1, 3, Some(&[rel("ro/sub/file")]));
    let report = sandbox.history.apply_restore(&plan, &quiet).unwrap();
    assert_eq!(report.mismatches, []);
    assert_eq!(fs::read(sandbox.at("ro/sub/file")).unwrap(), b"1");
    assert_eq!(fs::metadata(sandbox.at("ro/sub")).unwrap().mode() & 0o7777, 0o555);

    // The same after a run that was killed has left the directory open.
    set_mode(&sandbox.at("ro/sub"), 0o755);
    let report = sandbox.history.apply_restore(&plan, &quiet).unwrap();
    assert_eq!(report.mismatches, []);
    assert_eq!(fs::metadata(sandbox.at("ro/sub")).unwrap().mode() & 0o7777, 0o555);

    // Allows the sandbox to be removed.
    ["ro", "ro/sub", "closed"].iter().for_each(|dir| set_mode(&sandbox.at(dir), 0o755));
}

/// The body of the process that the next test starts as another user.
#[test]
fn unprivileged_body() {
    if std::env::var_os("FERMATA_TEST_UNPRIVILEGED").is_some() {
        assert!(!nix::unistd::geteuid().is_root());
        unprivileged_scenario();
    }
}

#[test]
fn without_privileges_read_only_directories_are_restored_and_unreadable_ones_skipped() {
    use std::os::unix::process::CommandExt;
    if !nix::unistd::geteuid().is_root() {
        return unprivileged_scenario();
    }
    let dir = tempfile::tempdir().unwrap();
    set_mode(dir.path(), 0o755);
    // The build directory may be closed to other users.
    let program = dir.path().join("program");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    set_mode(&program, 0o755);
    let output = Command::new(program)
        .args(["--exact", "tests::restoring::unprivileged_body", "--nocapture"])
        .env("FERMATA_TEST_UNPRIVILEGED", "1")
        .env("HOME", "/nonexistent")
        .env("TMPDIR", "/tmp")
        .current_dir("/")
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"));
}

#[test]
fn more_files_than_are_staged_at_once_are_restored_and_leave_no_temporary_file() {
    let sandbox = Sandbox::new();
    let write = |round: &str| {
        (0..100).for_each(|n| sandbox.write(format!("d{}/f{n}", n % 7), format!("{round} {n}")));
    };
    write("first");
    symlink("f1", sandbox.at("d1/link")).unwrap();
    fs::hard_link(sandbox.at("d0/f0"), sandbox.at("d1/other-name")).unwrap();
    sandbox.checkpoint(1);
    let before = files_on_disk(&sandbox.path());
    write("another");
    fs::remove_file(sandbox.at("d1/link")).unwrap();
    fs::remove_file(sandbox.at("d1/other-name")).unwrap();
    sandbox.restore_cleanly(1, 2);
    assert_eq!(files_on_disk(&sandbox.path()), before);
}

/// Restores `a`, `b` and `c` from the result of `change`, while `a` is written after a number of files are
/// staged: that write is kept and reported.
fn kept_while_staged(change: impl FnOnce(&Sandbox), staged: u64) {
    let sandbox = Sandbox::new();
    ["a", "b", "c"].iter().for_each(|name| sandbox.write(name, "1"));
    sandbox.checkpoint(1);
    change(&sandbox);
    sandbox.checkpoint(2);
    let plan = sandbox.plan(1, 2, None);
    let meddle = |progress: StoreProgress| {
        if progress.phase == StorePhase::Apply && progress.done == staged {
            sandbox.write("a", "mine");
        }
    };
    let report = sandbox.history.apply_restore(&plan, &meddle).unwrap();
    assert_eq!(report.mismatches.iter().map(|one| one.path.to_string()).collect::<Vec<_>>(), ["a"]);
    let read = |name: &str| fs::read_to_string(sandbox.at(name)).unwrap();
    assert_eq!((read("a"), read("b"), read("c")), ("mine".to_owned(), "1".to_owned(), "1".to_owned()));
    assert_eq!(fs::read_dir(sandbox.path()).unwrap().count(), 3);
}

#[test]
fn a_write_while_other_files_are_staged_is_kept_and_reported() {
    kept_while_staged(|sandbox| ["a", "b", "c"].iter().for_each(|name| sandbox.write(name, "22")), 2);
}

#[test]
fn a_file_created_while_others_are_staged_is_kept_and_reported() {
    let change = |sandbox: &Sandbox| {
        ["a", "b"].iter().for_each(|name| fs::remove_file(sandbox.at(name)).unwrap());
        sandbox.write("c", "22");
    };
    kept_while_staged(change, 3);
}

/// The paths that a plan leaves unchanged, with the reasons.
fn left(plan: &RestorePlan) -> Vec<(String, ConflictReason)> {
    plan.conflicts.iter().map(|one| (one.path.to_string(), one.reason)).collect()
}

#[test]
fn what_the_checkpoints_own_rules_left_out_stays_whatever_the_rules_of_today_say() {
    let sandbox = Sandbox::new();
    git_in(&sandbox.path(), &["init", "-q"]);
    sandbox.write(".gitignore", ".env\ncache/\n*.o\n!keep.o\n");
    sandbox.write("sub/.gitignore", "local\n");
    sandbox.write("code", "1");
    for ignored in [".env", "sub/.env", "sub/local", "cache/a/b", "x.o"] {
        sandbox.write(ignored, "left out");
    }
    sandbox.write("keep.o", "kept");
    sandbox.write("inner/.gitignore", "own\n");
    git_in(&sandbox.at("inner"), &["init", "-q"]);
    sandbox.let_files_age();
    sandbox.checkpoint(1);
    // The rules are overwritten; now everything is covered.
    sandbox.write(".gitignore", "");
    fs::remove_file(sandbox.at("sub/.gitignore")).unwrap();
    for new in ["new", "sub/new", "new-dir/.env", "new-dir/other", "inner/a.o", "keep.o"] {
        sandbox.write(new, "new");
    }
    sandbox.let_files_age();
    let before = sandbox.checkpoint(2);
    assert!(before.stats.files > 10);
    let planned = sandbox.planned(1, Some(2), None);
    let reason = ConflictReason::IgnoredThen;
    let wanted =
        [".env", "cache", "new-dir/.env", "sub/.env", "sub/local", "x.o"].map(|path| (path.to_owned(), reason));
    assert_eq!(left(&planned.plan), wanted);
    let changed: Vec<String> = planned.diff.entries.iter().map(|entry| entry.path.to_string()).collect();
    let changes = [".gitignore", "inner/a.o", "keep.o", "new", "new-dir/other", "sub/.gitignore", "sub/new"];
    assert_eq!(changed, changes);

    sandbox.restore(1, 3);
    for stays in [".env", "sub/.env", "sub/local", "cache/a/b", "x.o", "new-dir/.env"] {
        assert!(sandbox.at(stays).exists(), "{stays}");
    }
    for goes in ["new", "sub/new", "new-dir/other", "inner/a.o"] {
        assert!(!sandbox.at(goes).exists(), "{goes}");
    }
    assert_eq!(fs::read(sandbox.at("keep.o")).unwrap(), b"kept");
    assert_eq!(
        sandbox.checkpoint(4).files,
        sandbox.history.snapshot(&sandbox.request(5), 5, &quiet, &NEVER).unwrap().files
    );
}

#[test]
fn what_a_setting_left_out_stays_when_the_setting_is_another_one() {
    let mut sandbox = Sandbox::new();
    sandbox.write("a.big", "left out");
    sandbox.write("a.txt", "covered");
    sandbox.rules.exclude = vec!["*.big".to_owned()];
    sandbox.checkpoint(1);
    sandbox.rules.exclude.clear();
    sandbox.write("b.txt", "new");
    sandbox.checkpoint(2);
    assert_eq!(left(&sandbox.plan(1, 2, None)), [("a.big".to_owned(), ConflictReason::IgnoredThen)]);
    sandbox.restore(1, 3);
    assert!(sandbox.at("a.big").exists() && !sandbox.at("b.txt").exists());
}

#[test]
fn what_took_the_place_of_a_special_file_stays_and_is_told() {
    let sandbox = Sandbox::new();
    for name in ["file", "dir", "link", "same"] {
        nix::unistd::mkfifo(&sandbox.at(name), nix::sys::stat::Mode::S_IRWXU).unwrap();
    }
    sandbox.checkpoint(1);
    for name in ["file", "dir", "link"] {
        fs::remove_file(sandbox.at(name)).unwrap();
    }
    sandbox.write("file", "new");
    sandbox.write("dir/below", "new");
    std::os::unix::fs::symlink("/etc", sandbox.at("link")).unwrap();
    sandbox.checkpoint(2);
    let planned = sandbox.planned(1, Some(2), None);
    let wanted = ["dir", "file", "link"].map(|path| (path.to_owned(), ConflictReason::WasSpecial));
    assert_eq!(left(&planned.plan), wanted);
    assert_eq!(planned.diff.entries, []);
    sandbox.restore(1, 3);
    assert_eq!(fs::read(sandbox.at("dir/below")).unwrap(), b"new");
    assert_eq!(fs::read(sandbox.at("file")).unwrap(), b"new");
}
