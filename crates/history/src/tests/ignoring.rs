//! The ignore rules are git's: for random trees and rules, a snapshot covers exactly the files that git lists.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Names of files and directories; few, so that patterns match them.
const NAMES: [&str; 16] = [
    "a",
    "b",
    "ab",
    "abc",
    "a.o",
    "b.txt",
    "lib",
    "build",
    "foo bar",
    "tail ",
    "#hash",
    "!bang",
    "x[1]",
    "back\\slash",
    "B",
    "star*",
];

/// Lines of ignore files: cases of the manual and common mistakes.
fn pattern() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        8 => proptest::sample::select(NAMES.to_vec()).prop_map(str::to_owned),
        4 => proptest::sample::select(vec![
            "*", "?", "a*", "*.o", "*b", "a?", "[ab]", "[!a]", "[^a]", "[a-c]", "*.t?t", "b*d", "[[:alpha:]]", "[]a]",
            "a[", "\\a", "\\*", "x\\[1\\]", "star\\*", "back\\\\slash", "foo\\ bar", "[a-]", "a\\", "**", "a**", "**b",
            "[A-Z]", "[\\]]", "***", "[!]a]", "",
        ]).prop_map(str::to_owned),
    ];
    let joint = proptest::sample::select(vec!["/", "/**/", "/*/", "//"]);
    let body = (vec(piece, 1..4), joint).prop_map(|(pieces, joint)| pieces.join(joint));
    let front =
        proptest::sample::select(vec!["", "", "", "", "!", "!", "/", "!/", "**/", "\\!", "\\#", "#", "./", " "]);
    let back =
        proptest::sample::select(vec!["", "", "", "", "/", "/", "/**", " ", "\\ ", "  ", "/*", "\t", "\\  ", "\r"]);
    (front, body, back).prop_map(|(front, body, back)| format!("{front}{body}{back}"))
}

/// One step in the creation of a tree.
#[derive(Debug, Clone)]
enum Made {
    File(Vec<&'static str>),
    Link(Vec<&'static str>),
    Rules(Vec<&'static str>, Vec<String>),
}

fn steps() -> impl Strategy<Value = (Vec<Made>, Vec<String>)> {
    let path = || vec(proptest::sample::select(NAMES.to_vec()), 1..5);
    let dir = || vec(proptest::sample::select(NAMES.to_vec()), 0..3);
    let step = prop_oneof![
        10 => path().prop_map(Made::File),
        1 => path().prop_map(Made::Link),
        5 => (dir(), vec(pattern(), 1..5)).prop_map(|(dir, lines)| Made::Rules(dir, lines)),
    ];
    (vec(step, 1..40), vec(pattern(), 0..4))
}

/// Applies a step unless it is impossible, such as a directory where a file exists.
fn make(sandbox: &Sandbox, steps: &[Made]) {
    let top = sandbox.path();
    for step in steps {
        match step {
            Made::File(path) | Made::Link(path) => {
                let path = top.join(path.join("/"));
                let parent = path.parent().expect("it is below the workspace");
                if fs::create_dir_all(parent).is_err() || path.symlink_metadata().is_ok() {
                    continue;
                }
                match step {
                    Made::Link(_) => std::os::unix::fs::symlink("nowhere", &path).expect("link"),
                    _ => fs::write(&path, "x").expect("write"),
                }
            }
            Made::Rules(dir, lines) => {
                let dir = top.join(dir.join("/"));
                if fs::create_dir_all(&dir).is_ok() {
                    fs::write(dir.join(".gitignore"), lines.join("\n")).expect("write");
                }
            }
        }
    }
}

/// The files that git lists: tracked ones, and untracked ones that no rule ignores.
fn listed(sandbox: &Sandbox) -> BTreeSet<Vec<u8>> {
    let text = sandbox.git(&["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let names = text.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    // A tracked path may have been removed from the disk.
    let there = |name: &&[u8]| sandbox.path().join(Path::new(OsStr::from_bytes(name))).symlink_metadata().is_ok();
    names.filter(there).map(<[u8]>::to_vec).collect()
}

/// The paths that a snapshot covers, without directories.
fn covered(sandbox: &Sandbox, number: u64) -> BTreeSet<Vec<u8>> {
    sandbox.checkpoint(number);
    let listing = sandbox.history.listing_of(number).expect("listing");
    let files = listing.items.iter().filter(|(_, item)| item.content != crate::tree::listing::ItemContent::Directory);
    files.map(|(path, _)| path.bytes().to_vec()).collect()
}

fn shown(names: &BTreeSet<Vec<u8>>) -> Vec<String> {
    names.iter().map(|name| name.escape_ascii().to_string()).collect()
}

proptest! {
    #![proptest_config(fermata_test_seeds::cases(256))]

    #[test]
    fn a_snapshot_covers_what_git_would_list((steps, exclude) in steps(), tracked in vec(any::<bool>(), 0..8)) {
        let sandbox = Sandbox::new();
        sandbox.git(&["init", "-q"]);
        make(&sandbox, &steps);
        sandbox.write(".git/info/exclude", exclude.join("\n"));
        // Some files are tracked although a rule may ignore them.
        let all = walk(&sandbox.path());
        let files = all.iter().filter(|path| !path.is_dir() || path.is_symlink()).filter(|path| !path.starts_with(sandbox.at(".git")));
        let names = files.zip(tracked).filter(|(_, tracked)| *tracked).map(|(path, _)| {
            let name = path.strip_prefix(sandbox.path()).expect("it is below the workspace");
            name.to_str().expect("the names are UTF-8")
        });
        let add: Vec<&str> = ["--literal-pathspecs", "add", "-f", "--"].into_iter().chain(names).collect();
        sandbox.git(&add);
        prop_assert_eq!(shown(&covered(&sandbox, 1)), shown(&listed(&sandbox)));
    }
}
