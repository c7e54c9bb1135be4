//! The paths that a checkpoint covers, compared with git's own answer.

use super::*;

fn names(list: &[u8]) -> Vec<String> {
    let mut names: Vec<String> = list
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty())
        .map(|name| RelPath::new(name).unwrap().to_string())
        .collect();
    names.sort();
    names
}

fn assert_as_git(sandbox: &Sandbox, number: u64) {
    let git = names(&sandbox.git(&["ls-files", "-coz", "--exclude-standard"]));
    assert_eq!(sandbox.covered(number), git);
}

#[test]
fn the_ignore_rules_are_those_of_git() {
    let sandbox = Sandbox::new();
    sandbox.git(&["init", "-q"]);
    sandbox.write(
        ".gitignore",
        "*.log\n!keep.log\n/build/\nnode_modules/\n# comment\n\\#odd\ndoc/**/out\n*.tmp\r\n!/deep/\nlast \n",
    );
    sandbox.write("deep/.gitignore", "!important.log\n/local\nsub/*\n!sub/yes\n");
    sandbox.write(".git/info/exclude", "secret\n");
    for name in [
        "a.log",
        "keep.log",
        "build/x",
        "src/build/x",
        "node_modules/p/i.js",
        "src/node_modules/q",
        "#odd",
        "doc/a/b/out",
        "doc/out",
        "doc/outer",
        "x.tmp",
        "deep/important.log",
        "deep/other.log",
        "deep/local",
        "deep/x/local",
        "deep/sub/no",
        "deep/sub/yes",
        "secret",
        "deep/secret",
        ".hidden/file",
        "last",
        "build2/build",
        "tracked.log",
        "build/tracked",
    ] {
        sandbox.write(name, name);
    }
    sandbox.git(&["add", "-f", "tracked.log", "build/tracked", "src"]);
    sandbox.checkpoint(1);
    assert_as_git(&sandbox, 1);
    let covered = sandbox.covered(1);
    for name in ["tracked.log", "build/tracked", "keep.log", "deep/sub/yes"] {
        assert!(covered.contains(&name.to_owned()), "{name}");
    }
}

#[test]
fn a_subfolder_of_a_repository_obeys_the_rules_above_it() {
    let sandbox = Sandbox::new();
    sandbox.git(&["init", "-q"]);
    sandbox.write(".gitignore", "*.log\n/sub/out/\n/out/\n");
    sandbox.write(".git/info/exclude", "secret\n");
    for name in ["sub/a", "sub/a.log", "sub/out/b", "sub/in/out/c", "sub/secret", "sub/t.log"] {
        sandbox.write(name, name);
    }
    sandbox.git(&["add", "-f", "sub/t.log"]);
    let mut request = sandbox.request(1);
    request.workspace = sandbox.at("sub");
    let snapshot = sandbox.history.snapshot(&request, 0, &quiet, &NEVER).unwrap();
    sandbox.history.publish(&snapshot).unwrap();
    assert_eq!(sandbox.covered(1), names(&git_in(&sandbox.at("sub"), &["ls-files", "-coz", "--exclude-standard"])));
    assert_eq!(sandbox.covered(1), ["a", "in/out/c", "t.log"]);
}

#[test]
fn without_a_repository_ignore_files_count_too() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.outside(".gitignore"), "b\n").unwrap();
    sandbox.write(".gitignore", "*.log\n");
    sandbox.write("a.log", "");
    sandbox.write("b", "");
    let snapshot = sandbox.checkpoint(1);
    // Without a repository, ignore files above the workspace do not apply.
    assert_eq!(sandbox.covered(1), [".gitignore", "b"]);
    assert_eq!(snapshot.user_repository, None);
}

#[test]
fn includes_bring_back_what_is_ignored_and_excludes_beat_everything() {
    let mut sandbox = Sandbox::new();
    sandbox.git(&["init", "-q"]);
    sandbox.write(".gitignore", "out/\n*.env\n");
    for name in ["out/a/model.bin", "out/b.txt", "x.env", "secret/k", "src/s", "t.key"] {
        sandbox.write(name, name);
    }
    sandbox.git(&["add", "-f", "t.key"]);
    sandbox.rules.include = vec!["*.env".to_owned(), "/out/a/".to_owned()];
    sandbox.rules.exclude = vec!["secret/".to_owned(), "*.key".to_owned()];
    sandbox.checkpoint(1);
    assert_eq!(sandbox.covered(1), [".gitignore", "out/a/model.bin", "src/s", "x.env"]);

    sandbox.rules = Rules { use_gitignore: false, ..Rules::default() };
    sandbox.checkpoint(2);
    assert_eq!(sandbox.covered(2).len(), 7);
}

#[test]
fn nested_repositories_are_plain_files_without_their_git() {
    let sandbox = Sandbox::new();
    sandbox.git(&["init", "-q"]);
    sandbox.write(".gitignore", "*.log\n");
    fs::create_dir(sandbox.at("nested")).unwrap();
    git_in(&sandbox.at("nested"), &["init", "-q"]);
    sandbox.write("nested/.gitignore", "ignored\n");
    sandbox.write("nested/ignored", "");
    sandbox.write("nested/src/a", "");
    sandbox.write("module/.git", "gitdir: ../nowhere");
    sandbox.write("module/b", "");
    sandbox.write("odd/.GIT/config", "");
    sandbox.checkpoint(1);
    assert_eq!(sandbox.covered(1), [".gitignore", "module/b", "nested/.gitignore", "nested/src/a"]);
}

