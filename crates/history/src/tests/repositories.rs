//! Restores in workspaces that are, contain or belong to git repositories: files are restored exactly, and
//! git's own files do not change.

use super::*;

/// Returns all of git's files below a directory.
fn gits(dir: &Path) -> FilesOnDisk {
    let mut files = files_on_disk(dir);
    files.retain(|name, _| name.split('/').any(|part| part == ".git"));
    files
}

fn commit(dir: &Path, message: &str) {
    git_in(dir, &["add", "."]);
    git_in(dir, &["commit", "-qm", message]);
}

/// Takes a checkpoint of a workspace other than the sandbox's own.
fn checkpoint_of(sandbox: &Sandbox, workspace: &Path, number: u64) {
    let request = SnapshotRequest { workspace: workspace.to_owned(), ..sandbox.request(number) };
    let snapshot = sandbox.history.snapshot(&request, 0, &quiet, &NEVER).unwrap();
    sandbox.history.publish(&snapshot).unwrap();
}

fn restore_of(sandbox: &Sandbox, workspace: &Path, number: u64, safety: u64) -> RestorePlan {
    checkpoint_of(sandbox, workspace, safety);
    let request = RestoreOptions { number, safety: Some(safety), workspace, rules: &sandbox.rules, paths: None };
    let plan = sandbox.history.plan_restore(&request, &quiet, &NEVER).unwrap().plan;
    let report = sandbox.history.apply_restore(&plan, &quiet).unwrap();
    assert_eq!((report.mismatches, report.conflicts), (vec![], vec![]));
    plan
}

#[test]
fn a_linked_worktree_is_restored_and_its_git_file_stays() {
    let sandbox = Sandbox::new();
    sandbox.git(&["init", "-q"]);
    sandbox.write("a", "1");
    commit(&sandbox.path(), "one");
    let linked = sandbox.outside("linked");
    sandbox.git(&["worktree", "add", "-qb", "side", linked.to_str().unwrap()]);
    fs::write(linked.join("untracked"), "u").unwrap();
    checkpoint_of(&sandbox, &linked, 1);
    let before = files_without_git(&linked);
    fs::write(linked.join("a"), "changed").unwrap();
    fs::remove_file(linked.join("untracked")).unwrap();
    commit(&linked, "two");
    let gits_before = (gits(&linked), gits(&sandbox.path()));
    let plan = restore_of(&sandbox, &linked, 1, 2);
    assert_eq!(files_without_git(&linked), before);
    assert_eq!((gits(&linked), gits(&sandbox.path())), gits_before);
    // The branch has moved since the checkpoint, which is reported.
    assert!(plan.warnings.iter().any(|text| text.contains("on branch 'side'")), "{:?}", plan.warnings);
}

#[test]
fn submodules_and_nested_repositories_are_restored_as_files() {
    let sandbox = Sandbox::new();
    let library = sandbox.outside("library");
    fs::create_dir(&library).unwrap();
    git_in(&library, &["init", "-q"]);
    fs::write(library.join("lib.c"), "int x;\n").unwrap();
    commit(&library, "library");
    sandbox.git(&["init", "-q"]);
    sandbox.git(&["-c", "protocol.file.allow=always", "submodule", "add", "-q", library.to_str().unwrap(), "sub"]);
    sandbox.write("nested/src/a", "1");
    git_in(&sandbox.at("nested"), &["init", "-q"]);
    commit(&sandbox.at("nested"), "nested");
    sandbox.write("empty-repository/x", "1");
    git_in(&sandbox.at("empty-repository"), &["init", "-q"]);
    sandbox.checkpoint(1);
    assert!(sandbox.covered(1).contains(&"sub/lib.c".to_owned()), "{:?}", sandbox.covered(1));
    let before = files_without_git(&sandbox.path());
    sandbox.write("sub/lib.c", "int y;\n");
    sandbox.write("nested/src/a", "22");
    fs::remove_file(sandbox.at("empty-repository/x")).unwrap();
    sandbox.write("sub/new.c", "");
    commit(&sandbox.at("nested"), "nested again");
    let gits_before = gits(&sandbox.path());
    sandbox.restore_cleanly(1, 2);
    assert_eq!(files_without_git(&sandbox.path()), before);
    assert_eq!(gits(&sandbox.path()), gits_before);
}

#[test]
fn filters_and_line_ends_leave_the_bytes_alone() {
    let sandbox = Sandbox::new();
    sandbox.git(&["init", "-q"]);
    sandbox.git(&["config", "core.autocrlf", "true"]);
    sandbox.git(&["config", "filter.lfs.clean", "sed s/./X/g"]);
    sandbox.git(&["config", "filter.lfs.smudge", "sed s/./Y/g"]);
    sandbox.write(".gitattributes", "*.bin filter=lfs -text\n*.txt text eol=crlf\n*.id ident\n");
    for (name, text) in [("a.bin", "raw bytes"), ("b.txt", "one\r\ntwo\nthree\r\n"), ("c.id", "$Id$\n")] {
        sandbox.write(name, text);
    }
    sandbox.checkpoint(1);
    let before = files_without_git(&sandbox.path());
    for name in ["a.bin", "b.txt", "c.id"] {
        fs::remove_file(sandbox.at(name)).unwrap();
    }
    sandbox.restore_cleanly(1, 2);
    assert_eq!(files_without_git(&sandbox.path()), before);
}

