//! The user's index, read in every form that git writes, beside what git lists.

use sha1::Digest as _;

use super::super::user_index;
use super::super::user_repository::Location;
use super::*;

/// What git says is tracked: files and links, but for those that a sparse checkout has left out.
fn listed(sandbox: &Sandbox) -> Vec<String> {
    let lines = sandbox.git(&["ls-files", "-stz"]);
    let tracked = lines.split(|byte| *byte == 0).filter(|line| !line.is_empty()).filter_map(|line| {
        let tab = line.iter().position(|byte| *byte == b'\t').unwrap();
        let path = RelPath::new(&line[tab + 1..]).unwrap();
        let left_out = line.starts_with(b"S ") && sandbox.at(path.as_path()).symlink_metadata().is_err();
        (!left_out && !line[2..].starts_with(b"160000")).then(|| path.to_string())
    });
    let mut tracked: Vec<String> = tracked.collect();
    tracked.sort();
    tracked.dedup();
    tracked
}

fn read(sandbox: &Sandbox) -> Vec<String> {
    let location = Location::find(&sandbox.path()).unwrap();
    let mut tracked: Vec<String> = location.tracked().unwrap().iter().map(ToString::to_string).collect();
    tracked.sort();
    tracked.dedup();
    tracked
}

/// Changes what is tracked, step by step, and compares after each.
fn assert_as_git_does(init: &[&str], settings: &[&str]) {
    let sandbox = Sandbox::new();
    sandbox.git(&[&["init", "-q"], init].concat());
    settings.chunks(2).for_each(|setting| drop(sandbox.git(&["config", setting[0], setting[1]])));
    for number in 0..300 {
        sandbox.write(format!("dir-{}/some name {number}", number % 7), number.to_string());
    }
    let long = "long".repeat(60);
    sandbox.write(&long, "");
    std::os::unix::fs::symlink("dangling", sandbox.at("link")).unwrap();
    let steps: &[&[&str]] = &[
        &["add", "-A"],
        &["commit", "-qm", "one"],
        &["rm", "-q", "--cached", "-r", "dir-3"],
        &["update-index", "--chmod=+x", "dir-0/some name 0", "dir-6/some name 6", "dir-6/some name 293"],
        &["update-index", "--skip-worktree", "dir-1/some name 1", "dir-1/some name 64"],
        &["add", "-N", "dir-3/some name 3"],
        &["update-index", "--add", "--cacheinfo", "160000,4b825dc642cb6eb9a060e54bf8d69288fbee4904,module"],
        &["mv", "dir-2", "elsewhere"],
        &["rm", "-q", "-f", "--cached", &long, "dir-5/some name 5", "link"],
        &["add", "-A"],
        &["sparse-checkout", "set", "--no-cone", "dir-4"],
    ];
    for step in steps {
        // An id of the other kind's length is refused.
        if init.is_empty() || step[0] != "update-index" || step[1] != "--add" {
            sandbox.git(step);
        }
        assert_eq!(read(&sandbox), listed(&sandbox), "after git {step:?} with {settings:?}");
    }
}

#[test]
fn an_index_is_read_in_every_version() {
    for version in ["2", "3", "4"] {
        assert_as_git_does(&[], &["index.version", version]);
    }
    assert_as_git_does(&[], &["index.skipHash", "true"]);
}

#[test]
fn a_split_index_is_put_together() {
    assert_as_git_does(&[], &["core.splitIndex", "true", "splitIndex.maxPercentChange", "100"]);
    assert_as_git_does(&[], &["core.splitIndex", "true", "splitIndex.maxPercentChange", "100", "index.version", "4"]);
    assert_as_git_does(&[], &["core.splitIndex", "true"]);
}

#[test]
fn an_index_of_a_repository_with_long_ids_is_read() {
    let sha256 = ["--object-format=sha256"];
    assert_as_git_does(&sha256, &[]);
    assert_as_git_does(&sha256, &["index.version", "4", "core.splitIndex", "true"]);
    assert_as_git_does(&sha256, &["index.skipHash", "true"]);
}

#[test]
fn what_is_tracked_though_ignored_is_covered_with_a_split_index() {
    let sandbox = Sandbox::new();
    sandbox.git(&["init", "-q", "--object-format=sha256"]);
    sandbox.git(&["config", "core.splitIndex", "true"]);
    sandbox.write(".gitignore", "*.log\n");
    sandbox.write("kept.log", "1");
    sandbox.write("left.log", "2");
    sandbox.git(&["add", "-f", ".gitignore", "kept.log"]);
    let snapshot = sandbox.checkpoint(1);
    assert_eq!(sandbox.covered(1), [".gitignore", "kept.log"]);
    assert_eq!(snapshot.warnings, [] as [&str; 0]);
}

#[test]
fn a_damaged_index_is_refused_and_never_more() {
    let sandbox = Sandbox::new();
    sandbox.git(&["init", "-q"]);
    sandbox.git(&["config", "core.splitIndex", "true"]);
    sandbox.git(&["config", "splitIndex.maxPercentChange", "100"]);
    (0..40).for_each(|number| sandbox.write(format!("file {number}"), ""));
    sandbox.git(&["add", "-A"]);
    sandbox.write("file 7", "changed");
    sandbox.git(&["add", "-A"]);
    let git_dir = sandbox.at(".git");
    let shared = fs::read_dir(&git_dir).unwrap().map(|entry| entry.unwrap().path());
    let shared = shared.filter(|path| path.to_string_lossy().contains("sharedindex")).max().unwrap();
    for file in [git_dir.join("index"), shared] {
        let good = fs::read(&file).unwrap();
        for cut in 0..good.len() {
            assert!(user_index::tracked(&git_dir, &good[..cut]).is_err(), "cut off after {cut} bytes");
        }
        // With a checksum that is right, so that what is inside is looked at.
        for at in 0..good.len() - 20 {
            for bit in [0x01, 0x80, 0xff] {
                let mut bad = good[..good.len() - 20].to_vec();
                bad[at] ^= bit;
                bad.extend_from_slice(&sha1::Sha1::digest(&bad));
                drop(user_index::tracked(&git_dir, &bad));
            }
        }
    }
    fs::write(git_dir.join("index"), "DIRC").unwrap();
    let snapshot = sandbox.checkpoint(1);
    assert!(snapshot.warnings.iter().any(|text| text.contains("the index cannot be read")), "{:?}", snapshot.warnings);
}