#[test]
fn linked_worktrees_and_rebases_are_recorded() {
    let sandbox = Sandbox::new();
    sandbox.git(&["init", "-q"]);
    sandbox.write("a", "1");
    sandbox.git(&["add", "."]);
    sandbox.git(&["commit", "-qm", "one"]);
    sandbox.git(&["branch", "side"]);
    sandbox.git(&["pack-refs", "--all"]);
    let head = String::from_utf8(sandbox.git(&["rev-parse", "HEAD"])).unwrap().trim().to_owned();
    let linked = sandbox.outside("linked");
    sandbox.git(&["worktree", "add", "-q", linked.to_str().unwrap(), "side"]);
    fs::write(linked.join("b"), "2").unwrap();

    let mut request = sandbox.request(1);
    request.workspace = linked;
    let snapshot = sandbox.history.snapshot(&request, 0, &quiet, &NEVER).unwrap();
    let user = snapshot.user_repository.clone().unwrap();
    assert!(user.linked);
    assert_eq!((user.branch.as_deref(), user.head.as_ref()), (Some("side"), Some(&head)));
    assert_eq!(user.in_progress, None);
    sandbox.history.publish(&snapshot).unwrap();
    assert_eq!(sandbox.covered(1), ["a", "b"]);

    fs::create_dir(sandbox.at(".git/rebase-merge")).unwrap();
    sandbox.git(&["checkout", "-q", "--detach"]);
    sandbox.write("a", "changed");
    let user = sandbox.checkpoint(2).user_repository.unwrap();
    assert_eq!((user.branch, user.head), (None, Some(head)));
    assert_eq!(user.in_progress.as_deref(), Some("rebase"));
}

#[test]
fn special_and_large_and_unsteady_files_are_reported() {
    let mut sandbox = Sandbox::new();
    nix::unistd::mkfifo(&sandbox.at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    nix::unistd::mkfifo(&sandbox.at(".gitignore"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(sandbox.at("socket")).unwrap();
    sandbox.write("large", [1; 101]);
    sandbox.write("fits", [1; 100]);
    sandbox.rules.max_file_bytes = 100;
    let snapshot = sandbox.checkpoint(1);
    drop(socket);
    let skipped: Vec<_> = snapshot.skipped.iter().map(|skip| (skip.path.to_string(), skip.reason)).collect();
    let expected = [
        (".gitignore", SkipReason::Special),
        ("fifo", SkipReason::Special),
        ("large", SkipReason::TooLarge),
        ("socket", SkipReason::Special),
    ];
    assert_eq!(skipped, expected.map(|(path, reason)| (path.to_owned(), reason)));
    assert_eq!(sandbox.history.skipped(1).unwrap(), snapshot.skipped);
    // A restore does not delete a skipped file, although the checkpoint does not contain it.
    sandbox.rules.max_file_bytes = 1000;
    sandbox.restore_cleanly(1, 2);
    assert!(sandbox.at("large").exists() && sandbox.at("fifo").exists());
}

#[test]
fn rules_that_exclude_nearly_everything_are_reported() {
    let sandbox = Sandbox::new();
    sandbox.write(".gitignore", "/*\n!/debian/\n");
    sandbox.write("debian/rules", "");
    for n in 0..150 {
        sandbox.write(format!("src/{n}"), "");
    }
    let snapshot = sandbox.checkpoint(1);
    assert_eq!(sandbox.covered(1), ["debian/rules"]);
    assert!(snapshot.warnings.iter().any(|text| text.contains("nearly the whole workspace")), "{snapshot:?}");
}

#[test]
fn root_and_home_are_refused() {
    let sandbox = Sandbox::new();
    let mut request = sandbox.request(1);
    let home = nix::unistd::User::from_uid(nix::unistd::geteuid()).unwrap().unwrap().dir;
    for path in [PathBuf::from("/"), home, PathBuf::from("relative"), PathBuf::from("/etc/passwd")] {
        request.workspace = path;
        let result = sandbox.history.snapshot(&request, 0, &quiet, &NEVER);
        assert!(matches!(result, Err(HistoryError::WorkspaceRefused { .. })), "{:?}", request.workspace);
    }
}

#[test]
fn a_state_directory_in_the_workspace_is_not_covered() {
    let sandbox = Sandbox::new();
    sandbox.write("a", "1");
    let history = History::open(&sandbox.at("deep/state")).unwrap();
    let snapshot = history.snapshot(&sandbox.request(1), 0, &quiet, &NEVER).unwrap();
    assert_eq!(snapshot.stats.files, 1);
    assert_eq!(snapshot.warnings.len(), 1);
}

#[test]
fn files_that_never_hold_still_are_stored_whole_or_marked_torn() {
    use std::io::Write as _;
    use std::sync::atomic::Ordering;
    let sandbox = Sandbox::new();
    let (large, small) = (sandbox.at("large.log"), sandbox.at("small.log"));
    fs::write(&large, vec![b'x'; 3 * 1024 * 1024]).unwrap();
    fs::write(&small, "x").unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let append = |path| fs::OpenOptions::new().append(true).open(path).unwrap();
            let (mut large, mut small) = (append(&large), append(&small));
            while !stop.load(Ordering::Relaxed) {
                large.write_all(b"line\n").unwrap();
                small.write_all(b"y").unwrap();
            }
        });
        for number in 1..=5 {
            let snapshot = sandbox.checkpoint(number);
            assert_eq!(snapshot.skipped, []);
            assert_eq!(sandbox.history.verify(number, &quiet, &NEVER).unwrap().bad, []);
            let listing = sandbox.history.listing_of(number).unwrap();
            assert_eq!(listing.torn, snapshot.torn);
            assert!(listing.items[&rel("large.log")].size >= 3 * 1024 * 1024);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(sandbox.checkpoint(6).torn, []);
}