#[test]
fn names_that_differ_only_in_case_are_kept_apart() {
    let sandbox = Sandbox::new();
    sandbox.write("README", "loud");
    sandbox.write("readme", "quiet");
    sandbox.write("Dir/a", "1");
    sandbox.checkpoint(1);
    let before = files_on_disk(&sandbox.path());
    fs::remove_file(sandbox.at("readme")).unwrap();
    fs::rename(sandbox.at("README"), sandbox.at("readme")).unwrap();
    fs::rename(sandbox.at("Dir"), sandbox.at("dir")).unwrap();
    sandbox.restore_cleanly(1, 2);
    assert_eq!(files_on_disk(&sandbox.path()), before);
}

#[test]
fn an_unfinished_rebase_is_reported_and_git_stays_where_it_is() {
    let sandbox = Sandbox::new();
    sandbox.git(&["init", "-q"]);
    sandbox.write("a", "base\n");
    commit(&sandbox.path(), "base");
    sandbox.git(&["checkout", "-qb", "side"]);
    sandbox.write("a", "side\n");
    commit(&sandbox.path(), "side");
    sandbox.git(&["checkout", "-q", "main"]);
    sandbox.write("a", "main\n");
    commit(&sandbox.path(), "main");
    let rebase = Command::new("git")
        .args(["-c", "user.name=t", "-c", "user.email=t@t", "rebase", "-q", "side"])
        .current_dir(sandbox.path())
        .output()
        .unwrap();
    assert!(!rebase.status.success(), "a conflict was expected");
    sandbox.checkpoint(1);
    let before = files_without_git(&sandbox.path());
    assert!(String::from_utf8_lossy(&before["a"].3).contains("<<<<<<<"));
    sandbox.git(&["rebase", "--abort"]);
    let gits_before = gits(&sandbox.path());
    sandbox.checkpoint(2);
    let shown = sandbox.planned(1, None, None).plan.warnings;
    let plan = sandbox.plan(1, 2, None);
    assert_eq!(plan.warnings, shown);
    assert!(shown.iter().any(|text| text.contains("in the middle of a rebase")), "{shown:?}");
    assert_eq!(sandbox.history.apply_restore(&plan, &quiet).unwrap().mismatches, []);
    assert_eq!(files_without_git(&sandbox.path()), before);
    assert_eq!(gits(&sandbox.path()), gits_before);
}

#[test]
fn what_a_submodule_tracks_though_it_ignores_it_is_covered() {
    let sandbox = Sandbox::new();
    let repository = |name: &str| {
        let dir = sandbox.outside(name);
        fs::create_dir(&dir).unwrap();
        git_in(&dir, &["init", "-q"]);
        fs::write(dir.join(".gitignore"), "*.log\n").unwrap();
        fs::write(dir.join("kept.log"), "1").unwrap();
        git_in(&dir, &["add", "-f", ".gitignore", "kept.log"]);
        git_in(&dir, &["commit", "-qm", name]);
        dir
    };
    let add = |to: &Path, from: &Path, name: &str| {
        let from = from.to_str().unwrap();
        git_in(to, &["-c", "protocol.file.allow=always", "submodule", "add", "-q", from, name]);
        git_in(to, &["commit", "-qm", "submodule"]);
    };
    let (inner, outer) = (repository("inner"), repository("outer"));
    add(&outer, &inner, "deep/inner");
    sandbox.git(&["init", "-q"]);
    add(&sandbox.path(), &outer, "outer");
    sandbox.write("outer/left.log", "2");
    sandbox.write("outer/later.log", "3");
    sandbox.checkpoint(1);
    let covered = [".gitmodules", "outer/.gitignore", "outer/.gitmodules", "outer/kept.log"];
    assert_eq!(sandbox.covered(1), covered);
    // Files that are added later, and a submodule that is checked out later, are noticed.
    git_in(&sandbox.at("outer"), &["add", "-f", "later.log"]);
    sandbox.checkpoint(2);
    assert!(sandbox.covered(2).contains(&"outer/later.log".to_owned()), "{:?}", sandbox.covered(2));
    git_in(&sandbox.at("outer"), &["-c", "protocol.file.allow=always", "submodule", "update", "--init", "-q"]);
    sandbox.checkpoint(3);
    assert!(sandbox.covered(3).contains(&"outer/deep/inner/kept.log".to_owned()), "{:?}", sandbox.covered(3));
    let before = files_without_git(&sandbox.path());
    fs::remove_file(sandbox.at("outer/deep/inner/kept.log")).unwrap();
    sandbox.write("outer/kept.log", "changed");
    sandbox.restore_cleanly(3, 4);
    assert_eq!(files_without_git(&sandbox.path()), before);
    sandbox.git(&["submodule", "--quiet", "deinit", "-f", "outer"]);
    sandbox.checkpoint(5);
    assert_eq!(sandbox.covered(5), [".gitmodules"]);
}
