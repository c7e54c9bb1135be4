//! The user's index in every format that git writes, compared with what git lists.

use sha1::Digest as _;

use super::*;
use crate::rules::user_index;
use crate::rules::user_repository::Location;

/// The tracked files and links according to git, except those that a sparse checkout leaves out.
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
    let mut tracked: Vec<String> = location.tracked().unwrap().files.iter().map(ToString::to_string).collect();
    tracked.sort();
    tracked.dedup();
    tracked
}

/// Changes the index step by step and compares after each step.
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
        // An id of the other length is refused.
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
        // The checksum is right, so that the contents are parsed.
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

/// Builds an index with a right checksum from entries (bytes to remove from the previous name, and bytes to
/// add) and extensions.
fn forged(names: &[(u8, &[u8])], extensions: &[u8]) -> Vec<u8> {
    let mut index = [&b"DIRC"[..], &4_u32.to_be_bytes(), &(names.len() as u32).to_be_bytes()].concat();
    for (gone, name) in names {
        let mut state = [0; 62];
        state[24..28].copy_from_slice(&0o100_644_u32.to_be_bytes());
        index.extend_from_slice(&state);
        index.push(*gone);
        index.extend_from_slice(name);
        index.push(0);
    }
    index.extend_from_slice(extensions);
    index.extend_from_slice(&sha1::Sha1::digest(&index));
    index
}

#[test]
fn a_small_index_with_very_long_names_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let read = |index: &[u8]| user_index::tracked(dir.path(), index).map(|entries| entries.len());
    let name = "n".repeat(4000);
    assert_eq!(read(&forged(&[(0, name.as_bytes()), (1, b"")], b"")).unwrap(), 2);
    let mut many: Vec<(u8, &[u8])> = vec![(0, name.as_bytes())];
    many.extend([(0, &b""[..]); 10_000]);
    assert!(read(&forged(&many, b"")).unwrap_err().to_string().contains("too long"));
    let deep = "a/".repeat(100_000) + "a";
    assert!(read(&forged(&[(0, deep.as_bytes())], b"")).unwrap_err().to_string().contains("too long"));
    // A bitmap of four billion ones in twelve bytes.
    let shared = forged(&[(0, b"one")], b"");
    let sum = &shared[shared.len() - 20..];
    let hex: String = sum.iter().map(|byte| format!("{byte:02x}")).collect();
    fs::write(dir.path().join(format!("sharedindex.{hex}")), &shared).unwrap();
    let bitmap = |bits: u32, word: u64| {
        [&bits.to_be_bytes()[..], &1_u32.to_be_bytes(), &word.to_be_bytes(), &0_u32.to_be_bytes()].concat()
    };
    let linked = |bitmaps: Vec<u8>| {
        let size = (20 + bitmaps.len()) as u32;
        forged(&[], &[b"link", &size.to_be_bytes()[..], sum, &bitmaps].concat())
    };
    assert_eq!(read(&linked([bitmap(0, 0), bitmap(0, 0)].concat())).unwrap(), 1);
    assert_eq!(read(&linked([bitmap(1, 0b11), bitmap(0, 0)].concat())).unwrap(), 0);
    let ones = bitmap(u32::MAX, 1 << 27 | 1);
    assert!(read(&linked([ones.clone(), ones].concat())).unwrap_err().to_string().contains("bitmap"));
}

#[test]
fn an_index_that_goes_or_is_a_link_or_no_file_is_noticed() {
    let sandbox = Sandbox::new();
    sandbox.git(&["init", "-q"]);
    sandbox.write(".gitignore", "*.log\n");
    sandbox.write("one.log", "1");
    sandbox.write("two.log", "2");
    sandbox.git(&["add", "-f", "one.log"]);
    let index = sandbox.at(".git/index");
    sandbox.checkpoint(1);
    assert_eq!(sandbox.covered(1), [".gitignore", "one.log"]);
    // Immediately, while its fingerprint may equal that of the previous index.
    let kept = fs::read(&index).unwrap();
    fs::remove_file(&index).unwrap();
    sandbox.checkpoint(2);
    assert_eq!(sandbox.covered(2), [".gitignore"]);
    let elsewhere = sandbox.outside("index");
    fs::write(&elsewhere, kept).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &index).unwrap();
    sandbox.checkpoint(3);
    assert_eq!(sandbox.covered(3), [".gitignore", "one.log"]);
    sandbox.git(&["add", "-f", "two.log"]);
    assert!(index.is_symlink(), "git writes what it leads to");
    sandbox.checkpoint(4);
    assert_eq!(sandbox.covered(4), [".gitignore", "one.log", "two.log"]);
    fs::remove_file(&index).unwrap();
    nix::unistd::mkfifo(&index, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let snapshot = sandbox.checkpoint(5);
    assert!(snapshot.warnings.iter().any(|text| text.contains("the index cannot be read")), "{:?}", snapshot.warnings);
    fs::remove_file(&index).unwrap();
    assert_eq!(sandbox.checkpoint(6).warnings, [] as [&str; 0]);
}
